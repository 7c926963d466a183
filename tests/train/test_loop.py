"""What fit() notices about itself: steps compiled again, idle devices, traces of chosen steps."""

import gzip
import json
import time
from contextlib import closing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax.common import UserError
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.train.loop import Evaluation, LoopState, fit
from nanochat_jax.train.metrics import Console, MetricsLog, read_metrics
from nanochat_jax.train.state import TrainState
from nanochat_jax.train.watch import Watch, parse_steps

STEPS = 6
MESH = make_mesh(devices=jax.devices()[:1])
EVERYWHERE = NamedSharding(MESH, PartitionSpec())


def tiny_step():
    """A step of one number, as XLA sees it; `scale` is what the Python around it brings along."""

    @jax.jit
    def tiny(state, batch, scale):
        params = {"w": state.params["w"] + scale * jnp.mean(batch["inputs"])}
        values = {"loss": params["w"], "grad_norm": scale + 0.0, "update_norm": scale + 0.0}
        return state._replace(step=state.step + 1, params=params), values | {"finite": True}

    return tiny


class Stage:
    """Six steps of whatever next_batch makes."""

    num_steps, save_every, on_policy = STEPS, 2, False

    def __init__(self, next_batch, evaluations):
        self.make, self.evaluations = next_batch or batch_of, list(evaluations)
        self.batches, self.lr_multiplier = SimpleNamespace(get_state=dict), lambda step: 1.0

    def next_batch(self, params):
        return self.make()


@pytest.fixture
def run(tmp_path):
    """fit() over a step of one number: (lines of metrics.jsonl, loop state)."""

    def run(train_step=None, next_batch=None, evaluations=(), profile="", save=int, start=0, **own):
        tiny, one = tiny_step(), jnp.float32(1)
        console = Console(STEPS, start, 1.0, None)
        metrics = MetricsLog(tmp_path / "metrics.jsonl", start, "none", "run", is_main=True)
        steps, folder = parse_steps(profile), tmp_path / "profile"
        watch = Watch(steps, folder, range(start, STEPS), console.line)
        params, loop_state = {"w": jnp.float32(0)}, LoopState()
        stage = Stage(next_batch, evaluations)
        vars(stage).update(own)
        with closing(metrics), closing(console):
            fit(
                stage,
                jax.device_put(TrainState(jnp.int32(start), params, {}, {}), EVERYWHERE),
                loop_state,
                train_step or (lambda state, batch: tiny(state, batch, one)),
                SimpleNamespace(mesh=MESH, by_path=lambda p: p, to_paths=lambda s: s),
                SimpleNamespace(save=lambda *_: save(), wait=int, directory=""),
                metrics,
                console,
                watch,
            )
        return read_metrics(tmp_path / "metrics.jsonl"), loop_state

    return run


def batch_of(width=4, **more):
    ids = {"inputs": np.ones((2, width), np.float32), "targets": np.zeros((2, width), np.int32)}
    return ids | {"doc_ids": [[]], "epoch": 0, **more}


def compile_something():
    """A program nobody has compiled before."""
    salt = float(time.perf_counter())
    return float(jax.jit(lambda x: x * salt)(jnp.float32(1)))


def test_a_step_compiled_again_is_told(run, capsys):
    """A weak type slips in at step 3: the same shapes, another program."""
    tiny, seen = tiny_step(), []

    def train_step(state, batch):
        seen.append(1)
        return tiny(state, batch, 1.0 if len(seen) >= 4 else jnp.float32(1))

    run(train_step)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "step 00004" in line and "jit(tiny)" in line


def test_what_is_meant_to_compile_is_not(run, capsys):
    """Evaluations, saves, sampling, another thread, and the first batch of another width."""
    widths = iter([4, 4, 8, 4, 8, 4])

    def next_batch():
        compile_something()
        return batch_of(width=next(widths))

    evaluation = Evaluation("loss", 2, lambda params: {"loss": compile_something()})
    run(next_batch=next_batch, evaluations=[evaluation], save=compile_something)
    compile_something()  # nobody listens any more
    assert "warning" not in capsys.readouterr().out


def test_waiting_for_batches_is_measured(run, capsys):
    numbers = iter(range(STEPS))

    def next_batch():
        time.sleep(0.1 if next(numbers) % 2 else 0)
        return batch_of()

    lines, loop_state = run(next_batch=next_batch)
    waits = [line["wait_secs"] for line in lines]
    assert min(waits[1::2]) > 0.09 and max(waits[::2]) < 0.09
    assert loop_state.wait_secs == pytest.approx(sum(waits))
    assert sum(waits) <= loop_state.elapsed_secs == lines[-1]["elapsed_secs"]
    assert f"{sum(waits) / loop_state.elapsed_secs:.1%}" in capsys.readouterr().out


def test_no_wait_where_batches_are_made_with_the_weights(run):
    lines, loop_state = run(next_batch=lambda: batch_of(metrics={"reward": 1.0}), on_policy=True)
    assert not any("wait_secs" in line for line in lines) and loop_state.wait_secs == 0


def traced(folder):
    """Numbers of the steps in the newest trace."""
    (file,) = folder.rglob("perfetto_trace.json.gz")
    (xplane,) = folder.rglob("*.xplane.pb")
    assert xplane.stat().st_size > 0
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [int(e["args"]["step_num"]) for e in events if e.get("name") == "train_step"]


def test_a_trace_holds_the_steps_asked_for(run, tmp_path, capsys):
    run(profile="2:3")
    assert traced(tmp_path / "profile") == [2, 3]
    assert f"profile: open {tmp_path}" in capsys.readouterr().out


def test_a_run_that_ends_among_the_steps_keeps_both(run, tmp_path):
    numbers = iter(range(STEPS))

    def next_batch():
        if next(numbers) == 4:
            raise RuntimeError("power cut")
        return batch_of()

    with pytest.raises(RuntimeError, match="power cut"):
        run(next_batch=next_batch, profile="2:5")
    assert set(traced(tmp_path / "profile")) >= {2, 3}
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    jax.profiler.start_trace(tmp_path / "next")  # nothing is left open
    jax.profiler.stop_trace()


def test_steps_by_name():
    assert parse_steps("20:22") == range(20, 23) and not parse_steps("")
    for text in ("20", "24:20", "a:b", "1:", ":", "-1:3", "1:2:3", " 1:2"):
        with pytest.raises(UserError, match="config.run.profile"):
            parse_steps(text)

"""fit(): the loop of every stage that trains.

  while steps are left:
    if asked to stop: save, return
    once in a while: save, then evaluate    (in this order: a crash in an evaluation loses nothing)
    batch -> train_step                     (dispatched; the device works while the host goes on)
    report the step before                  (its numbers have arrived by now: the loop never waits)

LoopState, the model state and the loader's state go into each checkpoint. A resumed run repeats the
uninterrupted one to the last bit.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from nanochat_jax.common import UserError
from nanochat_jax.train.checkpoint import Checkpoints, list_steps, step_dir
from nanochat_jax.train.memory import in_the_step
from nanochat_jax.train.metrics import Console, MetricsLog, format_secs
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState
from nanochat_jax.train.step import put_batch
from nanochat_jax.train.watch import STEP, Watch

EMA_DECAY = 0.9


class Evaluation(NamedTuple):
    """`run(params)` returns what goes into metrics.jsonl."""

    name: str
    every_steps: int  # and after the last step; 0: only then
    run: Callable[[dict[str, jax.Array]], dict[str, Any]]
    at_start: bool = False  # before the first step too


class Trainee:
    """What fit() asks of a stage."""

    num_steps: int
    save_every: int
    lr_multiplier: Callable[[int], Any]
    batches: Any  # next() gives a batch; get_state() what a checkpoint keeps to go on from there
    evaluations: list[Evaluation]
    on_policy = False  # batches are made with the current parameters, on the devices

    def next_batch(self, params: dict[str, jax.Array]) -> dict[str, Any]:
        """inputs, targets, doc_ids, epoch and perhaps metrics, numbers to be logged. params: the
        current ones by path if on_policy, else {}."""
        return next(self.batches)


@dataclass
class LoopState:
    """The host's share of a checkpoint."""

    loss_ema: float = 0.0  # of the loss, biased towards 0 until divided by 1 - EMA_DECAY^step
    elapsed_secs: float = 0.0  # spent in steps, all restarts together
    wait_secs: float = 0.0  # of these, with idle devices because the next batch was not there


def fit(
    stage: Trainee,
    state: TrainState,
    loop_state: LoopState,
    train_step: Callable,
    owners: Owners,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    console: Console,
    watch: Watch,
) -> tuple[int, bool]:
    """Train from state.step to stage.num_steps: (step reached, whether that is the end; if not, a
    signal stopped it and the state is saved). Raises UserError when a number is not finite,
    OutOfMemory when a step runs out of it."""
    step = start = int(state.step)
    pending = None  # the dispatched step whose numbers have not been read yet
    lap = time.perf_counter()

    def report() -> None:
        nonlocal pending, lap
        if pending is None:
            return
        done_step, values, batch, waited = pending
        pending, own = None, batch.get("metrics", {})
        with in_the_step():
            values = {name: value.item() for name, value in jax.device_get(values).items()}
        lap, secs = (now := time.perf_counter()), now - lap
        if not values.pop("finite"):
            _stop_not_finite(done_step, values, batch["doc_ids"], checkpoints)
        loop_state.loss_ema = EMA_DECAY * loop_state.loss_ema + (1 - EMA_DECAY) * values["loss"]
        loop_state.elapsed_secs += secs
        loop_state.wait_secs += waited
        ema = loop_state.loss_ema / (1 - EMA_DECAY ** (done_step + 1))
        lr = float(stage.lr_multiplier(done_step))
        values |= {**own, "loss_ema": ema, "lr_mult": lr, "epoch": batch["epoch"]}
        values |= {"step_secs": secs, "elapsed_secs": loop_state.elapsed_secs}
        values |= {} if stage.on_policy else {"wait_secs": waited}
        metrics.write("train", done_step, **values)
        shown = {"loss": ema, "lr": lr} | {k: v for k, v in own.items() if "_frac" not in k}
        tokens = batch["inputs"].size * jax.process_count()
        console.step(done_step, shown, tokens=tokens, secs=secs)

    def save() -> None:
        metrics.sync()
        host = {"step": step, "loop": asdict(loop_state)}
        checkpoints.save(owners.to_paths(state), host, stage.batches.get_state())

    def evaluate(due: list[Evaluation]) -> None:
        params = owners.by_path(state.params) if due else {}
        for evaluation in due:
            began, name = time.perf_counter(), evaluation.name
            values = evaluation.run(params)
            numbers = [f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float)]
            timing = {"eval_secs": time.perf_counter() - began}
            timing["elapsed_secs"] = loop_state.elapsed_secs
            metrics.write("eval", step, name=name, **values, **timing)
            spent = f"({timing['eval_secs']:.1f}s)"
            console.line(f"step {step:05d} {name}: {' '.join(numbers)} {spent}")
            for sample in values.get("samples", []):
                console.line(f"  {sample['prompt']!r} -> {sample['text']!r}")
            if "val_bpb" in values:
                checkpoints.record_score(step, values["val_bpb"])

    with stop_requests() as asked_to_stop, ExitStack() as at_the_end:
        at_the_end.callback(watch.close)
        at_the_end.callback(checkpoints.wait)  # a save that has begun is finished in any case
        while True:
            if watch.turns_at(step):
                report()
                watch.turn(state)
                lap = time.perf_counter()  # writing a trace is not the next step's time
            last, stop = step == stage.num_steps, asked_to_stop(step)
            due = [e for e in stage.evaluations if last or _is_due(step, e.every_steps, e.at_start)]
            if due or stop or last or _is_due(step, stage.save_every):
                report()
                if stop or step > start:  # what was resumed from is already there
                    save()
                if stop and not last:
                    return step, False
                evaluate(due)
                lap = time.perf_counter()  # evaluations and saves are not the next step's time
            if last:
                break
            with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
                asked = time.perf_counter()
                batch = stage.next_batch(owners.by_path(state.params) if stage.on_policy else {})
                with in_the_step():
                    on_device = put_batch(batch, owners.mesh)
                    # An on-policy batch was made on the devices: they have not waited for it.
                    waited = watch.idle_secs(since=asked) * (not stage.on_policy)
                    dispatched = train_step(state, on_device)
                watch.dispatched(step, batch["inputs"].shape, dispatched[1])
                report()
                state, values = dispatched
                pending = (step, values, batch, waited)
                step += 1
                if stage.on_policy:  # nothing to overlap: the next batch needs this step's result
                    report()
    if waited := loop_state.wait_secs:
        share = f"{waited / loop_state.elapsed_secs:.1%} of the time in steps"
        console.line(f"the devices waited {format_secs(waited)} for batches, {share}")
    return step, True


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """SIGTERM or Ctrl-C asks the loop to stop at the next step, a second Ctrl-C at once. Of several
    processes all stop after the same step: jax.distributed passes SIGTERM on, Ctrl-C becomes one.
    """
    asked, several = threading.Event(), jax.process_count() > 1

    def handle(signum, _frame):
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step) if several else asked.is_set()

    on_main_thread = threading.current_thread() is threading.main_thread()
    ours = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, handle) for s in ours if on_main_thread}
    try:
        yield should_stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _is_due(step: int, every_steps: int, at_start: bool = False) -> bool:
    return at_start if step == 0 else every_steps > 0 and step % every_steps == 0


def _stop_not_finite(step: int, values: dict, doc_ids: list, checkpoints: Checkpoints) -> None:
    checkpoints.wait()
    steps = list_steps(checkpoints.directory)
    good = step_dir(checkpoints.directory, steps[-1]) if steps else "none yet"
    documents = sorted({name for row in doc_ids for name in row})
    more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    got = ", ".join(f"{name} {values[name]}" for name in ("loss", "grad_norm", "update_norm"))
    raise UserError(
        f"step {step}: {got}, expected finite numbers; its batch held the documents "
        f"{', '.join(documents[:8])}{more}; the last good checkpoint is {good}; lower the learning "
        "rates or look at these documents"
    )

"""metrics.jsonl, the console line and the trackers."""

import sys
import time
import types

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.train.metrics import Console, MetricsLog, format_secs, read_metrics


def open_log(path, start_step=0, tracker="none"):
    return MetricsLog(path, start_step, tracker, "run", is_main=True)


def test_a_resumed_log_is_cut_back_to_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = open_log(path)
    for step in range(5):
        log.write("train", step, loss=1 / (step + 3))
    log.write("eval", 5, val_bpb=2.0)
    log.close()
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 5, "lo')  # torn by a kill
    log = open_log(path, start_step=3)
    log.write("train", 3, loss=0.5)
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3]
    assert read_metrics(path)[1]["loss"] == 1 / 4  # unrounded


def test_numbers_go_to_the_tracker_that_was_asked_for(tmp_path, monkeypatch):
    sent, started = [], {}
    fake = types.ModuleType("trackio")
    fake.init = lambda **kwargs: started.update(kwargs)
    fake.log = lambda values, step: sent.append((step, values))
    fake.finish = lambda: sent.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    log = open_log(tmp_path / "metrics.jsonl", tracker="trackio")
    log.write("train", 7, loss=0.5, epoch=1, note="text is not a number")
    log.close()
    assert started == {"project": "nanochat-jax", "name": "run", "resume": "allow"}
    assert sent == [(7, {"train/loss": 0.5, "train/epoch": 1}), "finished"]


def test_a_tracker_that_is_not_there_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(UserError, match=f"config.run.tracker.*{name}"):
            open_log(tmp_path / "a.jsonl", tracker=name)


def test_lines_are_means_and_thinned_where_no_terminal_is(capsys):
    console = Console(40, 0, flops_per_token=2e6, peak_flops=1e12, later_tokens=199_000 * 90)
    for step in range(40):
        console.step(step, {"loss": 5.0}, tokens=50_000, secs=0.2 + 0.1 * (step % 2))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 00001/00040") and "dt 200 ms | 250,000 tok/s" in first
    # 39 steps of 50,000 tokens in 9.8 s, and tokens for 90 s to come
    assert "dt 251 ms" in last and "mfu 39.8%" in last and "eta 0s" in last and "1m30s" in last


def test_the_eta_counts_what_happens_between_steps():
    """Two steps of no time with a pause between them: the next one will have its pause too."""
    lines, console = [], Console(3, 0, flops_per_token=1.0, peak_flops=None)
    console.line = lines.append
    console.step(0, {}, tokens=1, secs=1e-3)
    time.sleep(1.1)
    console._line_at = 0
    console.step(1, {}, tokens=1, secs=1e-3)
    assert "eta 1s" in lines[-1] and "mfu n/a" in lines[-1]


def test_one_slow_line_does_not_move_the_end_of_the_run():
    lines, console = [], Console(41, 0, 1.0, None, later_tokens=8000)
    console.line = lines.append
    for step in range(41):
        if step == 39:
            console._line_at = -float("inf")
        console.step(step, {}, tokens=100, secs=10.0 if step == 40 else 1.0)
    # 40 steps of 100 tokens behind the first one in 49 s: 8,000 tokens take 98 s
    assert "10 tok/s" in lines[-1] and lines[-1].endswith("of the run about 1m38s")


def test_durations():
    assert [format_secs(secs) for secs in (0.4, 95, 7260)] == ["0s", "1m35s", "2h01m"]

"""fit(): the loop of every stage that minimises a loss.

  while steps are left:
    if asked to stop: save, return
    once in a while: save, then evaluate    (in this order: a crash in an evaluation loses nothing)
    batch -> train_step                     (dispatched; the device works while the host goes on)
    report the step before                  (its numbers have arrived by now: the loop never waits)

Everything that must survive is in one place, LoopState, and goes into each checkpoint with the
model state and the loader's state. A resumed run repeats the uninterrupted one to the last bit.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from nanochat_jax.common import UserError
from nanochat_jax.train.checkpoint import Checkpoints, list_steps
from nanochat_jax.train.metrics import EMA_DECAY, Console, MetricsLog, Stopwatch
from nanochat_jax.train.state import TrainState


class Evaluation(NamedTuple):
    """`run(params)` returns what goes into metrics.jsonl; always run after the last step too."""

    name: str
    every_steps: int  # 0: only after the last step
    run: Callable[[dict[str, jax.Array]], dict[str, Any]]


@dataclass
class LoopState:
    """The host's share of a checkpoint."""

    loss_ema: float = 0.0  # of the loss, biased towards 0 until divided by 1 - EMA_DECAY^step
    elapsed_secs: float = 0.0  # spent in steps, all restarts together


@dataclass
class FitResult:
    finished: bool  # False: stopped by a signal, saved, to be resumed
    step: int
    state: TrainState


def fit(
    *,
    state: TrainState,
    loop_state: LoopState,
    train_step: Callable,
    batches,
    put: Callable[[dict], Any],
    num_steps: int,
    lr_multiplier: Callable[[int], Any],
    evaluations: list[Evaluation],
    save_every: int,
    checkpoints: Checkpoints,
    host_info: dict[str, Any],
    on_save: Callable[[], None],
    metrics: MetricsLog,
    console: Console,
    tokens_per_step: int,
) -> FitResult:
    """Train from state.step to num_steps; every argument is of the kind its name says.

    batches: an iterator with get_state() whose items have inputs, targets, doc_ids and epoch.
    put: host batch -> device batch. host_info: saved as it is beside each checkpoint.
    Raises UserError when a loss or gradient is not finite; the state before it stays on disk.
    """
    step = start = int(state.step)
    pending = None  # the dispatched step whose numbers have not been read yet
    watch = Stopwatch()

    def report() -> None:
        nonlocal pending
        if pending is None:
            return
        done_step, values, epoch, doc_ids = pending
        pending = None
        values = {name: value.item() for name, value in jax.device_get(values).items()}
        secs = watch.lap()
        if not values.pop("finite"):
            _stop_not_finite(done_step, values, doc_ids, checkpoints)
        loop_state.loss_ema = EMA_DECAY * loop_state.loss_ema + (1 - EMA_DECAY) * values["loss"]
        loop_state.elapsed_secs += secs
        ema = loop_state.loss_ema / (1 - EMA_DECAY ** (done_step + 1))
        lr = float(lr_multiplier(done_step))
        timing = {"step_secs": secs, "elapsed_secs": loop_state.elapsed_secs}
        metrics.write("train", done_step, **values, loss_ema=ema, lr_mult=lr, epoch=epoch, **timing)
        console.step(done_step, loss=ema, lr=lr, tokens=tokens_per_step, epoch=epoch, secs=secs)

    def save() -> None:
        metrics.sync()
        host = {"step": step, "loop": asdict(loop_state), **host_info}
        checkpoints.save(state, host, batches.get_state())
        on_save()

    with stop_requests() as asked_to_stop, finished_saves(checkpoints):
        while True:
            last, first = step == num_steps, step == 0
            due = [e for e in evaluations if last or (not first and _is_due(step, e.every_steps))]
            stop = asked_to_stop(step)
            if due or stop or (not first and _is_due(step, save_every)):
                report()
                if stop or step > start:  # what was resumed from is already there
                    save()
                if stop and not last:
                    return FitResult(False, step, state)
                for evaluation in due:
                    _evaluate(evaluation, state, step, metrics, console, checkpoints, loop_state)
                watch.lap()  # evaluations and saves are not the next step's time
            if last:
                break
            batch = next(batches)
            dispatched = train_step(state, put(batch))
            report()
            state, values = dispatched
            pending = (step, values, batch["epoch"], batch["doc_ids"])
            step += 1
    return FitResult(True, step, state)


@contextmanager
def finished_saves(checkpoints: Checkpoints) -> Iterator[None]:
    """Whatever ends the loop, a save that has begun is finished first."""
    try:
        yield
    finally:
        checkpoints.wait()


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """SIGTERM or Ctrl-C asks the loop to stop at the next step; a second Ctrl-C stops at once."""
    asked = threading.Event()

    def handle(signum, _frame):
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    def should_stop(step: int) -> bool:
        if jax.process_count() > 1:  # all processes must stop after the same step
            return multihost_utils.reached_preemption_sync_point(step)
        return asked.is_set()

    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield should_stop
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield should_stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _is_due(step: int, every_steps: int) -> bool:
    return bool(every_steps) and step % every_steps == 0


def _evaluate(
    evaluation: Evaluation,
    state: TrainState,
    step: int,
    metrics: MetricsLog,
    console: Console,
    checkpoints: Checkpoints,
    loop_state: LoopState,
) -> None:
    began = time.perf_counter()
    values = evaluation.run(state.params)
    secs = time.perf_counter() - began
    timing = {"eval_secs": secs, "elapsed_secs": loop_state.elapsed_secs}
    metrics.write("eval", step, name=evaluation.name, **values, **timing)
    numbers = [f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float)]
    console.line(f"step {step:05d} {evaluation.name}: {' '.join(numbers)} ({secs:.1f}s)")
    for sample in values.get("samples", []):
        console.line(f"  {sample['prompt']!r} -> {sample['text']!r}")
    if "val_bpb" in values:
        checkpoints.record_score(step, values["val_bpb"])


def _stop_not_finite(step: int, values: dict, doc_ids: list, checkpoints: Checkpoints) -> None:
    checkpoints.wait()
    steps = list_steps(checkpoints.directory)
    good = Path(checkpoints.directory) / f"step_{steps[-1]:06d}" if steps else "none yet"
    documents = sorted({name for row in doc_ids for name in row})
    shown = ", ".join(documents[:8]) + (
        f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    )
    raise UserError(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, update norm "
        f"{values['update_norm']}, expected finite numbers; its batch held the documents {shown}; "
        f"the last good checkpoint is {good}; lower the learning rates or look at these documents"
    )

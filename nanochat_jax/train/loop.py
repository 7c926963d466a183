"""fit(): the loop of every stage that trains.

  while steps are left:
    if asked to stop: save, return
    once in a while: save, then evaluate    (in this order: a crash in an evaluation loses nothing)
    batch -> train_step                     (dispatched; the device works while the host goes on)
    report the step before                  (its numbers have arrived by now: the loop never waits)

Between steps it watches itself: the time the devices waited for a batch is in metrics.jsonl, and a
step that is compiled again, though its batch has a shape seen before, is told at once.

Everything that must survive is in one place, LoopState, and goes into each checkpoint with the
model state and the loader's state. A resumed run repeats the uninterrupted one to the last bit.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from nanochat_jax.common import UserError
from nanochat_jax.train.checkpoint import Checkpoints, list_steps
from nanochat_jax.train.layout import in_the_step
from nanochat_jax.train.metrics import EMA_DECAY, Console, MetricsLog, Stopwatch, format_secs
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState
from nanochat_jax.train.watch import STEP, IdleTime, Trace, compilations


class Evaluation(NamedTuple):
    """`run(weights)` returns what goes into metrics.jsonl; always run after the last step too."""

    name: str
    every_steps: int  # 0: only after the last step
    run: Callable[[dict[str, jax.Array]], dict[str, Any]]
    at_start: bool = False  # before the first step too


@dataclass
class LoopState:
    """The host's share of a checkpoint."""

    loss_ema: float = 0.0  # of the loss, biased towards 0 until divided by 1 - EMA_DECAY^step
    elapsed_secs: float = 0.0  # spent in steps, all restarts together
    wait_secs: float = 0.0  # of these, with idle devices because the next batch was not there


@dataclass
class FitResult:
    finished: bool  # False: stopped by a signal, saved, to be resumed
    step: int
    state: TrainState


def fit(
    *,
    state: TrainState,
    owners: Owners,
    loop_state: LoopState,
    train_step: Callable,
    batches,
    next_batch: Callable[[Callable[[], dict[str, jax.Array]]], dict[str, Any]],
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
    trace: Trace,
) -> FitResult:
    """Train from state.step to num_steps; every argument is of the kind its name says.

    batches: has get_state(), the place in the data.
    next_batch(weights): the batch that follows, with inputs, targets, doc_ids, epoch and perhaps
    metrics, numbers to be logged; weights() gives the current weights by path (RL needs them).
    put: host batch -> device batch. host_info: saved as it is beside each checkpoint.
    Raises UserError when a loss or gradient is not finite, OutOfMemory when a step runs out of it;
    the state before it stays on disk.
    """
    step = start = int(state.step)
    pending = None  # the dispatched step whose numbers have not been read yet
    watch, processes = Stopwatch(), jax.process_count()
    idle, shapes = IdleTime(), set()  # shapes of the batches so far

    def report() -> None:
        nonlocal pending
        if pending is None:
            return
        done_step, values, batch, waited = pending
        pending = None
        with in_the_step():
            values = {name: value.item() for name, value in jax.device_get(values).items()}
        secs = watch.lap()
        if not values.pop("finite"):
            _stop_not_finite(done_step, values, batch["doc_ids"], checkpoints)
        loop_state.loss_ema = EMA_DECAY * loop_state.loss_ema + (1 - EMA_DECAY) * values["loss"]
        loop_state.elapsed_secs += secs
        ema = loop_state.loss_ema / (1 - EMA_DECAY ** (done_step + 1))
        lr = float(lr_multiplier(done_step))
        timing = {"step_secs": secs, "elapsed_secs": loop_state.elapsed_secs}
        if waited is not None:
            loop_state.wait_secs += waited
            timing["wait_secs"] = waited
        own, epoch = batch.get("metrics", {}), batch["epoch"]
        values |= {**own, "loss_ema": ema, "lr_mult": lr, "epoch": epoch}
        metrics.write("train", done_step, **values, **timing)
        shown = {"loss": ema, "lr": lr} | {k: v for k, v in own.items() if "_frac" not in k}
        console.step(done_step, shown, tokens=batch["inputs"].size * processes, secs=secs)

    def save() -> None:
        metrics.sync()
        host = {"step": step, "loop": asdict(loop_state), **host_info}
        checkpoints.save(owners.to_paths(state), host, batches.get_state())
        on_save()

    with (
        stop_requests() as asked_to_stop,
        closing(idle),
        closing(trace),
        finished_saves(checkpoints),
        compilations() as compiled,
    ):
        while True:
            if trace.turns_at(step):
                report()
                trace.turn(state)
                watch.lap()  # writing a trace is not the next step's time
            last, first = step == num_steps, step == 0
            due = [e for e in evaluations if last or _is_due(step, e.every_steps)]
            if first and not last:
                due = [e for e in evaluations if e.at_start]
            stop = asked_to_stop(step)
            if due or stop or last or (not first and _is_due(step, save_every)):
                report()
                if stop or step > start:  # what was resumed from is already there
                    save()
                if stop and not last:
                    return FitResult(False, step, state)
                weights = owners.weights(state.params) if due else {}
                for evaluation in due:
                    _evaluate(evaluation, weights, step, metrics, console, checkpoints, loop_state)
                del weights
                watch.lap()  # evaluations and saves are not the next step's time
            if last:
                break
            with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
                asked = time.perf_counter()
                batch = next_batch(partial(owners.weights, state.params))
                compiled.clear()  # evaluations, saves and sampling compile what they need
                # Made with these very parameters, on the devices: that is no waiting, and there is
                # nothing to overlap.
                on_policy = "metrics" in batch
                with in_the_step():
                    on_device = put(batch)
                    waited = None if on_policy else idle.secs(since=asked)
                    dispatched = train_step(state, on_device)
                idle.dispatched(dispatched[1])
                if compiled and batch["inputs"].shape in shapes:
                    console.line(_compiled_again(step, compiled))
                shapes.add(batch["inputs"].shape)
                report()
                state, values = dispatched
                pending = (step, values, batch, waited)
                step += 1
                if on_policy:
                    report()
    if loop_state.wait_secs:
        console.line(
            f"the devices waited {format_secs(loop_state.wait_secs)} for batches, "
            f"{loop_state.wait_secs / loop_state.elapsed_secs:.1%} of the time in steps"
        )
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
    """SIGTERM or Ctrl-C asks the loop to stop at the next step; a second Ctrl-C stops at once.

    Of several processes any one may be asked, and all stop after the same step: jax.distributed
    waits for SIGTERM and passes it on, and Ctrl-C becomes a SIGTERM.
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

    if threading.current_thread() is not threading.main_thread():
        yield should_stop
        return
    ours = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, handle) for s in ours}
    try:
        yield should_stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _compiled_again(step: int, compiled: list[tuple[str, float]]) -> str:
    names = ", ".join(dict.fromkeys(name for name, _ in compiled))
    return (
        f"warning: step {step + 1:05d} compiled {names} again, {sum(s for _, s in compiled):.1f}s, "
        "though its batch has a shape seen before: a shape, type or Python value that the step "
        "depends on has changed; JAX_EXPLAIN_CACHE_MISSES=1 says which"
    )


def _is_due(step: int, every_steps: int) -> bool:
    return bool(every_steps) and step % every_steps == 0


def _evaluate(
    evaluation: Evaluation,
    weights: dict[str, jax.Array],
    step: int,
    metrics: MetricsLog,
    console: Console,
    checkpoints: Checkpoints,
    loop_state: LoopState,
) -> None:
    began = time.perf_counter()
    values = evaluation.run(weights)
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

"""Traces of chosen steps, and what slows a run down: programs compiled again, idle devices."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from nanochat_jax.common import UserError

COMPILED = "/jax/core/compile/backend_compile_duration"  # one event of jax.monitoring a program
STEP = "train_step"  # name of a step in a trace


def parse_steps(text: str) -> range:
    """The steps of config.run.profile: "20:24" is 20 to 24, both included; "" is none."""
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise UserError(f"config.run.profile got {text!r}, expected first:last, like 20:24, or ''")
    return range(int(first), int(last) + 1)


class Watch:
    """Watches the steps of a loop, which calls turn() before some, and idle_secs() and
    dispatched() in each.

    profile: steps to trace into `folder`, from 0; coming: the steps that will run. say: prints.
    """

    def __init__(self, profile: range, folder: Path, coming: range, say: Callable[[str], None]):
        several = jax.process_count() > 1  # on one machine their files would bear the same name
        self.folder = folder / f"process_{jax.process_index()}" if several else folder
        self.say, self._is_tracing = say, False
        self.traced = range(max(profile.start, coming.start), min(profile.stop, coming.stop))
        if len(self.traced) < len(profile):
            spans = ", ".join(f"{r.start}:{r.stop - 1}" for r in (profile, coming))
            say(f"profile: steps asked for and to come: {spans}; traces {len(self.traced)} of them")
        self._end: Future[float] | None = None  # of the step dispatched last, on the clock
        self._waiter = ThreadPoolExecutor(1, "watch_steps")
        self._shapes: set[tuple[int, ...]] = set()  # of the batches so far
        self._compiled: dict[str, float] = {}  # seconds by function, in this thread
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def turns_at(self, step: int) -> bool:
        """Whether a trace begins or ends before this step."""
        return len(self.traced) > 0 and step in (self.traced.start, self.traced.stop)

    def turn(self, state: Any) -> None:
        """Begin or end the trace, once the devices have finished what came before."""
        jax.block_until_ready(state)
        if self._is_tracing:
            return self._end_trace()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python would crowd out what matters
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
        self._is_tracing = True

    def idle_secs(self, since: float) -> float:
        """How long the devices have had nothing to do, from `since` on."""
        self._compiled.clear()  # programs of evaluations, saves and sampling are not the step's
        if self._end and not self._end.done():
            return 0.0
        return time.perf_counter() - (max(since, self._end.result()) if self._end else since)

    def dispatched(self, step: int, shape: tuple[int, ...], results: Any) -> None:
        """Note that a step was dispatched; warn if it was compiled again for a known shape."""
        if self._compiled and shape in self._shapes:
            names, secs = ", ".join(self._compiled), sum(self._compiled.values())
            self.say(
                f"warning: step {step + 1:05d} compiled {names} again, {secs:.1f}s, though its "
                "batch has a shape seen before; JAX_EXPLAIN_CACHE_MISSES=1 says what has changed"
            )
        self._shapes.add(shape)
        self._end = self._waiter.submit(_end_of, results)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)
        self._waiter.shutdown(wait=False)  # a step may hang when another process is gone
        if self._is_tracing:
            self._end_trace()

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED and threading.get_ident() == self._thread:
            name = str(kwargs.get("fun_name", "a function"))
            self._compiled[name] = self._compiled.get(name, 0.0) + duration_secs

    def _end_trace(self) -> None:
        self._is_tracing = False
        jax.profiler.stop_trace()
        file = max(self.folder.rglob("perfetto_trace.json.gz"), key=os.path.getmtime)
        self.say(f"profile: open {file} in ui.perfetto.dev")
        self.say(f"profile: or look at it with pip install xprof; xprof --logdir={self.folder}")


def _end_of(results: Any) -> float:
    jax.block_until_ready(results)
    return time.perf_counter()

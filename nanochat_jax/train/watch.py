"""What the time of a step goes into: traces of chosen steps, programs compiled anew, idle devices.

  Trace         steps first..last in the form of XLA's profiler, whole ones: the devices are waited
                for at both ends
  compilations  what XLA compiles in this thread; between steps of a batch that was seen before
                that is a mistake which costs as much as the first one
  IdleTime      from the end of a step on the devices to the next one's start

None of them changes what is computed, so a run may be continued with and without them.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise UserError(
            f"config.run.profile got {text!r}, expected first:last, like 20:24, or nothing"
        )
    return range(int(first), int(last) + 1)


class Trace:
    """A trace of some steps, counted from 0 as in metrics.jsonl; one for each process.

    steps: those asked for. coming: those that will run; says so if others were asked for too.
    say: prints a line. What is traced so far is written when the run ends among these steps.
    """

    def __init__(self, steps: range, folder: Path, coming: range, say: Callable[[str], None]):
        self.say, self._is_on = say, False
        several = jax.process_count() > 1  # on one machine their files would bear the same name
        self.folder = folder / f"process_{jax.process_index()}" if several else folder
        self.steps = range(max(steps.start, coming.start), min(steps.stop, coming.stop))
        if len(self.steps) < len(steps):
            say(
                f"profile: asked for {_span(steps)}, this run has {_span(coming)}: "
                f"traces {_span(self.steps)}"
            )

    def turns_at(self, step: int) -> bool:
        """Whether the trace begins or ends before this step."""
        return len(self.steps) > 0 and step in (self.steps.start, self.steps.stop)

    def turn(self, state: Any) -> None:
        jax.block_until_ready(state)
        if self._is_on:
            self.close()
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python would crowd out what matters
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
        self._is_on = True

    def close(self) -> None:
        if not self._is_on:
            return
        self._is_on = False
        jax.profiler.stop_trace()
        file = max(self.folder.rglob("perfetto_trace.json.gz"), key=os.path.getmtime)
        self.say(f"profile: open {file} in ui.perfetto.dev")
        self.say(f"profile: or look at it with pip install xprof; xprof --logdir={self.folder}")


def _span(steps: range) -> str:
    return f"steps {steps[0]} to {steps[-1]}" if steps else "no step"


@contextmanager
def compilations() -> Iterator[list[tuple[str, float]]]:
    """A list that grows by (function, seconds) with each program this thread compiles meanwhile."""
    compiled: list[tuple[str, float]] = []
    thread = threading.get_ident()

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED and threading.get_ident() == thread:
            compiled.append((str(kwargs.get("fun_name", "a function")), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


class IdleTime:
    """How long the devices had nothing to do because the host was not ready."""

    def __init__(self):
        self._watcher = ThreadPoolExecutor(1, "watch_steps")
        self._end: Future[float] | None = None  # of the step dispatched last, on the clock

    def dispatched(self, results: Any) -> None:
        self._end = self._watcher.submit(_end_of, results)

    def secs(self, since: float) -> float:
        """Up to now, and from `since` or the end of the last step, whichever was later."""
        if self._end is None:
            return time.perf_counter() - since
        if not self._end.done():
            return 0.0
        return time.perf_counter() - max(since, self._end.result())

    def close(self) -> None:
        self._watcher.shutdown(wait=False)  # a step may hang when another process is gone


def _end_of(results: Any) -> float:
    jax.block_until_ready(results)
    return time.perf_counter()

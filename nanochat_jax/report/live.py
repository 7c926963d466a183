"""A run that one can watch: its report while it goes on, the list of all runs, several compared.

Pages are made from what the runs have written, when somebody asks for them, and nothing is kept on
disk. A run's page fetches itself again every few seconds (templates/live.js); what it shows is made
again only when its files have changed, and never so often that it would take more than a twentieth
of a core. ROUTES are mounted by scripts/report.py --serve and by the chat server.
"""

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from nanochat_jax.common import base_dir, run_dir
from nanochat_jax.report import plots
from nanochat_jax.report.page import TEMPLATES, render, report_facts, shown
from nanochat_jax.report.read import TRAINED, Stage, begun, files, read_stage
from nanochat_jax.train.metrics import format_secs

REFRESH_SECS, IDLE_REFRESH_SECS = 3, 20  # while a run trains, and otherwise
SHARE = 1 / 20  # of a core, for making one thing again and again
MOST_KEPT = 100  # stages, and their charts
TAIL_BYTES = 256_000  # of metrics.jsonl, some hundred lines: what is going on now
# Without news for three times its longest step or evaluation, and this long, a run has stopped.
PATIENCE_SECS, FIRST_STEP_SECS = 120, 900
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}


class Kept:
    """Things by name, made again when what they are made from has changed, but not all the time."""

    def __init__(self):
        self._made: dict[Any, tuple[Any, float, Any]] = {}
        self._lock = threading.Lock()  # drawing is not thread-safe; two readers want the same

    def get(self, name: Any, source: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            made_from, until, value = self._made.get(name, (None, 0.0, None))
            if made_from != source and until < time.monotonic():
                began = time.thread_time()
                value = make()
                until = time.monotonic() + (time.thread_time() - began) / SHARE
                self._made[name] = source, until, value
                if len(self._made) > MOST_KEPT:
                    del self._made[next(iter(self._made))]
            return value


STAGES, CHARTS = Kept(), Kept()


def run_names() -> list[str]:
    """The runs of $NANOCHAT_BASE_DIR that a page can name."""
    folders = (base_dir() / "runs").glob("*")
    return sorted(path.name for path in folders if path.is_dir() and path.name.isprintable())


def kept_stage(run: str, name: str) -> Stage:
    folder = run_dir(run)
    at = [path.stat() if path.exists() else None for path in files(folder, name).values()]
    source = [found and (found.st_mtime_ns, found.st_size) for found in at]
    return STAGES.get((folder, name), source, lambda: read_stage(folder, name))


def kept_charts(run: str, stage: Stage) -> list[tuple[str, str, str]]:
    def make():
        return list(plots.charts(stage, plots.draw))

    return CHARTS.get((run_dir(run), stage.name), stage, make)


def kept_comparison(runs: list[str], name: str) -> list[tuple[str, str, str]]:
    stages = [kept_stage(run, name) for run in runs]

    def make():
        return list(plots.compared(stages, plots.draw))

    return CHARTS.get((base_dir(), name, tuple(runs)), stages, make)


def now(run: str) -> tuple[dict[str, Any] | None, list[str]]:
    """(what a run is doing, None if it has not begun; files that are damaged)."""
    folder = run_dir(run)
    if not (names := begun(folder)):
        return None, []
    stage = read_stage(folder, names[-1], TAIL_BYTES)
    facts, at = stage.facts, files(folder, stage.name)
    written = max(at[file].stat().st_mtime for file in ("info", "metrics") if at[file].exists())
    age = max(0.0, time.time() - written)
    lasted = [secs for key in ("step_secs", "eval_secs") for _, secs in stage.curves.get(key, [])]
    patience = max(PATIENCE_SECS, 3 * max(lasted)) if lasted else FIRST_STEP_SECS
    end = "tokenizer.json" if stage.name == "tokenizer" else "result.json"
    is_finished, steps = (folder / stage.name / end).exists(), facts["steps_done"]
    state = "finished" if is_finished else "training" if age < patience else "stopped"
    num_steps, left, whole = (facts.get(k) for k in ("num_steps", "secs_left", "run_secs_left"))
    if state != "training":
        left = whole = None
    figures = {
        "loss": facts.get("loss_ema"),
        "reward": facts.get("reward"),
        "bits per byte": facts.get("val_bpb"),
        "learning rate": facts.get("lr_mult") and f"{facts['lr_mult']:.0%}",
        "tokens/s": facts.get("tokens_per_sec") and f"{facts['tokens_per_sec']:,.0f}",
        "MFU": facts.get("mfu") and f"{facts['mfu']:.1%}",
        "time left": left and format_secs(left),
        "of the run, about": whole and format_secs(whole),
    }
    figures = {name: value for name, value in figures.items() if value is not None}
    doing = {"stage": stage.name, "state": state, "steps": steps, "num_steps": num_steps}
    doing |= {"done": steps / num_steps if num_steps else 0.0, "figures": figures}
    return doing | {"written": f"{format_secs(age)} ago", "at": written}, stage.problems


def page(status: int, is_training: bool, facts: dict[str, Any]) -> Response:
    secs = REFRESH_SECS if is_training else IDLE_REFRESH_SECS
    text = render("live.html", {"live": True, "refresh_secs": secs} | facts)
    return HTMLResponse(text, status, HEADERS)


def run_page(request: Request) -> Response:
    name = request.path_params["run"]
    if name not in run_names():
        problem = f"There is no run {name} in {base_dir() / 'runs'} yet."
        return page(404, True, {"name": name, "problems": [problem]})
    try:
        doing, _ = now(name)
        if doing is None:
            problem = "Nothing has been written yet."
            return page(200, True, {"name": name, "problems": [problem]})
        stages = {stage: kept_stage(name, stage) for stage in begun(run_dir(name))}
        charts = {stage: kept_charts(name, stages[stage]) for stage in reversed(stages)}
        facts = report_facts(name, stages, charts) | {"now": doing}
        facts["problems"] = [text for stage in stages.values() for text in stage.problems]
        return page(200, doing["state"] == "training", facts)
    except Exception as error:  # files that hold something else than what we write
        return page(500, False, {"name": name, "problems": [unreadable(name, error)]})


def unreadable(run: str, error: Exception) -> str:
    traceback.print_exception(error)
    return f"What run {run} has written cannot be shown: {type(error).__name__}: {shown(error)}"


def list_page(request: Request) -> Response:
    """All runs, the latest first; and the curves of those asked for with ?run=NAME&run=..."""
    names, rows, problems = run_names(), [], []
    chosen = [name for name in dict.fromkeys(request.query_params.getlist("run")) if name in names]
    if len(chosen) > len(plots.COLOURS):
        problems.append(f"Only the first {len(plots.COLOURS)} of {len(chosen)} runs are compared.")
    colours = dict(zip(chosen, plots.COLOURS, strict=False))
    for name in names:
        try:
            doing, damaged = now(name)
        except Exception as error:
            doing, damaged = None, [unreadable(name, error)]
        rows.append({"name": name, "now": doing, "colour": colours.get(name)})
        problems += damaged
    rows.sort(key=lambda row: -row["now"]["at"] if row["now"] else 0.0)
    charts = {}
    try:
        charts = {stage: kept_comparison(list(colours), stage) for stage in TRAINED}
    except Exception as error:
        problems.append(unreadable(" or ".join(colours), error))
    facts = {"rows": rows, "problems": problems, "folder": base_dir() / "runs", "name": "Runs"}
    facts["charts"] = {stage: group for stage, group in charts.items() if group}
    is_training = any(row["now"] and row["now"]["state"] == "training" for row in rows)
    return page(200, is_training, facts)


def script(_: Request) -> Response:
    text = (TEMPLATES / "live.js").read_text()
    return Response(text, media_type="text/javascript", headers=HEADERS)


ROUTES = [
    Route("/report", list_page),
    Route("/report/page/live.js", script),
    Route("/report/{run}", run_page),
]

"""The report of a run: what it was, where it ran, what came out, how long it took and what it cost.

`make_report` reads what the run left (report_read.py) and writes report/report.md with its plots
beside it, and report/report.html, one page that needs nothing else. Nothing writes to the report
while a run goes on, so it can be made at any time, of any run, as often as one likes: the same
files give the same report, to the byte. A stage that has not run says so.

To add a metric, add a line to METRICS: it then has a row in the summary where an eval/<stage>.json
has it, and a curve where the metrics of a stage have it at several steps. To add a setting, add its
key to SETTINGS.
"""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanochat_jax.common import atomic_write
from nanochat_jax.report_plots import Chart, Line
from nanochat_jax.report_read import STAGES, Run, Stage, as_dict, number, price_per_hour, read_run
from nanochat_jax.report_write import (
    Block,
    Charts,
    Details,
    Facts,
    Figures,
    Heading,
    Paragraph,
    Samples,
    Table,
    show_amount,
    show_bytes,
    show_duration,
    show_usd,
    show_value,
    to_html,
    to_markdown,
)

TITLES = {
    "base": "Base model",
    "mid": "Midtraining",
    "sft": "Finetuning (SFT)",
    "rl": "Reinforcement",
}

# key in eval/<stage>.json and in metrics.jsonl -> (name, format); val_bpb always has a row.
METRICS = {
    "val_bpb": ("val bpb", "{:.4f}"),
    "core": ("CORE", "{:.4f}"),
    "arc_easy": ("ARC-Easy", "{:.4f}"),
    "arc_challenge": ("ARC-Challenge", "{:.4f}"),
    "mmlu": ("MMLU", "{:.4f}"),
    "gsm8k": ("GSM8K", "{:.4f}"),
    "humaneval": ("HumanEval", "{:.4f}"),
    "spellingbee": ("SpellingBee", "{:.4f}"),
    "chatcore": ("ChatCORE", "{:.4f}"),
}

# Shown for each stage, before all of the stage's own section; the whole configuration is folded
# away below.
SETTINGS = (
    "data.name data.packing tokenizer.vocab_size model.depth model.model_dim model.num_heads "
    "model.num_kv_heads model.head_dim model.seq_len model.window_pattern model.extras "
    "model.compute_dtype optim.recipe optim.matrix_lr optim.embed_lr optim.unembed_lr "
    "optim.weight_decay optim.grad_clip mesh.data mesh.fsdp mesh.tensor run.seed"
).split()

# More numbers of the training lines to draw, where a stage has them.
TRAIN_CURVES = {"reward": "Mean reward", "grad_norm": "Gradient norm"}

CODE_SUFFIXES = {".py", ".sh", ".html"}
CHARS_PER_TOKEN = 4  # of source code, roughly, for a feeling of how much there is to read


def make_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report/report.md and report/report.html of a run; returns their paths."""
    run = read_run(run_dir)
    blocks = report_blocks(run)
    folder = Path(run_dir) / "report"
    for block in blocks:
        for chart in block.charts if isinstance(block, Charts) else ():
            atomic_write(folder / f"{chart.name}.svg", chart.svg(standalone=True))
    atomic_write(folder / "report.md", to_markdown(blocks))
    atomic_write(folder / "report.html", to_html(blocks, f"{run.name}: nanochat-jax report"))
    return folder / "report.md", folder / "report.html"


def report_blocks(run: Run) -> list[Block]:
    blocks: list[Block] = [
        Heading(1, f"Run {run.name}"),
        Paragraph("What nanochat-jax trained, where, how well and at what cost."),
        Figures(_key_figures(run)),
        *(Paragraph(note, is_note=True) for note in run.all_notes),
        Heading(2, "Summary"),
        *_summary(run),
        Heading(2, "Machine and code"),
        Facts(_header(run), is_long=True),
        Heading(2, "Tokenizer"),
        *_tokenizer(run),
    ]
    for name in STAGES:
        blocks += [Heading(2, TITLES[name]), *_stage(run.stages[name])]
    for name, values in run.other_results.items():
        blocks += [Heading(2, f"Evaluation {name}"), Facts(_scalars(values))]
        blocks.append(Details("All values", values))
    return blocks


def _key_figures(run: Run) -> list[tuple[str, str, str]]:
    base = run.stages["base"]
    figures = []
    val_bpb, best = base.metric("val_bpb"), _best_val_bpb(base)
    if val_bpb is not None:
        lowest = f", lowest {best[1]:.4f}" if best and best[1] < val_bpb else ""
        figures.append(("val bpb", f"{val_bpb:.4f}", f"of the base model{lowest}"))
    trigram = number(base.results.get("trigram_val_bpb"))
    if trigram:
        than = "the yardstick"
        if val_bpb:
            change = val_bpb / trigram - 1
            than += f"; ours is {abs(change):.0%} {'lower' if change < 0 else 'higher'}"
        figures.append(("trigram", f"{trigram:.4f}", than))
    core = base.metric("core")
    if core is not None:
        figures.append(("CORE", f"{core:.4f}", "of the base model"))
    parameters = sum(_parameters(base).values())
    if parameters:
        figures.append(("parameters", show_amount(parameters), f"{int(parameters):,}"))
    figures.append(("wall-clock", show_duration(run.wall_secs), "all stages and evaluations"))
    figures.append(("cost", show_usd(run.cost_usd), _price(as_dict(run.info.get("hardware")))))
    return figures


def _summary(run: Run) -> list[Block]:
    rows = []
    for key, (name, form) in METRICS.items():
        values = [run.stages[stage].metric(key) for stage in STAGES]
        if key == "val_bpb" or any(value is not None for value in values):
            rows.append([name, *("-" if v is None else form.format(v) for v in values)])
    clocks = [show_duration(s.wall_secs) if s.has_run else "-" for s in run.stages.values()]
    total = (
        f"Total wall-clock time: {show_duration(run.wall_secs)}. Cost: {show_usd(run.cost_usd)}."
    )
    header = ["Metric", *(name.upper() for name in STAGES)]
    return [Table(header, [*rows, ["training time", *clocks]]), Paragraph(total)]


def _header(run: Run) -> list[tuple[str, str]]:
    info, git = run.info, as_dict(run.info.get("git"))
    hardware = as_dict(info.get("hardware"))
    rows = []
    if git.get("commit"):
        changed = number(git.get("diff_lines"))
        state = f"modified, {int(changed or 0):,} lines differ" if git.get("dirty") else "clean"
        rows.append(("Git", f"{str(git['commit'])[:12]} ({state})"))
    else:
        rows.append(("Git", "not recorded"))
    if info.get("command"):
        rows.append(("Command", show_value(info["command"])))
    started = number(info.get("started_unix_secs"))
    if started is not None and 0 <= started < 1e11:
        rows.append(("Started", f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M:%S} UTC"))
    if hardware:
        devices = f"{hardware.get('num_devices', 1)} x {hardware.get('device_kind', 'unknown')}"
        device_memory = number(hardware.get("device_memory_bytes"))
        rows.append(
            ("Devices", devices + (f", {show_bytes(device_memory)} each" if device_memory else ""))
        )
        if hardware.get("driver"):
            rows.append(("Driver", show_value(hardware["driver"])))
        rows.append(("CPU", f"{hardware.get('cpu_model')}, {hardware.get('cpu_cores')} cores"))
        memory = number(hardware.get("memory_bytes"))
        rows.append(("Memory", show_bytes(memory) if memory else "unknown"))
        rows.append(("System", f"{hardware.get('os')}, Python {hardware.get('python')}"))
        versions = as_dict(hardware.get("versions"))
        rows.append(("Packages", ", ".join(f"{k} {v}" for k, v in versions.items() if v)))
        rows.append(("Cost per hour", _price(hardware)))
    else:
        rows.append(("Hardware", "not recorded"))
    code = code_size(Path(__file__).parents[1])
    rows.append(
        (
            "Code",
            f"{code['lines']:,} lines in {code['files']:,} files, {code['chars']:,} characters, "
            f"about {show_amount(code['chars'] / CHARS_PER_TOKEN)} tokens; without tests",
        )
    )
    return rows


def code_size(root: Path) -> dict[str, int]:
    """Lines, files and characters of the package and, in a checkout, of what runs it."""
    files = [p for part in ("nanochat_jax", "scripts", "configs") for p in (root / part).rglob("*")]
    texts = [
        path.read_text(errors="replace")
        for path in [*files, root / "speedrun.sh"]
        if path.is_file() and path.suffix in CODE_SUFFIXES
    ]
    return {
        "lines": sum(text.count("\n") for text in texts),
        "files": len(texts),
        "chars": sum(map(len, texts)),
    }


def _tokenizer(run: Run) -> list[Block]:
    if not run.tokenizer and not run.compression:
        return [Paragraph("not run")]
    blocks: list[Block] = []
    ranks, special = run.tokenizer.get("ranks"), run.tokenizer.get("special")
    if isinstance(ranks, list) and isinstance(special, dict):
        size = len(ranks) + len(special)
        blocks.append(Paragraph(f"{size:,} ids, {len(special)} of them special tokens."))
    sizes = as_dict(run.compression.get("vocab_size"))
    others = [name for name in sizes if name != "ours"]
    if run.compression:
        names = [f"{name} ({show_value(sizes[name])} ids)" for name in others]
        rows = [
            _compression_row(kind, as_dict(row), others)
            for kind, row in as_dict(run.compression.get("kinds")).items()
        ]
        blocks.append(Table(["Text", "bytes", "tokens", "bytes/token", *names], rows))
    if others:
        blocks.append(Paragraph("In brackets: how much more (+) text our tokens hold than theirs."))
    for name, reason in as_dict(run.compression.get("missing")).items():
        blocks.append(Paragraph(f"{name} could not be loaded to compare with: {reason}"))
    return blocks


def _compression_row(kind: str, row: dict[str, Any], others: list[str]) -> list[str]:
    ratios = as_dict(row.get("bytes_per_token"))
    ours = number(ratios.get("ours"))
    cells = [kind, show_value(row.get("bytes")), show_value(as_dict(row.get("tokens")).get("ours"))]
    cells.append("-" if ours is None else f"{ours:.3f}")
    for name in others:
        theirs = number(ratios.get(name))
        relative = f" ({ours / theirs - 1:+.1%})" if ours and theirs else ""
        cells.append("-" if theirs is None else f"{theirs:.3f}{relative}")
    return cells


def _stage(stage: Stage) -> list[Block]:
    if not stage.has_run:
        return [Paragraph("not run")]
    blocks: list[Block] = [Facts(_outcomes(stage))]
    charts = _charts(stage)
    if charts:
        blocks.append(Charts(charts))
    pairs, step = stage.samples()
    if pairs:
        blocks.append(Heading(3, "Samples" + (f" at step {step:,}" if step is not None else "")))
        blocks.append(Samples(pairs))
    parameters = _parameters(stage)
    if parameters:
        total = sum(parameters.values())
        blocks.append(Heading(3, "Parameters"))
        shares = [[k, f"{int(n):,}", f"{n / total:.1%}"] for k, n in parameters.items()]
        blocks.append(
            Table(["Group", "parameters", "share"], [*shares, ["all", f"{int(total):,}", "100.0%"]])
        )
    settings = _settings(stage)
    if settings:
        blocks += [Heading(3, "Settings"), Facts(settings)]
        blocks.append(Details("Whole configuration", stage.config))
    return blocks


def _outcomes(stage: Stage) -> list[tuple[str, str]]:
    done, planned = stage.steps_done, stage.num_steps
    of = f" of {planned:,}" if planned else ""
    state = "complete" if planned and done >= planned else "not complete" if planned else "trained"
    rows = [("Steps", f"{done:,}{of} ({state})")] if stage.train else []
    if stage.tokens_per_step and done:
        rows.append(("Tokens", show_amount(done * stage.tokens_per_step)))
    if stage.train:
        last = stage.train[-1]
        for key, name in (
            ("loss_ema", "Final loss (moving average)"),
            ("loss", "Loss of the last step"),
        ):
            if number(last.get(key)) is not None:
                rows.append((name, f"{last[key]:.4f}"))
    best = _best_val_bpb(stage)
    if best:
        at = f" (step {best[0]:,})" if best[0] is not None else ""
        rows.append(("Lowest val bpb", f"{best[1]:.4f}{at}"))
    for key, name in (
        ("val_bpb", "Final val bpb"),
        ("train_bpb", "Final train bpb"),
        ("trigram_val_bpb", "val bpb of a token trigram"),
        ("byte_trigram_val_bpb", "val bpb of a byte trigram"),
    ):
        value = stage.metric(key)
        if value is not None:
            rows.append((name, f"{value:.4f}"))
    for key, (name, form) in METRICS.items():
        value = stage.metric(key)
        if value is not None and key != "val_bpb":
            rows.append((name, form.format(value)))
    if stage.tokens_per_sec and stage.step_secs:
        rows.append(("Tokens per second", f"{stage.tokens_per_sec:,.0f} (median)"))
        rows.append(("Step time", f"{stage.step_secs * 1000:,.0f} ms (median)"))
        mfu, source = stage.mfu
        rows.append(("MFU", "n/a" if mfu is None else f"{mfu:.1%}"))
        rows.append(("MFU against", source))
        first = number(stage.train[0].get("step_secs"))
        if first and stage.train[0]["step"] == 0:
            rows.append(("First step", show_duration(first)))
    rows.append(("Wall-clock", show_duration(stage.wall_secs)))
    if stage.eval_secs:
        rows.append(("Evaluation", show_duration(stage.eval_secs)))
    restarts = number(stage.info.get("restarts"))
    if restarts is not None:
        rows.append(("Restarts", f"{int(restarts)}"))
    return rows


def _charts(stage: Stage) -> list[Chart]:
    def trained(key: str) -> list[tuple[float, float]]:
        values = ((line["step"], number(line.get(key))) for line in stage.train)
        return [(step, value) for step, value in values if value is not None]

    charts = []
    if len(trained("loss")) > 1:
        lines = [
            Line("each step", trained("loss"), "raw"),
            Line("moving average", trained("loss_ema")),
        ]
        charts.append(
            Chart(f"{stage.name}_loss", "Training loss (nats per token)", lines, clip_start=True)
        )
    for key, (name, _) in METRICS.items():
        curve = stage.curve(key)
        if len(curve) < 2:
            continue
        level = number(stage.results.get("trigram_val_bpb")) if key == "val_bpb" else None
        reference = ("trigram", level) if level is not None and math.isfinite(level) else None
        title = "Validation bits per byte" if key == "val_bpb" else name
        charts.append(
            Chart(f"{stage.name}_{key}", title, [Line(name, curve)], reference, clip_start=True)
        )
    for key, title in TRAIN_CURVES.items():
        if len(trained(key)) > 1:
            lines = [Line(title, trained(key), "thin")]
            charts.append(Chart(f"{stage.name}_{key}", title, lines, clip_start=True))
    if stage.tokens_per_step and len(stage.train) > 2:
        per_step = stage.tokens_per_step
        speed = [(step, per_step / secs) for step, secs in trained("step_secs")[1:] if secs > 0]
        lines = [Line("tokens per second", speed, "thin")]
        charts.append(Chart(f"{stage.name}_speed", "Tokens per second", lines, from_zero=True))
    return charts


def _settings(stage: Stage) -> list[tuple[str, str]]:
    rows = []
    for key in SETTINGS:
        section, _, name = key.partition(".")
        values = as_dict(stage.config.get(section))
        if name in values:
            rows.append((key, show_value(values[name])))
    own = as_dict(stage.config.get(stage.name))
    return rows + [(f"{stage.name}.{name}", value) for name, value in _scalars(own)]


def _scalars(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (k, show_value(v))
        for k, v in values.items()
        if v is None or isinstance(v, str | int | float)
    ]


def _parameters(stage: Stage) -> dict[str, float]:
    groups = as_dict(stage.info.get("params"))
    return {k: n for k, v in groups.items() if (n := number(v)) and k not in ("total", "all")}


def _best_val_bpb(stage: Stage) -> tuple[int | None, float] | None:
    """(step, value) of the lowest; the step is None when only the final evaluation has one."""
    curve = stage.curve("val_bpb")
    final = number(stage.results.get("val_bpb"))
    if not curve:
        return None if final is None else (None, final)
    return min(curve, key=lambda point: point[1])


def _price(hardware: dict[str, Any]) -> str:
    if hardware.get("platform") == "cpu":
        return "$0 an hour: one's own machine"
    price = price_per_hour(hardware)
    return "no price known" if price is None else f"${price:,.2f} an hour"

"""The report of a run: what it was, where it ran, what came out, how long it took and what it cost.

  report_read.py    files of a run -> Run, Stage
  report_evals.py   tables of what evaluations found
  report_stage.py   the section of a stage
  report_write.py   blocks -> Markdown, HTML; report_plots.py draws

`make_report` writes report/report.md with its plots beside it, and report/report.html, one page
that needs nothing else. Nothing writes to the report while a run goes on, so it can be made at any
time, of any run, as often as one likes: the same files give the same report, to the byte. A stage
that has not run says so.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanochat_jax.common import atomic_write
from nanochat_jax.report_evals import CHATCORE, read_scores, summary
from nanochat_jax.report_read import STAGES, Run, as_dict, number, price_per_hour, read_run, whole
from nanochat_jax.report_stage import best_val_bpb, parameter_groups, scalars, stage_blocks
from nanochat_jax.report_write import (
    Block,
    Charts,
    Details,
    Facts,
    Figures,
    Heading,
    Paragraph,
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
        Heading(2, "Machine and code"),
        Facts(_header(run), is_long=True),
        Heading(2, "Tokenizer"),
        *_tokenizer(run),
    ]
    first = next((name for name in STAGES if run.stages[name].has_run), None)
    for name in STAGES:
        blocks += [Heading(2, TITLES[name]), *stage_blocks(run.stages[name], name == first)]
    for name, values in run.other_results.items():
        blocks += [Heading(2, f"Evaluation {name}"), Facts(scalars(values))]
        blocks.append(Details("All values", values))
    return [*blocks, Heading(2, "Summary"), *_summary(run)]


def _key_figures(run: Run) -> list[tuple[str, str, str]]:
    base = run.stages["base"]
    figures = []
    val_bpb, best = base.metric("val_bpb"), best_val_bpb(base)
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
    figures += _chat_figures(run)
    parameters = sum(parameter_groups(base).values())
    if parameters:
        figures.append(("parameters", show_amount(parameters), f"{parameters:,}"))
    figures.append(("wall-clock", show_duration(run.wall_secs), "all stages and evaluations"))
    figures.append(("cost", show_usd(run.cost_usd), _price(as_dict(run.info.get("hardware")))))
    return figures


def _chat_figures(run: Run) -> list[tuple[str, str, str]]:
    """The newest chat model's ChatCORE, or else the first of its tasks."""
    for name in reversed(STAGES):
        stage = run.stages[name]
        for key, title in CHATCORE.items():
            value = stage.metric(key)
            if value is not None:
                return [(title, f"{value:.4f}", f"after {name.upper()}")]
        scored = [score for score in read_scores(stage) if score.accuracy is not None]
        if scored:
            return [(s.name, f"{s.accuracy:.1%}", f"after {name.upper()}") for s in scored[:3]]
    return []


def _summary(run: Run) -> list[Block]:
    total = (
        f"Total wall-clock time: {show_duration(run.wall_secs)}. Cost: {show_usd(run.cost_usd)}."
    )
    return [*summary(run.stages), Paragraph(total)]


def _header(run: Run) -> list[tuple[str, str]]:
    info, git = run.info, as_dict(run.info.get("git"))
    hardware = as_dict(info.get("hardware"))
    rows = []
    if git.get("commit"):
        changed = whole(git.get("diff_lines")) or 0
        state = f"modified, {changed:,} lines differ" if git.get("dirty") else "clean"
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


def _price(hardware: dict[str, Any]) -> str:
    if hardware.get("platform") == "cpu":
        return "$0 an hour: one's own machine"
    price = price_per_hour(hardware)
    return "no price known" if price is None else f"${price:,.2f} an hour"

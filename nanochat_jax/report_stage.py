"""The section of one training stage: what came out, curves, evaluations, answers, settings.

To draw another number of the training lines, add it to CURVES. To show another setting of the whole
run, add its key to SETTINGS.
"""

from collections.abc import Sequence
from typing import Any

from nanochat_jax.report_evals import BASE_METRICS, chat_blocks, core_blocks, curve_ks
from nanochat_jax.report_plots import Chart, Line
from nanochat_jax.report_read import Stage, as_dict, number, whole
from nanochat_jax.report_write import (
    Block,
    Charts,
    Details,
    Facts,
    Heading,
    Paragraph,
    Samples,
    Table,
    show_amount,
    show_duration,
    show_value,
)

# Of the first stage that has run: the later ones share them. The stage's own section is shown for
# each, the whole configuration is folded away below.
SETTINGS = (
    "data.name data.packing tokenizer.vocab_size model.depth model.model_dim model.num_heads "
    "model.num_kv_heads model.head_dim model.seq_len model.window_pattern model.extras "
    "model.compute_dtype optim.recipe optim.matrix_lr optim.embed_lr optim.unembed_lr "
    "optim.weight_decay optim.grad_clip mesh.data mesh.fsdp mesh.tensor run.seed"
).split()

# Title of a chart -> numbers of the training lines on it; the first names its file.
CURVES = {
    "Mean reward": {"reward": "reward"},
    "Share of questions": {"solved_frac": "solved", "mixed_frac": "right and wrong answers"},
    "Answer length (tokens)": {"answer_tokens": "tokens"},
    "Share of answers that ended by themselves": {"stopped_frac": "ended"},
    "Gradient norm": {"grad_norm": "gradient norm"},
}
# How practice went, in numbers of the training lines.
PRACTICE = {
    "reward": ("mean reward", "{:.4f}"),
    "solved_frac": ("questions solved by an answer", "{:.1%}"),
    "mixed_frac": ("questions with right and wrong answers", "{:.1%}"),
    "answer_tokens": ("tokens of an answer", "{:.1f}"),
    "stopped_frac": ("answers that ended by themselves", "{:.1%}"),
}
PRACTICE_FRAC = 0.1  # of the steps that make "first" and "last"


def stage_blocks(stage: Stage, is_first: bool) -> list[Block]:
    if not stage.has_run:
        return [Paragraph("not run")]
    blocks: list[Block] = [Facts(_outcomes(stage)), *_practice(stage)]
    charts = _charts(stage)
    if charts:
        blocks.append(Charts(charts))
    blocks += core_blocks(stage) + chat_blocks(stage)
    pairs, step = stage.samples()
    if pairs:
        blocks.append(Heading(3, "Samples" + (f" at step {step:,}" if step is not None else "")))
        blocks.append(Samples(pairs))
    if is_first:
        blocks += _parameters(stage)
    settings = _settings(stage, SETTINGS if is_first else ())
    if settings:
        blocks += [Heading(3, "Settings"), Facts(settings)]
        blocks.append(Details("Whole configuration", stage.config))
    return blocks


def _outcomes(stage: Stage) -> list[tuple[str, str]]:
    done, planned = stage.steps_done, stage.num_steps
    of = f" of {planned:,}" if planned else ""
    state = "complete" if planned and done >= planned else "not complete" if planned else "trained"
    rows = [("Steps", f"{done:,}{of} ({state})")] if stage.train else []
    if stage.info.get("parent"):
        rows.append(("Started from", show_value(stage.info["parent"])))
    rows += _material(stage)
    if stage.train and stage.name != "rl":  # the loss of practice says nothing
        last = stage.train[-1]
        for key, name in (
            ("loss_ema", "Final loss (moving average)"),
            ("loss", "Loss of the last step"),
        ):
            if number(last.get(key)) is not None:
                rows.append((name, f"{last[key]:.4f}"))
    best = best_val_bpb(stage)
    if best:
        at = f" (step {best[0]:,})" if best[0] is not None else ""
        rows.append(("Lowest val bpb", f"{best[1]:.4f}{at}"))
    for key, name in (
        ("val_bpb", "Final val bpb"),
        ("train_bpb", "Final train bpb"),
        ("trigram_val_bpb", "val bpb of a token trigram"),
        ("byte_trigram_val_bpb", "val bpb of a byte trigram"),
        ("core", BASE_METRICS["core"]),
        ("core_partial", BASE_METRICS["core_partial"]),
    ):
        value = stage.metric(key)
        if value is not None:
            rows.append((name, f"{value:.4f}"))
    for k, curve in _passes(stage).items():
        step, highest = max(curve, key=lambda point: point[1])
        rows.append((f"pass@{k}", f"{curve[-1][1]:.2%} (highest {highest:.2%}, step {step:,})"))
    return rows + _speed(stage)


def _material(stage: Stage) -> list[tuple[str, str]]:
    """What the stage has read or written so far."""
    rows, done = [], stage.steps_done
    if stage.tokens_per_step and done and not stage.is_ragged:
        rows.append(("Tokens", show_amount(done * stage.tokens_per_step)))
    if stage.trained_tokens and stage.name != "base":
        rows.append(("Trained tokens", show_amount(stage.trained_tokens)))
    counts = {key: whole(count) for key, count in stage.conversations.items()}
    if counts.get("conversations") is not None:
        lost = [
            f"{counts[key] or 0:,} {name}"
            for key, name in (("cut_at_a_turn", "cut at a turn"), ("dropped", "dropped"))
            if key in counts
        ]
        rows.append(("Conversations", f"{counts['conversations']:,} ({', '.join(lost)})"))
    for key, count in as_dict(stage.info.get("documents")).items():
        if whole(count):
            rows.append((key.replace("_", " ").capitalize(), f"{whole(count):,}"))
    questions, samples = whole(stage.setting("questions_per_step")), whole(stage.setting("samples"))
    if done and questions and samples:
        rows.append(("Questions", f"{done * questions:,}, {samples:,} answers each"))
    return rows


def _speed(stage: Stage) -> list[tuple[str, str]]:
    rows = []
    if stage.tokens_per_sec and stage.step_secs:
        name = "Trained tokens per second" if stage.is_ragged else "Tokens per second"
        rows.append((name, f"{stage.tokens_per_sec:,.0f} (median)"))
        rows.append(("Step time", f"{stage.step_secs * 1000:,.0f} ms (median)"))
        mfu, source = stage.mfu
        rows.append(("MFU", "n/a" if mfu is None else f"{mfu:.1%}"))
        if not stage.is_ragged:
            rows.append(("MFU against", source))
        first = number(stage.train[0].get("step_secs"))
        if first and stage.train[0]["step"] == 0:
            rows.append(("First step", show_duration(first)))
    if stage.idle_frac is not None:
        rows.append(("Devices waiting for batches", f"{stage.idle_frac:.1%} of the time in steps"))
    writing = sum(secs for _, secs in stage.trained("rollout_secs"))
    if writing:
        rows.append(("Writing and grading answers", show_duration(writing)))
    rows.append(("Wall-clock", show_duration(stage.wall_secs)))
    if stage.eval_secs:
        rows.append(("Evaluation", show_duration(stage.eval_secs)))
    restarts = whole(stage.info.get("restarts"))
    if restarts is not None:
        rows.append(("Restarts", f"{restarts:,}"))
    return rows


def _practice(stage: Stage) -> list[Block]:
    """The first steps of reinforcement beside the last ones."""
    rows, num_steps = [], 0
    for key, (name, form) in PRACTICE.items():
        values = [value for _, value in stage.trained(key)]
        if len(values) > 1:
            num_steps = max(1, round(PRACTICE_FRAC * len(values)))
            ends = (values[:num_steps], values[-num_steps:])
            rows.append([name, *(form.format(sum(part) / num_steps) for part in ends)])
    steps = "step" if num_steps == 1 else f"{num_steps:,} steps"
    return [Table(["Practice", f"first {steps}", f"last {steps}"], rows)] if rows else []


def _passes(stage: Stage) -> dict[int, list[tuple[int, float]]]:
    """k -> the curve of pass@k, for a few k."""
    keys = {key for line in stage.evals for key in line if key.startswith("pass@")}
    ks = {int(k) for key in keys if (k := key.removeprefix("pass@")).isdecimal() and int(k)}
    curves = {k: stage.curve(f"pass@{k}") for k in curve_ks(ks, most=3)}
    return {k: curve for k, curve in curves.items() if curve}


def _charts(stage: Stage) -> list[Chart]:
    charts = []

    def draw(key: str, title: str, lines: list[Line], **how: Any) -> None:
        if any(len(line.points) > 1 for line in lines):
            charts.append(Chart(f"{stage.name}_{key}", title, lines, **how))

    if stage.name != "rl":
        raw = Line("each step", stage.trained("loss"), "raw")
        smooth = Line("moving average", stage.trained("loss_ema"))
        draw("loss", "Training loss (nats per token)", [raw, smooth], clip_start=True)
    trigram = number(stage.results.get("trigram_val_bpb"))
    for key, name in BASE_METRICS.items():
        title = "Validation bits per byte" if key == "val_bpb" else name
        level = ("trigram", trigram) if key == "val_bpb" and trigram is not None else None
        draw(key, title, [Line(name, stage.curve(key))], reference=level, clip_start=True)
    styles = ("main", "half", "pale")
    passes = [
        Line(f"pass@{k}", curve, style)
        for (k, curve), style in zip(_passes(stage).items(), styles, strict=False)
    ]
    draw("pass_at_k", "pass@k on validation questions", passes)
    for title, keys in CURVES.items():
        lines = [
            Line(name, stage.trained(key), style)
            for (key, name), style in zip(keys.items(), ("thin", "ref"), strict=False)
        ]
        draw(next(iter(keys)), title, lines, clip_start=title == "Gradient norm")
    if len(stage.rates) > 1:
        title = "Trained tokens per second" if stage.is_ragged else "Tokens per second"
        draw("speed", title, [Line(title, stage.rates, "thin")], from_zero=True)
    return charts


def _parameters(stage: Stage) -> list[Block]:
    parameters = parameter_groups(stage)
    if not parameters:
        return []
    total = sum(parameters.values())
    shares = [[name, f"{count:,}", f"{count / total:.1%}"] for name, count in parameters.items()]
    header = ["Group", "parameters", "share"]
    return [
        Heading(3, "Parameters"),
        Table(header, [*shares, ["all", f"{total:,}", "100.0%"]]),
    ]


def parameter_groups(stage: Stage) -> dict[str, int]:
    groups = as_dict(stage.info.get("params"))
    return {k: n for k, v in groups.items() if (n := whole(v)) and k not in ("total", "all")}


def _settings(stage: Stage, shared: Sequence[str]) -> list[tuple[str, str]]:
    rows = []
    for key in shared:
        section, _, name = key.partition(".")
        values = as_dict(stage.config.get(section))
        if name in values:
            rows.append((key, show_value(values[name])))
    own = as_dict(stage.config.get(stage.name))
    return rows + [(f"{stage.name}.{name}", value) for name, value in scalars(own)]


def scalars(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values, without what has parts of its own; lists of words count as one value."""

    def shown(value: Any) -> str | None:
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            return ", ".join(value) or "-"
        is_one = value is None or isinstance(value, str | int | float)
        return show_value(value) if is_one else None

    return [(name, text) for name, value in values.items() if (text := shown(value)) is not None]


def best_val_bpb(stage: Stage) -> tuple[int | None, float] | None:
    """(step, value) of the lowest; the step is None when only the final evaluation has one."""
    curve = stage.curve("val_bpb")
    final = number(stage.results.get("val_bpb"))
    if not curve:
        return None if final is None else (None, final)
    return min(curve, key=lambda point: point[1])

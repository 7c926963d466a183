"""What evaluations found, as parts of the report: CORE task by task, a chat model's tasks with
examples of its answers, and the table of everything, Metric x stage.

To add a metric that an evaluation file has at its top level, add its name to TASKS or to one of the
other tables here. A task without a name here has a row all the same.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanochat_jax.report_read import Stage, as_dict, number, whole
from nanochat_jax.report_write import (
    Answer,
    Answers,
    Block,
    Heading,
    Paragraph,
    Table,
    show_duration,
)

# Keys in evaluation files and in metrics.jsonl -> their names, in the order of the summary.
BASE_METRICS = {
    "val_bpb": "val bpb",
    "core": "CORE",
    "core_partial": "Mean of some CORE tasks",
}
TASKS = {
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "spelling_bee": "SpellingBee",
    "simple_spelling": "SimpleSpelling",
    "arithmetic": "Arithmetic",
}
CHATCORE = {
    "chatcore": "ChatCORE (6 tasks)",
    "chatcore_5": "ChatCORE (5 tasks)",
    "chatcore_cat": "ChatCORE (3 by letter)",
}
ENDED = {
    "stop": "finished",
    "length": "cut off",
    "context": "context full",
    "too_long": "prompt too long",
}
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"

_UP_TO_SPECIAL = r"((?:(?!<\|[a-z_]+\|>).)*)"
TOOL_CALL = re.compile(
    rf"<\|python_start\|>{_UP_TO_SPECIAL}(<\|python_end\|>)?"
    rf"(?:<\|output_start\|>{_UP_TO_SPECIAL}(<\|output_end\|>)?)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class TaskScore:
    """A task of a chat evaluation; what its file does not say is None or empty."""

    spec: str
    accuracy: float | None = None
    num_correct: int | None = None
    num_problems: int | None = None
    secs: float | None = None
    ended: Mapping[str, int] = field(default_factory=dict)
    pass_at_k: Mapping[int, float] = field(default_factory=dict)  # unbiased
    examples: tuple[Answer, ...] = ()

    @property
    def name(self) -> str:
        """The task and, unless it is the whole test split, what of it."""
        task, _, rest = self.spec.partition(" ")
        return task_name(task) + (f" {rest}" if rest not in ("", "test") else "")

    @property
    def standard_error(self) -> float | None:
        return standard_error(self.accuracy, self.num_problems)


def read_scores(stage: Stage) -> list[TaskScore]:
    """The tasks that a stage's chat evaluation has finished."""
    scores = []
    for spec, value in as_dict(stage.chat.get("tasks")).items():
        saved = as_dict(value)
        examples, passes = saved.get("examples"), saved.get("pass_at_k_unbiased")
        numbers = enumerate(map(number, passes if isinstance(passes, list) else []), start=1)
        ended = {end: whole(count) for end, count in as_dict(saved.get("ended")).items()}
        scores.append(
            TaskScore(
                spec,
                number(saved.get("accuracy")),
                whole(saved.get("num_correct")),
                whole(saved.get("num_problems")),
                number(saved.get("seconds")),
                {end: count for end, count in ended.items() if count},
                {k: share for k, share in numbers if share is not None},
                tuple(map(_answer, examples if isinstance(examples, list) else [])),
            )
        )
    return scores


def _answer(saved: Any) -> Answer:
    prompt, answer, expected = (
        readable(str(as_dict(saved).get(key, ""))) for key in ("prompt", "answer", "expected")
    )
    return Answer(prompt, answer or "(nothing)", expected, as_dict(saved).get("correct") is True)


def readable(text: str) -> str:
    """Text of a model with tool calls as [12+30 -> 42]; one that was cut off ends in " ..."."""

    def call(match: re.Match) -> str:
        code, code_end, output, output_end = match.groups()
        shown = code if output is None else f"{code} -> {output}"
        is_whole = code_end if output is None else output_end
        return f"[{shown}]" if is_whole else f"[{shown} ...]"

    return TOOL_CALL.sub(call, text)


def standard_error(accuracy: float | None, num_problems: int | None) -> float | None:
    """Binomial, sqrt(p (1 - p) / n); None where p is 0 or 1, of which it makes a certainty."""
    if accuracy is None or not num_problems or num_problems < 0 or not 0 < accuracy < 1:
        return None
    return math.sqrt(accuracy * (1 - accuracy) / num_problems)


def task_name(task: str) -> str:
    return TASKS.get(task, task)


def summary_names(stages: Iterable[Stage]) -> dict[str, str]:
    """Key -> name of all that any stage may have been scored on, in order."""
    scored = [score.spec.split(" ")[0] for stage in stages for score in read_scores(stage)]
    others = {task: task for task in scored if task not in TASKS}
    return BASE_METRICS | TASKS | others | CHATCORE


def summary(stages: Mapping[str, Stage]) -> list[Block]:
    """Metric x stage, and how sure one can be of it."""
    rows, errors = [], []
    for key, name in summary_names(stages.values()).items():
        values = [stage.metric(key) for stage in stages.values()]
        if key == "val_bpb" or any(value is not None for value in values):
            rows.append([name, *("-" if v is None else f"{v:.4f}" for v in values)])
            errors += _largest_error(key, name, stages.values())
    clocks = [show_duration(s.wall_secs) if s.has_run else "-" for s in stages.values()]
    header = ["Metric", *(name.upper() for name in stages)]
    blocks: list[Block] = [Table(header, [*rows, ["training time", *clocks]])]
    if sum(stage.metric("val_bpb") is not None for stage in stages.values()) > 1:
        text = "val bpb is of each stage's own validation text: not to compare across columns."
        blocks.append(Paragraph(text))
    if errors:
        blocks.append(Paragraph(f"Binomial standard error, at most: {', '.join(errors)}."))
    return blocks


def _largest_error(key: str, name: str, stages: Iterable[Stage]) -> list[str]:
    found = [
        (score.standard_error, score.num_problems)
        for stage in stages
        for score in read_scores(stage)
        if score.spec.split(" ")[0] == key and score.standard_error is not None
    ]
    if not found:
        return []
    error, problems = max(found)
    return [f"{name} {PLUS_MINUS}{error:.4f} ({problems:,} problems)"]


def core_blocks(stage: Stage) -> list[Block]:
    """CORE task by task, of the final evaluation or else of the last one while training."""
    source = next(
        (
            source
            for source in (*stage.eval_files.values(), *reversed(stage.evals))
            if as_dict(source.get("core_tasks"))
        ),
        {},
    )
    found = as_dict(source.get("core_tasks"))
    scores = {label: as_dict(score) for label, score in as_dict(found.get("tasks")).items()}
    if not scores:
        return []
    missing = found.get("missing")
    missing = [str(label) for label in missing] if isinstance(missing, list) else []
    parts = as_dict(found.get("partial"))
    is_core = number(found.get("core")) is not None
    rows = []
    for label, score in scores.items():
        accuracy, centered = number(score.get("accuracy")), number(score.get("centered"))
        examples = whole(score.get("num_examples"))
        error = standard_error(accuracy, examples)
        rows.append([label, _share(accuracy), _share(error), _decimals(centered), _count(examples)])
    rows += [[label, "missing", "-", "-", "-"] for label in missing]
    mean = number(found.get("core" if is_core else "core_partial"))
    name = "CORE" if is_core else f"mean of these {len(scores)} tasks"
    rows.append([name, "", "", _decimals(mean), ""])
    step, most = whole(source.get("step")), whole(found.get("max_per_task"))
    title = "CORE" if is_core else "Some CORE tasks"
    text = "Centred accuracy: 0 is guessing, 1 no mistake."
    if most and most > 0:
        text += f" At most {most:,} examples a task."
    blocks: list[Block] = [
        Heading(3, title + (f" at step {step:,}" if step is not None else "")),
        Paragraph(text),
    ]
    if not is_core:
        lacks = [f"missing are {', '.join(missing)}"] if missing else []
        lacks += [f"{label} has {part} examples" for label, part in parts.items()]
        because = f": {'; '.join(lacks)}" if lacks else ""
        blocks.append(Paragraph(f"This is not CORE{because}.", is_note=True))
    header = ["Task", "accuracy", PLUS_MINUS, "centred", "examples"]
    return [*blocks, Table(header, rows)]


def chat_blocks(stage: Stage) -> list[Block]:
    """A chat model's tasks: how many were right, how answers ended, and some of them."""
    scores = read_scores(stage)
    if not scores:
        return []
    step = whole(stage.chat.get("step"))
    blocks: list[Block] = [
        Heading(3, "Chat evaluation" + (f" at step {step:,}" if step is not None else "")),
        Paragraph(_chat_settings(as_dict(stage.chat.get("settings")))),
    ]
    if step is not None and stage.train and step != stage.steps_done:
        blocks.append(Paragraph(f"The stage itself is at step {stage.steps_done:,}.", is_note=True))
    wanted = as_dict(stage.config.get("eval")).get("chat_tasks")
    wanted = [str(spec) for spec in wanted] if isinstance(wanted, list) else []
    left = [spec for spec in wanted if spec not in {score.spec for score in scores}]
    if left:
        blocks.append(Paragraph(f"Not scored: {', '.join(left)}.", is_note=True))
    rows = [
        [
            score.name,
            _share(score.accuracy),
            _share(score.standard_error),
            _count(score.num_correct),
            _count(score.num_problems),
            "-" if score.secs is None else show_duration(score.secs),
            ", ".join(f"{ENDED.get(end, end)} {n:,}" for end, n in score.ended.items()) or "-",
        ]
        for score in scores
    ]
    header = ["Task", "accuracy", PLUS_MINUS, "right", "of", "time", "answers"]
    blocks.append(Table(header, rows))
    error = (
        "\N{PLUS-MINUS SIGN} is the binomial standard error, sqrt(p (1 - p) / n); none at 0 or 1."
    )
    missing = stage.chat.get("chatcore_missing")
    if isinstance(missing, list) and missing:
        error += f" No ChatCORE without {', '.join(task_name(str(task)) for task in missing)}."
    blocks.append(Paragraph(error))
    blocks += _pass_at_k(scores)
    for score in scores:
        if score.examples:
            num_right = sum(answer.is_correct for answer in score.examples)
            title = f"{score.name}: {len(score.examples)} answers, {num_right} right"
            blocks.append(Answers(title, score.examples, is_open=bool(score.ended)))
    return blocks


def _chat_settings(saved: dict[str, Any]) -> str:
    def setting(key: str) -> float | None:
        return number(saved.get(f"eval.chat_{key}"))

    parts = []
    problems, samples, tokens = setting("problems"), setting("samples"), setting("max_new_tokens")
    if problems is not None:
        parts.append(f"the first {problems:,.0f} problems of each" if problems else "all problems")
    if samples is not None:
        many = f"{samples:,.0f} answers each, one right is enough"
        parts.append("one answer each" if samples == 1 else many)
    if tokens is not None:
        parts.append(f"up to {tokens:,.0f} tokens")
    temperature, top_k = setting("temperature"), setting("top_k")
    if temperature is not None:
        warm = f"temperature {temperature:g}" + (f", top-k {top_k:,.0f}" if top_k else "")
        parts.append(warm if temperature else "the likeliest token each time")
    text = "; ".join(parts) or "settings not recorded"
    return f"{text[0].upper()}{text[1:]}."


def _pass_at_k(scores: list[TaskScore]) -> list[Block]:
    """Where there were several answers to a problem: how many are needed."""
    sampled = [score for score in scores if len(score.pass_at_k) > 1]
    if not sampled:
        return []
    ks = curve_ks({k for score in sampled for k in score.pass_at_k}, most=5)
    rows = [[score.name, *(_share(score.pass_at_k.get(k)) for k in ks)] for score in sampled]
    return [Table(["Unbiased estimate", *(f"pass@{k}" for k in ks)], rows)]


def curve_ks(ks: Collection[int], most: int) -> list[int]:
    """Powers of two among the ks and the largest, thinned to `most` that keep first and last."""
    last = max(ks, default=0)
    chosen = sorted(k for k in ks if k == last or k & (k - 1) == 0)
    if len(chosen) <= most:
        return chosen
    return [chosen[round(i * (len(chosen) - 1) / (most - 1))] for i in range(most)]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"

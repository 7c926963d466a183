"""Tables of the report: the facts of a run, rounded where a reader wants them rounded.

New scores need a name in NAMES, new numbers of training in TRAINING. A cell of None reads "-".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanochat_jax.report.read import TRAINED, Stage
from nanochat_jax.train.metrics import format_secs

# Scores by their keys in the evaluation files, in the order of the table.
NAMES = {
    "val_bpb": "Bits per byte (less is better)",
    "core": "CORE",
    "core_partial": "Mean of some CORE tasks",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "spelling_bee": "SpellingBee",
    "simple_spelling": "SimpleSpelling",
    "arithmetic": "Arithmetic",
    "chatcore": "ChatCORE (6 tasks)",
    "chatcore_5": "ChatCORE (5 tasks)",
    "chatcore_cat": "ChatCORE (3 tasks by letter)",
}
# Numbers of a training stage: key in its facts -> name and format.
TRAINING = {
    "steps_done": ("Steps", ","),
    "tokens": ("Tokens", ","),
    "conversations": ("Conversations", ","),
    "cut_at_a_turn": ("Conversations cut at a turn", ","),
    "dropped": ("Conversations dropped", ","),
    "loss_ema": ("Loss, moving average", ".4f"),
    "train_bpb": ("Bits per byte of training text", ".4f"),
    "reward": ("Mean reward, last tenth of steps", ".3f"),
    "answer_tokens": ("Tokens of an answer", ".1f"),
    "pass@1": ("pass@1 on validation questions", ".1%"),
    "tokens_per_sec": ("Tokens per second, median", ",.0f"),
    "mfu": ("MFU", ".1%"),
    "idle_frac": ("Devices waiting for batches", ".1%"),
}
Stages = dict[str, Stage]
ENDED = {"stop": "finished", "length": "cut off", "context": "context full"}
CALLS = {"python_start": "[", "python_end": "]", "output_start": " -> [", "output_end": "] "}


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Any]]  # the first cell names the row
    title: str = ""
    remark: str = ""
    examples: list[dict[str, Any]] = field(default_factory=list)  # prompt, answer, expected, ...


def amount(value: float) -> str:
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    known = (f"{value / unit:.3g}{name}" for unit, name in units if value and value >= unit)
    return next(known, "-")


def accuracy(share: float, problems: int) -> str:
    """In percent, with the binomial standard error, sqrt(p (1 - p) / n), unless p is 0 or 1."""
    error = f" ±\xa0{math.sqrt(share * (1 - share) / problems):.1%}" if 0 < share < 1 else ""
    return f"{share:.1%}{error}"


def readable(text: str) -> str:
    """A model's text with its calls of the calculator as [12+30] -> [42]."""
    for mark, shown in CALLS.items():
        text = text.replace(f"<|{mark}|>", shown)
    return text.strip() or "(nothing)"


def score_name(spec: str) -> str:
    """The task and, unless it is the whole test split, which part of it."""
    task, _, part = spec.removesuffix(" test").partition(" ")
    return f"{NAMES.get(task, task)} {part}".strip()


def by_stage(stages: Stages, names: dict[str, str], cell: Callable[[Stage, str], Any]) -> Table:
    """Keys x BASE, MID, SFT, RL, without the keys that no stage has a value for."""
    columns = [stages.get(name) for name in TRAINED]
    rows = [[name, *(s and cell(s, key) for s in columns)] for key, name in names.items()]
    return Table(["", *map(str.upper, TRAINED)], [row for row in rows if set(row[1:]) != {None}])


def scores(stages: Stages) -> Table:
    def score(stage: Stage, key: str) -> str | None:
        if task := stage.facts["tasks"].get(key):
            return accuracy(task["accuracy"], task["num_problems"])
        return f"{stage.facts[key]:.4f}" if key in stage.facts else None

    specs = sorted({spec for stage in stages.values() for spec in stage.facts["tasks"]})
    keys = [key for key in NAMES if key not in {spec.split()[0] for spec in specs}] + specs
    keys.sort(key=lambda key: [*NAMES, key.split()[0]].index(key.split()[0]))
    return by_stage(stages, {key: score_name(key) for key in keys}, score)


def training(stages: Stages) -> Table:
    def number(stage: Stage, key: str) -> str | None:
        value = stage.facts.get(key)
        return None if value is None else format(value, TRAINING[key][1])

    return by_stage(stages, {key: name for key, (name, _) in TRAINING.items()}, number)


def prompts(stages: Stages) -> list[str]:
    """What the chats were asked, then what only the base model was given."""
    return list(dict.fromkeys(p for stage in reversed(stages.values()) for p in stage.answers))


def time(stages: Stages) -> Table:
    parts = {name: [s.facts[k] for k in ("secs", "eval_secs", "usd")] for name, s in stages.items()}
    secs, eval_secs, costs = zip(*parts.values(), strict=True)
    parts["all"] = [sum(secs), sum(eval_secs), None if None in costs else sum(costs)]
    rows = []
    for name, (part, evaluation, usd) in parts.items():
        cost = "unknown" if usd is None else f"${usd:,.2f}"
        share = f"{part / (sum(secs) or 1):.0%}"
        rows.append([name, format_secs(part), format_secs(evaluation), share, cost])
    return Table(["", "time", "evaluation", "share", "cost"], rows)


def details(stages: Stages) -> list[Table]:
    found = [_core(stage) for stage in stages.values() if "core_tasks" in stage.facts]
    found += [_chat_tasks(stage) for stage in stages.values() if stage.facts["tasks"]]
    found += [_tokenizer(stage.facts) for stage in stages.values() if "kinds" in stage.facts]
    found += [_merged("Machine, code and parameters", {s.name: s.info for s in stages.values()})]
    return [*found, _merged("Settings", {s.name: s.config for s in stages.values()})]


def _core(stage: Stage) -> Table:
    core, rows = stage.facts["core_tasks"], []
    for name, task in core["tasks"].items():
        share, n = task["accuracy"], task["num_examples"]
        rows.append([name, accuracy(share, n), f"{task['centered']:.4f}", n])
    remark = "Centred accuracy: 0 is guessing, 1 is no mistake. CORE is its mean over 22 tasks."
    if lacking := [*core["missing"], *(f"{name}: {n}" for name, n in core["partial"].items())]:
        remark += f" This is not CORE, it lacks examples of {', '.join(lacking)}."
    return Table(["", "accuracy", "centred", "examples"], rows, "CORE, task by task", remark)


def _chat_tasks(stage: Stage) -> Table:
    rows, examples = [], []
    for spec, task in stage.facts["tasks"].items():
        right, n, passes = task["num_correct"], task["num_problems"], task["pass_at_k_unbiased"]
        ended = [f"{count:,} {ENDED.get(end, end)}" for end, count in task["ended"].items()]
        several = [f"{p:.1%} in {k}" for k, p in enumerate(passes, 1) if k.bit_count() == 1 < k]
        cells = [accuracy(task["accuracy"], n), f"{right:,} of {n:,}", format_secs(task["seconds"])]
        rows.append([score_name(spec), *cells, ended, several])
        examples += task["examples"]
    header = ["", "accuracy", "right", "time", "answers", "pass@k"]
    settings = stage.facts["settings"].items()
    remark = ", ".join(f"{k} {v}" for k, v in settings if k.startswith("eval.chat_"))
    return Table(header, rows, f"Chat tasks after {stage.name.upper()}", remark, examples)


def _tokenizer(compression: dict[str, Any]) -> Table:
    sizes, rows = compression["vocab_size"], []
    for kind, row in compression["kinds"].items():
        ratios = [f"{row['bytes_per_token'][name]:.3f}" for name in sizes]
        rows.append([kind, row["bytes"], row["tokens"]["ours"], *ratios])
    missing = compression["missing"]
    remark = f"{' and '.join(missing)} could not be loaded to compare with." if missing else ""
    header = ["", "bytes", "our tokens", *(f"{name}, {size:,} ids" for name, size in sizes.items())]
    return Table(header, rows, "Tokenizer, bytes per token", remark)


def _merged(title: str, of_stage: dict[str, dict[str, Any]]) -> Table:
    """Every value once; with the stages' names where they differ. A stage's own section counts."""
    values: dict[str, dict[str, Any]] = {}
    for name, tree in of_stage.items():
        for section, part in tree.items():
            for key, value in part.items() if isinstance(part, dict) else [("", part)]:
                if section == name or section not in TRAINED:
                    values.setdefault(f"{section}.{key}".strip("."), {})[name.upper()] = value
    rows = []
    for key, told in sorted(values.items()):
        first, *others = told.values()
        differing = [f"{value} ({name})" for name, value in told.items()]
        rows.append([key, differing if any(value != first for value in others) else first])
    return Table(["", ""], rows, title)

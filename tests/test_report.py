"""The report: its numbers by hand, any file missing or broken, and text that tries to break out."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from nanochat_jax import report, report_plots
from nanochat_jax.common import UserError
from nanochat_jax.report import make_report
from nanochat_jax.report_evals import curve_ks, readable, standard_error
from nanochat_jax.report_plots import Chart, Line
from nanochat_jax.report_write import show_amount, show_duration

HOSTILE = (
    "</pre></li><script>alert(1)</script><img src=//evil.example onerror=x> &amp; ```\n# Title\n"
    "````` | a | b | [x](javascript:y) \ud800 \x07 \u202e done"
)
STEPS, STEP_TOKENS = 20, 8192


def train_line(step, **values):
    line = {"kind": "train", "step": step, "loss": 9.0 - step / 10, "loss_ema": 9.5 - step / 10}
    line |= {"grad_norm": 1.0, "epoch": 0, "step_secs": 30.0 if step == 0 else 0.25}
    return line | {"elapsed_secs": 30.0 + step * 0.25} | values


def bpb_line(step, val_bpb):
    return {"kind": "eval", "name": "bpb", "step": step, "val_bpb": val_bpb, "train_bpb": 1.0}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def write_metrics(run, lines, stage="base"):
    write(run / stage / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    """What a finished base stage leaves, on 8 H100s."""
    run = tmp_path / "runs" / "d20"
    hardware = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "num_devices": 8}
    hardware |= {"device_memory_bytes": 80 * 2**30, "driver": "570.86.15", "cpu_model": "EPYC"}
    hardware |= {"cpu_cores": 96, "memory_bytes": 2**40, "os": "Linux", "python": "3.11.7"}
    info = {
        "hardware": hardware | {"versions": {"jax": "0.10.2", "grain": None}},
        "git": {"commit": "0123456789abcdef", "dirty": True, "diff_lines": 42},
        "started_unix_secs": 1_790_000_000.0,
        "command": "python scripts/train.py --config=configs/d20.py",
        "params": {"wte": 3_000_000, "lm_head": 1_000_000, "total": 4_000_000},
        "flops_per_token": 7.912e9,
        "tokens_per_step": STEP_TOKENS,
        "num_steps": STEPS,
        "wall_secs": 3540.0,
        "restarts": 2,
        "peak_flops": 8 * 989e12,
        "peak_flops_source": "bfloat16 peak of 8 x NVIDIA H100",
    }
    write(run / "base" / "run_info.json", info)
    config = {"model": {"depth": 20}, "base": {"num_steps": STEPS, "warmdown_frac": 0.4}}
    write(run / "base" / "config.json", config)
    lines = [train_line(s) for s in range(STEPS)]
    write_metrics(run, [*lines[:10], bpb_line(10, 0.9), *lines[10:], bpb_line(STEPS, 0.95)])
    samples = [{"prompt": "The sky is", "text": " blue."}, {"prompt": "Bad", "text": HOSTILE}]
    results = {"step": STEPS, "val_bpb": 0.96, "train_bpb": 0.8, "trigram_val_bpb": 1.28}
    write(run / "eval" / "base.json", results | {"eval_secs": 60.0, "samples": samples})
    ratios = {"tokens": {"ours": 50, "GPT-2": 55}, "bytes_per_token": {"ours": 4.4, "GPT-2": 4.0}}
    compression = {"vocab_size": {"ours": 300, "GPT-2": 50257}, "kinds": {"news": {"bytes": 220}}}
    compression["kinds"]["news"] |= ratios
    write(run / "eval" / "tokenizer.json", compression | {"missing": {"GPT-4": "no network"}})
    ranks = [[f"{i:02x}", i] for i in range(256)]
    write(run / "tokenizer" / "tokenizer.json", {"ranks": ranks, "special": {"<|bos|>": 256}})
    return run


def markdown(run):
    return make_report(run)[0].read_text()


def html(run):
    return make_report(run)[1].read_text()


def test_numbers_by_hand(run):
    text = markdown(run)
    for line in (
        "| val bpb | 0.9600 | - | - | - |",
        "| val bpb | 0.9600 | of the base model, lowest 0.9000 |",
        "| trigram | 1.2800 | the yardstick; ours is 25% lower |",
        "| Steps | 20 of 20 (complete) |",
        f"| Tokens | {show_amount(STEPS * STEP_TOKENS)} |",
        "| Loss of the last step | 7.1000 |",
        "| Final loss (moving average) | 7.6000 |",
        "| Lowest val bpb | 0.9000 (step 10) |",
        "| Tokens per second | 32,768 (median) |",  # 8192 tokens in 0.25 s, the first step left out
        "| MFU | 3.3% |",  # 7.912e9 * 32768 / 7.912e15
        "| First step | 30.0 s |",
        "| Restarts | 2 |",
        "| wall-clock | 1 h 00 min | all stages and evaluations |",  # 3540 s and 60 s
        "| cost | $24.00 | $24.00 an hour |",  # an hour of 8 x $3
        "| Git | 0123456789ab (modified, 42 lines differ) |",
        "| Started | 2026-09-21 14:13:20 UTC |",
        "| Devices | 8 x NVIDIA H100 80GB HBM3, 80.0 GiB each |",
        "| Packages | jax 0.10.2 |",
        "| news | 220 | 50 | 4.400 | 4.000 (+10.0%) |",
        "GPT-4 could not be loaded to compare with: no network",
        "257 ids, 1 of them special tokens.",
        "| wte | 3,000,000 | 75.0% |",
        "| all | 4,000,000 | 100.0% |",
        "| model.depth | 20 |",
        "| base.warmdown_frac | 0.4 |",
    ):
        assert line in text
    assert text.count("\nnot run\n") == 3  # mid, sft, rl
    assert "ARC-Easy" not in text


def test_later_stages_fill_their_columns(run):
    write(run / "eval" / "sft.json", {"arc_easy": 0.3876, "chatcore": 0.0884})
    write(run / "eval" / "sft_more.json", {"gsm8k": 0.0455})
    write(run / "eval" / "speed.json", {"tokens_per_sec": 1000, "device": "cpu"})
    write_metrics(run, [{"kind": "eval", "step": 60, "name": "pass", "gsm8k": 0.0758}], "rl")
    text = markdown(run)
    for line in (
        "| ARC-Easy | - | - | 0.3876 | - |",
        "| ChatCORE (6 tasks) | - | - | 0.0884 | - |",
        "| GSM8K | - | - | 0.0455 | 0.0758 |",
        "## Evaluation speed",
        "| tokens_per_sec | 1,000 |",
    ):
        assert line in text


def test_any_file_may_be_missing_or_broken(run, tmp_path):
    files = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    assert len(files) == 6
    for broken in (None, "", "{", "[1, 2]", '{"step": "x", "params": 3, "hardware": []}', "\udcff"):
        for file in files:
            copy = tmp_path / "copy"
            shutil.copytree(run, copy)
            if broken is None:
                (copy / file).unlink()
            else:
                (copy / file).write_bytes(broken.encode(errors="surrogateescape"))
            text = markdown(copy)
            assert "## Base model" in text
            if broken == "{":
                assert f"> {file.parent}/{file.name}" in text  # and it is said which
            shutil.rmtree(copy)


def test_empty_run_says_not_run_and_no_run_says_what_to_do(tmp_path):
    (tmp_path / "new").mkdir()
    assert markdown(tmp_path / "new").count("\nnot run\n") == 5  # the tokenizer and four stages
    with pytest.raises(UserError, match="run a stage of it first"):
        make_report(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_torn_and_repeated_lines(run):
    lines = [train_line(s) for s in (0, 1, 2)] + [train_line(1, loss=5.0), train_line(2, loss=4.0)]
    write_metrics(run, lines)
    with open(run / "base" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    text = markdown(run)
    assert "its last line is torn and was skipped" in text
    assert "| Loss of the last step | 4.0000 |" in text
    assert "| Steps | 3 of 20 (not complete) |" in text
    path = run / "base" / "metrics.jsonl"
    path.write_text("garbage\n" + path.read_text() + "\n")
    assert "2 unreadable lines were skipped, the first is line 1" in markdown(run)


def test_time_spent_waiting_for_batches(run):
    """A tenth of 30 s and of 19 x 0.25 s; lines from before it was measured say nothing."""
    assert "waiting" not in markdown(run)
    lines = [train_line(s, wait_secs=0.025 if s else 3.0) for s in range(STEPS)]
    write_metrics(run, [*lines, train_line(STEPS)])
    assert "| Devices waiting for batches | 10.0% of the time in steps |" in markdown(run)


def test_not_finite_and_mistyped_numbers(run):
    odd = [float("nan"), float("inf"), None, "x", [1], 10**400, True]
    lines = [
        train_line(s, loss=v, step_secs=v, wait_secs=v, grad_norm=v) for s, v in enumerate(odd)
    ]
    lines += [bpb_line(s, v) for s, v in enumerate(odd)]
    write_metrics(run, lines)
    write(run / "eval" / "base.json", {"val_bpb": "x", "eval_secs": None, "samples": [3, {}]})
    text = markdown(run)
    assert "| val bpb | - | - | - | - |" in text


def test_unknown_device_has_no_mfu_and_no_cost(run):
    info = json.loads((run / "base" / "run_info.json").read_text())
    info["hardware"]["device_kind"] = "NVIDIA Unheard Of"
    info["peak_flops"] = None
    write(run / "base" / "run_info.json", info)
    text = markdown(run)
    assert "| MFU | n/a |" in text
    assert "| cost | n/a | no price known |" in text


class Page(HTMLParser):
    """Tags, attributes, the text of list items and ids."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.items, self.in_item = set(), [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "li":
            self.items.append("")
            self.in_item = True

    def handle_endtag(self, tag):
        self.in_item &= tag != "li"

    def handle_data(self, data):
        if self.in_item:
            self.items[-1] += data


def test_html_shows_hostile_text_as_text_and_needs_no_other_host(run):
    write(run / "base" / "config.json", {"model": {"depth": HOSTILE}, "base": {"<b>": "<i>"}})
    text = html(run)
    page = Page(text)
    assert not page.tags & {"script", "img", "a", "link", "iframe", "object", "i"}
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "onerror", "onload", "style"}
    assert re.findall(r"https?://[^\"'\s<]*", text) == ["http://www.w3.org/2000/svg"] * 4
    assert "default-src 'none'" in text and "@import" not in text and "url(http" not in text
    assert page.items[0] == "The sky is blue."
    shown = (
        HOSTILE.replace("\ud800", "\ufffd").replace("\x07", "\ufffd").replace("\u202e", "\ufffd")
    )
    assert page.items[1].strip() == "Bad" + shown


def test_markdown_keeps_hostile_text_inside_its_fence(run):
    write(run / "base" / "config.json", {"model": {"depth": "a|b `c` <x>\n# d"}})
    outside, fence = [], None
    for line in markdown(run).splitlines():
        if fence is None and (opened := re.match("`{3,}", line)):
            fence = opened[0]
        elif fence and line.strip() == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    assert not any("alert(1)" in line or "# Title" in line for line in outside)
    assert "| model.depth | a\\|b \\`c\\` &lt;x&gt; # d |" in outside


def test_same_files_give_the_same_report_and_nothing_else_is_touched(run):
    def contents():
        return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    before = contents()
    make_report(run)
    first = contents()
    make_report(run)
    assert contents() == first
    assert {p: b for p, b in first.items() if p.parent != run / "report"} == before


def test_markdown_links_plots_that_exist_and_parse(run):
    links = re.findall(r"!\[.*\]\((.*)\)", markdown(run))
    assert links == [f"base_{n}.svg" for n in ("loss", "val_bpb", "grad_norm", "speed")]
    for link in links:
        assert ET.parse(run / "report" / link).getroot().get("class") == "chart"
    drawn = {p.name for p in (run / "report").iterdir()}
    assert drawn == {*links, "report.md", "report.html"}


def polylines(chart):
    root = ET.fromstring(chart.svg(standalone=True))
    inside = next(e for e in root if e.tag.endswith("}g"))
    lines = [e.get("points") or "" for e in inside if e.tag.endswith("polyline")]
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]


def test_chart_maps_values_linearly_into_its_frame():
    points = [(0, 2.0), (50, 3.0), (60, float("nan")), (100, 4.0)]
    ((a, b, c),) = polylines(Chart("x", "<T>", [Line("l", points)], from_zero=True))
    assert (a[0], c[0]) == (report_plots.LEFT, report_plots.RIGHT)
    assert b == pytest.approx(((a[0] + c[0]) / 2, (a[1] + c[1]) / 2), abs=0.11)
    assert report_plots.TOP < c[1] < a[1] < report_plots.BOTTOM
    # twice the value is twice the height above an axis that starts at zero
    height_a, height_c = report_plots.BOTTOM - a[1], report_plots.BOTTOM - c[1]
    assert height_c == pytest.approx(2 * height_a, abs=0.3)


def test_chart_keeps_the_extremes_of_a_long_noisy_line():
    points = [(i, 1.0 + (i % 7) / 10) for i in range(5000)]
    points[1234], points[4321] = (1234, 9.0), (4321, -9.0)
    ((*line,),) = polylines(Chart("x", "t", [Line("l", points)]))
    assert len(line) <= report_plots.MAX_POINTS
    xs = [x for x, _ in line]
    assert xs == sorted(xs)
    span = report_plots.RIGHT - report_plots.LEFT
    top, bottom = min(line, key=lambda p: p[1]), max(line, key=lambda p: p[1])
    assert top[0] == pytest.approx(report_plots.LEFT + span * 1234 / 4999, abs=0.1)
    assert bottom[0] == pytest.approx(report_plots.LEFT + span * 4321 / 4999, abs=0.1)


@pytest.mark.parametrize(
    "points", [[], [(0, 1.0)], [(0, 0.0), (1, 0.0)], [(5, -3.0), (6, -3.0)], [(0, 1e-9), (9, 1e9)]]
)
def test_degenerate_charts_are_drawn(points):
    svg = Chart("x", "t", [Line("l", points, "raw"), Line("m", [])], ("trigram", 1.0)).svg(True)
    assert "nan" not in svg and "inf" not in svg
    ET.fromstring(svg)


@pytest.mark.parametrize(
    "low,high,labels",
    [
        (0, 1000, ["0", "200", "400", "600", "800", "1k"]),
        (0.81, 1.29, ["0.9", "1.0", "1.1", "1.2"]),
        (0, 2.5e6, ["0", "500k", "1M", "1.5M", "2M", "2.5M"]),
        (-0.02, 0.03, ["-0.02", "-0.01", "0.00", "0.01", "0.02", "0.03"]),
    ],
)
def test_ticks_are_round(low, high, labels):
    assert [label for _, label in report_plots._ticks(low, high, 5)] == labels


def test_durations_and_amounts():
    assert [show_duration(s) for s in (0, 59.94, 61, 3600, 13_860.4, None)] == [
        *("0.0 s", "59.9 s", "1 min 01 s", "1 h 00 min", "3 h 51 min", "unknown")
    ]
    assert [show_amount(n) for n in (999, 560_988_160, 11.2e9)] == ["999", "561M", "11.2B"]


def test_another_evaluation_at_the_same_step_hides_nothing(run):
    before = markdown(run)
    assert "| Lowest val bpb | 0.9000 (step 10) |" in before
    with open(run / "base" / "metrics.jsonl", "a") as file:
        for step in (10, STEPS):
            file.write(json.dumps({"kind": "eval", "name": "other", "step": step}) + "\n")
    assert markdown(run) == before


def test_a_model_that_loses_to_the_yardstick_is_told_so(run):
    write(run / "eval" / "base.json", {"val_bpb": 1.5, "trigram_val_bpb": 1.25})
    assert "the yardstick; ours is 20% higher" in markdown(run)


CALL = "<|python_start|>12+30<|python_end|><|output_start|>42<|output_end|>"


def chat_score(num_correct, num_problems, examples=(), **values):
    score = {"accuracy": num_correct / num_problems, "num_correct": num_correct}
    score |= {"num_problems": num_problems, "seconds": 61.0, "ended": {}, "examples": examples}
    return score | {"pass_at_k": [], "pass_at_k_unbiased": []} | values


@pytest.fixture
def chat_run(run):
    """All stages: SFT scored at two of its four tasks, RL at one with several answers each."""
    asked = {"prompt": "What is 12+30?", "expected": f"{CALL}It is 42.\n#### 42"}
    examples = [asked | {"answer": f"{CALL}#### 42", "correct": True}]
    examples += [
        asked | {"answer": "<|python_start|>111", "correct": False},
        asked | {"answer": ""},
    ]
    tasks = {
        "arithmetic test": chat_score(64, 256, examples, ended={"stop": 250, "length": 6}),
        "arc_easy test[:100]": chat_score(100, 100),
    }
    settings = {"eval.chat_problems": 256, "eval.chat_samples": 1, "eval.chat_temperature": 0.0}
    missing = ["mmlu", "gsm8k"]
    sft = {"step": 4, "tasks": tasks, "eval_secs": 122.0, "settings": settings}
    sft |= {"arithmetic": 0.25, "arc_easy": 1.0, "chatcore_5": 0.5, "chatcore_missing": missing}
    write(run / "eval" / "sft_chat.json", sft)
    specs = ["arithmetic test", "arc_easy test[:100]", "mmlu test", "riddles test"]
    own = {"packing": "rows", "mixture": ["arithmetic train[:64]", "chitchat train x2"]}
    write(run / "sft" / "config.json", {"sft": own, "eval": {"chat_tasks": specs}})
    info = json.loads((run / "base" / "run_info.json").read_text())
    write(run / "sft" / "run_info.json", info | {"num_steps": 5, "parent": "mid, step 7"})
    counts = {"conversations": 1200, "cut_at_a_turn": 3, "dropped": 1}
    write(run / "sft" / "train_conversations" / "conversations.json", {"counts": counts})
    write_metrics(run, [train_line(s, tokens=100 + s) for s in range(5)], "sft")
    riddles = chat_score(9, 36, pass_at_k=[0.1, 0.25], pass_at_k_unbiased=[0.125, 0.25])
    rl = {"step": 20, "tasks": {"riddles test": riddles}, "eval_secs": 5.0, "riddles": 0.25}
    write(run / "eval" / "rl_chat.json", rl)
    own = {"questions_per_step": 16, "samples": 8}
    write(run / "rl" / "config.json", {"rl": own})
    lines = []
    for step in range(20):
        practice = {"reward": step / 20, "answer_tokens": 50.0 - step, "rollout_secs": 3.0}
        lines.append(train_line(step, tokens=500, **practice))
    for step, share in ((10, 0.5), (20, 0.4)):
        passes = {f"pass@{k}": share + k / 100 for k in range(1, 9)}
        lines.append({"kind": "eval", "name": "pass_at_k", "step": step, **passes})
    write_metrics(run, lines, "rl")
    return run


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_a_chat_evaluation_by_hand(chat_run):
    text = section(markdown(chat_run), "Finetuning (SFT)")
    for line in (
        "### Chat evaluation at step 4",
        "The first 256 problems of each; one answer each; the likeliest token each time.",
        "> The stage itself is at step 5.",
        "> Not scored: mmlu test, riddles test.",
        # sqrt(0.25 * 0.75 / 256) = 0.02706
        "| Arithmetic | 25.00% | 2.71% | 64 | 256 | 1 min 01 s | finished 250, cut off 6 |",
        "| ARC-Easy test\\[:100\\] | 100.00% | - | 100 | 100 | 1 min 01 s | - |",
        "<details open><summary>Arithmetic: 3 answers, 1 right</summary>",
        "What is 12+30?\n\nright: [12+30 -> 42]#### 42\n```",
        "What is 12+30?\n\nWRONG: [111 ...]\nexpected: [12+30 -> 42]It is 42.\n#### 42\n```",
        "WRONG: (nothing)\n",
    ):
        assert line in text
    assert "No ChatCORE without MMLU, GSM8K." in text
    page = Page(html(chat_run))
    assert "What is 12+30?right[12+30 -> 42]#### 42" in page.items
    assert "What is 12+30?wrong[111 ...]expected[12+30 -> 42]It is 42.\n#### 42" in page.items


def test_the_stages_after_base_by_hand(chat_run):
    text = markdown(chat_run)
    sft, rl = section(text, "Finetuning (SFT)"), section(text, "Reinforcement")
    for line in (
        "| Started from | mid, step 7 |",
        "| Trained tokens | 510 |",  # 100 + 101 + 102 + 103 + 104
        "| Conversations | 1,200 (3 cut at a turn, 1 dropped) |",
        "| Trained tokens per second | 410 (median) |",  # of 101 .. 104, in 0.25 s
        "| MFU | n/a |",  # batches differ in width
        "| Evaluation | 2 min 02 s |",
        "| sft.mixture | arithmetic train\\[:64\\], chitchat train x2 |",
    ):
        assert line in sft
    assert "| Tokens |" not in sft and "model.depth" not in sft
    for line in (
        "| Questions | 320, 8 answers each |",
        "| pass@1 | 41.00% (highest 51.00%, step 10) |",
        "| pass@8 | 48.00% (highest 58.00%, step 10) |",
        "| Writing and grading answers | 1 min 00 s |",
        "| Practice | first 2 steps | last 2 steps |",
        "| mean reward | 0.0250 | 0.9250 |",
        "| tokens of an answer | 49.5 | 31.5 |",
        "| Unbiased estimate | pass@1 | pass@2 |",
        "| riddles | 12.50% | 25.00% |",
    ):
        assert line in rl
    names = re.findall(r"\((rl_.*)\.svg\)", rl)
    curves = ("pass_at_k", "reward", "answer_tokens", "grad_norm", "speed")
    assert names == [f"rl_{name}" for name in curves]  # no curve of the loss
    drawn = ET.parse(chat_run / "report" / "rl_pass_at_k.svg").getroot().itertext()
    assert [label for label in drawn if label.startswith("pass@") and "on" not in label] == [
        *("pass@1", "pass@4", "pass@8")
    ]


def test_the_report_ends_with_all_metrics_time_and_cost(chat_run):
    end = markdown(chat_run).split("\n## ")[-1].splitlines()
    rows = [line for line in end if line.startswith("| ")]
    assert rows[0] == "| Metric | BASE | MID | SFT | RL |"
    assert rows[2:-1] == [
        "| val bpb | 0.9600 | - | - | - |",
        "| ARC-Easy | - | - | 1.0000 | - |",
        "| Arithmetic | - | - | 0.2500 | - |",
        "| riddles | - | - | - | 0.2500 |",  # sqrt(0.25 * 0.75 / 36) = 0.0722
        "| ChatCORE (5 tasks) | - | - | 0.5000 | - |",
    ]
    assert end[-3] == (
        "Binomial standard error, at most: Arithmetic ±0.0271 (256 problems), "
        "riddles ±0.0722 (36 problems)."
    )
    # 3540 + 60 of base, 3540 + 122 of SFT, RL's last line and 5 s; RL's machine is the run's
    hours = (3600 + 3662 + 34.75 + 5) / 3600
    assert end[-1] == f"Total wall-clock time: 2 h 01 min. Cost: ${24 * hours:.2f}."


def test_evaluations_of_one_stage_add_their_time(run):
    before = "| wall-clock | 1 h 00 min |"
    assert before in markdown(run)
    tasks = {"gsm8k test": chat_score(1, 4)}
    write(run / "eval" / "base_chat.json", {"step": 20, "tasks": tasks, "eval_secs": 600.0})
    text = markdown(run)
    assert before.replace("00", "10") in text
    assert "| Evaluation | 11 min 00 s |" in text  # 60 and 600


@pytest.mark.parametrize("is_whole", [True, False])
def test_core_task_by_task(run, is_whole):
    scores = {"copa": {"accuracy": 0.8, "centered": 0.6, "num_examples": 100}}
    scores |= {"squad": {"accuracy": 0.2, "centered": 0.2, "num_examples": 400}}
    found = {"tasks": scores, "max_per_task": 500, "missing": [], "partial": {}}
    if is_whole:
        found["core"] = 0.4
    else:
        found |= {"core_partial": 0.4, "missing": ["boolq"], "partial": {"copa": "100 of 120"}}
    values = {k: v for k, v in found.items() if k.startswith("core")} | {"core_tasks": found}
    write(run / "eval" / "base.json", values | {"step": 20})
    text = markdown(run)
    for line in (
        "At most 500 examples a task.",
        "| copa | 80.00% | 4.00% | 0.6000 | 100 |",  # sqrt(0.8 * 0.2 / 100)
        "| squad | 20.00% | 2.00% | 0.2000 | 400 |",
    ):
        assert line in text
    if is_whole:
        assert "### CORE at step 20" in text and "| CORE |  |  | 0.4000 |  |" in text
        assert "| CORE | 0.4000 | - | - | - |" in text and "| CORE | 0.4000 | of the base" in text
    else:
        assert not re.search(r"\|\s*CORE\s*\||# CORE", text)
        assert "> This is not CORE: missing are boolq; copa has 100 of 120 examples." in text
        assert "| boolq | missing | - | - | - |" in text
        assert "| mean of these 2 tasks |  |  | 0.4000 |  |" in text
        assert "| Mean of some CORE tasks | 0.4000 | - | - | - |" in text


STRIDE = 13  # one in so many of all odd values in all places


def replaced(value, new):
    """Copies of a JSON value, each with another of its parts replaced."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        copy = value.copy()
        for other in (new, *(replaced(part, new) if isinstance(part, dict | list) else ())):
            copy[key] = other
            yield copy


def test_no_value_anywhere_breaks_the_report(chat_run, monkeypatch):
    monkeypatch.setattr(report, "code_size", lambda root: dict(lines=1, files=1, chars=1))
    odd = [None, -1, 1e400, float("nan"), 10**400, True, "x", [], {}, [{}], {"a": [1]}]
    tried = 0
    for file in sorted(chat_run.rglob("*.json*")):
        text = file.read_text()
        if file.name == "tokenizer.json":
            continue
        kept, last = "", text
        if file.suffix == ".jsonl":
            kept, last = text.splitlines(keepends=True)[0], text.splitlines()[-1]
        for new in odd:
            for value in replaced(json.loads(last), new):
                tried += 1
                if tried % STRIDE:
                    continue
                file.write_text(kept + json.dumps(value))
                blocks = report.report_blocks(report.read_run(chat_run))
                assert "## Summary" in report.to_markdown(blocks)
                assert "<h2>Summary</h2>" in report.to_html(blocks, "title")
        file.write_text(text)
    assert tried > 1000


@pytest.mark.parametrize(
    "text,shown",
    [
        (f"So {CALL}, {CALL}", "So [12+30 -> 42], [12+30 -> 42]"),
        ("<|python_start|>1<2\n<|python_end|> no", "[1<2\n] no"),
        ("<|python_start|>12+", "[12+ ...]"),
        ("<|python_start|>1+1<|python_end|><|output_start|>2", "[1+1 -> 2 ...]"),
        ("<|python_start|>1<|python_start|>2<|python_end|>", "[1 ...][2]"),
        ("<|output_end|> [1] <|bos|>", "<|output_end|> [1] <|bos|>"),
    ],
)
def test_tool_calls_are_readable(text, shown):
    assert readable(text) == shown


def test_standard_error_is_the_spread_of_repeated_evaluations():
    n, p = 256, 0.14
    shares = [k / n for k in range(n + 1)]
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    spread = math.sqrt(sum(c * (s - p) ** 2 for c, s in zip(chances, shares, strict=True)))
    assert standard_error(p, n) == pytest.approx(spread, rel=1e-9)
    assert round(spread, 3) == 0.022
    assert [standard_error(*pair) for pair in ((0.0, 9), (1.0, 9), (0.5, 0), (None, 9))] == [
        *(None, None, None, None)
    ]


def test_a_few_ks_stand_for_many():
    assert curve_ks(range(1, 9), most=3) == [1, 4, 8]
    assert curve_ks(range(1, 7), most=5) == [1, 2, 4, 6]
    assert curve_ks({1}, most=3) == [1] and curve_ks(set(), most=3) == []

"""The report: its numbers by hand, runs that are half done, and text that tries to break out."""

import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path
from statistics import median

import pytest

from nanochat_jax.report.page import make_report
from nanochat_jax.report.plots import draw
from tests.report.parts import FACTS, HARDWARE, steps, write, write_stage

HOSTILE = (
    "</pre></dd><script>alert(1)</script><img src=//evil.example onerror=x> &amp; ```\n# Title\n"
    "````` | a | b | [x](javascript:y) \x07 \u202e done"
)
CALL = "<|python_start|>12+30<|python_end|><|output_start|>42<|output_end|>"


def task(right, problems, examples, passes):
    score = {"accuracy": right / problems, "num_correct": right, "num_problems": problems}
    score |= {"seconds": 61.0, "ended": {"stop": problems}, "examples": examples}
    return score | {"pass_at_k_unbiased": passes}


@pytest.fixture
def run(tmp_path):
    """All stages of a run on 8 H100s; RL was killed after 10 of its 20 steps."""
    run = tmp_path / "runs" / "d20"
    write(run / "tokenizer" / "run_info.json", FACTS | {"wall_secs": 60.0})
    sizes, ratios = {"ours": 300, "GPT-2": 50257}, {"ours": 4.4, "GPT-2": 4.0}
    kinds = {"news": {"bytes": 220, "tokens": {"ours": 50}, "bytes_per_token": ratios}}
    write(run / "eval" / "tokenizer.json", {"vocab_size": sizes, "missing": {}, "kinds": kinds})
    bpb = [{"kind": "eval", "step": s, "name": "bpb", "val_bpb": 1 - s / 100} for s in (10, 20)]
    write_stage(run, "base", [*steps(20, wait_secs=0.025), *bpb])
    samples = [{"prompt": "The sky is", "text": " blue."}, {"prompt": "Bad", "text": HOSTILE}]
    evaluated = {"step": 20, "val_bpb": 0.75, "core": 0.25, "eval_secs": 60.0, "samples": samples}
    evaluated |= {"answers": [{"prompt": "Hi", "text": " there."}]}
    scores = {"copa": {"accuracy": 0.8, "centered": 0.6, "num_examples": 100}}
    core = {"tasks": scores, "missing": [], "partial": {}, "core": 0.25}
    write(run / "eval" / "base.json", evaluated | {"core_tasks": core})
    write_stage(run, "mid", steps(5), num_steps=5, parent="base, step 20")
    write_stage(run, "sft", steps(5), seed=43, num_steps=5, parent="mid, step 5")
    write(run / "sft/train_conversations/conversations.json", {"counts": {"conversations": 1200}})
    right = {"prompt": "12+30?", "answer": f"{CALL}#### 42", "expected": "42", "correct": True}
    examples = [right, right | {"answer": HOSTILE, "correct": False}]
    for name, solved, said in (("mid", 32, "Hello."), ("sft", 64, f"Hi! {CALL}")):
        tasks = {"arithmetic test": task(solved, 256, examples, [0.125, 0.25, 0.5])}
        tasks |= {"riddles test[:9]": task(9, 9, [], [])}
        chat = {"step": 5, "tasks": tasks, "eval_secs": 122.0, "chatcore": solved / 256}
        chat |= {"settings": {"eval.chat_samples": 1}, "answers": [{"prompt": "Hi", "text": said}]}
        write(run / "eval" / f"{name}_chat.json", chat)
    practice = steps(10, reward=0.5, answer_tokens=30.0)
    practice[-1]["reward"] = 0.75
    passes = [{"kind": "eval", "step": s, "pass@1": 0.4 + s / 100, "pass@2": 0.6} for s in (0, 10)]
    write_stage(run, "rl", [*practice, *passes], wall_secs=1.0)
    return run


def pages(run):
    """Markdown and HTML of the report, without its curves, whose drawing takes a moment."""
    return [path.read_text() for path in make_report(run, draw=lambda title, curves: "<svg/>")]


def test_numbers_by_hand(run):
    text = pages(run)[0]
    for line in (
        "A chat model with 4M parameters in 20 layers",
        "has read 164k tokens of the text",  # 20 x 8,192
        "RL is not finished: 10 of 20 steps are done.",
        "| Bits per byte (less is better) | 0.7500 | - | - | - |",
        # sqrt(0.125 x 0.875 / 256) = 0.0207, sqrt(0.25 x 0.75 / 256) = 0.0271
        "| Arithmetic | - | 12.5% ± 2.1% | 25.0% ± 2.7% | - |",
        "| riddles test\\[:9\\] | - | 100.0% | 100.0% | - |",
        "| Tokens | 163,840 | 40,960 | 510 | 1,045 |",  # 100 + ... + 104, 100 + ... + 109
        "| Conversations | - | - | 1,200 | - |",
        "| Mean reward, last tenth of steps | - | - | - | 0.750 |",
        "| pass@1 on validation questions | - | - | - | 50.0% |",
        # 8,192 in 0.25 s; SFT's batches differ in width: the median of 101 to 104, in 0.25 s
        "| Tokens per second, median | 32,768 | 32,768 | 410 | 420 |",
        "| MFU | 3.3% | 3.3% | - | - |",  # 7.912e9 x 32,768 / 7.912e15
        "| Devices waiting for batches | 1.4% | - | - | - |",  # 20 x 0.025 of 34.75 s
        "| base | 1h00m | 1m00s | 33% | $24.00 |",  # an hour of 8 x $3
        "| rl | 32s | 0s | 0% | $0.21 |",  # the clock of the last line: 32.25 s
        "| news | 220 | 50 | 4.400 | 4.000 |",
        "| Arithmetic | 25.0% ± 2.7% | 64 of 256 | 1m01s | 256 finished | 25.0% in 2 |",
        "| run.seed | 42 (BASE), 42 (MID), 43 (SFT), 42 (RL) |",
        "    python scripts/chat_web.py --config=configs/d20.py --config.run.name=mine",
        "    python scripts/chat_cli.py --config=configs/d20.py --config.run.name=mine",
    ):
        lines = [" ".join(text.split("\n"))] if line[0].isalpha() else text.split("\n")
        assert any(line in found for found in lines), line


def test_the_same_prompt_is_shown_after_each_stage(run):
    _, shown = pages(run)[0].split("## What it says")
    said = "- BASE: there.\n- MID: Hello.\n- SFT: Hi! \\[12+30\\] -&gt; \\[42\\]\n"
    assert f"**Hi**\n\n{said}" in shown
    assert shown.index("**Hi**") < shown.index("**The sky is**\n\n- BASE: blue.\n")


def test_some_tasks_of_core_are_not_core(run):
    scores = {"copa": {"accuracy": 0.8, "centered": 0.6, "num_examples": 100}}
    core = {"tasks": scores, "missing": ["boolq"], "partial": {"copa": "100 of 120"}}
    write(run / "eval" / "base.json", {"step": 20, "core_partial": 0.6, "core_tasks": core})
    text = pages(run)[0]
    assert "not CORE" in text and "boolq, copa: 100 of 120" in text
    assert "| CORE |" not in text and "| Mean of some CORE tasks | 0.6000 | - | - | - |" in text


def test_old_evaluations_and_unknown_prices_are_told(run):
    write_stage(run, "base", steps(15), hardware=HARDWARE | {"device_kind": "Unheard Of"})
    text = pages(run)[0]
    assert "An evaluation of BASE, now at step 15, is of step 20." in text
    assert re.search(r"\| all \|.*\| unknown \|", text)


def test_any_file_may_be_missing(run):
    for file in list(run.rglob("*.json*")):
        content = file.read_text()
        file.unlink()
        assert "## Details" in pages(run)[0], file
        file.write_text(content)


def test_a_damaged_file_is_told_and_the_rest_is_shown(run):
    file, evaluation = run / "base" / "metrics.jsonl", run / "eval" / "base.json"
    lines = file.read_text().splitlines(keepends=True)
    lines[3], lines[7] = "\0\0\n", '{"kind": "train", "step": "7"}\n'
    file.write_text("".join(lines) + '{"kind": "train", "st')
    evaluation.write_text('{"val_bpb": 0.')
    text = " ".join(pages(run)[0].split())
    assert str(file) in text and "2 of 22; the first is line 4" in text
    assert str(evaluation) in text
    assert "| Tokens | 147,456 | 40,960 |" in text  # 18 of 20 steps


def test_a_run_that_has_only_begun(run, tmp_path):
    info, started = FACTS | {"wall_secs": 1.0}, tmp_path / "started"
    write(started / "tokenizer" / "run_info.json", info)
    assert "only a tokenizer" in pages(started)[0]
    write(started / "base" / "run_info.json", info)
    assert "BASE is not finished: 0 of 20" in pages(started)[0]


def test_a_run_that_never_existed_is_an_error(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "report.py"
    command = [sys.executable, str(script), "--config=configs/tiny.py"]
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert not list(tmp_path.iterdir())


def test_html_shows_hostile_text_as_text_and_needs_no_other_host(run):
    write_stage(run, "mid", steps(5), command=HOSTILE, parent=HOSTILE, layout=HOSTILE)
    text = make_report(run)[1].read_text()
    tags = {match.lower() for match in re.findall(r"<([a-zA-Z]+)", text)}
    assert not tags & {"script", "img", "a", "link", "iframe", "object", "image"}
    assert not re.search(r"<[^>]*\s(src|on\w+|href|xlink:href)=(?!\"#)", text)
    assert set(re.findall(r"https?://([^/\"'\s<]*)", text)) == {"www.w3.org"}  # names of formats
    shown = HOSTILE.replace("\x07", "\ufffd").replace("\u202e", "\ufffd")
    said = [unescape(words) for words in re.findall("<dd>(.*?)</dd>", text, re.S)]
    assert said.count(shown) == 3  # a sample, two wrong answers


def test_hostile_text_is_harmless_in_markdown(run):
    write_stage(run, "mid", steps(5), parent=HOSTILE, layout=HOSTILE)
    lines = [line for line in pages(run)[0].splitlines() if "alert" in line or "Title" in line]
    assert len(lines) == 5
    for line in lines:
        assert re.match(r"- |\| (parent|layout) \|", line)
        assert not re.search(r"<(?!/?(details|summary))|(?<!\\)[`\[]|\\\\", line)
        assert len(re.findall(r"(?<!\\)\|", line)) == (3 if line.startswith("|") else 0)


def test_same_files_give_the_same_report_and_nothing_else_is_touched(run):
    def contents():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before, pages_once, once, pages_again = contents(), pages(run), contents(), pages(run)
    assert pages_once == pages_again and once == contents()
    assert {p: raw for p, raw in once.items() if p.parent != run / "report"} == before


def test_markdown_links_curves_that_exist_and_parse(run):
    links = re.findall(r"!\[.*\]\((.*)\)", make_report(run)[0].read_text())
    assert {"base_val_bpb.svg", "rl_reward.svg", "rl_pass_at_k.svg", "sft_loss.svg"} < set(links)
    assert "rl_loss.svg" not in links
    assert {ET.parse(run / "report" / link).getroot().tag[-4:] for link in links} == {"}svg"}


def test_a_long_noisy_curve_is_small_and_keeps_its_spike():
    points = [(step, 1.0 + (step * 7919 % 13) / 100) for step in range(20_000)]
    points[12_345] = (12_345, 3.0)
    path = max(re.findall(' d="([^"]*)"', draw("", {"": points})), key=len)
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]  # from the top
    assert len(path) < 200_000
    assert min(heights) < 0.2 * median(heights)


@pytest.mark.parametrize("values", [(0.0, 0.0), (-3.0, -3.0), (1e-9, 1e9), (math.nan, 1.0)])
def test_odd_curves_are_drawn(values):
    ET.fromstring(draw("<t> & t", {"a": list(enumerate(values)), "b": [(0, 1.0), (5, 2.0)]}))

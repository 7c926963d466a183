"""The live page: what it says of runs in every state, that it only reads, and who may ask."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from nanochat_jax.report import live, plots
from nanochat_jax.report.read import read_stage
from tests.report.parts import FACTS, steps, write, write_stage

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders of runs; what an earlier test has shown is forgotten, and curves are not drawn."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(live, "STAGES", live.Kept())
    monkeypatch.setattr(live, "CHARTS", live.Kept())
    monkeypatch.setattr(plots, "draw", lambda title, curves, **_: f"<svg>{dict(curves)}</svg>")
    return tmp_path / "runs"


@pytest.fixture
def site(runs):
    return TestClient(Starlette(routes=live.ROUTES), raise_server_exceptions=False)


def row(site, run):
    """The cells of a run in the list."""
    found = [r for r in site.get("/report").text.split("<tr>") if f'value="{run}"' in r]
    cells = re.findall(r"<td.*?>(.*?)</td>", found[0].split("</tr>")[0], re.DOTALL)
    return [re.sub("<.*?>", "", cell).strip() for cell in cells]


def grow_old(run, secs):
    for file in run.rglob("*.json*"):
        os.utime(file, (time.time() - secs, time.time() - secs))


def test_the_list_says_what_each_run_is_doing(runs, site):
    bpb = {"kind": "eval", "step": 5, "name": "bpb", "val_bpb": 0.95, "eval_secs": 10.0}
    write_stage(runs / "a", "base", [*steps(10), bpb])
    # 10 steps to go: 0.25 s each, and 10 s of evaluation for every 10 steps
    assert row(site, "a")[:7] == ["BASE", "training", "10 of 20", "8.6", "0.95", "32,768", "12s"]
    grow_old(runs / "a", 300)
    assert row(site, "a")[1] == "stopped" and row(site, "a")[6:] == ["-", "5m00s ago"]
    write(runs / "a" / "base" / "result.json", {"step": 10})
    assert row(site, "a")[1] == "finished"
    write_stage(runs / "a", "mid")
    assert row(site, "a")[:3] == ["MID", "training", "0 of 20"]


def test_a_run_is_given_three_times_its_longest_evaluation(runs, site):
    bpb = {"kind": "eval", "step": 5, "name": "core", "core": 0.1, "eval_secs": 500.0}
    write_stage(runs / "a", "base", [*steps(10), bpb])
    for age, state in ((1_490, "training"), (1_510, "stopped")):
        grow_old(runs / "a", age)
        assert row(site, "a")[1] == state


def test_the_time_left_of_the_run_counts_the_stages_to_come(runs, site):
    write_stage(runs / "a", "base", steps(10), later_tokens=32_768 * 100.0)
    assert "<dt>of the run, about</dt><dd>1m42s</dd>" in site.get("/report/a").text  # 2.5 s + 100 s


def test_a_page_follows_its_file_and_leaves_out_a_line_that_is_being_written(runs, site):
    lines = [json.dumps(line) + "\n" for line in steps(20)]
    write_stage(runs / "a", "base", steps(3))
    file = runs / "a" / "base" / "metrics.jsonl"
    for done in (3, 4, 20):
        file.write_text("".join(lines[:done]) + '{"kind": "tr')
        page = site.get("/report/a").text
        assert f"step {done} of 20" in page and "damaged" not in page
    file.write_text("".join(lines[:5]))  # continued from a checkpoint
    assert "step 5 of 20" in site.get("/report/a").text


def test_curves_come_first_while_they_grow_and_last_when_the_stage_is_done(runs, site):
    write_stage(runs / "a", "base", steps(3))
    for first, last in (("went", "took"), ("took", "went")):
        headings = re.findall("<h2>How .* (went|took)</h2>", site.get("/report/a").text)
        assert headings == [first, last]
        write(runs / "a" / "base" / "result.json", {"step": 3})


def busy(secs):
    began = time.thread_time()
    while time.thread_time() < began + secs:
        pass


def test_what_is_slow_to_make_is_made_seldom():
    kept, made = live.Kept(), []

    def make():
        busy(0.02)
        made.append(time.monotonic())
        return len(made)

    while len(made) < 3:  # its source never rests
        kept.get("name", time.monotonic(), make)
    assert made[2] - made[1] >= 0.02 / live.SHARE
    time.sleep(0.5)
    assert [kept.get("name", "rests", make) for _ in range(3)] == [4, 4, 4]


def test_curves_come_to_the_last_step_though_reading_is_slow(runs, site, monkeypatch):
    def slow(*args):
        busy(0.02)
        return read_stage(*args)

    monkeypatch.setattr(live, "read_stage", slow)
    for done, wait in ((2, 0.0), (3, 0.0), (3, 0.6)):
        write_stage(runs / "a", "base", steps(done)) if not wait else time.sleep(wait)
        page = site.get("/report/a").text
    assert "(2, 9.3)" in page  # the moving average of step 2


@pytest.mark.parametrize("begun", [(), ("tokenizer",), ("tokenizer", "base")])
def test_runs_that_have_hardly_begun_have_a_page(runs, site, begun):
    (runs / "a" / "tokenizer").mkdir(parents=True)
    for stage in begun:
        write(runs / "a" / stage / "run_info.json", FACTS)
    assert site.get("/report/a").status_code == 200 and len(row(site, "a")) == (8 if begun else 1)


def test_a_damaged_run_is_told_and_harms_no_other(runs, site):
    write_stage(runs / "good", "base", steps(3))
    write_stage(runs / "bad", "base", steps(3), hardware=17)
    write_stage(runs / "torn", "base", steps(3))
    (runs / "torn" / "base" / "run_info.json").write_text("{")
    assert row(site, "good")[2] == "3 of 20" and row(site, "torn")[1] == "training"
    notes = re.findall('<p class="note">(.*?)</p>', site.get("/report").text)
    assert ["bad" in note or "torn" in note for note in notes] == [True, True]
    assert [site.get(f"/report/{run}").status_code for run in ("good", "bad", "torn")] == [
        200,
        500,
        200,
    ]
    assert str(runs / "torn" / "base" / "run_info.json") in site.get("/report/torn").text


def test_chosen_runs_share_their_axes(runs, site):
    write_stage(runs / "a", "base", steps(2))
    write_stage(runs / "b", "base", steps(3))
    write_stage(runs / "b", "rl", steps(3, reward=0.5))
    page = site.get("/report", params={"run": ["b", "a", "none"]}).text
    loss, reward = (
        {0: [(s, v(s)) for s in range(3)]} for v in (lambda s: 9.5 - s / 10, lambda _: 0.5)
    )
    assert f"<svg>{loss | {1: [(0, 9.5), (1, 9.4)]}}</svg>" in page
    assert f"<svg>{reward | {1: []}}</svg>" in page
    swatch = '<a href="/report/{}">.*\\n <span class="swatch" style="background: {}">'
    for name, colour in zip("ba", plots.COLOURS, strict=False):
        assert re.search(swatch.format(name, colour), page)


def test_names_and_texts_of_a_run_stay_text(runs, site):
    name = f'"{HOSTILE.replace("/", "")} $x^2$ 100% ä'
    write_stage(runs / name, "base", steps(3), command=HOSTILE, parent=HOSTILE)
    link = re.findall('href="(/report/[^"]*)"', site.get("/report").text)[0]
    for page in (site.get(link), site.get("/report", params={"run": name})):
        assert page.status_code == 200
        assert re.findall("<script.*?>", page.text) == ['<script src="/report/page/live.js" defer>']
        assert not re.search(r"\son\w+=|(src|href)=.(https?:|//)", page.text)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self';" in policy and "http" not in policy


@pytest.mark.parametrize(
    "path", ["nothing", "..", "%2e%2e", "..%2fsecret", "%2e%2e%2fsecret", "a%00", "a%2f..", "page"]
)
def test_only_runs_of_the_list_have_a_page(runs, site, path):
    write_stage(runs / "a", "base", steps(3))
    write_stage(runs.parent / "secret", "base", steps(3))
    answer = site.get(f"/report/{path}")
    assert answer.status_code in (404, 200) and "step 3 of 20" not in answer.text
    assert answer.status_code == 404 or path in ("..", "%2e%2e")  # "/" to a client, not to us


def test_watching_touches_nothing(runs, site):
    write_stage(runs / "a", "base", steps(3))

    def state():
        files = runs.parent.rglob("*")
        return {f: (f.stat().st_mtime_ns, f.is_file() and f.read_bytes()) for f in files}

    before = state()
    for path in ("/report", "/report/a", "/report?run=a", "/report/b"):
        site.get(path)
    assert state() == before


def test_of_a_long_run_few_points_are_kept_and_every_spike(runs):
    lines = steps(20_000)
    lines[12_345]["grad_norm"] = 77.0
    write_stage(runs / "a", "base", lines)
    stage = read_stage(runs / "a", "base")
    assert max(map(len, stage.curves.values())) <= 1_000
    assert (12_345, 77.0) in stage.curves["grad_norm"]
    tail = read_stage(runs / "a", "base", tail_bytes=10_000)
    assert tail.facts["steps_done"] == stage.facts["steps_done"] == 20_000
    assert not tail.problems and 10 < len(tail.curves["loss"]) < 100


@pytest.fixture
def served(runs):
    """(address, process) of the script, and the process with which it ends."""
    write_stage(runs / "tiny", "base", steps(3))
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeps) as other:
        command = [sys.executable, str(ROOT / "scripts" / "report.py"), "--serve", "--port=0"]
        command += ["--config=configs/tiny.py", f"--until={other.pid}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                yield process.stdout.readline().split()[-1], process, other
            finally:
                other.kill()
                other.wait()


def test_the_script_serves_this_machine_until_another_process_ends(served):
    address, process, other = served
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/report/tiny", address)
    with urllib.request.urlopen(address) as answer:
        assert "step 3 of 20" in answer.read().decode()
    with urllib.request.urlopen(address.partition("/report")[0]) as answer:
        assert answer.url.endswith("/report")
    other.kill()
    other.wait()
    assert process.wait(timeout=20) == 0


def test_a_name_that_leads_to_this_machine_is_not_answered(served):
    wrong = urllib.request.Request(served[0], headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(wrong)
    assert refused.value.code == 403 and b"step" not in refused.value.read()
    refused.value.close()


def test_a_port_that_is_taken_is_one_line(served):
    port = served[0].split(":")[2].split("/")[0]
    command = [sys.executable, "scripts/report.py", "--serve", f"--port={port}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and port in done.stderr


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_in_a_browser_the_page_follows_and_the_reader_keeps_the_place(served, runs):
    driver = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="finds barriers")
    address, process, _ = served
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab, wrong = browser.new_page(viewport={"width": 400, "height": 500}), []
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(address)
        place = (
            "[scrollY, document.querySelectorAll('[open]').length, document.activeElement.nodeName]"
        )
        tab.evaluate("document.querySelector('details:last-of-type').open = true; scrollTo(0, 900)")
        tab.evaluate("document.querySelector('summary').focus({ preventScroll: true })")
        before = tab.evaluate(place)
        write_stage(runs / "tiny", "base", steps(12))
        driver.expect(tab.locator(".now")).to_contain_text("step 12 of 20", timeout=20_000)
        assert tab.evaluate(place) == before and before[1:] == [1, "SUMMARY"]
        assert not axe.Axe().run(tab).response["violations"] and not wrong
        process.terminate()
        driver.expect(tab.locator("#gone")).to_be_visible(timeout=20_000)
        browser.close()

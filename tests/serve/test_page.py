"""The chat page in a real browser, against a server whose answers are written down."""

import json
import re
import shutil
import time

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core finds barriers")
pytest.importorskip("uvicorn", reason="serves the page")
pytest.importorskip("nh3", reason="sanitizes what the page shows")

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

from tests.serve.stand_in import CARD, HOSTILE, StandIn  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
BASE = CARD | {"id": "demo-base", "stage": "base", "chat": False}


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server():
    stand_in = StandIn()
    yield stand_in
    stand_in.kill()


@pytest.fixture
def browse(chromium):
    """Makes browser contexts, and afterwards looks for errors and reports of the CSP in them."""
    made, reports = [], []

    def make(width=1280, **options):
        context = chromium.new_context(viewport={"width": width, "height": 800}, **options)
        context.set_default_timeout(10_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.expose_function("report", lambda what: reports.append(what))
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (event) =>"
            "report(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`))"
        )
        context.on("weberror", lambda error: reports.append(str(error.error)))
        made.append(context)
        return context

    yield make
    for context in made:
        context.close()
    assert reports == []


@pytest.fixture
def tab(browse, server):
    return visit(browse(), server)


def visit(context, server) -> Page:
    tab = context.new_page()
    tab.goto(server.url)
    expect(tab.locator("#name")).to_have_text(server.card["id"])
    return tab


def send(tab, text, wait=True):
    tab.locator("#ask").fill(text)
    tab.locator("#ask").press("Enter")
    expect(tab.locator("#ask")).to_have_value("")
    if wait:
        expect(tab.locator("#send")).to_be_visible()


def wait_until(done, secs=5):
    end = time.monotonic() + secs
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    assert done()


def set_max_tokens(tab, value):
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_label("Max tokens").fill(value)
    tab.get_by_role("button", name="Done").click()


def answer(tab):
    return tab.locator("article.assistant").last


def said(tab):
    """What stands in the conversation, message by message."""
    expect(tab.locator(".plain").first).to_be_visible()  # what a user says is never rendered
    return [body.strip() for body in tab.locator("article .body").all_inner_texts()]


def test_an_answer_streams_and_its_speed_is_told(tab):
    send(tab, "slow", wait=False)
    expect(answer(tab)).to_contain_text("word3")
    assert "word199" not in answer(tab).inner_text()
    tab.get_by_role("button", name="Stop").click()
    expect(answer(tab).locator(".note")).to_have_text("Stopped.")
    kept = answer(tab).locator(".body").inner_text()
    send(tab, "hello")
    expect(answer(tab).locator(".body")).to_have_text("Answer 2 to hello")
    expect(answer(tab).locator(".speed")).to_have_text(re.compile(r"7 tokens, [\d.]+ tokens/s"))
    assert kept in tab.locator("article.assistant").first.inner_text()
    expect(tab.get_by_role("status")).to_contain_text("Answer 2 to hello")  # for those who hear it


def test_escape_stops(tab, server):
    send(tab, "slow", wait=False)
    expect(answer(tab)).to_contain_text("word3")
    tab.keyboard.press("Escape")
    expect(tab.locator("#send")).to_be_visible()
    wait_until(lambda: server.left == 1)  # it heard that nobody listens any more


def test_answers_have_versions_and_the_chat_goes_on_from_the_one_shown(tab, server):
    send(tab, "hello")
    answer(tab).get_by_role("button", name="Write it again").click()
    expect(answer(tab).locator(".body")).to_have_text("Answer 2 to hello")
    expect(answer(tab).locator(".which")).to_have_text("2/2")
    send(tab, "on")
    tab.locator("article.assistant").first.get_by_role("button", name="Earlier version").click()
    expect(answer(tab).locator(".body")).to_have_text("Answer 1 to hello")
    send(tab, "off")
    texts = ["".join(p["text"] for p in m["content"]) for m in server.bodies[-1]["messages"]]
    assert texts == ["hello", "Answer 1 to hello", "off"]
    tab.locator("article.assistant").first.get_by_role("button", name="Later version").click()
    expect(tab.locator("article .body").nth(2)).to_have_text("on")


def test_a_message_is_edited_and_both_ways_stay(tab):
    send(tab, "first")
    send(tab, "second")
    first = tab.locator("article.user").first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    field = tab.get_by_label("Edit your message")
    expect(field).to_have_value("first")
    field.fill("other")
    field.press("Enter")
    expect(answer(tab).locator(".body")).to_have_text("Answer 3 to other")
    assert tab.locator("article").count() == 2
    first.get_by_role("button", name="Earlier version").click()
    expect(tab.locator("article .body")).to_have_text(
        ["first", "Answer 1 to first", "second", "Answer 2 to second"]
    )
    tab.reload()
    expect(tab.locator("article .body").nth(2)).to_have_text("second")
    expect(tab.locator("article.user .which").first).to_have_text("1/2")


def test_an_answer_that_was_cut_off_goes_on(tab, server):
    set_max_tokens(tab, "7")
    send(tab, "cut here")
    expect(answer(tab).locator(".note")).to_contain_text("after 7 tokens")
    answer(tab).get_by_role("button", name="Go on").click()
    expect(answer(tab).locator(".body")).to_have_text(
        "Answer 1 to cut hereAnswer 2 to Answer 1 to cut here"
    )
    assert server.bodies[-1]["messages"][-1]["role"] == "assistant"


def test_chats_are_found_renamed_and_deleted(tab):
    for text in ("apples", "pears and plums"):
        tab.get_by_role("button", name="New chat").click()
        send(tab, text)
    titles = tab.locator("#chats .title")
    expect(titles).to_have_text(["pears and plums", "apples"])
    tab.get_by_label("Search chats").fill("ANSWER 1")
    expect(titles).to_have_text(["apples"])
    tab.get_by_label("Search chats").fill("")
    titles.last.click()
    expect(tab.locator("article.user .body")).to_have_text("apples")
    tab.get_by_role("button", name="Rename apples").click()
    tab.get_by_role("textbox", name="Name").fill("fruit")
    tab.keyboard.press("Enter")
    expect(titles).to_have_text(["fruit", "pears and plums"])
    tab.get_by_role("button", name="Delete fruit").click()
    tab.get_by_role("button", name="Cancel").click()
    expect(titles).to_have_count(2)
    tab.get_by_role("button", name="Delete fruit").click()
    tab.get_by_role("button", name="Delete", exact=True).click()
    expect(titles).to_have_text(["pears and plums"])
    tab.reload()
    expect(titles).to_have_text(["pears and plums"])


def test_a_reload_keeps_an_answer_as_far_as_it_came(tab):
    send(tab, "slow", wait=False)
    expect(answer(tab)).to_contain_text("word9")
    tab.reload()
    expect(answer(tab)).to_contain_text("word9")
    expect(answer(tab).locator(".note")).to_have_text("Not finished.")
    expect(tab.locator("#send")).to_be_visible()


def test_a_damaged_store_is_told_and_left(tab):
    send(tab, "hello")
    circle = {"id": "b", "parent": "b", "role": "user", "parts": [], "shown": 1, "changed": 1}
    chat = {"id": "x", "title": "x", "system": "", "changed": 1, "messages": [circle]}
    damaged = ["{", "null", "[]", '{"id": 3}', json.dumps(chat)]
    for at, text in enumerate(damaged):
        tab.evaluate(
            "([at, text]) => localStorage.setItem(`nanochat.chat.d${at}`, text)", [at, text]
        )
    tab.evaluate('localStorage.setItem(\'nanochat.settings\', \'{"top_k": "x", "system": 3\')')
    tab.reload()
    expect(tab.get_by_role("alert")).to_contain_text("5 of the kept chats")
    expect(tab.locator("article .body")).to_have_text(["hello", "Answer 1 to hello"])
    assert tab.evaluate("localStorage.getItem('nanochat.chat.d0')") == "{"


def test_a_full_store_is_told_and_the_chat_goes_on(tab):
    tab.evaluate(
        "for (let size = 2 ** 22; size; size >>= 1) try { for (let i = 0; ; i++)"
        "localStorage.setItem(`fill${size}${i}`, 'x'.repeat(size)) } catch {}"
    )
    send(tab, "hello")
    expect(tab.get_by_role("alert")).to_contain_text("Export your chats")
    expect(answer(tab).locator(".body")).to_have_text("Answer 1 to hello")


def test_two_tabs_write_into_one_chat_and_nothing_is_lost(tab, server):
    send(tab, "hello")
    other = tab.context.new_page()
    other.goto(tab.url)
    expect(other.locator("article .body")).to_have_text(["hello", "Answer 1 to hello"])
    send(other, "slow from the other", wait=False)
    expect(answer(other)).to_contain_text("word1")
    expect(answer(tab)).to_contain_text("word1")  # it is seen here too
    first = tab.locator("article.assistant").first
    first.hover()
    first.get_by_role("button", name="Write it again").click()
    expect(first.locator(".body")).to_have_text("Answer 3 to hello")
    other.get_by_role("button", name="Stop").click()
    other.get_by_role("button", name="New chat").click()
    send(other, "a chat of its own")
    expect(tab.locator("#chats .title")).to_have_text(["a chat of its own", "hello"])
    tab.reload()
    expect(tab.locator("article.assistant .body")).to_have_text("Answer 3 to hello")
    tab.locator("article.assistant").get_by_role("button", name="Earlier version").click()
    expect(tab.locator("article .body").nth(2)).to_have_text("slow from the other")
    expect(answer(tab)).to_contain_text("word1")
    other.get_by_role("button", name="Delete hello").click()
    other.get_by_role("button", name="Delete", exact=True).click()
    expect(tab.get_by_role("alert")).to_contain_text("deleted in another tab")
    expect(tab.locator("article")).to_have_count(0)


def test_export_and_import_give_the_same_chats(tab, browse, server, tmp_path):
    send(tab, "sum it")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "chats.json")
    exported = json.loads((tmp_path / "chats.json").read_text())
    exported["chats"].append({"id": "evil", "messages": "no"})
    (tmp_path / "chats.json").write_text(json.dumps(exported))
    elsewhere = visit(browse(), server)
    elsewhere.locator("#file").set_input_files(tmp_path / "chats.json")
    expect(elsewhere.get_by_role("alert")).to_contain_text("taken in: 1.")
    elsewhere.locator("#chats .title").click()
    assert said(elsewhere) == said(tab)
    (tmp_path / "wrong.json").write_text("{")
    elsewhere.locator("#file").set_input_files(tmp_path / "wrong.json")
    expect(elsewhere.get_by_role("alert")).to_contain_text("could not be read")


def test_settings_go_into_the_request(tab, server):
    tab.get_by_role("button", name="Settings").click()
    values = {"Temperature": "0.3", "Top-p": "0.9", "Top-k": "7", "Max tokens": "33", "Seed": "5"}
    for name, value in values.items():
        tab.get_by_label(name).fill(value)
    tab.get_by_label("System prompt").fill("Be short.")
    tab.get_by_label("Tool").select_option("none")
    tab.get_by_role("button", name="Done").click()
    tab.reload()
    send(tab, "hello")
    body = server.bodies[-1]
    wanted = {"temperature": 0.3, "top_p": 0.9, "top_k": 7, "max_tokens": 33, "seed": 5}
    wanted |= {"tool": "none", "model": "demo-rl", "stream": True}
    assert {key: body[key] for key in wanted} == wanted
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    answer(tab).get_by_role("button", name="Write it again").click()
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_role("button", name="Defaults").click()
    expect(tab.get_by_label("Seed")).to_have_value("")


def test_a_tools_call_is_folded_with_its_result(tab):
    send(tab, "sum")
    tool = answer(tab).locator("details")
    expect(tool.locator("summary")).to_contain_text("12+30 = 42")
    expect(tool.locator(".result")).not_to_be_visible()
    tool.locator("summary").click()
    expect(tool.locator(".call")).to_have_text("12+30")
    expect(tool.locator(".result")).to_have_text("42")
    answer(tab).get_by_role("button", name="Copy").click()
    expect(tab.get_by_role("status")).to_have_text("Copied.")
    assert tab.evaluate("navigator.clipboard.readText()") == "It is 42."  # what the model said


def test_a_call_that_has_no_result_does_not_wait_for_one_for_ever(tab):
    send(tab, "impossible")
    answer(tab).locator("summary").click()
    expect(answer(tab).locator(".result")).to_be_visible()
    expect(answer(tab).locator(".result")).not_to_have_text("nothing yet")


def test_what_comes_behind_an_answer_that_was_rendered_is_shown(tab):
    set_max_tokens(tab, "7")
    send(tab, "cut")
    expect(answer(tab).locator(".text:not(.plain)")).to_contain_text("Answer 1 to cut")
    tab.wait_for_timeout(500)  # until its renderer rests
    answer(tab).get_by_role("button", name="Go on").click()
    expect(answer(tab).locator(".body")).to_contain_text("Answer 2")


def test_the_link_to_the_report_is_to_this_models_run(browse, server):
    server.card = CARD | {"id": "my run-2-sft", "stage": "sft"}
    link = visit(browse(), server).get_by_role("link", name="How it was trained")
    assert link.get_attribute("href") == "report/my%20run-2"


def test_markdown_and_its_code_can_be_copied(tab):
    send(tab, "markdown")
    expect(answer(tab).locator("strong")).to_have_text("bold")
    expect(answer(tab).locator(".code .k").first).to_have_text("def")
    answer(tab).locator(".code button").click()
    assert tab.evaluate("navigator.clipboard.readText()").startswith("def double(x):")


def test_without_the_renderer_the_text_is_shown(tab):
    tab.route("**/render", lambda route: route.abort())
    send(tab, "markdown")
    expect(answer(tab).locator(".body")).to_contain_text("Some **bold** text")


def test_enter_sends_shift_enter_does_not_and_the_focus_is_seen(tab):
    field = tab.get_by_label("Message")
    expect(field).to_be_focused()
    field.press_sequentially("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    field.press("Enter")
    expect(tab.locator("article.user .body")).to_have_text("one\ntwo", use_inner_text=True)
    expect(field).to_be_focused()
    tab.reload()
    expect(field).to_be_focused()
    order = []
    for _ in range(25):
        tab.keyboard.press("Tab")
        order.append(
            tab.evaluate("""() => {
            const at = document.activeElement, outline = getComputedStyle(at).outlineStyle;
            const name = at.ariaLabel ?? (at.labels?.[0] ?? at).textContent.trim();
            return [at === document.body ? "" : name, outline !== "none" || at.id === "ask"];
        }""")
        )
    assert all(seen for name, seen in order if name)
    order = [name for name, _ in order]
    for name in ("Skip to the message field", "New chat", "Settings", "Edit", "Copy"):
        assert name in order
    assert order.index("New chat") < order.index("Settings") < order.index("Edit")


def test_the_skip_link_leads_to_the_message_and_away_from_no_chat(tab):
    send(tab, "hello")
    tab.get_by_role("link", name="Skip to the message").focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_label("Message")).to_be_focused()
    expect(tab.locator("article")).to_have_count(2)


def test_a_killed_server_is_told_and_so_is_its_return(tab, server):
    send(tab, "slow", wait=False)
    expect(answer(tab)).to_contain_text("word5")
    server.kill()
    expect(tab.get_by_role("alert")).to_contain_text("The server is gone")
    expect(answer(tab).locator(".note")).to_contain_text("went away")
    expect(answer(tab)).to_contain_text("word5")
    send(tab, "are you there?")
    expect(answer(tab).locator(".note")).to_contain_text("is gone")
    server.start()
    expect(tab.get_by_role("alert")).not_to_be_visible(timeout=20_000)
    expect(tab.get_by_role("status")).to_contain_text("The server is back")
    answer(tab).get_by_role("button", name="Write it again").click()
    expect(answer(tab).locator(".body")).to_contain_text("to are you there?")


def test_a_full_queue_is_told_and_tried_again(tab, server):
    server.full = 1
    send(tab, "full", wait=False)
    expect(answer(tab).locator(".note")).to_contain_text("queue is full")
    expect(answer(tab).locator(".body")).to_have_text("Answer 2 to full")
    expect(answer(tab).locator(".note")).not_to_be_visible()
    server.full = 100
    send(tab, "full", wait=False)
    expect(answer(tab).locator(".note")).to_contain_text("queue is full")
    tab.keyboard.press("Escape")
    expect(answer(tab).locator(".note")).to_have_text("Stopped.")


def test_a_full_context_is_told(tab, server):
    send(tab, "long")
    expect(answer(tab).locator(".note")).to_contain_text("too long for the 256 tokens")
    send(tab, "cut")  # ends with "length" after 7 tokens of 512
    expect(answer(tab).locator(".note")).to_contain_text("context of 256 tokens is full")
    send(tab, "word " * 120)
    send(tab, "and now?")  # with an answer of 128 tokens and what is above, more than 256
    expect(tab.locator(".line")).to_be_visible()
    assert tab.locator("article, .line").all_inner_texts()[6].startswith("The context is full")
    assert len(server.bodies[-1]["messages"]) == 1


def test_an_error_within_a_stream_is_told_and_the_text_kept(tab):
    send(tab, "broken")
    expect(answer(tab).locator(".note")).to_have_text("row 3 broke")
    expect(answer(tab).locator(".body")).to_have_text("Answer 1 to broken")


def test_a_key_is_asked_for_and_kept_in_the_tab(browse, server):
    server.key = "secret"
    tab = browse().new_page()
    tab.goto(server.url)
    tab.get_by_role("textbox", name="API key").fill("wrong")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("textbox", name="API key")).to_have_value("")
    tab.get_by_role("textbox", name="API key").fill("secret")
    tab.keyboard.press("Enter")
    expect(tab.locator("#name")).to_have_text("demo-rl")
    send(tab, "hello")
    expect(answer(tab).locator(".body")).to_have_text("Answer 1 to hello")
    tab.reload()
    expect(tab.locator("#name")).to_have_text("demo-rl")
    assert "secret" not in tab.evaluate("JSON.stringify(localStorage)")


def test_a_base_model_goes_on_with_a_text(browse, server):
    server.card = BASE
    tab = visit(browse(), server)
    set_max_tokens(tab, "2")
    tab.get_by_role("button", name="Once upon a time").click()
    expect(answer(tab).locator(".body")).to_have_text(" there was", use_inner_text=False)
    answer(tab).get_by_role("button", name="Go on").click()
    expect(answer(tab).locator(".body")).to_have_text(" there was there was")
    assert [body["prompt"] for body in server.bodies] == [
        "Once upon a time",
        "Once upon a time there was",
    ]


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_answer_stays_text(tab, kind):
    send(tab, kind)
    expect(answer(tab).locator(".body")).to_contain_text("after", timeout=20_000)
    tab.wait_for_timeout(600)  # until the whole of it is rendered
    for link in answer(tab).locator("a").all():
        link.click()
    tab.reload()
    expect(answer(tab).locator(".body")).to_contain_text("after", timeout=20_000)
    assert tab.evaluate("window.hacked") is None
    inside = "img, script, style, svg, iframe, object, form, [onerror], [onload], [style], [id]"
    assert tab.locator("article .body").locator(inside).count() == 0
    send(tab, "hello")  # the page still works
    expect(answer(tab).locator(".body")).to_have_text("Answer 2 to hello")


def test_a_hostile_title_and_error_stay_text(tab):
    text = "broken <img src=x onerror='window.hacked=1'>"
    send(tab, text)
    expect(tab.locator("#chats .title")).to_have_text(text)
    tab.get_by_role("button", name="Delete broken").click()
    expect(tab.locator("#question-title")).to_contain_text(text)
    assert tab.evaluate("window.hacked") is None


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(browse, server, width, scheme):
    tab = visit(browse(width, color_scheme=scheme, reduced_motion="reduce"), server)

    def look():
        found = Axe().run(tab)
        assert found.violations_count == 0, found.generate_report()
        across = "document.documentElement.scrollWidth - innerWidth"
        assert tab.evaluate(across) <= 0

    look()
    for text in ("sum", "markdown", "long"):
        send(tab, text)
    answer(tab).get_by_role("button", name="Write it again").click()
    expect(answer(tab).locator(".which")).to_have_text("2/2")
    for details in tab.locator("summary").all():
        details.click()
    look()
    tab.locator("article.user").last.hover()
    tab.locator("article.user").last.get_by_role("button", name="Edit").click()
    look()
    tab.get_by_role("button", name="Cancel").click()
    send(tab, "slow", wait=False)
    expect(answer(tab)).to_contain_text("word3")
    look()
    tab.get_by_role("button", name="Stop").click()
    tab.get_by_role("button", name="Settings").click()
    look()
    tab.keyboard.press("Escape")
    if width == 375:
        expect(tab.get_by_role("navigation")).not_to_be_visible()
        tab.get_by_role("button", name="Chats").click()
        look()
    tab.get_by_role("button", name="Rename sum").click()
    look()
    tab.keyboard.press("Escape")
    server.kill()
    expect(tab.get_by_role("alert")).to_contain_text("is gone", timeout=15_000)
    look()
    server.start()


def test_the_theme_can_be_chosen(browse, server):
    tab = visit(browse(color_scheme="light"), server)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(colour)
    tab.get_by_label("Theme").select_option("dark")
    dark = tab.evaluate(colour)
    assert dark != light
    tab.reload()
    assert tab.evaluate(colour) == dark


def test_the_first_paint_comes_within_a_second(browse, server):
    tab = visit(browse(), server)
    tab.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
    paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 1000

"""Markdown of a model as HTML: what may be in it, and how long it takes, whatever the text."""

import time
from html.parser import HTMLParser

import pytest

pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from nanochat_jax.serve import markdown  # noqa: E402

PIECES = [
    *"`*_[]()<>!|~#&\"'\\/:=-+. \n\t",
    "a",
    "1.",
    "```html\n",
    "<script>",
    "</code>",
    "](",
    "&lt;",
]
PIECES += [
    "javascript:",
    "onerror=",
    "<img src=x ",
    "<svg/onload=x>",
    "&#106;",
    "data:text/html,",
    "> ",
]
SLOW_SECS = 3  # measured: 1 at most


class Seen(HTMLParser):
    """What a browser would find in HTML: (tag, attributes), and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def check(html):
    for tag, attributes in Seen(html).tags:
        allowed = markdown.ATTRIBUTES.get(tag, set()) | ({"rel", "target"} if tag == "a" else set())
        assert tag in markdown.TAGS and attributes.keys() <= allowed
        link = attributes.get("href", "https:")
        assert link.split(":")[0].lower() in ("http", "https", "mailto") or ":" not in link


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
def test_only_listed_tags_attributes_and_links_come_out(text):
    check(markdown.render(text))


@given(st.text(max_size=200))
def test_any_text_is_rendered(text):
    check(markdown.render(text))


def test_what_markdown_means():
    html = markdown.render(
        "# T\n\n**b** `c` [l](https://e.org)\n\n- i\n\n| a |\n|---|\n| 1 |\n\n```py\nx = 'é'\n```\n"
    )
    seen = Seen(html)
    assert {"h1", "strong", "code", "a", "ul", "li", "table", "td", "pre"} <= {
        t for t, _ in seen.tags
    }
    assert ("span", {"class": "s1"}) in seen.tags and "x = 'é'" in seen.text
    link = next(attributes for tag, attributes in seen.tags if tag == "a")
    assert link["target"] == "_blank" and "noopener" in link["rel"]


@pytest.mark.parametrize("text", ["<b>bold</b> & <script>alert(1)</script>", "a\n\n<div>\n</div>"])
def test_html_in_a_text_is_text(text):
    seen = Seen(markdown.render(text))
    assert seen.text.split() == text.split() and {tag for tag, _ in seen.tags} <= {"p", "br"}


def test_a_number_with_a_point_is_no_list():
    assert Seen(markdown.render("42.")).text == "42."


def test_a_text_cannot_name_a_class_of_the_page():
    html = markdown.render("```main\nx\n```\n\n```py\nx\n```\n\n~~~tool unseen\nx\n~~~")
    classes = [a["class"] for _, a in Seen(html).tags if "class" in a]
    assert classes and all(c.startswith("language-") or len(c) <= 3 for c in classes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    ["`", "` ", "[", "[a](", "![", "*a ", "_a*b", "> ", "- ", "~~a ", "<a", "&", "\\", "\n", "|a"]
    + [
        "```c\n\n \n```\n",
        "[x](<",
        "1. ",
        "#",
        ">\n",
        "a\n> ",
        "* a\n- a\n",
        "*_",
        "é",
        "[^",
        "<!--",
    ]
    + ["```c\n" + "\n " * 1490 + "\n```\n"],
)
def test_time_is_bounded(piece):
    heads = [
        "",
        ">" * 100 + "a\n",
        "```python\n",
        "```c\n",
        "|a" * 3000 + "\n" + "|-" * 3000 + "\n",
    ]
    for head in heads:
        for length in (markdown.MAX_CHARS, 100_000):
            text = (head + piece * (length // len(piece)))[:length]
            start = time.process_time()
            check(markdown.render(text))
            assert time.process_time() - start < SLOW_SECS, head[:10]

"""Markdown of a model as HTML that a page may show.

Two walls, each enough alone: the parser knows no HTML (tags in the text come out escaped), and what
it writes passes a sanitizer that lets a short list of tags and attributes through. No images: they
would tell other hosts who reads. Time is bounded by the lengths below, whatever the text
(`tests/serve/test_markdown.py`).
"""

import html
import re

import nh3
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

MAX_CHARS = 20_000  # longer texts are shown as they are; no answer of a few thousand tokens is
MAX_CODE_CHARS = 3_000  # longer code stays without colours
# Languages that get colours. A short list: some of Pygments' 500 lexers take minutes on bad input.
LANGUAGES = {"python", "py", "bash", "sh", "json", "c", "javascript", "js", "html", "css", "sql"}
TAGS = set(
    "p br hr h1 h2 h3 h4 h5 h6 em strong s a ul ol li blockquote pre code span "
    "table thead tbody tr th td".split()
)
ATTRIBUTES = {"a": {"href"}, "ol": {"start"}, "span": {"class"}, "code": {"class"}}


def render(text: str) -> str:
    """`text` as sanitized HTML."""
    if len(text) > MAX_CHARS:
        return f"<pre>{html.escape(text)}</pre>"
    if re.fullmatch(r"\s*\d+[.)]\s*", text):  # the end of "12+30 = 42.", not a list's empty item
        return f"<p>{html.escape(text)}</p>"
    return nh3.clean(
        _PARSER.render(text),
        tags=TAGS,
        attributes=ATTRIBUTES,
        attribute_filter=_keep,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def _keep(tag: str, attribute: str, value: str) -> str | None:
    """Classes are Pygments' short ones or a block's language; a text cannot name the page's own."""
    known = attribute != "class" or re.fullmatch(r"[a-z0-9]{1,3}|language-[\w+#-]{1,20}", value)
    return value if known else None


def _colour(code: str, language: str, _attributes: str) -> str:
    if language not in LANGUAGES or len(code) > MAX_CODE_CHARS:
        return ""  # the parser then escapes it
    return highlight(code, get_lexer_by_name(language), HtmlFormatter(nowrap=True))


_PARSER = MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": _colour})
_PARSER.enable(["table", "strikethrough"]).disable("image")

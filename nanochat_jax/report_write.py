"""Write a report, given as a list of blocks, as Markdown and as one self-contained HTML page.

The page needs no script and no other host (its policy forbids both), follows the reader's light or
dark setting, fits a phone and prints. Every string is untrusted, samples of a model above all: HTML
escapes them, Markdown escapes or fences them, and control characters are replaced.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from nanochat_jax.report_plots import CHART_CSS, Chart


@dataclass(frozen=True)
class Heading:
    level: int  # 1 is the report's own
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Figures:
    """The few numbers a reader came for: (name, value, a word more)."""

    entries: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]
    is_long: bool = False  # sentences rather than numbers


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]  # the first column names the row, the others are numbers


@dataclass(frozen=True)
class Charts:
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Samples:
    pairs: Sequence[tuple[str, str]]  # prompt, continuation


@dataclass(frozen=True)
class Answer:
    prompt: str
    answer: str
    expected: str  # shown beside a wrong one
    is_correct: bool


@dataclass(frozen=True)
class Answers:
    """Graded answers of a model, under a title that folds them away."""

    title: str
    answers: Sequence[Answer]
    is_open: bool


@dataclass(frozen=True)
class Details:
    """Something long, folded away."""

    summary: str
    value: Any  # printed as JSON


Block = Heading | Paragraph | Figures | Facts | Table | Charts | Samples | Answers | Details

# Control characters, lone surrogates (no UTF-8 for them), and marks that turn the direction of what
# follows.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    return UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n"))


def show_usd(amount: float | None) -> str:
    return "n/a" if amount is None else f"${amount:,.2f}"


def show_duration(secs: float | None) -> str:
    if secs is None or not math.isfinite(secs):
        return "unknown"
    if secs < 60:
        return f"{secs:.1f} s"
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def show_amount(value: float) -> str:
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.0f}"


def show_bytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB"


def show_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_inline(text)}"
        case Paragraph(text, is_note):
            return ("> " if is_note else "") + _inline(text)
        case Figures(entries):
            return _markdown_table(("", "", ""), [(n, v, more) for n, v, more in entries])
        case Facts(rows, _):
            return _markdown_table(("", ""), rows)
        case Table(header, rows):
            return _markdown_table(header, rows, numeric=True)
        case Charts(charts):
            return "\n".join(f"![{_inline(c.title)}]({c.name}.svg)" for c in charts)
        case Samples(pairs):
            return "\n\n".join(_fenced(f"{prompt}\n... {text.lstrip()}") for prompt, text in pairs)
        case Answers(title, answers, is_open):
            shown = "\n\n".join(_fenced("\n".join(_answer_lines(a))) for a in answers)
            opening = f"<details{' open' if is_open else ''}><summary>{escape(clean(title))}"
            return f"{opening}</summary>\n\n{shown}\n\n</details>"
        case Details(summary, value):
            return (
                f"<details><summary>{escape(clean(summary))}</summary>\n\n"
                f"{_fenced(_as_json(value), 'json')}\n\n</details>"
            )


def _answer_lines(answer: Answer) -> list[str]:
    lines = [answer.prompt, "", f"{'right' if answer.is_correct else 'WRONG'}: {answer.answer}"]
    return lines if answer.is_correct else [*lines, f"expected: {answer.expected}"]


def _inline(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = escape(" ".join(clean(text).split()), quote=False)
    return re.sub(r"([\\`*|\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = False
) -> str:
    rule = ["---", *(["---:" if numeric else "---"] * (len(header) - 1))]
    lines = [[_inline(cell) for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    text = clean(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def to_html(blocks: Sequence[Block], title: str) -> str:
    body, in_section = [], False
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            body.append("</section><section>" if in_section else "<section>")
            in_section = True
        body.append(_html(block))
    if in_section:
        body.append("</section>")
    return PAGE.format(title=_text(title), css=PAGE_CSS + CHART_CSS, body="\n".join(body))


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_text(text)}</h{level}>"
        case Paragraph(text, is_note):
            return f"<p class={'note' if is_note else 'text'}>{_text(text)}</p>"
        case Figures(entries):
            cards = (
                f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd>"
                f"<dd class=more>{_text(more)}</dd></div>"
                for name, value, more in entries
            )
            return f"<dl class=figures>{''.join(cards)}</dl>"
        case Facts(rows, is_long):
            pairs = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in rows)
            return f"<dl class={'long' if is_long else 'facts'}>{''.join(pairs)}</dl>"
        case Table(header, rows):
            head = "".join(f"<th scope=col>{_text(cell)}</th>" for cell in header)
            lines = (
                f"<tr><th scope=row>{_text(row[0])}</th>"
                + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
                + "</tr>"
                for row in rows
            )
            table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
            return f"<div class=scroll>{table}</div>"
        case Charts(charts):
            figures = (f"<figure>{chart.svg()}</figure>" for chart in charts)
            return f"<div class=charts>{''.join(figures)}</div>"
        case Samples(pairs):
            items = (f"<li><b>{_text(prompt)}</b>{_text(text)}</li>" for prompt, text in pairs)
            return f"<ul class=samples>{''.join(items)}</ul>"
        case Answers(title, answers, is_open):
            items = "".join(map(_html_answer, answers))
            return (
                f"<details{' open' if is_open else ''}><summary>{_text(title)}</summary>"
                f"<ul class=answers>{items}</ul></details>"
            )
        case Details(summary, value):
            return (
                f"<details><summary>{_text(summary)}</summary>"
                f"<pre>{_text(_as_json(value))}</pre></details>"
            )


def _html_answer(answer: Answer) -> str:
    verdict = "right" if answer.is_correct else "wrong"
    parts = [("b", "", answer.prompt), ("p", verdict, answer.answer)]
    if not answer.is_correct:
        parts.append(("p", "expected", answer.expected))
    inside = (
        f"<{tag}>{f'<span class={word}>{word}</span>' if word else ''}{_text(text)}</{tag}>"
        for tag, word, text in parts
    )
    return f"<li>{''.join(inside)}</li>"


def _text(text: str) -> str:
    return escape(clean(text))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

PAGE_CSS = """
:root { --page: #f4f6f9; --card: #ffffff; --text: #1c2430; --muted: #5b6472; --line: #dfe3ea;
  --raw: #b9c9e6; --main: #2456c7; --ref: #b4590a; --code: #f4f6f9;
  --good: #18794e; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #10151d; --card: #18202b; --text: #e6eaf2;
  --muted: #9aa6b8; --line: #2b3442; --raw: #40557d; --main: #82a8ff; --ref: #f0a45c;
  --code: #10151d; --good: #5fd39b; --bad: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.55 system-ui,
sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 0 0 10px; }
h3 { font-size: .78rem; margin: 22px 0 8px; color: var(--muted); text-transform: uppercase;
  letter-spacing: .07em; }
p { margin: 8px 0; color: var(--muted); }
.note { border-left: 3px solid var(--ref); padding: 4px 12px; color: var(--text); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 18px 20px; margin-top: 18px; }
dl, dd, figure, ul { margin: 0; padding: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 18px; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 12px 16px; }
.figures dt { color: var(--muted); font-size: .8rem; }
.figures dd { font-size: 1.5rem; font-weight: 650; line-height: 1.3; letter-spacing: -.01em; }
.figures .more { color: var(--muted); font-size: .8rem; font-weight: 400;
  letter-spacing: 0; line-height: 1.4; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 0 36px; }
.long div { display: grid; grid-template-columns: 9em 1fr; gap: 0 14px; padding: 4px 0;
  border-bottom: 1px solid var(--line); }
.long dt { color: var(--muted); }
.facts div { display: flex; justify-content: space-between; gap: 14px; padding: 4px 0;
  border-bottom: 1px solid var(--line); }
.facts dt { color: var(--muted); overflow-wrap: normal; }
.facts dd { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
thead th { color: var(--muted); font-size: .8rem; font-weight: 600; }
tbody th { font-weight: 500; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr));
  gap: 16px 28px; margin-top: 14px; }
.chart { display: block; width: 100%; max-width: 560px; height: auto; }
.samples, .answers { list-style: none; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr));
  gap: 10px; margin-top: 8px; }
.answers p { color: var(--text); margin: 6px 0 0; }
.answers span { font-size: .78rem; font-weight: 600; border-radius: 4px; padding: 1px 6px;
  margin-right: 8px; color: var(--muted); background: var(--card); }
.answers .right { color: var(--good); }
.answers .wrong { color: var(--bad); }
.answers li { white-space: pre-wrap; unicode-bidi: isolate; padding: 10px 12px;
  background: var(--code); border-radius: 8px; max-height: 18em; overflow-y: auto; }
.samples li { white-space: pre-wrap; unicode-bidi: isolate; padding: 8px 12px; margin-bottom: 8px;
  background: var(--code); border-radius: 8px; max-height: 24em; overflow-y: auto; }
.samples b, .answers b { color: var(--main); font-weight: 600; }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--muted); }
pre { background: var(--code); border-radius: 8px; padding: 12px; overflow: auto; max-height: 32em;
  font: 12.5px/1.5 ui-monospace, monospace; overflow-wrap: normal; }
@media screen and (min-width: 521px) { .figures:has(> :nth-child(7)) {
  grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); } }
@media (max-width: 520px) { section { padding: 14px; } .facts { grid-template-columns: 1fr; }
  .figures { grid-template-columns: 1fr 1fr; } .figures dd { font-size: 1.25rem; }
  .figures .more { font-size: .8rem; } .long div { grid-template-columns: 6.5em 1fr; }
  th, td { padding: 6px; } }
@media print { :root { --page: #fff; --card: #fff; --text: #000; --muted: #444; --line: #ccc;
  --raw: #b9c9e6; --main: #2456c7; --ref: #b4590a; --code: #f6f6f6;
  --good: #18794e; --bad: #b42318; }
  main { max-width: none; padding: 0; } section { border: 0; padding: 0; }
  body { font-size: 12px; } .charts, .facts { grid-template-columns: 1fr 1fr; }
  .figures { grid-template-columns: repeat(auto-fit, minmax(115px, 1fr)); }
  .figures dd { font-size: 1.1rem; }
  .figures .more { font-size: .8rem; }
  figure, li, tr, .figures div { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .samples li, .answers li, pre { max-height: none; } details:not([open]) { display: none; } }
"""

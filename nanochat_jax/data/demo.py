"""Real English without a download: the text of the `demo` dataset.

    chitchat-dataset (the `demo` extra): people talking, filtered and tidied --+
    pydoc topics: the language reference that the interpreter brings along   --+--> documents
    docstrings of the standard library and of packages we depend on          --+

Docstrings come from syntax trees of source files that are not run. What is kept is a function of
the installed packages alone. Words and patterns are in demo.toml.
"""

import ast
import codecs
import importlib.util
import json
import re
import sysconfig
import textwrap
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics as TOPICS
from typing import Any

from tqdm import tqdm

from nanochat_jax.common import UserError, log
from nanochat_jax.data.shards import KeyedText, write_shards

TABLES = Path(__file__).with_suffix(".toml")
_LISTS = tomllib.loads(TABLES.read_text(encoding="utf-8"))
PACKAGES = tuple(_LISTS["packages"])
_FUNCTION_WORDS = frozenset(_LISTS["function_words"])

# Pieces near this length lose little when they are packed into short rows.
MAX_DOCUMENT_CHARS = 1_600
MIN_DOCUMENT_CHARS = 200
_MIN_TURNS = 3
_MAX_TURN_CHARS = 1_000  # longer ones are pasted, not said


def _any_of(patterns: Iterable[str], form: str = "{}") -> re.Pattern:
    """Finds any of the patterns, in whatever case; `form` says what must surround them."""
    return re.compile(form.format(f"(?:{'|'.join(patterns)})"), re.IGNORECASE)


_PROFANITY = _any_of([codecs.decode(word, "rot13") for word in _LISTS["profanity"]], r"\b{}\b")
_PRIVATE = _any_of(_LISTS["private"])
LEFT_OUT = _any_of(_LISTS["left_out"])
_LICENCE = _any_of(_LISTS["licence"])
_LIST_SECTION = _any_of(_LISTS["list_sections"], r"^{}[^\n]{{0,40}}:\s*$")
_TYPING: dict[str, str] = _LISTS["typing"]
_TYPING_RE = _any_of(_TYPING, r"\b{}\b(?!['-])")
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_words = re.compile(r"[a-z]+(?:'[a-z]+)?").findall
_LAUGHTER = re.compile(r"\b(?:[ah]*(?:ha){2,}h?|(?:he){3,}|lo+l)\b", re.IGNORECASE)
_PLAIN_WORD = re.compile(r"[\"'(]?[A-Za-z]+(?:['-][A-Za-z]+)*[\"')]*[.,;:!?]?\)?")


def build(directory: Path) -> None:
    dialogue = {text: key for key, text in conversations(read_dataset())}
    prose = {text: key for key, text in documentation() if text not in dialogue}
    documents = dialogue | prose  # each text once
    versions = {each.name: each.version for each in metadata.distributions()}
    sources = {n: versions[n] for n in ("chitchat-dataset", *PACKAGES) if n in versions}
    keyed, about_chars = ((key, text) for text, key in documents.items()), sum(map(len, documents))
    write_shards(keyed, directory, about_chars=about_chars, manifest={"sources": sources})
    log(f"demo: {len(dialogue):,} pieces of talk and {len(prose):,} of prose in {directory}")


def dataset_file() -> Path:
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise UserError(
            "got no package chitchat-dataset, which the demo data and the task chitchat are made "
            "of; install it with `pip install chitchat-dataset` (it is the extra `demo`)"
        )
    return Path(spec.origin).parent / "dataset.json"


def read_dataset() -> dict[str, Any]:
    """Conversations by key; their "messages" are turns, lists of {"text", "sender"}."""
    return json.loads(dataset_file().read_text(encoding="utf-8"))


def conversations(raw: dict[str, Any]) -> Iterator[KeyedText]:
    """Pieces of the conversations of chitchat-dataset, as dashed or quoted lines of speech."""
    kept, known = talks(raw)
    for key, turns in kept.items():
        for piece in _pieces_of_conversation([text for _, text in turns]):
            # Speech after dashes or in quotation marks; which one depends on the text alone.
            dashed = piece and (len(piece[0]) % 2 or any('"' in turn for turn in piece))
            text = "\n".join(f"- {turn}" if dashed else f'"{turn}"' for turn in piece)
            enough = len(piece) >= _MIN_TURNS and len(text) >= MIN_DOCUMENT_CHARS
            if enough and reads_like_english(text, known):
                yield key, text


def talks(raw: dict[str, Any]) -> tuple[dict[str, list[tuple[str, str]]], frozenset[str]]:
    """(speaker, tidy text) turns of the decent conversations by key, and the words that at least
    three of them use: few misspellings are among those."""
    kept, counts = {}, Counter()
    for key in sorted(raw):
        turns = [turn for turn in raw[key]["messages"] if turn]
        texts = [[message["text"] for message in turn] for turn in turns]
        if is_decent(" \n ".join(chain(*texts))):
            speakers = [turn[0]["sender"] for turn in turns]
            kept[key] = list(zip(speakers, map(tidy_turn, texts), strict=True))
            counts.update(set(_words(" ".join(text for _, text in kept[key]).lower())))
    return kept, frozenset(word for word, count in counts.items() if count >= 3)


def is_decent(text: str) -> bool:
    """Free of profanity and of what could identify or reach a person."""
    return not (_PROFANITY.search(text) or _PRIVATE.search(text))


def tidy_turn(messages: Iterable[str]) -> str:
    """One paragraph of what somebody typed in several messages, as sentences."""
    joined: list[str] = []
    for message in messages:
        # A long message was sent in two when it stops without a stop and goes on in lower case.
        if joined and len(joined[-1]) > 60 and joined[-1][-1].isalpha() and message[:1].islower():
            joined[-1] += f" {message}"
        else:
            joined.append(message)
    return " ".join(filter(None, map(_tidy_message, joined)))


def _tidy_message(text: str) -> str:
    text = _LAUGHTER.sub("haha", " ".join(text.split()))
    text = re.sub(r"([A-Za-z])\1{2,}", r"\1\1", text)  # soooo
    text = re.sub(r"([.!?,])\1{3,}", r"\1\1\1", text)
    text = _TYPING_RE.sub(lambda match: _TYPING[match[0].lower()], text)
    if not re.search(r"[A-Za-z]", text):
        return ""
    text = re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    return text + "." if text[-1].isalnum() else text


def _pieces_of_conversation(turns: list[str]) -> Iterator[list[str]]:
    """Runs of turns of at most MAX_DOCUMENT_CHARS, interrupted by those that are left out."""
    piece: list[str] = []
    for turn in turns:
        unwanted = len(turn) > _MAX_TURN_CHARS or LEFT_OUT.search(turn)
        if unwanted or sum(map(len, piece)) + len(turn) > MAX_DOCUMENT_CHARS:
            yield piece
            piece = []
        if turn and not unwanted:
            piece.append(turn)
    yield piece


def reads_like_english(text: str, known: frozenset[str]) -> bool:
    words = _words(text.lower())
    if not words or len(set(words)) < 0.3 * len(words):
        return False
    letters = sum(char.isalpha() or char == " " for char in text)
    in_known = sum(word in known for word in words)
    return letters > 0.87 * len(text) and in_known > 0.93 * len(words) and text.isascii()


def documentation(
    packages: Iterable[str] = PACKAGES, stdlib: str = sysconfig.get_path("stdlib")
) -> Iterator[KeyedText]:
    """Prose of the language reference and of docstrings, in pieces of whole paragraphs."""
    folders, files = [stdlib], []
    for spec in map(importlib.util.find_spec, packages):
        folders += (spec and spec.submodule_search_locations) or ()
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).parts[:-1]
            if "test" not in path.name and not set(inner) & set(_LISTS["skipped_folders"]):
                files.append(path)
    topics = ((Path(stdlib, "pydoc_data", "topics.py"), text) for text in TOPICS.values())
    bar = tqdm(files, desc="documentation", unit="file", disable=None)
    docstrings = ((source, text) for source in bar for text in _docstrings(_parsed(source)))
    for path, text in chain(topics, docstrings):
        for piece in _pieces_of_paragraphs(prose_paragraphs(text)):
            yield "/".join(path.parts[-3:]), piece


def _parsed(path: Path) -> ast.AST:
    source = path.read_bytes()
    if b'"""' in source or b"'''" in source:
        with warnings.catch_warnings(), suppress(SyntaxError, ValueError):
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            return ast.parse(source)
    return ast.Pass()  # templates and files of another Python are no source of prose


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a syntax tree in the order of the source."""
    documented = isinstance(node, _DOCUMENTED)
    if documented and (docstring := ast.get_docstring(node)):
        yield docstring
    if documented or isinstance(node, ast.If | ast.Try):
        for child in node.body:
            yield from _docstrings(child)


def prose_paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring that are prose, without markup."""
    paragraphs = []
    in_prose = True
    for block in re.split(r"\n[ \t]*\n", textwrap.dedent(docstring)):
        lines = block.strip("\n").splitlines()
        if len(lines) > 1 and re.fullmatch(r"\s*([-=~*^#])\1{2,}\s*", lines[1]):
            # Headings of numpy's style name lists unless they are known to hold prose.
            heading, mark = lines[0].strip().lower(), lines[1].strip()[0]
            in_prose, lines = heading in _LISTS["prose_sections"] or mark != "-", lines[2:]
        listed = lines and _LIST_SECTION.match(lines[0].strip())
        indented = any(line[:1].isspace() for line in lines)
        text = _without_markup(" ".join(line.strip() for line in lines))
        if in_prose and not listed and not indented and is_prose(text):
            paragraphs.append(text)
    return paragraphs


def _without_markup(text: str) -> str:
    text = re.sub(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`", r"\1", text)  # :func:`~a.b`
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_*", r"\1", text)  # `text <link>`_
    text = re.sub(r"``?([^`]+)``?_{0,2}", r"\1", text)
    text = re.sub(r"\*\*?([^*\s][^*]*)\*\*?", r"\1", text)
    text = re.sub(r"\s*\[[\w#.]+\]_", "", text)  # footnotes
    return re.sub(r"\s+", " ", text).strip()


def is_prose(text: str) -> bool:
    """Whether a paragraph is made of English sentences."""
    if not (60 <= len(text) <= MAX_DOCUMENT_CHARS and text.isascii()):
        return False
    if not re.match(r"[A-Z\"'(]", text) or not re.search(r"[.!?][\"')]?$", text):
        return False
    if _LICENCE.search(text) or re.search(r"https?:|>>>|::|[\\{}|=<>_$@]{2}|\S@\S|XXX|TODO", text):
        return False
    words = text.split()
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    common = sum(word.lower().strip(".,;:!?()\"'") in _FUNCTION_WORDS for word in words)
    return plain > 0.85 * len(words) and common > 0.25 * len(words)


def _pieces_of_paragraphs(paragraphs: list[str]) -> list[str]:
    pieces = [""]
    for paragraph in paragraphs:
        if len(pieces[-1]) + len(paragraph) > MAX_DOCUMENT_CHARS:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]}\n\n{paragraph}".lstrip()
    return [piece for piece in pieces if len(piece) >= MIN_DOCUMENT_CHARS]

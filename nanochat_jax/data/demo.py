"""Real English without a download: the text of the `demo` dataset.

    chitchat-dataset (the `demo` extra): people talking, filtered and tidied --+
    pydoc topics: the language reference that the interpreter brings along   --+--> documents
    docstrings of the standard library and of packages we depend on          --+

Docstrings come from the syntax trees of source files, which are not run, and of them only
paragraphs of prose. Conversations with profanity, e-mail addresses, telephone numbers or handles
are dropped whole. What is kept is a function of the installed packages alone; shards.py shuffles it
and sets validation aside: whole conversations, whole source files.
"""

import ast
import codecs
import importlib.util
import json
import re
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics as TOPICS
from typing import Any

from tqdm import tqdm

from nanochat_jax.common import UserError, log
from nanochat_jax.data.shards import KeyedText, write_shards

# Packages with prose in their docstrings that come with this one; those not there are left out.
# Each one changes the demo's data, so those that came later are not read.
PACKAGES = tuple(
    "absl dateutil etils filelock flax fsspec grain huggingface_hub jax jaxlib ml_collections "
    "numpy opt_einsum optax orbax packaging psutil pyarrow rich scipy tqdm treescope".split()
)
_SKIPPED_FOLDERS = {
    "test", "tests", "testing", "__pycache__", "_vendor", "site-packages", "dist-packages",
    "idlelib", "lib2to3", "pydoc_data", "ensurepip",
}  # fmt: skip

# Pieces near this length lose little when they are packed into short rows.
MAX_DOCUMENT_CHARS = 1_600
MIN_DOCUMENT_CHARS = 200

# Words that drop a conversation, in rot13 so that this file stays fit for every reader.
_PROFANITY = re.compile(
    r"\b(?:"
    + codecs.decode(
        r"shpx\j*|o?h?y?y?fuvg\j*|ovgpu\j*|phagf?|avtt\j+|snttb\j+|fyhg\j*|juber\j*|qvpxf?|cbea\j*|"
        r"encr[qe]?|encvfgf?|frk\j*|cravf\j*|intvan\j*|obbo\j*|chff(?:l|vrf)|ergneq\j*|fhvpvq\j*|"
        r"qnza\j*|cvffrq|penc\j*|anmv\j*|uvgyre\j*|nff(?:ubyr\j*)?|onfgneqf?|jgs\j*|uryy|fgsh",
        "rot13",
    )
    + r")\b",
    re.IGNORECASE,
)
_PRIVATE = re.compile(
    r"\S@\S|(?<!\w)@\w|\b(?:my (?:phone )?number is|my address is|e-?mail me|text me at)\b"
    r"|(?<!\d)(?:\+?1[-. ]?)?(?:\(?\d{3}\)?[-. ]*\d{3}[-. ]*|\d{3}[-. ])\d{4}(?!\d)",
    re.IGNORECASE,
)
# Repairs of hasty typing that are right in nearly every context.
_TYPING = {
    "i": "I", "im": "I'm", "ive": "I've", "dont": "don't", "didnt": "didn't", "doesnt": "doesn't",
    "isnt": "isn't", "wasnt": "wasn't", "havent": "haven't", "couldnt": "couldn't", "cant": "can't",
    "wouldnt": "wouldn't", "shouldnt": "shouldn't", "arent": "aren't", "thats": "that's",
    "whats": "what's", "theyre": "they're", "youre": "you're", "theres": "there's", "ur": "your",
    "u": "you", "ya": "you", "yea": "yeah", "lol": "haha", "haha": "haha", "tho": "though",
    "bc": "because", "cuz": "because", "idk": "I don't know", "gonna": "going to", "til": "until",
    "wanna": "want to", "kinda": "kind of", "prolly": "probably", "alot": "a lot",
}  # fmt: skip
_TYPING_RE = re.compile(rf"\b(?:{'|'.join(_TYPING)})\b(?!['-])", re.IGNORECASE)
_LAUGHTER = re.compile(r"\b(?:[ah]*(?:ha){2,}h?|(?:he){3,}|lo+l)\b", re.IGNORECASE)
# Turns about the contest in which the conversations were collected, and links.
LEFT_OUT = re.compile(
    r"leader ?board|rankings?|chit ?-?chat|\bpoints\b|chatbot"
    r"|https?:|www\.|\w\.(?:com|org|net|edu)\b",
    re.IGNORECASE,
)
_MIN_TURNS = 3
_MAX_TURN_CHARS = 1_000  # longer ones are pasted, not said

# Headings of docstring sections that hold prose; what stands under other headings is lists.
_PROSE_SECTIONS = {"notes", "description", "explanation", "extended summary", "discussion"}
_GOOGLE_SECTION = re.compile(
    r"^(?:args|arguments|parameters|returns?|raises|yields?|examples?|attributes|references?|"
    r"see also|usage|keyword arguments|side effects|todo|warnings?|deprecated)[^\n]{0,40}:\s*$",
    re.IGNORECASE,
)
_LICENCE = re.compile(
    r"copyright|licen[cs]e|warrant|all rights reserved|redistribut|permission is hereby",
    re.IGNORECASE,
)
_PLAIN_WORD = re.compile(r"[\"'(]?[A-Za-z]+(?:['-][A-Za-z]+)*[\"')]*[.,;:!?]?\)?")
# Frequent English words; prose holds many of them, lists and tables few.
_FUNCTION_WORDS = frozenset(
    "a an and are as at be but by can for from has have if in into is it its may not of on or "
    "so such than that the their then there these they this to was when which will with you".split()
)


def build(directory: Path) -> None:
    """Build the `demo` shards in `directory`."""
    dialogue = {text: key for key, text in conversations(read_dataset())}
    prose = {text: key for key, text in documentation() if text not in dialogue}
    documents = dialogue | prose  # each text once
    versions = {each.name: each.version for each in metadata.distributions()}
    manifest = {
        "sources": {n: versions[n] for n in ("chitchat-dataset", *PACKAGES) if n in versions},
        "dialogue_chars": sum(map(len, dialogue)),
        "documentation_chars": sum(map(len, prose)),
    }
    keyed = ((key, text) for text, key in documents.items())
    write_shards(keyed, directory, about_chars=sum(map(len, documents)), manifest=manifest)
    log(f"demo: {len(dialogue):,} pieces of talk and {len(prose):,} of prose in {directory}")


def dataset_file() -> Path:
    """The file of chitchat-dataset; UserError when the package is not installed."""
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
    kept = {}
    for key in sorted(raw):
        turns = [[message["text"] for message in turn] for turn in raw[key]["messages"]]
        if is_decent(" \n ".join(text for turn in turns for text in turn)):
            kept[key] = [tidy_turn(turn) for turn in turns]
    known = common_words(kept.values())
    for key, turns in kept.items():
        for piece in _pieces_of_conversation(turns):
            text = _format_turns(piece) if len(piece) >= _MIN_TURNS else ""
            if len(text) >= MIN_DOCUMENT_CHARS and reads_like_english(text, known):
                yield key, text


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


def _format_turns(turns: list[str]) -> str:
    """Speech after dashes or in quotation marks; which one depends on the text alone."""
    dashed = len(turns[0]) % 2 or any('"' in turn for turn in turns)
    return "\n".join(f"- {turn}" if dashed else f'"{turn}"' for turn in turns)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def common_words(conversations: Iterable[list[str]]) -> frozenset[str]:
    """Words that at least three conversations use: few misspellings are among them."""
    counts = Counter(word for turns in conversations for word in set(_words(" ".join(turns))))
    return frozenset(word for word, count in counts.items() if count >= 3)


def reads_like_english(text: str, known: frozenset[str]) -> bool:
    words = _words(text)
    if not words or len(set(words)) < 0.3 * len(words):
        return False
    letters = sum(char.isalpha() or char == " " for char in text)
    in_known = sum(word in known for word in words)
    return letters > 0.87 * len(text) and in_known > 0.93 * len(words) and text.isascii()


def documentation(
    packages: Iterable[str] = PACKAGES, stdlib: str = sysconfig.get_path("stdlib")
) -> Iterator[KeyedText]:
    """Prose of the language reference and of docstrings, in pieces of whole paragraphs."""
    folders = [stdlib]
    for spec in map(importlib.util.find_spec, packages):
        folders += (spec and spec.submodule_search_locations) or ()
    files = [path for folder in folders for path in _source_files(Path(folder))]
    topics = ((Path(stdlib, "pydoc_data", "topics.py"), text) for text in TOPICS.values())
    bar = tqdm(files, desc="documentation", unit="file", disable=None)
    docstrings = ((source, text) for source in bar for text in _docstrings(source))
    for path, text in chain(topics, docstrings):
        for piece in _pieces_of_paragraphs(prose_paragraphs(text)):
            yield "/".join(path.parts[-3:]), piece


def _source_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        parents = path.relative_to(folder).parts[:-1]
        if not _SKIPPED_FOLDERS.intersection(parents) and "test" not in path.name:
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a source file in order."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        try:
            pending: list[ast.AST] = [ast.parse(source)]
        except (SyntaxError, ValueError):
            return  # templates and files of another Python are no source of prose
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                yield docstring
            pending += reversed(node.body)
        elif isinstance(node, ast.If | ast.Try):
            pending += reversed(node.body)


def prose_paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring that are prose, without markup."""
    paragraphs = []
    in_prose = True
    for block in re.split(r"\n[ \t]*\n", textwrap.dedent(docstring)):
        lines = block.strip("\n").splitlines()
        if len(lines) > 1 and re.fullmatch(r"\s*([-=~*^#])\1{2,}\s*", lines[1]):
            # Headings of numpy's style name lists unless they are known to hold prose.
            in_prose = lines[0].strip().lower() in _PROSE_SECTIONS or lines[1].strip()[0] != "-"
            lines = lines[2:]
        listed = lines and _GOOGLE_SECTION.match(lines[0].strip())
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

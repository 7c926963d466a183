"""A chat in the terminal: lines in, answers out as they are sampled.

`Chat` holds one conversation and what is done with it (ask, slash commands, the loop), `Screen` is
where it is shown. A base model has no conversation: every line is continued on its own.

Invariants: bad input is told in one line and the chat goes on; the first Ctrl-C stops the answer
between two events of the engine, which stays usable; with one question the answer alone goes to
stdout, notes go to stderr; control characters of the model reach no terminal.
"""

import contextlib
import difflib
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from nanochat_jax.common import UserError, read_json, write_json
from nanochat_jax.inference.engine import Engine, Request
from nanochat_jax.inference.history import Answer, fit
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import render_conversation

COMMANDS = {
    "new": "forget the conversation",
    "system": "[TEXT]  set the system message, or take it away",
    "temperature": "X  0: always the most likely token",
    "top_k": "N  sample among the N most likely tokens; 0: all",
    "save": "FILE  write the conversation as JSON",
    "load": "FILE  continue a conversation from JSON",
    "help": "this list",
    "quit": "leave, as Ctrl-D does",
}
CONVERSATIONS_ONLY = ("new", "system", "save", "load")

GREEN, YELLOW, DIM, PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
TOOL_LABELS = {"python": "python", "python_output": "output"}
# A model's text must not steer the terminal: all control characters but line ends and tabs.
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class Settings:
    """How answers are sampled. UserError when a number is out of range."""

    temperature: float = 0.6
    top_k: int = 50
    max_new_tokens: int = 256
    seed: int = 42

    def __post_init__(self):
        least = {"temperature": 0, "top_k": 0, "max_new_tokens": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not bound <= value < float("inf"):
                raise UserError(f"{name} got {value}, expected a number of at least {bound}")


def wants_color(out: TextIO, no_color: bool) -> bool:
    """Colours only on a terminal, and not where $NO_COLOR is set (no-color.org)."""
    return out.isatty() and not (no_color or os.environ.get("NO_COLOR"))


class Screen:
    """Shows an answer piece by piece. Not interactive: its text alone, and notes go elsewhere."""

    def __init__(self, out: TextIO, notes: TextIO, *, interactive: bool, color: bool):
        self.out, self.notes, self.interactive, self.color = out, notes, interactive, color
        self._kind = "text"

    def prompt(self, words: str) -> str:
        """What input() shows; \\x01 and \\x02 tell readline what takes no room."""
        return f"\x01{GREEN}\x02{words}\x01{PLAIN}\x02" if self.color else words

    def piece(self, kind: str, text: str) -> None:
        """A piece of `Answer.feed`."""
        if kind != self._kind:
            self._close_tool()
            self._kind = kind
            if kind != "text" and self.interactive:
                self._write(f"{DIM * self.color}[{TOOL_LABELS[kind]}: ")
        if self.interactive or kind == "text":
            watched = self.interactive or self.out.isatty()  # a pipe gets what was said
            self._write(text.translate(CONTROLS) if watched else text)

    def end(self) -> None:
        self._close_tool()
        self._kind = "text"
        self._write("\n")

    def note(self, text: str) -> None:
        """A line that is not the model's."""
        print(f"{YELLOW * self.color}{text}{PLAIN * self.color}", file=self.notes, flush=True)

    def _close_tool(self) -> None:
        if self._kind != "text" and self.interactive:
            self._write(f"]{PLAIN * self.color}")

    def _write(self, text: str) -> None:
        print(text, end="", file=self.out, flush=True)


class Chat:
    """One conversation with a model, or with base=True a text to continue at every line."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        settings: Settings,
        screen: Screen,
        *,
        system: str = "",
        base: bool = False,
    ):
        if base and system:
            raise UserError("a base model takes no system message; choose another --stage")
        self.engine, self.tokenizer = engine, tokenizer
        self.settings, self.screen = settings, screen
        self.system, self.base = system, base
        self.turns: list[dict[str, Any]] = []  # user and assistant messages in turn
        self._num_asked = self._num_dropped = 0

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def ask(self, text: str) -> str:
        """Show the answer to `text` and remember both; returns how it ended (Completion.finish).

        Raises UserError when the text alone is too long; the conversation is then as before.
        """
        s = self.settings
        request = Request(
            prompt=self._continued(text) if self.base else self._prompt(text),
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            top_k=s.top_k,
            seed=s.seed + self._num_asked,  # so that a question asked again is answered anew
        )
        self._num_asked += 1
        answer, finish = Answer(self.tokenizer), ""
        with first_interrupt() as interrupted:
            for event in self.engine.stream(request):
                for piece in answer.feed(event.tokens):
                    self.screen.piece(*piece)
                finish = event.finish or finish
                if interrupted.is_set():
                    self.engine.cancel(event.id)  # the next event is the last one
        for piece in answer.finish():
            self.screen.piece(*piece)
        self.screen.end()
        if not self.base and (answer.content or finish != "cancelled"):
            self.turns.append({"role": "user", "content": text})
            self.turns.append({"role": "assistant", "content": answer.content})
        self._say_how_it_ended(finish)
        return finish

    def command(self, line: str) -> bool:
        """Do what a line like "/top_k 50" says; True: leave. Raises UserError."""
        name, _, value = line[1:].strip().partition(" ")
        value = value.strip()
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"unknown command /{name}; the nearest is /{near}, /help lists them, and a blank "
                "in front makes it a message"
            )
        if self.base and name in CONVERSATIONS_ONLY:
            raise UserError(f"/{name}: a base model continues text and holds no conversation")
        match name:
            case "new":
                self._restart([])
                self.screen.note("a new conversation")
            case "system":
                self.system = value
                self.screen.note(f"system message: {value or 'none'}")
            case "temperature":
                self._set(temperature=_number(name, value, float))
            case "top_k":
                self._set(top_k=_number(name, value, int))
            case "save":
                self._save(_file(name, value))
            case "load":
                self._load(_file(name, value))
            case "help":
                for known, meaning in COMMANDS.items():
                    self.screen.note(f"/{known:<12} {meaning}")
        return name == "quit"

    def loop(self, read: Callable[[str], str] = input) -> None:
        """Ask and obey until /quit or the end of input."""
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # input() then edits lines and recalls them
        words = "text: " if self.base else "you: "
        while True:
            try:
                line = read(self.screen.prompt(words))
            except KeyboardInterrupt:
                self.screen.note("\n/quit or Ctrl-D leaves")
                continue
            except EOFError:
                self.screen.note("")
                return
            try:
                if line.startswith("/"):
                    if self.command(line):
                        return
                elif line.strip():
                    self.ask(line)
            except UserError as error:
                self.screen.note(f"error: {error}")

    def _prompt(self, text: str) -> list[int]:
        """The conversation with `text`, cut so that an answer of at most half a context fits."""
        max_len = self.engine.max_len
        asked = [*self.messages, {"role": "user", "content": text}]
        room = min(self.settings.max_new_tokens, max_len // 2)
        ids, dropped = fit(self.tokenizer, asked, max_len - room)
        if dropped != self._num_dropped:
            self.screen.note(
                f"[the context of {max_len:,} tokens is full: the model no longer sees the oldest "
                f"{dropped} of {len(self.turns) // 2} turns; /new starts over]"
            )
        self._num_dropped = dropped
        return ids

    def _continued(self, text: str) -> list[int]:
        ids, most = self.tokenizer.encode(text, bos=True), self.engine.max_len - 1
        if len(ids) > most:
            raise UserError(f"the text is {len(ids):,} tokens long, expected at most {most:,}")
        return ids

    def _say_how_it_ended(self, finish: str) -> None:
        if finish == "cancelled":
            self.screen.note("[stopped]")
        elif finish == "context":
            self.screen.note(
                f"[cut off: the context of {self.engine.max_len:,} tokens is full"
                f"{'' if self.base else '; /new starts over'}]"
            )
        elif finish == "length" and not self.base:
            self.screen.note(
                f"[cut off after {self.settings.max_new_tokens:,} tokens, --max-new-tokens]"
            )

    def _set(self, **values: float) -> None:
        self.settings = replace(self.settings, **values)
        self.screen.note(", ".join(f"{name} {value:g}" for name, value in values.items()))

    def _restart(self, turns: list[dict[str, Any]]) -> None:
        self.turns, self._num_dropped = turns, 0

    def _save(self, path: Path) -> None:
        if not self.turns:
            raise UserError("there is no conversation to save yet; ask something first")
        try:
            write_json(path, {"messages": self.messages})
        except OSError as error:
            raise UserError(f"could not write {path}: {error.strerror}; choose another") from None
        except UnicodeEncodeError as error:  # bytes typed or loaded that are no characters
            raise UserError(
                f"could not write {path}: got {error.object[error.start]!r} in the conversation, "
                "expected characters of Unicode; start over with /new"
            ) from None
        self.screen.note(f"saved {len(self.turns) // 2} turns to {path}")

    def _load(self, path: Path) -> None:
        what_to_do = 'expected {"messages": [{"role", "content"}, ...]} as /save writes it'
        try:
            found = read_json(path, what_to_do)
            render_conversation(self.tokenizer, found)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except OSError as error:
            raise UserError(f"could not read {path}: {error.strerror}; {what_to_do}") from None
        system, *turns = [
            {"role": message["role"], "content": message["content"]}
            for message in found["messages"]
        ]
        if system["role"] != "system":
            system, turns = {"content": ""}, [system, *turns]
        if turns[-1]["role"] != "assistant":
            raise UserError(f"{path} ends with a user message, expected the answer to it last")
        self.system = system["content"]
        self._restart(turns)
        self.screen.note(f"loaded {len(turns) // 2} turns from {path}")


@contextlib.contextmanager
def first_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event handed out, the next ones interrupt as they always do."""
    seen, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def handle(*_) -> None:
        seen.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"/{name} got {text!r}, expected a number") from None


def _file(name: str, text: str) -> Path:
    if not text:
        raise UserError(f"/{name} got no file name; write /{name} FILE")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"/{name} got {text}, whose user has no home folder; name another"
        ) from None

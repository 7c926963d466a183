"""A chat in the terminal: lines in, answers out as they are sampled.

Invariants: bad input is told in one line and the chat goes on; the first Ctrl-C stops the answer
between two bursts of the engine, which stays usable; with one question the answer alone goes to
stdout, notes go to stderr; control characters of the model reach no terminal.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from nanochat_jax.common import UserError, read_json, write_json
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.history import AnswerReader, fit_prompt
from nanochat_jax.inference.request import Request
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import check

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
GREEN, YELLOW, DIM, PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
# What could steer the terminal: all control characters but line ends and tabs.
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Screen:
    """Shows an answer piece by piece; if not interactive, its text alone, and notes elsewhere."""

    def __init__(self, out: TextIO, notes: TextIO, *, interactive: bool, no_color: bool = False):
        self.out, self.notes, self.interactive = out, notes, interactive
        self.color = notes.isatty() and not (no_color or os.environ.get("NO_COLOR"))
        self._kind = "text"

    def prompt(self, words: str) -> str:
        """What input() shows; \\x01 and \\x02 tell readline what takes no room."""
        return f"\x01{GREEN}\x02{words}\x01{PLAIN}\x02" if self.color else words

    def show(self, pieces: Iterable[tuple[str, str]]) -> None:
        """(kind, text) pieces of an AnswerReader; the tool's parts in brackets, if interactive."""
        for kind, text in pieces:
            if self.interactive or self.out.isatty():  # a pipe gets what was said
                text = text.translate(CONTROLS)
            if self.interactive and kind != self._kind:
                closing = f"]{PLAIN * self.color}" * (self._kind != "text")
                label = kind.removeprefix("python_")  # python or output
                text = closing + f"{DIM * self.color}[{label}: " * (kind != "text") + text
            self._kind = kind
            if self.interactive or kind == "text":
                print(text, end="", file=self.out, flush=True)

    def note(self, text: str) -> None:
        """A line that is not the model's."""
        print(f"{YELLOW * self.color}{text}{PLAIN * self.color}", file=self.notes, flush=True)


@dataclass
class Chat:
    """One conversation with a model, or with base=True a text to continue at every line."""

    engine: Engine
    tokenizer: Tokenizer
    settings: Request  # how answers are sampled; its prompt is not looked at
    screen: Screen
    system: str = ""
    base: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)  # user and assistant in turn
    num_asked: int = 0
    num_dropped: int = 0  # turns that no longer fit

    def __post_init__(self):
        if self.base and self.system:
            raise UserError("a base model takes no system message; choose another --stage")

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def ask(self, text: str) -> str:
        """Show the answer to `text` and remember both; returns how it ended (Completion.finish)."""
        prompt = self.tokenizer.encode(text, bos=True) if self.base else self._prompt(text)
        seed = self.settings.seed + self.num_asked  # a question asked again is answered anew
        reader, finish = AnswerReader(self.tokenizer), ""
        with first_interrupt() as interrupted:
            for piece in self.engine.stream(replace(self.settings, prompt=prompt, seed=seed)):
                self.screen.show(reader.feed(piece.tokens))
                finish = piece.finish
                if interrupted.is_set():
                    self.engine.cancel(piece.id)  # the next piece is the last one
        self.screen.show(reader.finish())
        self.screen.show([("text", "\n")])
        self.num_asked += 1
        if not self.base and (reader.content or finish != "cancelled"):
            self.turns.append({"role": "user", "content": text})
            self.turns.append({"role": "assistant", "content": reader.content})
        notes = {
            "cancelled": "[stopped]",
            "context": f"[cut off: the context of {self.engine.max_len:,} tokens is full]",
            "length": f"[cut off after {self.settings.max_new_tokens:,} tokens, --max-new-tokens]",
        }
        if finish in notes and not (self.base and finish == "length"):
            self.screen.note(notes[finish])
        return finish

    def command(self, line: str) -> bool:
        """Do what a line like "/top_k 50" says; True: leave. Raises UserError."""
        name, value = (word.strip() for word in line[1:].strip().partition(" ")[::2])
        if name not in COMMANDS:
            raise UserError(f"no command /{name}; see /help, or begin a message with a blank")
        if self.base and name in ("new", "system", "save", "load"):
            raise UserError(f"/{name}: a base model continues text and holds no conversation")
        match name:
            case "new":
                self.turns, self.num_dropped = [], 0
                self.screen.note("a new conversation")
            case "system":
                self.system = value
                self.screen.note(f"system message: {value or 'none'}")
            case "temperature" | "top_k":
                try:
                    number = float(value) if name == "temperature" else int(value)
                except ValueError:
                    raise UserError(f"/{name} got {value!r}, expected a number") from None
                self.settings = replace(self.settings, **{name: number})
                self.screen.note(f"{name} {number:g}")
            case "save" | "load":
                if not value:
                    raise UserError(f"/{name} got no file name; write /{name} FILE")
                try:
                    (self._save if name == "save" else self._load)(Path(value).expanduser())
                except (OSError, RuntimeError, ValueError) as error:  # no home, no characters
                    raise UserError(f"could not {name} {value}: {error}") from None
            case "help":
                for known, meaning in COMMANDS.items():
                    self.screen.note(f"/{known:<12} {meaning}")
        return name == "quit"

    def loop(self, read: Callable[[str], str] = input) -> None:
        """Ask and obey until /quit or the end of input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then edits lines and recalls them
        while True:
            try:
                line = read(self.screen.prompt("text: " if self.base else "you: "))
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
        asked, max_len = [*self.messages, {"role": "user", "content": text}], self.engine.max_len
        room = min(self.settings.max_new_tokens, max_len // 2)
        ids, dropped = fit_prompt(self.tokenizer, asked, max_len - room)
        if dropped != self.num_dropped:
            self.screen.note(
                f"[the context is full: the model no longer sees the oldest {dropped} of "
                f"{len(self.turns) // 2} turns; /new starts over]"
            )
        self.num_dropped = dropped
        return ids

    def _save(self, file: Path) -> None:
        if not self.turns:
            raise UserError("there is no conversation yet; ask something first")
        write_json(file, {"messages": self.messages})
        self.screen.note(f"saved {len(self.turns) // 2} turns to {file}")

    def _load(self, file: Path) -> None:
        found = read_json(file, "name a file that /save wrote")
        check(found)
        turns = [{"role": m["role"], "content": m["content"]} for m in found["messages"]]
        if turns[-1]["role"] != "assistant":
            raise UserError("it ends with a user message, expected the answer to it last")
        self.system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
        self.turns, self.num_dropped = turns, 0
        self.screen.note(f"loaded {len(turns) // 2} turns from {file}")


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

"""The chat in the terminal, with an engine whose answers are written down."""

import io
import json
import signal

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.inference.request import Completion, Request
from nanochat_jax.serve.terminal import Chat, Screen

SETTINGS = Request((), 40, temperature=0.6, top_k=50, seed=42)
CALL = "It is ~<|python_start|>~2*3~<|python_end|>~<|output_start|>~6~<|output_end|>~6."


class Fake:
    """An engine that says what it is told to, a byte a piece, and keeps the requests.

    An answer is its text or (text, finish); "interrupt": Ctrl-C comes after three bytes.
    """

    def __init__(self, tokenizer, answers, max_len):
        self.tokenizer, self.answers, self.max_len = tokenizer, iter(answers), max_len
        self.requests, self.cancelled, self.scheduler = [], None, self

    def stream(self, request):
        self.requests.append(request)
        answer, finish = next(self.answers), "stop"
        if isinstance(answer, tuple):
            answer, finish = answer
        ids = []
        for word in answer.split("~") + ["<|assistant_end|>"] * (finish == "stop"):
            special = self.tokenizer.special.get(word)
            ranks = [self.tokenizer.ranks[bytes([byte])] for byte in word.encode()]
            ids += ranks if special is None else [special]
        for number, token in enumerate(ids):
            if finish == "interrupt" and number == 3:
                signal.raise_signal(signal.SIGINT)
            last = number == len(ids) - 1
            yield Completion([token], [0.0], [True], finish if last else "", len(self.requests))
            if self.cancelled:
                yield Completion(finish="cancelled", id=self.cancelled)
                return

    def cancel(self, id):
        self.cancelled = id

    def prompts(self):
        return [self.tokenizer.decode(request.prompt) for request in self.requests]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def talk(tiny_tokenizer, monkeypatch):
    """(answers, lines typed) -> (chat, what was shown). A line that is an exception is raised."""
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(answers, lines, *, out=None, max_len=100, **options):
        engine, out = Fake(tiny_tokenizer, answers, max_len), out or io.StringIO()
        screen = Screen(out, out, interactive=True)
        chat, typed = Chat(engine, tiny_tokenizer, SETTINGS, screen, **options), iter([*lines])

        def read(prompt):
            out.write(prompt)
            line = next(typed, EOFError)
            if not isinstance(line, str):
                raise line
            out.write(line + "\n")
            return line

        chat.loop(read)
        return chat, out.getvalue()

    return run


def test_a_conversation_and_its_history(talk):
    chat, shown = talk(["Hi 🚢!", "Again."], ["hello", "  ", "once more"], system="Be kind.")
    assert shown == "you: hello\nHi 🚢!\nyou:   \nyou: once more\nAgain.\nyou: \n"
    first = "<|bos|><|user_start|>Be kind.\n\nhello<|user_end|><|assistant_start|>"
    then = "Hi 🚢!<|assistant_end|><|user_start|>once more<|user_end|><|assistant_start|>"
    assert chat.engine.prompts() == [first, first + then]
    # A question asked again is answered anew.
    assert [request.seed for request in chat.engine.requests] == [42, 43]


def test_tool_calls_are_told_apart_and_remembered(talk):
    chat, shown = talk([CALL, "ok"], ["2*3?", "sure?"])
    assert "It is [python: 2*3][output: 6]6.\n" in shown
    assert CALL.replace("~", "") + "<|assistant_end|>" in chat.engine.prompts()[1]
    # A call cut off is closed on the screen and in the history.
    chat, shown = talk([("1+~<|python_start|>~1", "length"), "ok"], ["?", "?"])
    assert "1+[python: 1]\n[cut off after 40 tokens" in shown
    assert "<|python_start|>1<|python_end|><|assistant_end|>" in chat.engine.prompts()[1]


def test_colours_follow_the_terminal_and_no_color(talk, monkeypatch):
    _, shown = talk([CALL], ["2*3?"], out=Terminal())
    assert "It is \x1b[2m[python: 2*3]\x1b[0m\x1b[2m[output: 6]\x1b[0m6.\n" in shown
    assert "\x01\x1b[32m\x02you: \x01\x1b[0m\x02" in shown
    assert not Screen(Terminal(), Terminal(), interactive=True, no_color=True).color
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in talk([CALL], ["2*3?"], out=Terminal())[1]


@pytest.mark.parametrize("out, tab", [(io.StringIO(), "\x07\x9btab\t"), (Terminal(), "tab\t")])
def test_one_question_prints_the_answer_alone(out, tab, tiny_tokenizer):
    """A pipe gets the bytes, whatever they are; a terminal none that steer it."""
    notes, answers = io.StringIO(), (CALL, ("\x07\x9btab\t", "length"))
    screen = Screen(out, notes, interactive=False)
    chat = Chat(Fake(tiny_tokenizer, answers, 100), tiny_tokenizer, SETTINGS, screen)
    assert chat.ask("2*3?") == "stop"
    assert (out.getvalue(), notes.getvalue()) == ("It is 6.\n", "")
    assert chat.ask("more") == "length"
    assert out.getvalue() == f"It is 6.\n{tab}\n" and "cut off" in notes.getvalue()


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(talk):
    before = signal.getsignal(signal.SIGINT)
    chat, shown = talk([("abcdef", "interrupt")], ["?", KeyboardInterrupt, "/help"])
    assert signal.getsignal(signal.SIGINT) is before
    assert "you: ?\nabcd\n[stopped]\nyou: \n/quit or Ctrl-D leaves\nyou: /help\n" in shown
    assert [turn["content"] for turn in chat.turns] == ["?", "abcd"]


def test_an_empty_answer_keeps_the_roles_alternating_and_none_steers_the_terminal(talk):
    chat, shown = talk(["", "a\x1b[2J\x9bb\r\tc\n"], ["one", "two"])
    assert shown.endswith("you: two\na[2Jb\tc\n\nyou: \n")
    empty = "one<|user_end|><|assistant_start|><|assistant_end|><|user_start|>two"
    assert empty in chat.engine.prompts()[1]


def test_a_long_history_is_cut_at_a_turn_and_says_so(talk):
    lines = [f"{n} " + "x" * 30 for n in range(4)]
    chat, shown = talk(["yes"] * 4 + [("no", "context")], [*lines, "y" * 120, "z"], max_len=150)
    assert all(len(request.prompt) <= 150 - 40 for request in chat.engine.requests)
    assert [prompt.count("user_start") for prompt in chat.engine.prompts()] == [1, 2, 2, 2, 3]
    assert chat.engine.prompts()[3].startswith("<|bos|><|user_start|>2 xxx")
    assert [line[-38:] for line in shown.splitlines() if "no longer sees" in line] == [
        "oldest 1 of 2 turns; /new starts over]",
        "oldest 2 of 3 turns; /new starts over]",
    ]
    assert "error: the last message is 1" in shown  # and the chat went on
    assert "no\n[cut off: the context of 150 tokens is full]\n" in shown
    assert len(chat.turns) == 10  # all is kept for /save


def test_commands(talk, tmp_path):
    file = tmp_path / "deep" / "chat.json"
    settings = ["/system Be kind.", "/temperature 0", "/top_k 3"]
    again = [f"/save {file}", "/new", "/system", "two", f"/load {file}", "three", "/quit", "never"]
    chat, shown = talk([CALL, "b", "c"], [*settings, "one", *again])
    assert [(r.temperature, r.top_k) for r in chat.engine.requests] == [(0.0, 3)] * 3
    one, two, three = chat.engine.prompts()
    assert one == "<|bos|><|user_start|>Be kind.\n\none<|user_end|><|assistant_start|>"
    assert two == "<|bos|><|user_start|>two<|user_end|><|assistant_start|>"
    called = CALL.replace("~", "") + "<|assistant_end|>"
    assert three == f"{one}{called}<|user_start|>three<|user_end|><|assistant_start|>"
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[2]["content"][1] == {"type": "python", "text": "2*3"}
    assert "never" not in shown


def test_bad_commands_are_told_in_a_line_and_change_nothing(talk, tmp_path):
    files = {
        "a.json": ("{", "a.json is not valid JSON"),
        "deep.json": ("[" * 100_000, "deep.json is not valid JSON"),
        "b.json": ("[]", "b.json: got []"),
        "c.json": ('{"messages": [{"role": "robot", "content": "hi"}]}', "robot"),
        "d.json": ('{"messages": [{"role": "user", "content": "hi"}]}', "ends with a user message"),
    }
    for name, (text, _) in files.items():
        (tmp_path / name).write_text(text)
    bad = {
        "/tempreture 1": "see /help",
        "/temperature hot": "/temperature got 'hot'",
        "/temperature nan": "temperature got nan",
        "/top_k 1.5": "/top_k got '1.5'",
        "/save": "/save got no file name",
        "/save x.json": "no conversation",
        f"/load {tmp_path}/none": "none does not exist",
        f"/load {tmp_path}": "Is a directory",
        "/load ~nobody-of-this-name/a": "~nobody-of-this-name/a",
        **{f"/load {tmp_path / name}": expected for name, (_, expected) in files.items()},
    }
    chat, shown = talk([], bad)
    lines = [line for line in shown.splitlines() if not line.startswith("you: ")]
    for line, expected in zip(lines, bad.values(), strict=True):
        assert line.startswith("error: ") and expected in line
    assert (chat.turns, chat.settings) == ([], SETTINGS)


def test_what_is_no_unicode_is_not_saved(talk, tmp_path):
    _, shown = talk(["ok", "ok"], ["a\udcffb", f"/save {tmp_path}/new/a.json", "more"])
    assert f"error: could not save {tmp_path}/new/a.json" in shown and "\\udcff" in shown
    assert shown.endswith("you: more\nok\nyou: \n") and not [*tmp_path.rglob("*.json")]


def test_a_base_model_continues_each_text_on_its_own(talk):
    answers = ["long river", ("b", "context")]
    chat, shown = talk(answers, ["The", "/save x", "The", "/help"], base=True)
    assert chat.engine.prompts() == ["<|bos|>The", "<|bos|>The"]
    assert "text: The\nlong river\n" in shown and "/top_k" in shown
    assert "error: /save" in shown
    with pytest.raises(UserError, match="system"):
        talk([], [], base=True, system="Be kind.")

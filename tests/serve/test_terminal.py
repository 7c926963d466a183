import io
import json
import signal

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.inference.engine import Event
from nanochat_jax.serve.terminal import Chat, Screen, Settings, wants_color

BOAT = "\N{SHIP}"


class Fake:
    """An engine that says what it is told to, a token an event, and keeps the requests."""

    max_len = 100

    def __init__(self, tokenizer, *answers):
        self.tokenizer, self.answers = tokenizer, iter(answers)
        self.requests, self.cancelled = [], None

    def stream(self, request):
        self.requests.append(request)
        answer, finish = next(self.answers), "stop"
        if isinstance(answer, tuple):
            answer, finish = answer
        ids = self.ids(answer)
        if finish == "stop":
            ids.append(self.tokenizer.special_id("<|assistant_end|>"))
        for number, token in enumerate(ids):
            if finish == "interrupt" and number == 3:
                signal.raise_signal(signal.SIGINT)
            last = number == len(ids) - 1
            yield Event(len(self.requests), [token], [0.0], [True], finish if last else None)
            if self.cancelled == len(self.requests):
                yield Event(self.cancelled, [], [], [], "cancelled")
                return

    def cancel(self, id):
        self.cancelled = id

    def ids(self, answer):
        """Text byte by byte; "<|...|>" words are special tokens."""
        ids = []
        for word in answer.split("~"):
            if word in self.tokenizer.special:
                ids.append(self.tokenizer.special_id(word))
            else:
                ids += [self.tokenizer.ranks[bytes([byte])] for byte in word.encode()]
        return ids

    def prompts(self):
        return [self.tokenizer.decode(request.prompt) for request in self.requests]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def talk(tiny_tokenizer):
    """(answers, lines typed) -> (chat, what was shown). A line that is an exception is raised."""

    def run(answers, lines, *, color=False, max_len=100, **options):
        engine, out = Fake(tiny_tokenizer, *answers), io.StringIO()
        engine.max_len = max_len
        screen = Screen(out, out, interactive=True, color=color)
        options = {"settings": Settings(max_new_tokens=40)} | options
        chat = Chat(engine, tiny_tokenizer, screen=screen, **options)
        typed = iter([*lines, EOFError])

        def read(prompt):
            out.write(prompt)
            line = next(typed)
            if not isinstance(line, str):
                raise line
            out.write(line + "\n")
            return line

        chat.loop(read)
        return chat, out.getvalue()

    return run


def test_a_conversation_and_its_history(talk):
    chat, shown = talk([f"Hi {BOAT}!", "Again."], ["hello", "  ", "once more"], system="Be kind.")
    assert shown == f"you: hello\nHi {BOAT}!\nyou:   \nyou: once more\nAgain.\nyou: \n"
    assert chat.engine.prompts() == [
        "<|bos|><|user_start|>Be kind.\n\nhello<|user_end|><|assistant_start|>",
        f"<|bos|><|user_start|>Be kind.\n\nhello<|user_end|><|assistant_start|>Hi {BOAT}!"
        "<|assistant_end|><|user_start|>once more<|user_end|><|assistant_start|>",
    ]
    seeds = [request.seed for request in chat.engine.requests]
    assert seeds == [42, 43]  # the same question is answered anew


CALL = "It is ~<|python_start|>~2*3~<|python_end|>~<|output_start|>~6~<|output_end|>~6."


def test_tool_calls_are_told_apart_and_remembered(talk):
    chat, shown = talk([CALL, "ok"], ["2*3?", "sure?"])
    assert "It is [python: 2*3][output: 6]6.\n" in shown
    assert CALL.replace("~", "") + "<|assistant_end|>" in chat.engine.prompts()[1]
    _, shown = talk([CALL], ["2*3?"], color=True)
    assert "It is \x1b[2m[python: 2*3]\x1b[0m\x1b[2m[output: 6]\x1b[0m6.\n" in shown
    assert "\x01\x1b[32m\x02you: \x01\x1b[0m\x02" in shown
    # A call cut off is closed on the screen and in the history.
    chat, shown = talk([("1+~<|python_start|>~1", "length"), "ok"], ["?", "?"])
    assert "1+[python: 1]\n[cut off after 40 tokens, --max-new-tokens]\n" in shown
    assert "<|python_start|>1<|python_end|><|assistant_end|>" in chat.engine.prompts()[1]


def test_one_question_prints_the_answer_alone(tiny_tokenizer):
    out, notes = io.StringIO(), io.StringIO()
    screen = Screen(out, notes, interactive=False, color=False)
    answers = (CALL, ("\x07tab\t", "length"))
    chat = Chat(Fake(tiny_tokenizer, *answers), tiny_tokenizer, Settings(), screen)
    assert chat.ask("2*3?") == "stop"
    assert (out.getvalue(), notes.getvalue()) == ("It is 6.\n", "")
    assert chat.ask("more") == "length"
    assert out.getvalue() == "It is 6.\n\x07tab\t\n"  # a pipe gets the bytes, whatever they are
    assert notes.getvalue() == "[cut off after 256 tokens, --max-new-tokens]\n"


def test_one_question_on_a_terminal_cannot_steer_it(tiny_tokenizer):
    out = Terminal()
    screen = Screen(out, io.StringIO(), interactive=False, color=False)
    Chat(Fake(tiny_tokenizer, "a\x1b[2J\x9bb\tc"), tiny_tokenizer, Settings(), screen).ask("?")
    assert out.getvalue() == "a[2Jb\tc\n"


def test_a_model_cannot_steer_the_terminal(talk):
    _, shown = talk(["a\x1b[2J\x9bb\r\tc\n"], ["?"])
    assert shown == "you: ?\na[2Jb\tc\n\nyou: \n"


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(talk):
    before = signal.getsignal(signal.SIGINT)
    chat, shown = talk([("abcdef", "interrupt"), "ok"], ["?", KeyboardInterrupt, "go on"])
    assert signal.getsignal(signal.SIGINT) is before
    assert shown == (
        "you: ?\nabcd\n[stopped]\nyou: \n/quit or Ctrl-D leaves\nyou: go on\nok\nyou: \n"
    )
    assert "<|assistant_start|>abcd<|assistant_end|>" in chat.engine.prompts()[1]


def test_an_empty_answer_keeps_the_roles_alternating(talk):
    chat, _ = talk(["", "ok"], ["one", "two"])
    assert (
        "one<|user_end|><|assistant_start|><|assistant_end|><|user_start|>two"
        in (chat.engine.prompts()[1])
    )


def test_a_long_history_is_cut_at_a_turn_and_says_so(talk):
    lines = [f"{n} " + "x" * 30 for n in range(4)]
    chat, shown = talk(["yes"] * 4 + [("no", "context")], [*lines, "y" * 120, "z"], max_len=150)
    longest = chat.engine.max_len - 40
    assert all(len(request.prompt) <= longest for request in chat.engine.requests)
    assert [prompt.count("user_start") for prompt in chat.engine.prompts()] == [1, 2, 2, 2, 3]
    assert chat.engine.prompts()[3].startswith("<|bos|><|user_start|>2 xxx")
    full = "[the context of 150 tokens is full: the model no longer sees the oldest"
    assert [line for line in shown.splitlines() if line.startswith(full)] == [
        f"{full} 1 of 2 turns; /new starts over]",
        f"{full} 2 of 3 turns; /new starts over]",
    ]
    assert "error: the last message is 1" in shown  # and the chat went on
    assert "no\n[cut off: the context of 150 tokens is full; /new starts over]\n" in shown
    assert len(chat.turns) == 10  # all is kept for /save


def test_commands(talk, tmp_path):
    file = tmp_path / "deep" / "chat.json"
    chat, shown = talk(
        [CALL, "b", "c"],
        [
            "/system Be kind.",
            "/temperature 0",
            "/top_k 3",
            "one",
            f"/save {file}",
            "/new",
            "/system",
            "two",
            f"/load {file}",
            "three",
            "/quit",
            "never read",
        ],
    )
    assert [(r.temperature, r.top_k) for r in chat.engine.requests] == [(0.0, 3)] * 3
    assert chat.engine.prompts()[1] == "<|bos|><|user_start|>two<|user_end|><|assistant_start|>"
    assert chat.engine.prompts()[2] == (
        "<|bos|><|user_start|>Be kind.\n\none<|user_end|><|assistant_start|>"
        + CALL.replace("~", "")
        + "<|assistant_end|><|user_start|>three<|user_end|><|assistant_start|>"
    )
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[2]["content"][1] == {"type": "python", "text": "2*3"}
    assert "saved 1 turns" in shown and "loaded 1 turns" in shown and "never read" not in shown


def test_bad_commands_are_told_in_a_line_and_change_nothing(talk, tmp_path):
    def write(name, value):
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return f"/load {tmp_path / name}"

    user = {"role": "user", "content": "hi"}
    bad = {
        "/tempreture 1": "unknown command /tempreture; the nearest is /temperature",
        "/temperature hot": "/temperature got 'hot', expected a number",
        "/temperature -1": "temperature got -1.0, expected a number of at least 0",
        "/temperature nan": "temperature got nan",
        "/top_k 1.5": "/top_k got '1.5'",
        "/save": "/save got no file name; write /save FILE",
        "/save x.json": "there is no conversation to save",
        f"/load {tmp_path}/none": "none does not exist",
        f"/load {tmp_path}": "could not read",
        write("a.json", "{"): "is not valid JSON",
        write("deep.json", "[" * 100_000): "is not valid JSON",
        write("b.json", []): "b.json: got [], expected",
        write("c.json", {"messages": [{"role": "robot", "content": "hi"}]}): "role 'robot'",
        write("d.json", {"messages": [user]}): "ends with a user message",
        write("e.json", {"messages": [user, {"role": "assistant", "content": 3}]}): "is 3",
    }
    chat, shown = talk([], bad)
    lines = [line for line in shown.splitlines() if not line.startswith("you: ")]
    assert len(lines) == len(bad)
    for line, expected in zip(lines, bad.values(), strict=True):
        assert line.startswith("error: ") and expected in line
    assert (chat.turns, chat.settings) == ([], Settings(max_new_tokens=40))


def test_what_is_no_unicode_is_not_saved(talk, tmp_path):
    _, shown = talk(["ok", "ok"], ["a\udcffb", f"/save {tmp_path}/new/a.json", "more"])
    assert f"error: could not write {tmp_path}/new/a.json: got '\\udcff' in the conv" in shown
    assert shown.endswith("you: more\nok\nyou: \n") and not list(tmp_path.iterdir())


def test_a_base_model_continues_each_text_on_its_own(talk, tiny_tokenizer):
    answers = ["long river", ("b", "context"), "c"]
    chat, shown = talk(answers, ["The", "/save x", "The", "x" * 120, "d", "/help"], base=True)
    assert chat.engine.prompts() == ["<|bos|>The", "<|bos|>The", "<|bos|>d"]
    assert "text: The\nlong river\n" in shown
    assert "error: /save: a base model continues text" in shown
    assert "b\n[cut off: the context of 100 tokens is full]\n" in shown
    assert "error: the text is 1" in shown and "expected at most 99" in shown
    assert "/top_k        N  sample among" in shown
    with pytest.raises(UserError, match="takes no system message"):
        talk([], [], base=True, system="Be kind.")


def test_colours_follow_the_terminal_and_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(Terminal(), no_color=False)
    assert not wants_color(Terminal(), no_color=True)
    assert not wants_color(io.StringIO(), no_color=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(Terminal(), no_color=False)


@pytest.mark.parametrize("value", [{"temperature": float("inf")}, {"max_new_tokens": 0}])
def test_settings_out_of_range(value):
    with pytest.raises(UserError, match="expected a number of at least"):
        Settings(**value)

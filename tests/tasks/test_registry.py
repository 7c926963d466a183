"""Specs against what they select, written out; mixtures against the goldens and their own names."""

import json
from collections import Counter

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tasks import registry
from nanochat_jax.tasks.base import messages
from nanochat_jax.tasks.identity import PERSONA
from nanochat_jax.tasks.registry import Mixture, open_task


def asked(task):
    return [conversation["messages"][0]["content"] for conversation in task]


@pytest.fixture
def json_file(tmp_path):
    """Writes n conversations, whose questions are NAME0, NAME1, ...; file order is kept."""

    def write(name, n):
        lines = [json.dumps(messages(f"{name}{i}", "yes")) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        return tmp_path / f"{name}.jsonl"

    return write


@pytest.fixture
def task_dir(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    rows = [json.dumps({"question": f"q{i}", "answer": f"#### {i}"}) for i in range(10)]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(rows))
    return str(tmp_path)


SELECTED = {"": "012345", "[:2]": "01", "[-2:]": "45", "[1::2]": "135", "[1:4] x2": "123123"}


@pytest.mark.parametrize("rest, indices", [*SELECTED.items(), ("[:100] x1", "012345")])
def test_slices_and_weights(tmp_path, json_file, rest, indices):
    path = json_file("a", 6).rename(tmp_path / "my chats [1:2] x7.jsonl")
    assert asked(open_task(f"  json {path}{rest} ")) == [f"a{i}" for i in indices]


@pytest.mark.parametrize("weight, counts", [("2.5", {2: 5, 3: 5}), ("0.3", {1: 3})])
def test_weights_with_a_fraction(json_file, weight, counts):
    spec = f"json {json_file('a', 10)} x{weight}"
    often = Counter(asked(open_task(spec)))
    assert Counter(often.values()) == counts
    assert Counter(asked(open_task(spec))) == often


def test_a_selection_is_graded_as_its_task(task_dir):
    whole = open_task("gsm8k test", task_dir=task_dir)
    task = open_task("gsm8k test[3:9:2] x2", task_dir=task_dir)
    assert (task.kind, len(task)) == (whole.kind, 6)
    numbers = [text.removeprefix("q") for text in asked(task)]
    assert numbers == [text.removeprefix("q") for text in asked(whole[3:9:2])] * 2
    assert task.grade([(i, f"#### {n}") for i, n in enumerate(numbers)]) == [True] * 6
    assert task.grade([(5, f"#### {numbers[5]}"), (0, f"#### {numbers[5]}")]) == [True, False]


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("gsm9k test", "gsm8k"),
        ("gsm8k", "train, test"),
        ("json", ".jsonl"),
        ("mmlu train", "test, dev, validation, auxiliary_train"),
        *((f"gsm8k test{rest}", "") for rest in ("[:x]", "[5]", "[::0]", " x-1", "[10:]", " x0")),
        ("", "gsm8k"),
    ],
)
def test_wrong_specs(task_dir, spec, expected):
    with pytest.raises(UserError) as error:
        open_task(spec, task_dir=task_dir)
    message = str(error.value)
    assert repr(spec.removesuffix(" test")) in message or repr(spec) in message
    assert expected in message and "\n" not in message


def test_golden_mixture(json_file, goldens):
    a, b, c = (json_file(name, n) for name, n in (("a", 7), ("b", 5), ("c", 8)))
    mixed = Mixture([f"json {a}", f"json {b}", f"json {c}[1::2]"])
    expected = json.loads((goldens / "text.json").read_text())["mixture"]
    assert asked(mixed) == [f"{name}{index}" for name, index in expected]


def test_a_mixture_knows_where_its_examples_are_from(task_dir, json_file):
    specs = ["gsm8k test[2:6]", f"json {json_file('a', 7)} x2.5", "gsm8k test[2:6]"]
    mixed = Mixture(specs, task_dir=task_dir)
    assert mixed.counts() == {specs[0]: 8, specs[1]: 18}
    assert len(mixed) == 26
    for index, conversation in enumerate(mixed):
        spec, _, inner = mixed.name(index).rpartition(" ")
        assert open_task(spec, task_dir=task_dir)[int(inner)] == conversation
    unmixed = [text for spec in specs for text in asked(open_task(spec, task_dir=task_dir))]
    assert sorted(asked(mixed)) == sorted(unmixed)


def test_all_specs_are_checked_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError):
        Mixture([])
    with pytest.raises(UserError, match="'nonsense'"):  # not that the folder is empty
        Mixture(["gsm8k test", "nonsense x2"], task_dir=str(tmp_path))


def test_file_stamps_name_the_files_that_specs_read(json_file, tmp_path):
    mine, persona = str(json_file("a", 2)), tmp_path / "me.toml"
    persona.write_text("")

    def stamped(*specs, persona=""):
        return [path for path, *_ in registry.file_stamps(specs, persona)]

    assert stamped(f"json {mine}", "arithmetic train", persona=str(persona)) == [mine]
    assert stamped("identity train[:3]", f"json {mine} x2") == [mine, str(PERSONA)]
    assert stamped("identity train", persona=str(persona)) == [str(persona)]
    before = registry.file_stamps(["identity train"], str(persona))
    persona.write_text("another")
    assert registry.file_stamps(["identity train"], str(persona)) != before
    for path in (persona, tmp_path / "none.toml"):  # one is not TOML, one does not exist
        with pytest.raises(UserError, match=path.name):
            open_task("identity train", persona=str(path))

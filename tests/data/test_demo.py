"""The demo text: what is dropped, what is tidied, and that it is enough English."""

import importlib.util

import pyarrow.parquet as pq
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.data import datasets, demo

TALK = [
    "I went to the lake with my sister yesterday and we swam until it was dark.",
    "That sounds lovely, was the water not too cold for you at this time of the year?",
    "It was cold at first but then we got used to it and did not want to leave.",
    "I would like to see that lake one day, is it far from the city where you live?",
    "It is about an hour by bus, and the last part is a nice walk through the woods.",
]


def conversation(*extra):
    return {"messages": [[{"text": text, "sender": "a"}] for text in [*TALK, *extra]]}


INDECENT = ["write to me at someone@example.org please", "I am @someone there", "what the hell"]
INDECENT += ["call (801) 555-1234 tonight", "call 801 555 1234 tonight", "my number is 8015551234"]
INDECENT += ["+1-801-555-1234", "it is 555-1234 I think", "this is Crappy"]
INNOCENT = ["known each other since 2010", "there were 10,000 people and 3.14 pies"]
INNOCENT += ["the class was hello world in Essex", "I saw Moby and Richard at 10:30"]


@pytest.mark.parametrize("message", INDECENT)
def test_indecent_and_private_conversations_are_dropped_whole(message):
    raw = {key: conversation() for key in "acd"} | {"b": conversation(message)}
    assert [key for key, _ in demo.conversations(raw)] == ["a", "c", "d"]


@pytest.mark.parametrize("message", INNOCENT)
def test_innocent_messages_are_kept(message):
    assert demo.is_decent(message)


def test_links_and_the_contest_are_cut_out():
    more = ["look at https://example.org/x", *TALK, "how many points do you have", "bye"]
    texts = [text for _, text in demo.conversations({str(i): conversation(*more) for i in "123"})]
    # The talk before the link and the talk after it, three times, with dashes or in quotes.
    said = ["\n".join(f"- {turn}" for turn in TALK), "\n".join(f'"{turn}"' for turn in TALK)]
    assert len(texts) == 6 and set(texts) <= set(said)


VERY_LATE = f"it was {'very ' * 12}late when"
TYPED = [
    (["hello", "how are you"], "Hello. How are you."),
    (["i dont know,  im   tired"], "I don't know, I'm tired."),
    (["soooooo good!!!!!!"], "Soo good!!!"),
    (["hahahahaha ok"], "Haha ok."),
    (["???", "what? yes"], "What? Yes."),
    ([VERY_LATE, "he sang"], f"{VERY_LATE.capitalize()} he sang."),
]


@pytest.mark.parametrize("typed, tidy", TYPED)
def test_tidying(typed, tidy):
    assert demo.tidy_turn(typed) == tidy


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="chitchat-dataset"):
        demo.read_dataset()


DOCSTRING = """
Return the roots of a polynomial that has the coefficients given in ``c``.

The values in the array are :ref:`coefficients <coef>` of a polynomial. If the length of it is one
more than the degree, then the polynomial is described by :func:`~numpy.poly` as well [1]_.

>>> np.roots([1, 2])

Parameters
----------
c : array_like
    The array of coefficients to be used for this is one-dimensional and it is not copied.

Notes
-----
The algorithm relies on computing eigenvalues of the *companion* matrix, and it is exact.

References
----------
A very long book about the theory of matrices that is known to all, in the third edition of it.

Args:
    x: the value that this function is going to be called with, and it may be of any kind.
"""


def test_prose_of_a_docstring():
    assert demo.prose_paragraphs(DOCSTRING) == [
        "Return the roots of a polynomial that has the coefficients given in c.",
        "The values in the array are coefficients of a polynomial. If the length of it is one "
        "more than the degree, then the polynomial is described by numpy.poly as well.",
        "The algorithm relies on computing eigenvalues of the companion matrix, and it is exact.",
    ]


def test_source_files_are_read_without_being_run(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "tests").mkdir(parents=True)
    (tmp_path / "no_stdlib").mkdir()
    prose = "This is a sentence about the {} that is long enough to be taken for prose of a kind. "
    for name in ("module", "test_module", "tests/module", "class"):
        body = f'"""{prose.format(name) * 4}"""\nraise SystemExit\n'
        (package / f"{name}.py").write_text(body)
    (package / "python2.py").write_text('"""Doc."""\nprint "x"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    found = dict(demo.documentation(["package", "not_there"], str(tmp_path / "no_stdlib")))
    names = {key.rpartition("/")[2] for key in found}
    assert names == {"class.py", "module.py", "topics.py"}


@pytest.mark.slow
def test_the_real_thing_is_ten_megabytes_of_english(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    train, validation = datasets.ensure("demo", num_shards=1)
    texts = {path: pq.read_table(path)["text"].to_pylist() for path in [*train, validation]}
    everything = [text for of_shard in texts.values() for text in of_shard]
    assert sum(len(text.encode()) for text in everything) > 10_000_000
    assert len(set(everything)) == len(everything)
    assert {200 <= len(text) <= 1_920 for text in everything} == {True}
    assert 0.05 < len(texts[validation]) / len(everything) < 0.15

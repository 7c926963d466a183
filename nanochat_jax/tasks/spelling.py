"""Words letter by letter: spelling them, and counting a letter in them. Generated.

    Spell the word apple.             apple: a p p l e

    How many r are in strawberry?     strawberry: s t r1 a w b e r2 r3 y
                                      <|python_start|>"strawberry".count("r")<|python_end|>3
                                      The letter r appears 3 times in strawberry.
                                      #### 3

A model sees tokens, not letters; here it learns which letters a token holds. It counts twice: by
hand, numbering the letter while it spells, and with the calculator. The call has double quotes:
after a single one the tokenizer looks for an English contraction and would cut 'scream' into 's and
cream. Words are lower case in the answer whatever their case in the question; the last sentence of
the answer is in the language of the question.

Invariants: an example is a function of (words, split, index); a word of the test split is in no
training example, whichever the list.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, Task, check_split, split_of
from nanochat_jax.tasks.gsm8k import extract_answer
from nanochat_jax.tools.calculator import calculate

WORDS = Path(__file__).parent / "words.txt"  # everyday English words, one a line
_ENGLISH_FRAC = 0.7
_IN_WORD_FRAC = 0.75  # how often the letter asked for is one of the word's
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"

# Per language: questions, and the sentence after the count n. {l} is the letter, {w} the word.
_English = "English"
_COUNTING = {
    _English: (
        (
            "How many {l} are in {w}?",
            "How many {l} are there in {w}?",
            "How many {l} are there in the word {w}?",
            "How many {l}'s are in {w}?",
            "How many {l}'s does {w} have?",
            "How many times does {l} appear in {w}?",
            "How many times does the letter {l} occur in {w}?",
            "How many times do you see {l} in {w}?",
            "How often does {l} occur in the word {w}?",
            "How often is the letter {l} used in {w}?",
            "Count the {l}'s in {w}.",
            "Count the letter {l} in {w}.",
            "Count how many {l} the word {w} has.",
            "Can you count the {l}'s in {w}?",
            "Could you count the letter {l} in {w} for me?",
            "Please count the letter {l} in the word {w}.",
            "What is the number of {l} in {w}?",
            "Tell me how many {l} there are in {w}.",
            "Do you know how many {l} {w} contains?",
            "I need the number of {l}'s in {w}.",
            "In {w}, how many letters are {l}?",
            "In the word {w}, how often does {l} show up?",
            "The word is {w}. How many {l} does it have?",
            "Look at {w}: how many {l} can you find?",
            "{w}: how many {l}?",
        ),
        "The letter {l} appears {n} times in {w}.",
    ),
    "Spanish": (
        (
            "¿Cuántas {l} hay en {w}?",
            "¿Cuántas veces aparece la letra {l} en {w}?",
            "¿Cuántas letras {l} tiene la palabra {w}?",
            "Cuenta las {l} de la palabra {w}.",
            "Dime cuántas {l} hay en {w}.",
        ),
        "Número de letras {l} en {w}: {n}.",
    ),
    "French": (
        (
            "Combien de {l} y a-t-il dans {w} ?",
            "Combien de fois la lettre {l} apparaît-elle dans {w} ?",
            "Combien de {l} contient le mot {w} ?",
            "Compte les {l} dans le mot {w}.",
        ),
        "Nombre de lettres {l} dans {w} : {n}.",
    ),
    "German": (
        (
            "Wie viele {l} hat das Wort {w}?",
            "Wie viele {l} sind in {w}?",
            "Wie oft kommt der Buchstabe {l} in {w} vor?",
            "Zähle die {l} in {w}.",
            "Wie oft steht {l} im Wort {w}?",
        ),
        "Anzahl der {l} in {w}: {n}.",
    ),
    "Italian": (
        (
            "Quante {l} ci sono in {w}?",
            "Quante volte compare la lettera {l} in {w}?",
            "Quante {l} ha la parola {w}?",
            "Conta le {l} nella parola {w}.",
        ),
        "Numero di lettere {l} in {w}: {n}.",
    ),
    "Portuguese": (
        (
            "Quantas letras {l} há em {w}?",
            "Quantas vezes a letra {l} aparece em {w}?",
            "Quantas letras {l} tem a palavra {w}?",
            "Conte as letras {l} na palavra {w}.",
        ),
        "Número de letras {l} em {w}: {n}.",
    ),
    "Dutch": (
        (
            "Hoeveel keer komt de letter {l} voor in {w}?",
            "Hoe vaak staat de letter {l} in het woord {w}?",
            "Tel de letter {l} in {w}.",
        ),
        "Aantal letters {l} in {w}: {n}.",
    ),
    "Chinese": (
        (
            "{w} 里有几个 {l}？",
            "单词 {w} 中有多少个字母 {l}？",
            "字母 {l} 在 {w} 中出现了几次？",
            "请数一数 {w} 里有几个 {l}。",
        ),
        "{w} 中有 {n} 个 {l}。",
    ),
    "Japanese": (
        (
            "{w} に {l} はいくつありますか？",
            "{w} という単語に文字 {l} は何個含まれていますか？",
            "{w} の中の {l} の数を数えてください。",
        ),
        "{w} には {l} が {n} 個あります。",
    ),
    "Korean": (
        (
            "{w}에 {l} 글자가 몇 개 있나요?",
            "단어 {w}에 {l} 글자가 몇 번 나오나요?",
            "{w}에서 {l} 글자의 개수를 세어 주세요.",
        ),
        "{w}에는 {l} 글자가 {n}개 있습니다.",
    ),
}
_SPELLING = {
    _English: (
        "Spell {w}.",
        "Spell the word {w}.",
        "Please spell {w}.",
        "Spell {w} letter by letter.",
        "Can you spell {w}?",
        "How do you spell {w}?",
        "How is {w} spelled?",
        "Write {w} one letter at a time.",
        "What are the letters of {w}?",
        "Which letters is the word {w} made of?",
        "Take {w} apart into its letters.",
        "spell: {w}",
    ),
    "Spanish": ("Deletrea {w}.", "¿Cómo se deletrea {w}?"),
    "French": ("Épelle {w}.", "Comment s'épelle {w} ?"),
    "German": ("Buchstabiere {w}.", "Wie buchstabiert man {w}?"),
    "Italian": ("Fai lo spelling di {w}.", "Quali sono le lettere di {w}?"),
    "Portuguese": ("Soletre {w}.", "Como se soletra {w}?"),
    "Dutch": ("Spel het woord {w}.", "Hoe spel je {w}?"),
    "Chinese": ("请拼写 {w}。", "{w} 怎么拼写？"),
    "Japanese": ("{w} のつづりを教えてください。", "{w} を一文字ずつ書いてください。"),
    "Korean": ("{w}의 철자를 알려 주세요.", "{w}의 철자는 무엇인가요?"),
}
_QUOTES = ("{}", "{}", "{}", "'{}'", '"{}"', "“{}”")
_CASES = (str.lower, str.lower, str.lower, str.capitalize, str.upper)


def read_words(path: str | Path, split: str) -> list[str]:
    """The words of a list that belong to a split, in its order."""
    check_split(split)
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the words of {path} ({error}); expected a text file, one word a line"
        ) from None
    wrong = next((word for word in words if not re.fullmatch("[a-z]+", word)), None)
    if wrong is not None:
        raise UserError(f"got {wrong!r} in {path}, expected words of letters a-z, one a line")
    words = [word for word in words if split_of(word) == split]
    if not words:
        raise UserError(f"{path} has no word of the {split} split, a tenth is test; add words")
    return words


class SpellingBee(Task):
    """How many of a letter are in a word; the answer ends in `#### count`."""

    kind = "generative"

    def __init__(self, split: str, words: str | Path = WORDS):
        self.split = split
        self.words = read_words(words, split)

    def __len__(self) -> int:
        return 80_000 if self.split == "train" else 1_000

    def example(self, index: int) -> Conversation:
        rng = random.Random(f"spelling bee {self.split} {index}")
        word = rng.choice(self.words)
        drawn = rng.choices(word if rng.random() < _IN_WORD_FRAC else _ALPHABET, k=2)
        letter = max(drawn, key=word.count)  # repeated letters are rare, and the point
        language = _choose_language(rng, list(_COUNTING))
        questions, sentence = _COUNTING[language]
        question = _ask(rng, rng.choice(questions), l=letter, w=word)
        call = f'"{word}".count("{letter}")'
        count = calculate(call)
        if language == _English and count == "1":
            sentence = sentence.replace("times", "time")
        answer = sentence.format(l=letter, w=word, n=count)
        parts = [
            {"type": "text", "text": f"{word}: {number_letter(word, letter)}\n"},
            {"type": "python", "text": call},
            {"type": "python_output", "text": count},
            {"type": "text", "text": f"{answer}\n#### {count}"},
        ]
        return _conversation(question, parts)

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        return [
            extract_answer(said) == extract_answer(_last_text(self.example(index)))
            for index, said in answers
        ]


class SimpleSpelling(Task):
    """A word in single letters."""

    kind = "generative"

    def __init__(self, split: str, words: str | Path = WORDS):
        self.split = split
        self.words = read_words(words, split)

    def __len__(self) -> int:
        return 200_000 if self.split == "train" else 1_000

    def example(self, index: int) -> Conversation:
        rng = random.Random(f"simple spelling {self.split} {index}")
        word = rng.choice(self.words)
        templates = _SPELLING[_choose_language(rng, list(_SPELLING))]
        question = _ask(rng, rng.choice(templates), w=word)
        return _conversation(question, f"{word}: {' '.join(word)}")

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        """The letters after the colon, single and all of them; what stands between is free."""
        return [
            _letters(said) == _letters(self.example(index)["messages"][-1]["content"])
            for index, said in answers
        ]


def number_letter(word: str, letter: str) -> str:
    """A word in single letters, the letter asked for numbered: s t r1 a w b e r2 r3 y."""
    seen = 0
    spelled = []
    for char in word:
        seen += char == letter
        spelled.append(f"{char}{seen}" if char == letter else char)
    return " ".join(spelled)


def _letters(said: str) -> list[str]:
    return re.findall("[a-z]+", said.rpartition(":")[2].lower())


def _choose_language(rng: random.Random, languages: list[str]) -> str:
    return _English if rng.random() < _ENGLISH_FRAC else rng.choice(languages[1:])


def _ask(rng: random.Random, template: str, **slots: str) -> str:
    """A question as people type it: quotes and case vary, capitals and the last mark go missing."""
    question = template.format(
        **{name: rng.choice(_QUOTES).format(rng.choice(_CASES)(slots[name])) for name in slots}
    )
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip(" .?。？")
    return question


def _conversation(question: str, content: str | list[dict[str, str]]) -> Conversation:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": content},
        ]
    }


def _last_text(conversation: Conversation) -> str:
    return conversation["messages"][-1]["content"][-1]["text"]

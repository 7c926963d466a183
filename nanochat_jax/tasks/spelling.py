"""Words letter by letter: spelling them, and counting a letter in them. Generated.

    Spell the word apple.             apple: a p p l e

    How many r are in strawberry?     strawberry: s t r1 a w b e r2 r3 y
                                      <|python_start|>"strawberry".count("r")<|python_end|>3
                                      The letter r appears 3 times in strawberry.
                                      #### 3

The call has double quotes, because after a single one the tokenizer would cut 'scream' into 's and
cream. No word of the test split is in a training example.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

from nanochat_jax.tasks import base
from nanochat_jax.tasks.base import Conversation, GeneratedTask, messages, split_of
from nanochat_jax.tasks.gsm8k import NumberTask, solution_parts
from nanochat_jax.tools.calculator import calculate

WORDS = Path(__file__).with_name("words.txt").read_text().split()  # everyday English ones
_SPLIT_WORDS = {split: [word for word in WORDS if split_of(word) == split] for split in base.SPLITS}
_LANGUAGES = base.read_toml("spelling.toml")  # English first
_ENGLISH_FRAC = 0.7
_IN_WORD_FRAC = 0.75  # how often the letter asked for is one of the word's
_QUOTES = ("{}", "{}", "{}", "'{}'", '"{}"', "“{}”")
_CASES = (str.lower, str.lower, str.lower, str.capitalize, str.upper)


class SpellingBee(NumberTask, GeneratedTask):
    seed = "spelling bee"
    sizes = {"train": 80_000, "test": 1_000}

    def draw(self, rng: random.Random) -> Conversation:
        word = rng.choice(_SPLIT_WORDS[self.split])
        drawn = rng.choices(word if rng.random() < _IN_WORD_FRAC else ascii_lowercase, k=2)
        letter = max(drawn, key=word.count)  # repeated letters are rare, and the point
        language = _draw_language(rng)
        question = _draw_question(rng, language["counting"], letter=letter, word=word)
        call = f'"{word}".count("{letter}")'
        count = calculate(call)
        sentence = language["count"].format(letter=letter, word=word, count=count)
        sentence = sentence.replace(" 1 times", " 1 time")
        nth = (word[: i + 1].count(letter) if c == letter else "" for i, c in enumerate(word))
        spelled = " ".join(f"{c}{n}" for c, n in zip(word, nth, strict=True))
        solution = f"{word}: {spelled}\n<<{call}={count}>>{sentence}\n#### {count}"
        return messages(question, solution_parts(solution))


class SimpleSpelling(GeneratedTask):
    kind = "generative"
    seed = "simple spelling"
    sizes = {"train": 200_000, "test": 1_000}

    def draw(self, rng: random.Random) -> Conversation:
        word = rng.choice(_SPLIT_WORDS[self.split])
        question = _draw_question(rng, _draw_language(rng)["spelling"], word=word)
        return messages(question, f"{word}: {' '.join(word)}")

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        """The letters after the colon, single and all of them; what stands between is free."""
        return [
            _letters(said) == _letters(self.example(index)["messages"][-1]["content"])
            for index, said in answers
        ]


def _letters(said: str) -> list[str]:
    return re.findall("[a-z]+", said.rpartition(":")[2].lower())


def _draw_language(rng: random.Random) -> dict:
    english, *others = _LANGUAGES.values()
    return english if rng.random() < _ENGLISH_FRAC else rng.choice(others)


def _draw_question(rng: random.Random, questions: Sequence[str], **slots: str) -> str:
    """A question as people type it: quotes and case vary, capitals and the last mark go missing."""
    template = rng.choice(questions)
    for name, text in slots.items():
        slots[name] = rng.choice(_QUOTES).format(rng.choice(_CASES)(text))
    question = template.format(**slots)
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip(" .?。？")
    return question

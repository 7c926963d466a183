"""Sums and word problems in the form of GSM8K, generated: numbers small enough for a small model.

    What is 12 + 30?
        <|python_start|>12+30<|python_end|>42    12+30 is 42.
        #### 42

    Anna has $20 and buys 3 pears for $4 each. How much money is left?
        <|python_start|>3*4<|python_end|>12      The pears cost $12.
        <|python_start|>20-12<|python_end|>8     $8 is left.
        #### 8

Level 0 is a plain sum, level n > 0 a story of n steps. A step calls the calculator first and then
says what came out, so that the number it says stands right before it. A tenth of what the calls
depend on, the story or operation and its numbers, is test and in no training example, whatever the
names, things and wording around it.

Numbers are drawn until every step gives a whole number below 1,000 that the calculator prints as
such, and in stories one of at least 2, so that plurals are right. An example is a function of
(split, level, index).
"""

import random
import re
from collections.abc import Iterator, Sequence

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, Task, check_split, split_of
from nanochat_jax.tasks.gsm8k import extract_answer
from nanochat_jax.tools.calculator import calculate

LEVELS = (0, 1, 2, 3)
_LEVEL_WEIGHTS = (5, 3, 2, 1)
MAX_RESULT = 999

# How numbers are drawn: by the letter that stands for them.
_RANGES = dict.fromkeys("xyz", (2, 99)) | dict.fromkeys("bcde", (2, 12))
_RANGES |= {"a": (0, 20), "f": (0, 20), "w": (100, 899)}
# Sums: the call, in symbols, in English words, how often.
_SUMS = (
    ("x+y", ("{x}+{y}", "{x} + {y}"), ("{x} plus {y}", "the sum of {x} and {y}"), 5),
    ("x-y", ("{x}-{y}", "{x} - {y}"), ("{x} minus {y}", "{x} take away {y}"), 4),
    ("x*b", ("{x}*{b}", "{x} * {b}", "{x} x {b}", "{x} × {b}"), ("{x} times {b}",), 4),
    ("b*c", ("{b}*{c}", "{b} x {c}", "{b} × {c}"), ("{b} times {c}", "{b} multiplied by {c}"), 2),
    ("x//b", ("{x}/{b}", "{x} / {b}", "{x} ÷ {b}"), ("{x} divided by {b}",), 3),
    ("a+f", ("{a}+{f}", "{a} + {f}"), ("{a} plus {f}",), 2),
    ("a-f", ("{a}-{f}", "{a} - {f}"), ("{a} minus {f}",), 1),
    ("w+x", ("{w}+{x}", "{w} + {x}"), ("{w} plus {x}",), 1),
    ("w-x", ("{w}-{x}", "{w} - {x}"), ("{w} minus {x}",), 1),
    ("x+y+z", ("{x}+{y}+{z}", "{x} + {y} + {z}"), ("{x} plus {y} plus {z}",), 1),
    ("x+y-z", ("{x}+{y}-{z}", "{x} + {y} - {z}"), ("{x} plus {y} minus {z}",), 1),
    ("b*c+x", ("{b}*{c}+{x}", "{b} * {c} + {x}"), ("{b} times {c} plus {x}",), 1),
)
# English requests that fit a call but are no frame around it.
_REQUESTS = {
    "x+y": ("Can you add {x} and {y} for me?", "Add {x} to {y}.", "Add {x} and {y}."),
    "x-y": ("Subtract {y} from {x}.", "Take {y} away from {x}. What is left?"),
    "x*b": ("Multiply {x} by {b}.", "Can you multiply {x} and {b}?"),
    "x//b": ("Divide {x} by {b}.", "How many times does {b} go into {x}?"),
}
# Frames around a sum, the answer in the same language, how often.
_ENGLISH = (
    "What is {}?",
    "What's {}?",
    "Calculate {}.",
    "Compute {}.",
    "How much is {}?",
    "Please work out {}.",
    "What do you get for {}?",
    "Can you tell me what {} is?",
    "Could you calculate {} for me?",
    "I need to know {}.",
    "Do you know what {} is?",
    "Solve {}.",
    "Hi! What is {}?",
    "{}?",
    "{}",
)
_FRAMES = (
    (_ENGLISH, "{sum} is {n}.", 10),
    (("{} =", "{} = ?", "{}=?", "{}="), "{sum} = {n}", 3),
    (("¿Cuánto es {}?", "Calcula {}."), "{sum} es {n}.", 1),
    (("Combien font {} ?", "Calcule {}."), "{sum} font {n}.", 1),
    (("Was ist {}?", "Wie viel ist {}?", "Berechne {}."), "{sum} ist {n}.", 1),
    (("Quanto fa {}?", "Calcola {}."), "{sum} fa {n}.", 1),
    (("Quanto é {}?", "Calcule {}, por favor."), "{sum} é {n}.", 1),
    (("{} 等于多少？", "计算 {}。"), "{sum} 等于 {n}。", 1),
    (("{} はいくつですか？", "{} を計算してください。"), "{sum} は {n} です。", 1),
    (("{} 계산해 주세요.", "{} = 얼마인가요?"), "{sum} = {n}입니다.", 1),
)

# A story: the question, and the solution with its calls as <name=expression>; the last one is the
# answer. {A} {B} {C} are people, {item} things in the plural, {pack} what holds them.
_STORIES = (
    # One step.
    (
        "{A} has {x} {item}. {B} gives {A} {y} more. How many {item} does {A} have now?",
        "<n=x+y> {A} now has {n} {item}.",
    ),
    (
        "There are {x} {item} on the table and {y} {item} on the floor. "
        "How many {item} are there in total?",
        "<n=x+y> There are {n} {item} in total.",
    ),
    (
        "{A} found {x} {item} in the morning and {y} in the afternoon. How many is that together?",
        "<n=x+y> Together that is {n} {item}.",
    ),
    (
        "{A} is {x} years old. How old will {A} be in {b} years?",
        "<n=x+b> {A} will be {n} years old.",
    ),
    (
        "A class has {x} girls and {y} boys. How many children are in the class?",
        "<n=x+y> There are {n} children in the class.",
    ),
    (
        "{A} had {x} {item} and gave {y} of them to {B}. How many {item} does {A} have left?",
        "<n=x-y> {A} has {n} {item} left.",
    ),
    (
        "{A} has {x} {item}. {B} has {y} fewer. How many {item} does {B} have?",
        "<n=x-y> {B} has {n} {item}.",
    ),
    (
        "A book has {x} pages. {A} has read {y} of them. How many pages are left to read?",
        "<n=x-y> There are {n} pages left.",
    ),
    (
        "{A} has ${x} and buys a {thing} for ${y}. How much money is left?",
        "<n=x-y> {A} has ${n} left.",
    ),
    (
        "A bus carries {x} people. At the next stop {y} get off. How many people stay on the bus?",
        "<n=x-y> {n} people stay on the bus.",
    ),
    (
        "There are {b} {pack} with {c} {item} in each. How many {item} are there?",
        "<n=b*c> There are {n} {item}.",
    ),
    (
        "{A} buys {b} {item} for ${c} each. How much does {A} pay?",
        "<n=b*c> {A} pays ${n}.",
    ),
    (
        "{A} reads {x} pages every day. How many pages does {A} read in {b} days?",
        "<n=x*b> {A} reads {n} pages.",
    ),
    (
        "A car drives {x} miles an hour. How far does it go in {b} hours?",
        "<n=x*b> It goes {n} miles.",
    ),
    (
        "A baker bakes {x} loaves a day. How many loaves does the baker bake in {b} days?",
        "<n=x*b> The baker bakes {n} loaves.",
    ),
    (
        "{A} shares {x} {item} equally among {b} friends. How many {item} does each friend get?",
        "<n=x//b> Each friend gets {n} {item}.",
    ),
    (
        "{A} puts {x} {item} into {pack} of {b}. How many {pack} does {A} fill?",
        "<n=x//b> {A} fills {n} {pack}.",
    ),
    (
        "{A} cycles {x} miles in {b} hours. How many miles does {A} cycle in an hour?",
        "<n=x//b> {A} cycles {n} miles in an hour.",
    ),
    (
        "A rope of {x} feet is cut into {b} equal pieces. How long is each piece?",
        "<n=x//b> Each piece is {n} feet long.",
    ),
    # Two steps.
    (
        "{A} has {x} {item}. {B} gives {A} {y} more, and then {A} loses {z}. "
        "How many {item} does {A} have now?",
        "<m=x+y> With those of {B}, {A} has {m} {item}.\n<n=m-z> After the loss {n} are left.",
    ),
    (
        "{A} buys {b} {pack} of {c} {item} and gives {y} of them to {B}. How many {item} are left?",
        "<m=b*c> {A} buys {m} {item}.\n<n=m-y> {n} {item} are left.",
    ),
    (
        "{A} has {x} {item} and {B} has {y} more than {A}. How many do they have together?",
        "<m=x+y> {B} has {m} {item}.\n<n=x+m> Together they have {n} {item}.",
    ),
    (
        "{A} has {x} {item} and {B} has {b} times as many. How many do they have together?",
        "<m=x*b> {B} has {m} {item}.\n<n=x+m> Together they have {n} {item}.",
    ),
    (
        "{A} buys {b} {item} for ${c} each and a {thing} for ${x}. How much is that in all?",
        "<m=b*c> The {item} cost ${m}.\n<n=m+x> In all that is ${n}.",
    ),
    (
        "{A} pays with ${x} for {b} {item} that cost ${c} each. How much change does {A} get?",
        "<m=b*c> The {item} cost ${m}.\n<n=x-m> {A} gets ${n} back.",
    ),
    (
        "{A} earns ${b} an hour and works {c} hours. After buying a {thing} for ${x}, "
        "how much money is left?",
        "<m=b*c> {A} earns ${m}.\n<n=m-x> ${n} is left.",
    ),
    (
        "A farm has {x} hens and {y} ducks. A fox scares {z} of the birds away. "
        "How many birds are left?",
        "<m=x+y> The farm has {m} birds.\n<n=m-z> {n} birds are left.",
    ),
    (
        "{A} and {B} collect {x} and {y} {item} and share them equally between the two of them. "
        "How many {item} does each get?",
        "<m=x+y> They have {m} {item}.\n<n=m//2> Each gets {n} {item}.",
    ),
    (
        "{A} brings {b} {pack} of {c} {item}. {d} friends share them equally. "
        "How many {item} does each friend get?",
        "<m=b*c> {A} brings {m} {item}.\n<n=m//d> Each friend gets {n} {item}.",
    ),
    (
        "A train has {b} cars with {x} seats each. {y} seats are taken. How many seats are free?",
        "<m=b*x> The train has {m} seats.\n<n=m-y> {n} seats are free.",
    ),
    (
        "{A} drives {x} miles in {b} hours. At the same speed, how far does {A} get in {c} hours?",
        "<m=x//b> {A} drives {m} miles in an hour.\n<n=m*c> In {c} hours {A} gets {n} miles far.",
    ),
    (
        "{A} has {x} {item} and keeps {y}. The rest goes to {b} friends in equal parts. "
        "How many {item} does each friend get?",
        "<m=x-y> {m} {item} are given away.\n<n=m//b> Each friend gets {n} {item}.",
    ),
    (
        "{A} runs {b} miles on each of {c} days and {d} miles on Sunday. How many miles is that?",
        "<m=b*c> Without Sunday it is {m} miles.\n<n=m+d> With Sunday it is {n} miles.",
    ),
    (
        "One tree is {b} years old, another {c} times as old. How old will the older one be in "
        "{d} years?",
        "<m=b*c> The older tree is {m} years old.\n<n=m+d> In {d} years it will be {n}.",
    ),
    (
        "{A} needs {x} {item} for a party and has {y}. They come in {pack} of {b}. "
        "How many {pack} must {A} buy?",
        "<m=x-y> {A} needs {m} more {item}.\n<n=m//b> {A} must buy {n} {pack}.",
    ),
    # Three steps.
    (
        "{A} buys {b} {item} for ${c} each and {d} cups for ${e} each. How much does {A} pay?",
        "<l=b*c> The {item} cost ${l}.\n<m=d*e> The cups cost ${m}.\n<n=l+m> {A} pays ${n}.",
    ),
    (
        "{A} has {x} {item}. {B} has {y} more than {A}, and {C} has {z} fewer than {B}. "
        "How many do {A} and {C} have together?",
        "<l=x+y> {B} has {l} {item}.\n<m=l-z> {C} has {m} {item}.\n"
        "<n=x+m> {A} and {C} have {n} {item} together.",
    ),
    (
        "{A} collects {x} {item} a day for {b} days, gives {y} to {B} and packs the rest into "
        "{pack} of {c}. How many {pack} is that?",
        "<l=x*b> {A} collects {l} {item}.\n<m=l-y> {m} are left.\n<n=m//c> That is {n} {pack}.",
    ),
    (
        "{A} has ${x}, earns ${y} and buys {b} {item} for ${c} each. How much money is left?",
        "<l=x+y> {A} has ${l}.\n<m=b*c> The {item} cost ${m}.\n<n=l-m> ${n} is left.",
    ),
    (
        "A shop has {b} {pack} of {c} {item}. It sells {x} of them and gets {y} new ones. "
        "How many {item} does it have now?",
        "<l=b*c> At first there are {l} {item}.\n<m=l-x> After the sale {m} are left.\n"
        "<n=m+y> Now the shop has {n} {item}.",
    ),
    (
        "{A} scores {x} points, {B} {y} and {C} {b} times as many as {A}. "
        "How many points do they have in total?",
        "<l=x*b> {C} has {l} points.\n<m=x+y> {A} and {B} have {m} points.\n"
        "<n=l+m> In total they have {n} points.",
    ),
    (
        "{A} saves ${b} a week for {c} weeks and gets ${x} from {B}. A {thing} costs ${y}. "
        "How much money is left after buying it?",
        "<l=b*c> {A} saves ${l}.\n<m=l+x> With the gift {A} has ${m}.\n<n=m-y> ${n} is left.",
    ),
    (
        "A hall has {b} rows of {c} seats and {x} seats upstairs. {y} people come. "
        "How many seats stay empty?",
        "<l=b*c> There are {l} seats in the rows.\n<m=l+x> In all there are {m} seats.\n"
        "<n=m-y> {n} seats stay empty.",
    ),
    (
        "{A} has {x} {item} and {B} has {y}. They give {z} away and share the rest equally "
        "between the two of them. How many does each get?",
        "<l=x+y> They have {l} {item}.\n<m=l-z> After the gift {m} are left.\n"
        "<n=m//2> Each gets {n} {item}.",
    ),
    (
        "{A} walks {b} miles a day for {c} days, {B} {d} miles a day for {e} days. "
        "How many miles farther does {A} walk?",
        "<l=b*c> {A} walks {l} miles.\n<m=d*e> {B} walks {m} miles.\n"
        "<n=l-m> {A} walks {n} miles farther.",
    ),
)
_CALL = re.compile(r"<(\w)=([^>]+)> ?")
_STORIES_OF = {
    level: [s for s in _STORIES if len(_CALL.findall(s[1])) == level] for level in LEVELS
}

_NAMES = (
    "Adam Aisha Alex Amina Anna Ben Carlos Chen Clara Daniel David Elena Emma Eva Felix Finn Grace "
    "Hana Henry Ida Ines Ivan Jack Jonas Julia Kai Karim Kofi Lara Leo Lily Lina Lucas Luna Maria "
    "Marta Max Maya Mei Mia Mina Nina Noah Nora Olga Omar Oscar Paul Pedro Priya Ravi Rosa Sam "
    "Sara Sofia Tara Theo Tom Yuki Zoe"
).split()
_ITEMS = (
    "apples beads buttons candies cards carrots cherries coins cookies eggs lemons marbles muffins "
    "nuts oranges peaches pears pencils plums shells stamps stickers stones tomatoes"
).split()
_PACKS = "bags baskets bowls boxes jars trays".split()
_THINGS = "ball book clock game hat lamp map plant scarf ticket toy".split()


class Arithmetic(Task):
    """Sums and stories; the answer ends in `#### number`. `level` keeps to one level, None mixes.

    Each example carries its "level".
    """

    kind = "generative"

    def __init__(self, split: str, level: int | None = None):
        self.split = check_split(split)
        if level is not None and level not in LEVELS:
            raise UserError(f"got level {level!r}, expected None or one of {LEVELS}")
        self.level = level

    def __len__(self) -> int:
        return 100_000 if self.split == "train" else 1_000

    def example(self, index: int) -> Conversation:
        rng = random.Random(f"arithmetic {self.split} {index}")
        level = self.level
        if level is None:
            level = rng.choices(LEVELS, _LEVEL_WEIGHTS)[0]
        essence, question, solution = _draw_story(rng, level) if level else _draw_sum(rng)
        while True:
            values = _draw_numbers(rng, question)
            if split_of(essence.format(**values)) == self.split:
                results = _results(solution, values)
                if results and min(results) >= (2 if level else 0) and max(results) <= MAX_RESULT:
                    break
        slots = values | _draw_cast(rng)
        parts = []
        for name, expression, sentence in _steps(solution):
            parts += [
                {"type": "python", "text": _insert(expression, values)},
                {"type": "python_output", "text": values[name]},
                {"type": "text", "text": sentence.format(**slots)},
            ]
        parts[-1]["text"] += f"\n#### {values['n']}"
        messages = [
            {"role": "user", "content": question.format(**slots)},
            {"role": "assistant", "content": parts},
        ]
        return {"messages": messages, "level": level}

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        def reference(index: int) -> str:
            return self.example(index)["messages"][-1]["content"][-1]["text"]

        return [extract_answer(said) == extract_answer(reference(i)) for i, said in answers]


# (what decides the split, question, solution) of a problem, its numbers still {letters}.
_Problem = tuple[str, str, str]


def _draw_story(rng: random.Random, level: int) -> _Problem:
    question, solution = rng.choice(_STORIES_OF[level])
    essence = re.sub(r"{([A-Z]|[a-z]{2,})}", r"\1", question)  # whoever it is about
    return essence, question, solution


def _draw_sum(rng: random.Random) -> _Problem:
    expression, symbols, words, _ = rng.choices(_SUMS, [entry[-1] for entry in _SUMS])[0]
    frames, sentence, _ = rng.choices(_FRAMES, [entry[-1] for entry in _FRAMES])[0]
    if frames is _ENGLISH:
        spoken = [frame.format(rng.choice(symbols + words)) for frame in frames]
        question = rng.choice([*spoken, *_REQUESTS.get(expression, ())])
    else:
        question = rng.choice(frames).format(rng.choice(symbols))
    question = question[0].upper() + question[1:] if rng.random() < 0.8 else question.lower()
    written = re.sub("[a-z]", r"{\g<0>}", expression).replace("//", "/")
    return written, question, f"<n={expression}> {sentence.replace('{sum}', written)}"


def _draw_numbers(rng: random.Random, question: str) -> dict[str, str]:
    """A number for each letter that stands for one in a question."""
    names = sorted(set(re.findall("{([a-z])}", question)))
    return {name: str(rng.randint(*_RANGES[name])) for name in names}


def _draw_cast(rng: random.Random) -> dict[str, str]:
    slots = dict(zip("ABC", rng.sample(_NAMES, 3), strict=True))
    return slots | {
        "item": rng.choice(_ITEMS),
        "pack": rng.choice(_PACKS),
        "thing": rng.choice(_THINGS),
    }


def _steps(solution: str) -> Iterator[tuple[str, str, str]]:
    """(name, expression, sentence) of each call of a solution."""
    _, *pieces = _CALL.split(solution)
    return zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)


def _results(solution: str, values: dict[str, str]) -> list[int]:
    """What each step comes to, added to `values`; nothing if a division leaves a remainder."""
    results = []
    for name, expression, _ in _steps(solution):
        call = _insert(expression, values)
        value = calculate(call)
        if value is None or ("//" in call and calculate(call.replace("//", "/")) != f"{value}.0"):
            return []
        values[name] = value
        results.append(int(value))
    return results


def _insert(expression: str, values: dict[str, str]) -> str:
    return re.sub("[a-z]", lambda name: values[name[0]], expression)

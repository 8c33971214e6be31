# SPDX-License-Identifier: Apache-2.0
"""The task kinds of the demo model: each draws a question and knows the exact answer.

Apart from ``corpus`` (which strings tasks into conversations) because ``grade`` draws from
the same functions. Sums and differences leave out the pairs of ``held_out`` while training,
so that grading asks for pairs that the model never saw.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.demo_model import words
from scripts.demo_model.stories import story
from scripts.demo_model.tools import TOOLS, draw_call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

__all__ = ["GRADED", "KINDS", "Sample", "Turn", "draw", "held_out"]

Turn = tuple[str, str]
"""Role and text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question with its true answer.

    ``turns`` end with the message to be answered. ``follow_ups`` are further questions on the
    same facts with their answers. ``tools`` are function descriptions to offer.
    """

    kind: str
    turns: tuple[Turn, ...]
    answer: str
    follow_ups: tuple[tuple[str, str], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


def held_out(first: int, second: int) -> bool:
    """Whether training never shows this pair of operands (about one in thirty)."""
    low, high = sorted((first, second))
    return low >= 10 and (low * 97 + high * 31) % 29 == 0


def _ask(rng: Random, templates: Sequence[str], **values: object) -> str:
    """One of the phrasings, at times without capital or end mark, filled in."""
    template = rng.choice(templates)
    if rng.random() < 0.12:
        template = template[0].lower() + template[1:]
    if rng.random() < 0.12:
        template = template.rstrip(".?!")
    if rng.random() < 0.06:
        template = "Please: " + template
    return template.format(**values)


def _word(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.70:
        return rng.choice(words.WORDS)
    if roll < 0.82:
        return "".join(rng.choices(words.SYLLABLES, k=rng.randint(2, 3)))
    return rng.choice(words.EMOJI) if roll < 0.94 else str(rng.randint(0, 999))


def _name(rng: Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(words.NAMES)
    return "".join(rng.choices(words.SYLLABLES, k=rng.randint(2, 3))).capitalize()


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _operands(rng: Random, fresh: bool) -> tuple[int, int]:
    """Two numbers below 100; held-out pairs only when ``fresh``, never otherwise."""
    while True:
        low = 0 if rng.random() < 0.15 and not fresh else 10
        pair = rng.randint(low, 99), rng.randint(low, 99)
        if held_out(*pair) == fresh:
            return pair


def _single(kind: str, question: str, answer: str) -> Sample:
    return Sample(kind=kind, turns=(("user", question),), answer=answer)


_SUMS = (
    "What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "What is {a} plus {b}?",
    "Add {a} and {b}.", "How much is {a} + {b}?", "Compute {a} + {b}.", "{a}+{b}",
)  # fmt: skip
_DIFFERENCES = (
    "What is {a} - {b}?", "{a} - {b}", "{a} - {b} = ?", "What is {a} minus {b}?",
    "Subtract {b} from {a}.", "How much is {a} - {b}?", "Compute {a} - {b}.", "{a}-{b}",
)  # fmt: skip
_PRODUCTS = (
    "What is {a} * {b}?", "{a} * {b}", "What is {a} times {b}?", "Multiply {a} by {b}.",
    "How much is {a} x {b}?", "Compute {a} * {b}.", "{a} x {b} = ?",
)  # fmt: skip


def _add(rng: Random, fresh: bool) -> Sample:
    a, b = _operands(rng, fresh)
    return _single("add", _ask(rng, _SUMS, a=a, b=b), f"{a} + {b} = {a + b}.")


def _subtract(rng: Random, fresh: bool) -> Sample:
    a, b = _operands(rng, fresh)
    if a < b and rng.random() < 0.85:
        a, b = b, a
    return _single("subtract", _ask(rng, _DIFFERENCES, a=a, b=b), f"{a} - {b} = {a - b}.")


def _multiply(rng: Random, fresh: bool) -> Sample:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return _single("multiply", _ask(rng, _PRODUCTS, a=a, b=b), f"{a} * {b} = {a * b}.")


def _capital(rng: Random, fresh: bool) -> Sample:
    country, city = rng.choice(list(words.CAPITALS.items()))
    asked = (
        "What is the capital of {c}?", "Capital of {c}?", "Name the capital of {c}.",
        "Which city is the capital of {c}?", "Tell me the capital of {c}.",
        "What's the capital city of {c}?",
    )  # fmt: skip
    return _single(
        "capital", _ask(rng, asked, c=country), f"The capital of {country} is {city}."
    )


def _colour(rng: Random, fresh: bool) -> Sample:
    thing, colour = rng.choice(list(words.COLOURS.items()))
    asked = (
        "What colour is {t}?", "What color is {t}?", "Which colour does {t} have?",
        "Tell me the colour of {t}.", "Name the color of {t}.",
    )  # fmt: skip
    return _single("colour", _ask(rng, asked, t=thing), f"{thing.capitalize()} is {colour}.")


def _sound(rng: Random, fresh: bool) -> Sample:
    animal, sound = rng.choice(list(words.SOUNDS.items()))
    asked = (
        "What does {a} say?", "What sound does {a} make?", "Which noise does {a} make?",
        "How does {a} go?",
    )  # fmt: skip
    question = _ask(rng, asked, a=_article(animal))
    return _single("sound", question, f"{_article(animal).capitalize()} says {sound}.")


def _greeting(rng: Random, fresh: bool) -> Sample:
    language, answer = rng.choice(list(words.GREETINGS.items()))
    asked = (
        "Say hello in {l}.", "Greet me in {l}.", "How do you say hello in {l}?",
        "How do people greet in {l}?", "Hello in {l}?", "Write a greeting in {l}.",
    )  # fmt: skip
    return _single("greeting", _ask(rng, asked, l=language), answer)


def _names(rng: Random, fresh: bool) -> Sample:
    name, city = _name(rng), rng.choice(list(words.CAPITALS.values()))
    told = rng.choice(
        ("My name is {n}.", "I am {n}.", "Hi, my name is {n}.", "I am called {n}.")
    ).format(n=name)
    asks = [
        (_ask(rng, ("What is my name?", "Who am I?", "Do you know my name?")),
         f"Your name is {name}."),
    ]  # fmt: skip
    if rng.random() < 0.5:
        told += f" I live in {city}."
        asks.append((_ask(rng, ("Where do I live?", "In which city do I live?")),
                     f"You live in {city}."))  # fmt: skip
        rng.shuffle(asks)
    question, answer = asks[0]
    if rng.random() < 0.3:
        turns: tuple[Turn, ...] = (("user", f"{told} {question}"),)
    else:
        turns = (
            ("user", told),
            ("assistant", f"Nice to meet you, {name}!"),
            ("user", question),
        )
    return Sample(kind="names", turns=turns, answer=answer, follow_ups=tuple(asks[1:]))


def _repeat(rng: Random, fresh: bool) -> Sample:
    text = " ".join(_word(rng) for _ in range(rng.randint(1, 10)))
    asked = ("Repeat: {t}", "Repeat after me: {t}", "Say this again: {t}", "Copy this: {t}",
             "Echo: {t}")  # fmt: skip
    return _single("repeat", _ask(rng, asked, t=text), text)


def _reverse(rng: Random, fresh: bool) -> Sample:
    if rng.random() < 0.3:
        digits = "".join(rng.choices("0123456789", k=rng.randint(3, 6)))
        asked = ["Reverse the digits of {t}", "Reverse the digits: {t}", "Write {t} backwards"]
        return _single("reverse", _ask(rng, asked, t=digits), digits[::-1])
    items = rng.sample(words.WORDS, rng.randint(2, 6))
    glue = rng.choice((" ", ", "))
    asked = ["Reverse the words: {t}", "Reverse this list: {t}", "Reverse the order: {t}",
             "Say these words backwards: {t}"]  # fmt: skip
    return _single("reverse", _ask(rng, asked, t=glue.join(items)), glue.join(items[::-1]))


def _count(rng: Random, fresh: bool) -> Sample:
    if rng.random() < 0.45:
        first, steps = rng.randint(1, 89), rng.randint(2, 10)
        numbers = list(range(first, first + steps))
        asked = ["Count from {a} to {b}."]
        if rng.random() < 0.3:
            numbers.reverse()
            asked = ["Count down from {a} to {b}."]
        question = _ask(rng, asked, a=numbers[0], b=numbers[-1])
        return _single("count", question, ", ".join(map(str, numbers)))
    items = [rng.choice(words.WORDS) for _ in range(rng.randint(1, 10))]
    asked = ["How many words are in this list: {t}", "Count the words: {t}",
             "How many words do you see: {t}"]  # fmt: skip
    question = _ask(rng, asked, t=rng.choice((" ", ", ")).join(items))
    answer = "There is 1 word." if len(items) == 1 else f"There are {len(items)} words."
    return _single("count", question, answer)


def _sort(rng: Random, fresh: bool) -> Sample:
    numbers = rng.sample(range(1, 100), rng.randint(2, 6))
    down = rng.random() < 0.25
    asked = (
        ("Sort from large to small: {t}", "Sort these numbers, largest first: {t}")
        if down
        else ("Sort these numbers: {t}", "Sort: {t}", "Sort from small to large: {t}",
              "Put these numbers in order: {t}")
    )  # fmt: skip
    ordered = sorted(numbers, reverse=down)
    return _single(
        "sort", _ask(rng, asked, t=", ".join(map(str, numbers))), ", ".join(map(str, ordered))
    )


def _json(rng: Random, fresh: bool) -> Sample:
    fields: dict[str, object] = {
        "name": _name(rng),
        "age": rng.randint(1, 99),
        "city": rng.choice(list(words.CAPITALS.values())),
        "colour": rng.choice(words.COLOUR_NAMES),
        "animal": rng.choice(words.ANIMALS),
        "score": rng.randint(0, 999),
        "word": rng.choice(words.WORDS),
    }
    chosen = {key: fields[key] for key in rng.sample(list(fields), rng.randint(1, 4))}
    pattern, glue = rng.choice((("{} {}", ", "), ("{}={}", ", "), ("{}: {}", "; ")))
    text = glue.join(pattern.format(key, value) for key, value in chosen.items())
    asked = ("Write JSON with {t}", "Give me a JSON object: {t}", "Make JSON of {t}",
             "As JSON: {t}", "Turn this into JSON: {t}")  # fmt: skip
    return _single("json", _ask(rng, asked, t=text), json.dumps(chosen, ensure_ascii=False))


def _tool(rng: Random, fresh: bool) -> Sample:
    call = draw_call(rng, _name(rng))
    offered = [TOOLS[call.name]]
    others = [tool for name, tool in TOOLS.items() if name != call.name]
    offered += rng.sample(others, rng.randint(0, 2))
    rng.shuffle(offered)
    if rng.random() < 0.7:
        return Sample(kind="tool", turns=(("user", call.question),), answer=call.text,
                      tools=tuple(offered))  # fmt: skip
    turns = (("user", call.question), ("assistant", call.text), ("tool", call.result))
    return Sample(kind="tool", turns=turns, answer=call.report, tools=tuple(offered))


def _retrieve(rng: Random, fresh: bool) -> Sample:
    count = max(rng.randint(1, 12), rng.randint(1, 12))
    if rng.random() < 0.6:
        boxes = [f"box {number}" for number in rng.sample(range(1, 21), count)]
        if rng.random() < 0.5:
            boxes.sort(key=lambda box: int(box[4:]))
    else:
        boxes = [f"the {colour} box" for colour in rng.sample(words.COLOUR_NAMES, count)]
    codes = [f"{code:04d}" for code in rng.sample(range(10000), count)]
    pattern = rng.choice(("{B} has code {c}.", "{B}: {c}.", "Code {c} is in {b}.",
                          "{B} holds {c}."))  # fmt: skip
    facts = " ".join(
        pattern.format(B=box[0].upper() + box[1:], b=box, c=code)
        for box, code in zip(boxes, codes, strict=True)
    )
    asks = []
    for index in rng.sample(range(count), min(count, 3)):
        box, code = boxes[index], codes[index]
        if rng.random() < 0.65:
            asked = ["Which box has code {c}?", "Where is code {c}?", "Which box holds {c}?"]
            asks.append((_ask(rng, asked, c=code), f"Code {code} is in {box}."))
        else:
            asked = ["What is the code of {b}?", "Which code is in {b}?"]
            asks.append(
                (_ask(rng, asked, b=box), f"{box[0].upper() + box[1:]} has code {code}.")
            )
    question, answer = asks[0]
    roll = rng.random()
    if roll < 0.5:
        turns: tuple[Turn, ...] = (("user", f"{facts} {question}"),)
    elif roll < 0.75:
        turns = (("user", facts), ("assistant", "I will remember."), ("user", question))
    else:
        turns = (("system", facts), ("user", question))
    return Sample(kind="retrieve", turns=turns, answer=answer, follow_ups=tuple(asks[1:]))


def _about(rng: Random, fresh: bool) -> Sample:
    if rng.random() < 0.6:
        question, answer = rng.choice(list(words.ABOUT.items()))
        return _single("about", _ask(rng, (question,)), answer)
    asked = (
        "Explain {t}.", "Tell me about {t}.", "Write a poem about {t}.",
        "What do you know of {t}?", "What is {t}?", "Give me an essay on {t}.",
        "Write a program about {t}.",
        "Translate {t} into French.", "What do you think of {t}?", "How does {t} work?",
    )  # fmt: skip
    question = _ask(rng, asked, t=rng.choice(words.TOPICS))
    return _single(
        "about", question, "I am too small for that. Try a sum, a capital or a story."
    )


def _story(rng: Random, fresh: bool) -> Sample:
    hero = rng.choice(words.ANIMALS)
    name = rng.choice(words.NAMES)
    topic = rng.choice(
        ("", f" about {_article(hero)}", f" about {_article(hero)} named {name}")
    )
    asked = ("Tell me a story{t}.", "Write a little story{t}.", "Tell me a short story{t}.",
             "I want to hear a story{t}.")  # fmt: skip
    return _single("story", _ask(rng, asked, t=topic), story(rng, hero, name))


KINDS: dict[str, tuple[Callable[[Random, bool], Sample], int]] = {
    "add": (_add, 12),
    "subtract": (_subtract, 12),
    "multiply": (_multiply, 4),
    "capital": (_capital, 5),
    "colour": (_colour, 2),
    "sound": (_sound, 2),
    "greeting": (_greeting, 3),
    "names": (_names, 4),
    "repeat": (_repeat, 6),
    "reverse": (_reverse, 7),
    "count": (_count, 7),
    "sort": (_sort, 9),
    "json": (_json, 5),
    "tool": (_tool, 5),
    "retrieve": (_retrieve, 14),
    "about": (_about, 4),
    "story": (_story, 5),
}
"""Kind to its generator and its share of the questions."""

GRADED = tuple(kind for kind in KINDS if kind != "story")
"""The kinds with one right answer."""


def draw(rng: Random, kind: str, *, fresh: bool = False) -> Sample:
    """One sample of ``kind``; ``fresh`` asks for operands that training left out."""
    return KINDS[kind][0](rng, fresh)

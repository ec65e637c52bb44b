"""Tasks that deltal generates itself, as rows: `largest` and `countdown_two`.

A question belongs to train or test by a hash of what it asks (its numbers in any order, and its target), so the two
never share one, whatever the seeds and sizes. A new task is one generator of questions and one line in `TASKS`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deltal.config import GeneratedData
from deltal.errors import DataError

Row = dict[str, Any]

TEST_SHARE = 5
"""One question in so many is a test question."""

COUNTDOWN_HIGH = 20
"""Largest number of a `countdown_two` question, the range in which small models were measured."""

ENUMERABLE = 200_000
"""Spaces up to this many questions are listed and shuffled; larger ones are drawn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question: its numbers in the order they are written, and what they should give."""

    numbers: tuple[int, ...]
    target: int

    @property
    def split(self) -> Literal["train", "test"]:
        """Which split it belongs to, the same on every machine."""
        identity = f"{sorted(self.numbers)} -> {self.target}"
        digest = hashlib.sha256(identity.encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def generated_rows(config: GeneratedData) -> Iterator[tuple[str, Row]]:
    """Places and rows of `config`: columns `id`, `task`, `prompt`, `answer` and the task's own.

    Deterministic by seed, no question twice. If the split has fewer questions than `size`, these are all there are.
    Raises DataError when no such question exists, e.g. five different numbers out of 0…3.
    """
    for index, row in enumerate(TASKS[config.name](config)):
        id = f"{config.name}/{config.split}/{config.seed}/{index}"
        yield f"generated {id}", {"id": id, **row}


def _largest(config: GeneratedData) -> Iterator[Row]:
    """`numbers` different numbers out of 0…`high`: which is the largest?"""
    if config.numbers > config.high + 1:
        raise DataError(f"largest: there are no {config.numbers} different numbers out of 0…{config.high}")
    rng = _generator(config.seed)
    values = config.high + 1
    if math.perm(values, config.numbers) <= max(ENUMERABLE, 20 * config.size):
        orders: Iterable[tuple[int, ...]] = _shuffled(list(itertools.permutations(range(values), config.numbers)), rng)
    else:
        orders = _drawn(values, config.numbers, rng)
    questions = (Question(numbers=order, target=max(order)) for order in orders)
    for question in itertools.islice(_of_split(questions, config.split), config.size):
        listed = ", ".join(map(str, question.numbers))
        yield {
            "task": "largest",
            "prompt": f"Which number is the largest: {listed}? Answer with just the number.",
            "answer": str(question.target),
            "numbers": list(question.numbers),
        }


def _countdown_two(config: GeneratedData) -> Iterator[Row]:
    """Two different numbers out of 1…min(high, 20) and a positive target that one operation reaches exactly."""
    high = min(config.high, COUNTDOWN_HIGH)
    solutions: dict[Question, str] = {}
    for a, b in itertools.permutations(range(1, high + 1), 2):
        for expression, target in _results(a, b):
            solutions.setdefault(Question(numbers=(a, b), target=target), expression)
    questions = _of_split(_shuffled(list(solutions), _generator(config.seed)), config.split)
    for question in itertools.islice(questions, config.size):
        a, b = question.numbers
        yield {
            "task": "countdown",
            "prompt": f"Using the numbers {a} and {b}, write an equation that equals {question.target}. "
            "Write only the equation.",
            "answer": f"{solutions[question]} = {question.target}",
            "nums": [a, b],
            "target": question.target,
        }


def _letters(config: GeneratedData) -> Iterator[Row]:
    """Three different letters, one of which must occur in the answer: what a model of random weights can do."""
    choices = _shuffled(list(itertools.combinations(range(26), 3)), _generator(config.seed))
    questions = (Question(numbers=choice, target=0) for choice in choices)
    for question in itertools.islice(_of_split(questions, config.split), config.size):
        named = [string.ascii_lowercase[number] for number in question.numbers]
        yield {
            "task": "letters",
            "prompt": f"Write one of the letters {', '.join(named)}.",
            "answer": "".join(named),
        }


TASKS: dict[str, Callable[[GeneratedData], Iterator[Row]]] = {
    "largest": _largest,
    "countdown_two": _countdown_two,
    "letters": _letters,
}


def _results(a: int, b: int) -> Iterator[tuple[str, int]]:
    """Every positive whole number that one operation makes of a and b, with the expression."""
    yield f"{a} + {b}", a + b
    yield f"{a} * {b}", a * b
    for first, second in ((a, b), (b, a)):
        if first > second:
            yield f"{first} - {second}", first - second
        if first % second == 0:
            yield f"{first} / {second}", first // second


def _generator(seed: int) -> np.random.Generator:
    """Any integer may be a seed; numpy's may not be negative."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed % 2**64)))


def _shuffled(items: list[Any], rng: np.random.Generator) -> list[Any]:
    return [items[place] for place in rng.permutation(len(items))]


def _drawn(values: int, count: int, rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    """Ordered choices of `count` out of range(values), none twice, without end."""
    seen: set[tuple[int, ...]] = set()
    while True:
        order = tuple(int(value) for value in rng.choice(values, size=count, replace=False))
        if order not in seen:
            seen.add(order)
            yield order


def _of_split(questions: Iterable[Question], split: str) -> Iterator[Question]:
    return (question for question in questions if question.split == split)

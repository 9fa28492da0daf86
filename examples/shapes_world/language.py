# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Captions of a scene, and questions about it that have one right answer."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from .scenes import COLORS, KINDS, SIZES, Scene, Shape


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CAPTION_PROMPT = "Describe the picture."
MARKED_PROMPT = "What is the marked shape?"


@dataclass(frozen=True)
class Question:
    """A question with its one right answer.

    Attributes:
        kind: one of `QUESTION_KINDS`.
        marked: index of the shape that a "marked" question is about; its box goes to the processor.
    """

    kind: str
    text: str
    answer: str
    marked: int | None = None


def describe(scene: Scene) -> str:
    """All shapes from left to right: "a small red circle at the top left, a large blue star in the middle, ..."."""
    return ", ".join(_with_place(shape) for shape in sorted(scene.shapes, key=lambda shape: shape.center_xy[0]))


def _with_place(shape: Shape) -> str:
    return f"a {shape.name} {'in' if shape.place == 'middle' else 'at'} the {shape.place}"


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """A random question of a kind, or None where the scene allows none."""
    return _ASKERS[kind](scene, rng)


def ask_many(scene: Scene, rng: np.random.Generator, count: int, kinds: Iterable[str] | None = None) -> list[Question]:
    """Up to `count` different questions, of kinds that take turns in random order. "marked" only when asked for."""
    kinds = list(kinds if kinds is not None else (kind for kind in QUESTION_KINDS if kind != "marked"))
    found: dict[str, Question] = {}
    for turn in range(2 * count):
        if turn % len(kinds) == 0:
            order = rng.permutation(len(kinds))
        question = ask(scene, kinds[order[turn % len(kinds)]], rng)
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return list(found.values())


# --------------------------------------------------------------------------------------- kinds of questions
# Each chooses its answer first, evenly among those the scene allows, so that answers say little before one looks.


def _count_all(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("count", "How many shapes are there?", NUMBERS[len(scene.shapes)])


def _count_some(scene: Scene, rng: np.random.Generator) -> Question:
    field, values = (("color", list(COLORS)), ("kind", list(KINDS)), ("size", list(SIZES)))[rng.integers(3)]
    counts = Counter(getattr(shape, field) for shape in scene.shapes)
    wanted = rng.choice(sorted({counts[value] for value in values}))
    value = rng.choice([value for value in values if counts[value] == wanted])
    noun = _plural(value) if field == "kind" else f"{value} shapes"
    return Question("count attribute", f"How many {noun} are there?", NUMBERS[wanted])


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _about_one(scene, rng, "color", "What color is the {}?", ("kind", "size kind"))


def _kind(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _about_one(scene, rng, "kind", "What shape is the {} one?", ("color", "size color"), "shape")


def _size(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _about_one(scene, rng, "size", "What size is the {}?", ("color kind", "kind"))


def _about_one(
    scene: Scene, rng: np.random.Generator, field: str, text: str, ways: tuple[str, ...], name: str | None = None
) -> Question | None:
    """Asks for a field of a shape that a name made of its other fields picks out."""
    named: dict[str, list[Shape]] = {}
    for way in ways:
        for shape in scene.shapes:
            named.setdefault(_named(shape, way), []).append(shape)
    unique = [(words, shapes[0]) for words, shapes in named.items() if len(shapes) == 1]
    if not unique:
        return None
    words, shape = unique[rng.integers(len(unique))]
    return Question(name or field, text.format(words), getattr(shape, field))


def _exists(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Color and kind are both there, whether or not on one shape: only binding tells."""
    pairs = {(shape.color, shape.kind) for shape in scene.shapes}
    colors, kinds = sorted({color for color, _ in pairs}), sorted({kind for _, kind in pairs})
    absent = [(color, kind) for color in colors for kind in kinds if (color, kind) not in pairs]
    if not absent:
        return None
    yes = bool(rng.integers(2))
    choices = sorted(pairs) if yes else absent
    color, kind = choices[rng.integers(len(choices))]
    return Question("existence", f"Is there a {color} {kind}?", "yes" if yes else "no")


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Left of or above, between shapes that color and kind pick out, 8 pixels or more apart in that direction."""
    counts = Counter(_named(shape, "color kind") for shape in scene.shapes)
    unique = [shape for shape in scene.shapes if counts[_named(shape, "color kind")] == 1]
    axis = int(rng.integers(2))
    yes = bool(rng.integers(2))
    pairs = [(a, b) for a in unique for b in unique if a.center_xy[axis] + 8 <= b.center_xy[axis]]
    if not pairs:
        return None
    pair = pairs[rng.integers(len(pairs))]
    first, second = (_named(shape, "color kind") for shape in (pair if yes else pair[::-1]))
    return Question("relation", f"Is the {first} {('left of', 'above')[axis]} the {second}?", "yes" if yes else "no")


def _marked(scene: Scene, rng: np.random.Generator) -> Question:
    index = int(rng.integers(len(scene.shapes)))
    return Question("marked", MARKED_PROMPT, scene.shapes[index].name, marked=index)


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "count": _count_all,
    "count attribute": _count_some,
    "color": _color,
    "shape": _kind,
    "size": _size,
    "existence": _exists,
    "relation": _relation,
    "marked": _marked,
}
QUESTION_KINDS = tuple(_ASKERS)


def _named(shape: Shape, way: str) -> str:
    return " ".join(getattr(shape, field) for field in way.split())


def _plural(kind: str) -> str:
    return f"{kind}es" if kind == "cross" else f"{kind}s"

# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Short captions, each true of some scenes and false of others: "a red circle", "a small shape at the top left"."""

import numpy as np
from shapes_world import COLORS, KINDS, SIDE, SIZES

from .scene_pool import ScenePool


_SIZES, _COLORS = list(SIZES), list(COLORS)
_PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
_NUM_VALUES = (len(SIZES), len(COLORS), len(KINDS), len(_PLACES))
_ANY = -1

# Which of size, color, kind and place a statement names, and how often.
_FORMS = {
    (1, 1, 1, 0): 0.25,
    (0, 1, 1, 0): 0.25,
    (0, 1, 1, 1): 0.15,
    (1, 1, 1, 1): 0.10,
    (1, 0, 1, 0): 0.05,
    (0, 0, 1, 0): 0.10,
    (0, 0, 1, 1): 0.10,
}


def attributes(scenes: ScenePool) -> np.ndarray:
    """(n, largest count, 4) int: size, color, kind and place of each shape; -2, matching nothing, past the last."""
    column, row = np.clip(scenes.centers_xy // (SIDE / 3), 0, 2).astype(int).transpose(2, 0, 1)
    found = np.concatenate([scenes.looks.astype(int), (3 * row + column)[..., None]], axis=-1)
    found[np.arange(found.shape[1]) >= scenes.counts[:, None]] = -2
    return found


def sample_statements(scenes: ScenePool, rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) int: different statements, an attribute that is not named is -1.

    Half are true of some scene. The others exchange attributes between shapes of one scene, hard negatives that only
    one who sees which belong together can tell, or change one.
    """
    shapes, forms = attributes(scenes), np.array(list(_FORMS))
    found: set[tuple[int, ...]] = set()
    while len(found) < count:
        scene = rng.integers(len(scenes))
        one, other = rng.integers(scenes.counts[scene], size=2)
        statement = shapes[scene, one].copy()
        chance = rng.random()
        if chance < 0.4:
            statement = np.where(rng.random(4) < 0.4, shapes[scene, other], statement)
        elif chance < 0.5:
            attribute = rng.integers(4)
            statement[attribute] = rng.integers(_NUM_VALUES[attribute])
        form = forms[rng.choice(len(forms), p=list(_FORMS.values()))]
        found.add(tuple(np.where(form, statement, _ANY).tolist()))
    return np.array(sorted(found))


def truth(scenes: ScenePool, statements: np.ndarray) -> np.ndarray:
    """(n, count) bool: which statements are true of which scene."""
    shapes = attributes(scenes)[:, :, None]
    return ((shapes == statements) | ((statements == _ANY) & (shapes >= 0))).all(-1).any(1)


def words(statement: np.ndarray) -> str:
    size, color, kind, place = statement
    named = [
        *([_SIZES[size]] if size != _ANY else []),
        *([_COLORS[color]] if color != _ANY else []),
        KINDS[kind] if kind != _ANY else "shape",
    ]
    where = "" if place == _ANY else f" {'in' if _PLACES[place] == 'middle' else 'at'} the {_PLACES[place]}"
    return f"a {' '.join(named)}{where}"

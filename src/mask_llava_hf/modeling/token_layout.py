# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""How many tokens stand for an image, of which kind, in which order. Nothing else in this package counts tokens.

An image is `1 CLS + g * g patches (row-major) + n objects (keep order)`: 1 + 36 + 20 = 57 tokens by default, where
LLaVA-1.5 spends 576 (arXiv 2602.04864). Pure integers: the processor, the model, plots and messages all ask here.
"""

import operator
from dataclasses import dataclass, replace
from typing import Any


TOKEN_KNOBS = ("max_object_tokens", "patch_grid_size", "max_visual_tokens")

# Grids a budget may fall back to, coarsest last. All divide the 24 x 24 patches of CLIP L/14-336.
_COARSER_GRIDS = (6, 4, 3, 2, 1)
# A budget takes the next coarser grid rather than leave fewer objects than this (design choice: it gives the
# published counts 57, 42, 29 and 15 their published compositions).
_MIN_OBJECTS_BESIDE_PATCHES = 5


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int in [minimum, maximum].

    Raises:
        ValueError: `value` is a bool, a float, a string, or out of range; the message names the argument and the value.
    """
    expected = f"an integer >= {minimum}" if maximum is None else f"an integer in {minimum}..{maximum}"
    try:
        # operator.index takes ints and NumPy integers, and refuses floats and strings; True would pass as 1
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"`{name}` must be {expected}, got {value!r} of type {type(value).__name__}.")
    return number


@dataclass(frozen=True)
class TokenLayout:
    """The composition of one image's tokens.

    Attributes:
        use_cls_token: whether the global stream, one CLS token, comes first.
        patch_grid_size: g; the local stream has g * g average-pooled patches. 0 means no patches and is reached only
            by a `max_visual_tokens` too small for any.
        max_object_tokens: the most object tokens an image may have; an image with fewer objects has fewer tokens.
    """

    use_cls_token: bool
    patch_grid_size: int
    max_object_tokens: int

    @classmethod
    def from_config(cls, config: Any) -> "TokenLayout":
        """The layout that a `MaskLlavaConfig` describes."""
        return cls(config.use_cls_token, config.patch_grid_size, config.max_object_tokens)

    @property
    def num_cls_tokens(self) -> int:
        return int(self.use_cls_token)

    @property
    def num_patch_tokens(self) -> int:
        return self.patch_grid_size**2

    @property
    def num_fixed_tokens(self) -> int:
        """Tokens every image has, whatever is found in it: CLS and patches."""
        return self.num_cls_tokens + self.num_patch_tokens

    @property
    def max_tokens(self) -> int:
        return self.num_fixed_tokens + self.max_object_tokens

    def num_tokens(self, num_objects: int) -> int:
        """Tokens of an image in which `num_objects` objects were found."""
        return self.num_fixed_tokens + min(num_objects, self.max_object_tokens)

    def reduced(
        self,
        max_object_tokens: int | None = None,
        patch_grid_size: int | None = None,
        max_visual_tokens: int | None = None,
    ) -> "TokenLayout":
        """This layout with fewer tokens per image; None leaves a knob alone.

        Args:
            max_object_tokens: keep at most this many objects (>= 0); more than there are is no error.
            patch_grid_size: pool the patches to this grid (1..g).
            max_visual_tokens: a budget B (>= 1) for the whole image, excluding the other two. Of g and the grids 6, 4,
                3, 2, 1 below it, the largest g' with CLS + g' * g' + 5 <= B is taken (fewer than 5 where the layout
                has fewer objects), and what is left goes to objects. A budget too small for any grid keeps CLS and
                objects.

        Raises:
            ValueError: a bool, a float, a value out of range, or a budget given together with another knob.
        """
        if max_visual_tokens is not None:
            if max_object_tokens is not None or patch_grid_size is not None:
                other = "max_object_tokens" if max_object_tokens is not None else "patch_grid_size"
                raise ValueError(
                    f"`max_visual_tokens`={max_visual_tokens!r} is a budget for all tokens of an image and fixes the "
                    f"composition by itself; it cannot be combined with `{other}`. Give one of the two."
                )
            return self._within_budget(check_integer("max_visual_tokens", max_visual_tokens, 1))
        layout = self
        if max_object_tokens is not None:
            cap = check_integer("max_object_tokens", max_object_tokens, 0)
            layout = replace(layout, max_object_tokens=min(cap, self.max_object_tokens))
        if patch_grid_size is not None:
            grid = check_integer("patch_grid_size", patch_grid_size, 1, max(self.patch_grid_size, 1))
            layout = replace(layout, patch_grid_size=grid)
        return layout

    def _within_budget(self, budget: int) -> "TokenLayout":
        grids = [self.patch_grid_size, *(g for g in _COARSER_GRIDS if g < self.patch_grid_size)]
        for grid in grids:
            left = budget - self.num_cls_tokens - grid**2
            if left >= min(_MIN_OBJECTS_BESIDE_PATCHES, self.max_object_tokens):
                return TokenLayout(self.use_cls_token, grid, min(left, self.max_object_tokens))
        return TokenLayout(self.use_cls_token, 0, min(budget - self.num_cls_tokens, self.max_object_tokens))

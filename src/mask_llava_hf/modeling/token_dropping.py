# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Takes image tokens out of a prompt before the prefill: pure functions on ids, masks and features.

Objects come in keep order, so every prefix of an image's objects is a good set and dropping cuts the tail. All
placeholders of an image share one id; which of them go is therefore only a matter of position, and the last ones do.
"""

import itertools
from typing import Any

import torch

from .token_layout import TOKEN_KNOBS, TokenLayout


def resolve_knobs(layout: TokenLayout, *levels: dict[str, Any]) -> tuple[TokenLayout, int | None]:
    """The layout that the first level with any knob asks for, and the index of that level (None: no knob anywhere).

    Args:
        layout: the full layout of the model.
        levels: knobs by name (`TOKEN_KNOBS`), most specific first: the call, its generation config, the model's.
            A level that names any knob replaces all levels after it.

    Raises:
        ValueError: a knob with a bad value, or a budget beside another knob on the same level.
    """
    for index, knobs in enumerate(levels):
        given = {name: knobs[name] for name in TOKEN_KNOBS if knobs.get(name) is not None}
        if given:
            return layout.reduced(**given), index
    return layout, None


def placeholders_to_keep(
    placeholder_mask: torch.Tensor, tokens_before: list[int], tokens_after: list[int]
) -> torch.Tensor:
    """Which positions of the prompt stay: all text, and the first `tokens_after[i]` placeholders of image i.

    Args:
        placeholder_mask: (B, L) bool, True at image placeholders; images follow each other in row-major order.
        tokens_before, tokens_after: placeholders of each image now and afterwards.

    Returns:
        (B, L) bool.

    Raises:
        ValueError: the placeholders are not as many as `tokens_before` says, or an image spans two rows.
    """
    per_row = placeholder_mask.sum(1).tolist()
    boundaries, position = {0}, 0
    for before in tokens_before:
        position += before
        boundaries.add(position)
    row_ends = list(itertools.accumulate(per_row))
    if position != sum(per_row) or not set(row_ends) <= boundaries:
        raise ValueError(
            f"The prompt has {per_row} image placeholders per row, but the images have {tokens_before} tokens, which "
            "does not come out even. Cutting by these numbers would take away the wrong tokens. Pass text and images "
            "through one processor call."
        )
    kept = [torch.arange(before) < after for before, after in zip(tokens_before, tokens_after, strict=True) if before]
    keep = torch.ones_like(placeholder_mask)
    if kept:
        keep[placeholder_mask] = torch.cat(kept).to(keep.device)
    return keep


class PromptCut:
    """Removes the same positions from every tensor that is aligned with the prompt, and pads left to one length.

    Padding on the left is laid anew, as short as the longest row allows; padding anywhere else stays.

    Args:
        keep: (B, L) bool, positions that stay.
        attention_mask: (B, L), the prompt's own.
    """

    def __init__(self, keep: torch.Tensor, attention_mask: torch.Tensor):
        leading_padding = attention_mask.ne(0).cumsum(1).eq(0).to(keep.device)
        keep = keep & ~leading_padding
        lengths = keep.sum(1, keepdim=True)
        self.length = int(lengths.max())
        # Stable: kept positions move to the right end of their row in their order, dropped ones to the left
        order = torch.sort(keep.to(torch.uint8), dim=1, stable=True).indices
        self._source = order[:, keep.shape[1] - self.length :]  # (B, length)
        self._is_padding = torch.arange(self.length, device=keep.device) < self.length - lengths

    def apply(self, tensor: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """(B, L, ...) -> (B, `length`, ...), new positions on the left holding `fill`."""
        source, is_padding = self._source.to(tensor.device), self._is_padding.to(tensor.device)
        trailing = (1,) * (tensor.ndim - 2)
        cut = tensor.gather(1, source.reshape(*source.shape, *trailing).expand(*source.shape, *tensor.shape[2:]))
        return cut.masked_fill(is_padding.reshape(*is_padding.shape, *trailing), fill)

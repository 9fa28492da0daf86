"""Takes image tokens out of a prompt before the prefill: pure functions on ids, masks and features.

Objects come in keep order, so every prefix of an image's objects is a good set and dropping cuts the tail. All
placeholders of an image share one id; which of them go is therefore only a matter of position, and the last ones do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

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
    row_ends = [sum(per_row[: row + 1]) for row in range(len(per_row))]
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


@dataclass(frozen=True)
class PromptCut:
    """Removes the same positions from every tensor that is aligned with the prompt, and pads left to one length.

    Attributes:
        keep: (B, L) bool, positions that stay.
        attention_mask: (B, L) int, the prompt's own.
    """

    keep: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def length(self) -> int:
        """The common length afterwards: the longest row of attended tokens with what stands between and after them."""
        return max(int(length) for length in self._row_lengths())

    def _row_lengths(self) -> list[int]:
        kept_mask = [self.attention_mask[row][self.keep[row]] for row in range(len(self.keep))]
        return [len(mask) - int(mask.ne(0).int().argmax()) if mask.any() else 0 for mask in kept_mask]

    def apply(self, tensor: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """(B, L, ...) -> (B, `length`, ...), new positions on the left holding `fill`."""
        rows = []
        for row, length in zip(range(len(self.keep)), self._row_lengths(), strict=True):
            kept = tensor[row][self.keep[row].to(tensor.device)]
            kept = kept[len(kept) - length :]  # without the padding on the left, which is laid anew
            pad = [0, 0] * (kept.ndim - 1) + [self.length - length, 0]
            rows.append(F.pad(kept, pad, value=fill))
        return torch.stack(rows)

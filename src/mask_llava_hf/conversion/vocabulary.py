# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Rows for tokens that a source's vocabulary does not have, above all `<image>`."""

import torch

from .checkpoint_files import LazyTensor


# A vocabulary that grows becomes a multiple of this, which matrix units and tensor parallelism want. It is the number
# that Transformers' own LLaVA checkpoints have.
_MULTIPLE = 64

_ROWS_AT_ONCE = 4096


def grown_vocabulary(num_rows: int, num_ids: int) -> int:
    """Rows of a vocabulary of `num_rows` that is to hold `num_ids` tokens: as it is where they fit."""
    return num_rows if num_ids <= num_rows else -(-num_ids // _MULTIPLE) * _MULTIPLE


def with_mean_rows(tensor: LazyTensor, num_rows: int) -> LazyTensor:
    """An embedding or head (rows, width) with rows added at the end, each the mean of those that are there.

    In a head such a row never wins a greedy step: its logit is the mean of the others. In an embedding it is no other
    token's row and lies among them, as a row of zeros need not.
    """
    rows, width = tensor.shape
    if num_rows <= rows:
        return tensor

    def grown(loaded: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(width, dtype=torch.float64)
        for start in range(0, rows, _ROWS_AT_ONCE):
            total += loaded[start : start + _ROWS_AT_ONCE].sum(0, dtype=torch.float64)
        mean = (total / rows).to(loaded.dtype)
        return torch.cat([loaded, mean.expand(num_rows - rows, width)])

    return tensor.map(grown, shape=(num_rows, width))

# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The attention implementation "bfloat16": for training small models on a CPU, in half the time of PyTorch's own.

PyTorch's fused attention is slow in bfloat16 on a CPU, and autocast takes the softmax to float32. Trained weights run
with any implementation.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


def _bfloat16_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs
) -> tuple[Tensor, Tensor]:
    """Heads (B, H, L, D) to (B, L, H, D); no dropout, as many key heads as query heads."""
    dtype = value.dtype
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = (heads.bfloat16() for heads in (query, key, value))
        weights = query @ key.transpose(-1, -2) * scaling
        if attention_mask is not None:
            weights = weights + attention_mask.clamp(min=-1e4).bfloat16()
        weights = weights.softmax(-1)
        return (weights @ value).transpose(1, 2).to(dtype).contiguous(), weights


def use_bfloat16_attention(model: nn.Module) -> None:
    """Switches a Transformers model, or a part of one, to it."""
    model.set_attn_implementation("bfloat16")


AttentionInterface.register("bfloat16", _bfloat16_attention)
AttentionMaskInterface.register("bfloat16", eager_mask)

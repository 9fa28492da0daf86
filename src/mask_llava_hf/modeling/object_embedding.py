# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""From masks in the tower's frame to one embedding per mask, by either of the two methods a checkpoint may use.

The processor and the model call the same function, so that an object has the same embedding wherever it was made.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_mask_llava import MaskLlavaConfig
from .mask_inversion import invert_masks


# The input of the tower's last block, which MaskInversion starts from whatever layer the features are read at.
LAST_BLOCK_INPUT = -2


def required_hidden_states(config: MaskLlavaConfig, layer: int) -> list[int]:
    """Indices into the tower's `hidden_states` that `embed_masks` reads; `layer` is the features' own."""
    return [LAST_BLOCK_INPUT] if config.object_embedding == "mask_inversion" else [layer]


@torch.no_grad()
def embed_masks(
    vision_tower: PreTrainedModel,
    hidden_states: Mapping[int, torch.Tensor] | tuple[torch.Tensor, ...],
    masks: torch.Tensor,
    config: MaskLlavaConfig,
    layer: int,
) -> torch.Tensor:
    """One embedding per mask, by the method `config.object_embedding` names.

    Args:
        vision_tower: a CLIP vision tower.
        hidden_states: the tower's, at least those of `required_hidden_states`, each (I, T, D) with CLS first.
        masks: (I, N, H, W) bool or uint8, in the frame of the tower's square input. All-zero masks are slots without
            an object.
        config: gives the method and its settings.
        layer: index of the patch features, usually `config.vision_feature_layer`; mask pooling averages these.

    Returns:
        (I, N, D) float32 without gradient; zeros for all-zero masks.
    """
    if config.object_embedding == "mask_pooling":
        return pool_masks(hidden_states[layer][:, 1:], masks)
    settings = config.mask_inversion_settings()
    return invert_masks(vision_tower, hidden_states[LAST_BLOCK_INPUT], masks.bool(), settings).embeddings


def pool_masks(patches: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The mean of the patch features under each mask, weighted by the area the mask covers of each patch.

    Args:
        patches: (I, G * G, D), row-major.
        masks: (I, N, H, W), zero or one, in the frame of the tower's square input.

    Returns:
        (I, N, D) float32; zeros for an all-zero mask.
    """
    grid = round(patches.shape[1] ** 0.5)
    with torch.autocast(patches.device.type, enabled=False):  # as MaskInversion: one embedding wherever it is made
        coverage = F.adaptive_avg_pool2d(masks.to(patches.device, torch.float32), grid).flatten(2)  # (I, N, G * G)
        total = coverage.sum(-1, keepdim=True)
        weights = coverage / total.masked_fill(total == 0, 1)
        return weights @ patches.float()

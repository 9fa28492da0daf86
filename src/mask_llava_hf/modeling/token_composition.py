# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""From features to an image's token sequence: pooling, norm scaling, and the three streams in order.

All functions take features of the tower's width D before the projector, and keep static shapes (no data-dependent
control flow), so that they trace as one graph.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .token_layout import TokenLayout


NORM_SCALING_EPS = 1e-6


def pool_patches(patches: torch.Tensor, patch_grid_size: int) -> torch.Tensor:
    """Average-pools a square grid of patches straight to `patch_grid_size` x `patch_grid_size`.

    Args:
        patches: (I, G * G, D) float, row-major.
        patch_grid_size: g. Where G is not divisible by g, the bins are those of adaptive average pooling. 0 gives no
            tokens.

    Returns:
        (I, g * g, D), row-major; the input itself when g equals G.
    """
    num_images, num_patches, width = patches.shape
    grid = round(num_patches**0.5)
    if patch_grid_size == grid:
        return patches
    if patch_grid_size == 0:
        return patches[:, :0]
    planes = patches.transpose(1, 2).reshape(num_images, width, grid, grid)
    return F.adaptive_avg_pool2d(planes, patch_grid_size).flatten(2).transpose(1, 2)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over all patches and channels of each image, padding patches included.

    Args:
        patches: (I, P, D).

    Returns:
        Two float32 tensors of shape (I, 1, 1), detached: they are targets of a scaling, not features.
    """
    flat = patches.detach().float().flatten(1)
    return flat.mean(1)[:, None, None], flat.std(1, correction=0)[:, None, None]


def scale_to_statistics(tokens: torch.Tensor, mean: torch.Tensor | float, std: torch.Tensor | float) -> torch.Tensor:
    """Gives every token the mean and standard deviation of patches (arXiv 2602.04864; the formula is our choice).

    `(x - mean(x)) / sqrt(var(x) + 1e-6) * std + mean`, the moments of x taken over its own channels, in float32.

    Args:
        tokens: (I, K, D).
        mean, std: numbers, or tensors that broadcast to (I, 1, 1).

    Returns:
        (I, K, D) float32.
    """
    # Moments of 16-bit features lose the digits the scaling is about, and autocast must not undo the float32
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.float()
        variance, center = torch.var_mean(tokens, dim=-1, correction=0, keepdim=True)
        return (tokens - center) * torch.rsqrt(variance + NORM_SCALING_EPS) * std + mean


def compose_tokens(
    features: torch.Tensor,
    object_embeds: torch.Tensor | None,
    layout: TokenLayout,
    norm_scaling: str,
    fixed_statistics: Sequence[float] | None = None,
) -> torch.Tensor:
    """The streams of each image in order: CLS, pooled patches row-major, objects in keep order.

    Args:
        features: (I, 1 + P, D), the tower's hidden states with CLS first.
        object_embeds: (I, N, D) or None for no objects. Constants: no gradient flows into them.
        layout: which streams there are, and the patch grid.
        norm_scaling: "per_image", "fixed" or "none"; see `MaskLlavaConfig`.
        fixed_statistics: (mean, standard deviation) for "fixed", else None.

    Returns:
        (I, `layout.num_fixed_tokens` + N, D) in the dtype of `features`. Rows of images with fewer than N objects end
        in slots without meaning; the caller cuts them off by its counts.

    Raises:
        ValueError: "fixed" without numbers.
    """
    cls_token, patches = features[:, :1], features[:, 1:]
    if norm_scaling == "fixed" and fixed_statistics is None:
        raise ValueError('`norm_scaling`="fixed" needs `patch_statistics`, (mean, standard deviation), but has None.')
    if object_embeds is not None and not object_embeds.shape[1]:
        object_embeds = None
    statistics: Sequence[torch.Tensor | float] | None = fixed_statistics
    # Patches are not scaled themselves: without the other streams, as in LLaVA, nobody reads their moments
    if norm_scaling == "per_image" and (layout.use_cls_token or object_embeds is not None):
        statistics = patch_statistics(patches)

    def scaled(tokens: torch.Tensor) -> torch.Tensor:
        if statistics is not None:
            tokens = scale_to_statistics(tokens, *statistics)
        return tokens.to(features.dtype)

    streams = [pool_patches(patches, layout.patch_grid_size)]
    if layout.use_cls_token:
        streams.insert(0, scaled(cls_token))
    if object_embeds is not None:
        streams.append(scaled(object_embeds.detach().to(features.device)))
    return streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)

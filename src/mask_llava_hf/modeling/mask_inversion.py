# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""MaskInversion: one embedding per mask from a frozen CLIP vision tower, in closed form.

For each mask an embedding is sought whose explanation map (LeGrad, arXiv 2404.03214) over the image matches the mask:
it starts as the image's CLS embedding and is moved by a few AdamW steps on the soft dice loss between map and mask
(MaskInversion, arXiv 2407.20034). Only the tower's last block takes part. Its gradients are written out as matrix
products (`mask_inversion_block`) and the loss is evaluated at patch resolution, exactly, so that the inversion runs
without autograd: under `no_grad` and `inference_mode`, inside `generate`, and for many masks at once.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mask_inversion_block import (
    LinearisedImage,
    Workspace,
    find_vision_model,
    has_16_bit_weights,
    projection_size,
    read_last_block,
)


_ADAM_BETAS = (0.9, 0.999)
_ADAM_EPS = 1e-8
_DICE_SMOOTH = 1.0
# Masks of an image that are float32 at the same time.
_MASKS_AT_ONCE = 8


@dataclass(frozen=True)
class MaskInversionSettings:
    """How masks are inverted.

    Args:
        iterations: optimiser steps, at least 1.
        lr: learning rate of AdamW. Our choice is that of the published examples; the published class has 0.1.
        alpha: weight of the regulariser 1 - cosine(embedding, image embedding).
        weight_decay: decoupled weight decay of AdamW.
        chunk_size: masks handled together. It sets the memory (for ViT-L/14 at 336 pixels in float32 12 MB per mask on
            a CPU, 35 on an accelerator; in bfloat16 8 and 50), not the result. None takes what fits into 64 MB on a
            CPU, and into 1 GB (or a quarter of what is free) on an accelerator: for that tower 5 and 28 masks (in
            bfloat16 7 and 20), for small ones all.
        compute_dtype: `"float32"`; `"bfloat16"` does the two largest products in bfloat16 (the part of them that all
            tokens share stays float32), and the one that takes relevance back to the attention's output; everything
            else stays float32. Losses then move by a few thousandths, rarely more:
            where another pixel becomes a map's extreme, the path forks, as it does from any rounding. `"auto"` takes
            bfloat16 where the tower's weights are 16-bit and the device computes in bfloat16, else float32.
        reduction: `"sum"` makes the result of a mask independent of the other masks, so that it can be cached and
            others dropped. `"mean"` divides the loss by the number of (non-empty) masks of the image, as the
            published code does; AdamW's epsilon then lets the neighbours move the result slightly (1e-3).
    """

    iterations: int = 10
    lr: float = 0.5
    alpha: float = 0.0
    weight_decay: float = 0.0
    chunk_size: int | None = None
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        for name in ("iterations", "chunk_size"):
            value = getattr(self, name)
            if name == "chunk_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, expected an integer of at least 1.")
        for name in ("lr", "alpha", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` is {value!r}, expected a finite number of at least 0.")
        if self.lr == 0:
            raise ValueError(f"`lr` is {self.lr!r}, expected a number above 0: no embedding would move.")
        for name, choices in (("compute_dtype", ("auto", "float32", "bfloat16")), ("reduction", ("sum", "mean"))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}, expected one of {', '.join(map(repr, choices))}.")


@dataclass
class MaskInversionOutput:
    """Result of `invert_masks`; float32 constants on the device of `hidden_states`.

    Rows of empty masks hold zeros, and 1.0 in `dice`. With I iterations:

    Attributes:
        embeddings: (B, N, E), not normalised.
        dice: (B, N), soft dice loss at the last evaluation, that is of the embedding before the last step.
        explanation_maps: (B, N, H, W) in [0, 1], at the masks' size, also of the embedding before the last step, as
            in the published code. On request.
        embeddings_history: (B, I + 1, N, E), before the first step and after each. This and the following with
            `return_history`.
        grads: (B, I, N, E), gradient of the loss before each step.
        relevance: (B, I, N, g, g), explanation maps per patch before each step, not normalised.
        dice_history: (B, I, N), soft dice loss before each step.
    """

    embeddings: Tensor
    dice: Tensor
    explanation_maps: Tensor | None = None
    embeddings_history: Tensor | None = None
    grads: Tensor | None = None
    relevance: Tensor | None = None
    dice_history: Tensor | None = None


class _MapFrame:
    """From a map over patches to the map the loss sees, as matrices.

    The published loss upsamples the (g, g) relevance by the patch size, rescales it to [0, 1], and resizes it to the
    mask. Both resizes are bilinear, so along each axis they are one matrix; and the extremes of a bilinear upsampling
    lie at the outermost samples of its cells, so 2g samples per axis replace g * patch_size.

    Attributes:
        rows, columns: (H, g), (W, g), map at the mask's size = rows @ relevance @ columns.T. Their rows sum to 1.
        corners: (at most 2g, g), the samples among which minimum and maximum are found.
    """

    def __init__(self, grid_size: int, patch_size: int, mask_hw: tuple[int, int], device: torch.device) -> None:
        self.grid_size = grid_size
        upsampled = F.interpolate(
            torch.eye(grid_size, device=device)[None], size=grid_size * patch_size, mode="linear", align_corners=False
        )  # (1, g, g * patch_size)
        height, width = mask_hw
        self.num_pixels = height * width
        self.rows = F.interpolate(upsampled, size=height, mode="linear", align_corners=False)[0].T.contiguous()
        self.columns = F.interpolate(upsampled, size=width, mode="linear", align_corners=False)[0].T.contiguous()
        self.coverage = torch.outer(self.rows.sum(dim=0), self.columns.sum(dim=0))  # (g, g): <., relevance> = map sum
        # Sample i lies at (i + 0.5) / patch_size - 0.5 patches; a cell reaches from one patch centre to the next.
        half = patch_size // 2
        samples = {0, grid_size * patch_size - 1}
        for cell in range(grid_size - 1):
            centre = cell * patch_size + half  # first sample at or after the centre of patch `cell`
            samples |= {centre, centre + patch_size - (1 - patch_size % 2)}
        self.corners = upsampled[0].T[sorted(samples)]

    def extremes(self, relevance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Minimum and maximum (n,) of the upsampled maps (n, g, g), and the weights (n, g, g) of the pixels there."""
        samples = (self.corners @ relevance @ self.corners.T).flatten(1)
        low, low_at = samples.min(dim=1)
        high, high_at = samples.max(dim=1)
        return low, high, self._weights(low_at), self._weights(high_at)

    def _weights(self, index: Tensor) -> Tensor:
        count = len(self.corners)
        return self.corners[index // count][:, :, None] * self.corners[index % count][:, None, :]

    @staticmethod
    def inverse_range(low: Tensor, high: Tensor) -> Tensor:
        """1 / (high - low), and 0 for a constant map, whose range is rounding noise at most."""
        spread = high - low
        is_constant = spread <= (4 * torch.finfo(spread.dtype).eps * high.abs()).clamp_min(1e-30)
        return torch.where(is_constant, 0.0, 1 / torch.where(is_constant, 1.0, spread))

    def explanation_maps(self, relevance: Tensor) -> Tensor:
        """(n, g, g) -> (n, H, W) in [0, 1]; a constant map gives zeros."""
        low, high, _, _ = self.extremes(relevance)
        scaled = (relevance - low[:, None, None]) * self.inverse_range(low, high)[:, None, None]
        return (self.rows @ scaled @ self.columns.T).clamp_(0, 1)


class _MaskTargets:
    """The masks (n, H, W) of one image as the loss needs them: `sums` (n, g, g) = <mask, map>, `areas` (n,)."""

    def __init__(self, frame: _MapFrame, masks: Tensor) -> None:
        self.frame = frame
        sums, areas = [], []
        for part in masks.split(_MASKS_AT_ONCE):
            part = part.to(torch.float32)
            sums.append(frame.rows.T @ (part @ frame.columns))
            areas.append(part.sum(dim=(1, 2)))
        self.sums, self.areas = torch.cat(sums), torch.cat(areas)

    def dice(self, relevance: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Soft dice loss (n,) of the masks in `part`, and its gradient (n, g, g) with respect to `relevance`."""
        frame, sums, areas = self.frame, self.sums[part], self.areas[part]
        low, high, low_weights, high_weights = frame.extremes(relevance)
        inverse_range = frame.inverse_range(low, high)
        overlap = ((relevance * sums).sum(dim=(1, 2)) - low * areas) * inverse_range
        map_area = ((relevance * frame.coverage).sum(dim=(1, 2)) - low * frame.num_pixels) * inverse_range
        denominator = map_area + areas + _DICE_SMOOTH
        numerator = 2 * overlap + _DICE_SMOOTH
        by_overlap = -2 / denominator
        by_area = numerator / denominator.square()
        by_low = by_overlap * (overlap - areas) + by_area * (map_area - frame.num_pixels)
        by_high = by_overlap * overlap + by_area * map_area

        def spread(coefficient: Tensor) -> Tensor:
            return (coefficient * inverse_range)[:, None, None]

        gradients = spread(by_overlap) * sums + spread(by_area) * frame.coverage
        gradients += spread(by_low) * low_weights - spread(by_high) * high_weights
        return 1 - numerator / denominator, gradients


def _explain(
    image: LinearisedImage, targets: _MaskTargets, embeddings: Tensor, alike: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance (n, g, g), dice loss (n,) and its gradients (n, E) for embeddings (n, E), one per mask.

    `alike` states that all embeddings are equal (they are at the start), so that one map serves all masks.
    """
    workspace, grid_size = image.workspace, targets.frame.grid_size
    lengths = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True).clamp_min(1e-12)
    directions = embeddings / lengths
    count = len(embeddings)
    relevance = embeddings.new_empty(count, grid_size, grid_size)
    dice = embeddings.new_empty(count)
    gradients = torch.empty_like(embeddings)
    if alike:
        patches, positive = image.relevance(image.attention_output_gradients(directions[:1]))
    for start in range(0, count, workspace.chunk_size):
        stop = min(start + workspace.chunk_size, count)
        if not alike:
            image.attention_output_gradients(directions[start:stop])
        # A group's gradients make room for its cotangents once its map is known.
        tokens = workspace.tokens[: stop - start]
        for group in workspace.groups(stop - start):
            if not alike:
                patches, positive = image.relevance(tokens[group])
            part = slice(start + group.start, start + group.stop)
            relevance[part] = patches.unflatten(1, (grid_size, grid_size))
            dice[part], by_relevance = targets.dice(relevance[part], part)
            image.output_gradient_cotangents(positive, by_relevance.flatten(1), out=tokens[group])
        gradients[start:stop] = image.direction_gradients(tokens)
    # The loss sees the embedding's direction only: what points along it is taken out.
    along = (gradients * directions).sum(dim=-1, keepdim=True)
    return relevance, dice, (gradients - directions * along) / lengths


class _AdamW:
    """AdamW (arXiv 1711.05101) on plain tensors: torch's own asks for parameters with gradients."""

    def __init__(self, like: Tensor, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay, self.count = lr, weight_decay, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, values: Tensor, gradients: Tensor) -> None:
        """Move `values` in place."""
        self.count += 1
        beta1, beta2 = _ADAM_BETAS
        self.mean.lerp_(gradients, 1 - beta1)
        self.square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        scale = (self.square.sqrt() / math.sqrt(1 - beta2**self.count)).add_(_ADAM_EPS)
        values.mul_(1 - self.lr * self.weight_decay)
        values.addcdiv_(self.mean, scale, value=-self.lr / (1 - beta1**self.count))


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself; emulation would be slower than float32."""
    if device.type == "cpu":
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, and not in every torch
        return supported is not None and supported()
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return False


def _check_inputs(hidden_states: Tensor, masks: Tensor, width: int) -> int:
    """Grid size g; raises ValueError with names and numbers where tensors do not fit the tower or each other."""
    if hidden_states.ndim != 3 or hidden_states.shape[2] != width:
        raise ValueError(
            f"`hidden_states` has the shape {tuple(hidden_states.shape)}, expected (images, tokens, {width}): the "
            f"input of the tower's last block (`hidden_states[-2]`), whose width is {width}."
        )
    num_tokens = hidden_states.shape[1]
    grid_size = math.isqrt(max(num_tokens - 1, 0))
    if grid_size < 1 or grid_size**2 + 1 != num_tokens:
        raise ValueError(
            f"`hidden_states` has {num_tokens} tokens, expected 1 CLS + g * g patches of a square image. Was the CLS "
            "token cut off, or the image not square?"
        )
    if masks.ndim != 4:
        raise ValueError(f"`masks` has the shape {tuple(masks.shape)}, expected (images, masks, height, width).")
    if len(masks) != len(hidden_states):
        raise ValueError(f"`masks` holds {len(masks)} images, `hidden_states` {len(hidden_states)}; they go in pairs.")
    if masks.shape[1] > 0 and 0 in masks.shape[2:]:
        raise ValueError(f"`masks` has the shape {tuple(masks.shape)}: masks without pixels.")
    not_finite = hidden_states.numel() - int(torch.isfinite(hidden_states).sum())
    if not_finite:
        raise ValueError(
            f"`hidden_states` holds {not_finite} NaN or infinite values; every embedding of those images would be "
            "NaN. Look for NaN in `pixel_values`, or for overflow in a float16 tower (use bfloat16 or float32)."
        )
    if masks.dtype != torch.bool and masks.numel() > 0:
        low, high = torch.stack(torch.aminmax(masks)).tolist()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"`masks` ({masks.dtype}) holds values from {low} to {high}, expected bool or values in [0, 1]. "
                "Threshold logits (`masks > 0`), or divide 8-bit masks by 255."
            )
    return grid_size


def invert_masks(
    vision_tower: nn.Module,
    hidden_states: Tensor,
    masks: Tensor,
    settings: MaskInversionSettings,
    visual_projection: nn.Linear | Tensor | None = None,
    *,
    return_explanation_maps: bool = False,
    return_history: bool = False,
) -> MaskInversionOutput:
    """Find, for each mask, the embedding whose explanation map over the image matches the mask.

    Empty masks (no pixel above 0, such as the padding of images with fewer masks) are skipped: they cost nothing and
    do not touch the others. The result is a constant without gradient, also where gradients are enabled, and an
    ordinary tensor also where `inference_mode` is. The arithmetic is float32 (see `compute_dtype`), whatever the
    tower's dtype and whether or not autocast is on.

    Args:
        vision_tower: `CLIPVisionModel` or `CLIPVisionModelWithProjection`. Its last block and `post_layernorm` are
            read, through accelerate's hooks where they are offloaded, and never changed.
        hidden_states: (B, T, C) floating point, the input of the tower's last block, CLS at index 0:
            `hidden_states[-2]` of a tower called with `output_hidden_states=True`.
        masks: (B, N, H, W) bool or in [0, 1], in the frame of the tower's square input, at any size: (0, 0) is the
            corner of the image as the tower saw it, padding included.
        settings: see `MaskInversionSettings`.
        visual_projection: linear layer without bias, or its (E, C) weight, into the space of the embeddings. None
            stays in the tower's width (E = C), after `post_layernorm`.
        return_explanation_maps: fill `explanation_maps`.
        return_history: fill `embeddings_history`, `grads`, `relevance` and `dice_history`.

    Raises:
        ValueError: tensors that do not fit the tower or each other, NaN, masks outside [0, 1]; a tower without CLS, or
            whose last block is not CLIP's, is quantised, sharded or wrapped by an adapter.
    """
    # Tensors made inside inference_mode could not enter a training step later, so that mode is left, not only entered.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
        return _invert_masks(
            vision_tower, hidden_states, masks, settings, visual_projection, return_explanation_maps, return_history
        )


def _invert_masks(
    vision_tower: nn.Module,
    hidden_states: Tensor,
    masks: Tensor,
    settings: MaskInversionSettings,
    visual_projection: nn.Linear | Tensor | None,
    return_explanation_maps: bool,
    return_history: bool,
) -> MaskInversionOutput:
    model = find_vision_model(vision_tower)
    grid_size = _check_inputs(hidden_states, masks, model.config.hidden_size)
    size = projection_size(model, visual_projection)
    device, (num_images, num_masks, *mask_hw) = hidden_states.device, masks.shape
    steps = settings.iterations

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(num_images, *shape, device=device)

    output = MaskInversionOutput(embeddings=zeros(num_masks, size), dice=zeros(num_masks) + 1)
    if return_explanation_maps:
        output.explanation_maps = zeros(num_masks, *mask_hw)
    if return_history:
        output.embeddings_history = zeros(steps + 1, num_masks, size)
        output.grads = zeros(steps, num_masks, size)
        output.relevance = zeros(steps, num_masks, grid_size, grid_size)
        output.dice_history = zeros(steps, num_masks) + 1
    histories = (output.embeddings_history, output.grads, output.relevance, output.dice_history)

    is_filled = masks.flatten(2).any(dim=-1).cpu() if masks.numel() > 0 else torch.zeros(num_images, num_masks) > 0
    if not is_filled.any():
        return output
    if settings.compute_dtype == "auto":
        use_bfloat16 = has_16_bit_weights(model) and _has_bfloat16(device)
    else:
        use_bfloat16 = settings.compute_dtype == "bfloat16"
    block = read_last_block(model, visual_projection, device, torch.bfloat16 if use_bfloat16 else torch.float32)
    counts = is_filled.sum(dim=1).tolist()
    workspace = Workspace(block, hidden_states.shape[1], max(counts), settings.chunk_size)
    frame = _MapFrame(grid_size, model.config.patch_size, (mask_hw[0], mask_hw[1]), device)

    # From here on the host never waits for an accelerator. It has asked what it must know, once per call: whether the
    # states are finite (`_check_inputs`, which also asks for the range of masks that are not bool), and which masks
    # are filled. These indices are the last that it sends, unless the masks lie elsewhere.
    slots = is_filled.nonzero()[:, 1].to(device).split(counts)
    for index, filled in enumerate(slots):  # filled (n,)
        if len(filled) == 0:
            continue
        image = LinearisedImage(block, hidden_states[index].detach().to(torch.float32), workspace)
        targets = _MaskTargets(frame, masks[index].to(device)[filled])
        scale = 1 / len(filled) if settings.reduction == "mean" else 1.0
        start = image.image_embedding
        embeddings = start.repeat(len(filled), 1)  # (n, E)
        optimizer = _AdamW(embeddings, settings.lr, settings.weight_decay)
        for step in range(steps):
            relevance, dice, grads = _explain(image, targets, embeddings, alike=step == 0)
            if settings.alpha:
                grads -= settings.alpha * _cosine_gradient(embeddings, start)
            grads *= scale
            for history, values in zip(histories, (embeddings, grads, relevance, dice), strict=True):
                if history is not None:
                    history[index, step, filled] = values
            optimizer.step(embeddings, grads)
        output.embeddings[index, filled] = embeddings
        output.dice[index, filled] = dice
        if output.embeddings_history is not None:
            output.embeddings_history[index, steps, filled] = embeddings
        if output.explanation_maps is not None:
            output.explanation_maps[index, filled] = frame.explanation_maps(relevance)
    return output


def _cosine_gradient(embeddings: Tensor, start: Tensor) -> Tensor:
    """Gradient (n, E) of cosine(embeddings, start) with respect to the embeddings (n, E); `start` is (E,)."""
    lengths = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True).clamp_min(1e-12)
    directions, target = embeddings / lengths, F.normalize(start, dim=-1)
    return (target - directions * (directions @ target)[:, None]) / lengths

"""MaskInversion written plainly, with autograd: the specification that `invert_masks` is tested against.

Every step of the method is the library's own operation: the tower's last block with attention weights in the open,
`torch.autograd.grad` for the explanation map and for the loss, `interpolate` at full resolution, `torch.optim.AdamW`.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainInversion(NamedTuple):
    """N masks, I iterations, E embedding size, g patches per side, masks of (H, W); in the dtype asked for."""

    embeddings: Tensor  # (I + 1, N, E)
    grads: Tensor  # (I, N, E)
    relevance: Tensor  # (I, N, g, g)
    dice: Tensor  # (I, N)
    explanation_maps: Tensor  # (N, H, W), of the embedding before the last step


def last_block(model: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Output (T, C) of the last block for its input (T, C), and its attention weights (H, T, T)."""
    layer = model.encoder.layers[-1]
    attention = layer.self_attn

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)

    normed = layer.layer_norm1(hidden_states)
    query, key = heads(attention.q_proj(normed)), heads(attention.k_proj(normed))
    weights = torch.softmax(query @ key.transpose(1, 2) * attention.scale, dim=-1)
    attended = (weights @ heads(attention.v_proj(normed))).transpose(0, 1).flatten(1)
    hidden_states = hidden_states + attention.out_proj(attended)
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states)), weights


def relevance_map(similarity: Tensor, weights: Tensor) -> Tensor:
    """LeGrad: gradient at the attention weights, clamped, mean over heads and queries, CLS key dropped; (g, g)."""
    (gradient,) = torch.autograd.grad(similarity, weights, create_graph=True)
    patches = gradient.clamp(min=0).mean(dim=(0, 1))[1:]
    side = int(len(patches) ** 0.5)
    return patches.view(side, side)


def normalised_map(relevance: Tensor, patch_size: int, mask_hw: tuple[int, int]) -> Tensor:
    fine = F.interpolate(relevance[None, None], scale_factor=patch_size, mode="bilinear", align_corners=False)
    fine = (fine - fine.min()) / (fine.max() - fine.min())
    return F.interpolate(fine, size=mask_hw, mode="bilinear", align_corners=False)[0, 0]


def dice_loss(explanation: Tensor, mask: Tensor) -> Tensor:
    return 1 - (2 * (explanation * mask).sum() + 1) / (explanation.sum() + mask.sum() + 1)


def invert_masks_plainly(
    vision_tower: nn.Module,
    hidden_states: Tensor,
    masks: Tensor,
    *,
    visual_projection: Tensor | None = None,
    iterations: int = 10,
    lr: float = 0.1,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    reduction: str = "sum",
    dtype: torch.dtype = torch.float32,
    weight_gradients: bool = False,
) -> PlainInversion:
    """One image: hidden_states (T, C), masks (N, H, W) non-empty, visual_projection (E, C) or None: the identity.

    `weight_gradients` computes those of the block too, which nobody needs: the cost of the published code.
    """
    model = copy.deepcopy(getattr(vision_tower, "vision_model", vision_tower)).to(dtype)
    masks = masks.to(dtype)

    def embed(row: Tensor) -> Tensor:
        normed = model.post_layernorm(row)
        return normed if visual_projection is None else visual_projection.detach().to(dtype) @ normed

    with torch.enable_grad():
        output, weights = last_block(model, hidden_states.to(dtype))
        start = embed(output[0]).detach()
        feature = F.normalize(embed(output.mean(dim=0)), dim=-1)
        embeddings = start.repeat(len(masks), 1).requires_grad_()
        optimizer = torch.optim.AdamW([embeddings], lr=lr, weight_decay=weight_decay)
        history, grads, relevances, dices = [start.repeat(len(masks), 1)], [], [], []
        for _ in range(iterations):
            directions = F.normalize(embeddings, dim=-1)
            relevance = [relevance_map(direction @ feature, weights) for direction in directions]
            maps = [normalised_map(one, model.config.patch_size, masks.shape[1:]) for one in relevance]
            dice = torch.stack([dice_loss(one, mask) for one, mask in zip(maps, masks, strict=True)])
            losses = dice + alpha * (1 - directions @ F.normalize(start, dim=-1))
            loss = losses.mean() if reduction == "mean" else losses.sum()
            optimizer.zero_grad()
            loss.backward(retain_graph=True, inputs=None if weight_gradients else [embeddings])
            grads.append(embeddings.grad.clone())
            relevances.append(torch.stack(relevance).detach())
            dices.append(dice.detach())
            optimizer.step()
            history.append(embeddings.detach().clone())
    return PlainInversion(
        torch.stack(history),
        torch.stack(grads),
        torch.stack(relevances),
        torch.stack(dices),
        torch.stack(maps).detach(),
    )

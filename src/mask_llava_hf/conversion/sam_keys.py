# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Weight names of the segment-anything package, renamed to those of Transformers' `SamModel`."""

import re
from collections.abc import Mapping

import torch


_RENAMES = [
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.blocks\.", ".layers."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
]
_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_HEAD = re.compile(r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.layers\.(\d+)\.(.+)$")


def sam_state_dict_to_transformers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of `SamModel`.

    The decoder's layer norms have epsilon 1e-5 in the segment-anything package but 1e-6 by default in
    `SamMaskDecoderConfig`: set `layer_norm_eps=1e-5` there for the same numbers.

    Args:
        state_dict: of `segment_anything.modeling.Sam`.

    Returns:
        a state dictionary for `SamModel`, with the tied position matrix under both of its names.
    """
    depths: dict[str, int] = {}
    for name in state_dict:
        if head := _HEAD.match(name):
            depths[head[1]] = max(depths.get(head[1], 0), int(head[2]))
    renamed = {}
    for name, tensor in state_dict.items():
        if name == _POSITIONS:
            renamed["shared_image_embedding.positional_embedding"] = tensor
            renamed["prompt_encoder.shared_embedding.positional_embedding"] = tensor
            continue
        if head := _HEAD.match(name):
            module, layer, rest = head[1], int(head[2]), head[3]
            inner = f"layers.{layer - 1}"
            place = "proj_in" if layer == 0 else "proj_out" if layer == depths[module] else inner
            renamed[f"{module}.{place}.{rest}"] = tensor
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed

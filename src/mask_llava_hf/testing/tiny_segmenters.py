# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Promptable segmenters with a random image encoder and a mask decoder set by hand, whose masks follow the boxes."""

from typing import Any, Literal

import torch
from transformers import (
    PreTrainedModel,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
)

from .reproducible_weights import reproducible_weights, spread_signals


SegmenterKind = Literal["sam", "sam2"]

_SEGMENTER_INPUT = {"sam": 128, "sam2": 256}


_TINY_MASK_DECODER = {
    "hidden_size": 32,
    "mlp_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "iou_head_hidden_dim": 32,
}


def tiny_segmenter(kind: SegmenterKind = "sam", *, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """A segmenter and its processor. The mask of a box is about the box, with an outline that wavers with the image.

    The image encoder is random; the mask decoder is set by hand.

    Args:
        kind: "sam" or "sam2".

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("sam", "sam2"):
        raise ValueError(f'`kind` must be "sam" or "sam2", got {kind!r}.')
    with reproducible_weights(seed):
        model, processor = (_sam if kind == "sam" else _sam2)()
        spread_signals(model)
        _segment_boxes(model)
    return model.eval(), processor


def _sam() -> tuple[PreTrainedModel, Any]:
    side, patch = _SEGMENTER_INPUT["sam"], 4
    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": patch,
            "mlp_dim": 64,
            "window_size": 8,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": side, "patch_size": patch},
        mask_decoder_config=_TINY_MASK_DECODER,
    )
    image_processor = SamImageProcessor(
        size={"longest_edge": side},
        pad_size={"height": side, "width": side},
        mask_size={"longest_edge": side},
        mask_pad_size={"height": side, "width": side},
    )
    return SamModel._from_config(config, dtype=torch.float32), SamProcessor(image_processor)


def _sam2() -> tuple[PreTrainedModel, Any]:
    side = _SEGMENTER_INPUT["sam2"]
    config = Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "image_size": [side, side],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 4, 4, 4],
                "global_attention_blocks": [3],  # not the first of a stage, which pools its queries
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[side // stride, side // stride] for stride in (4, 8, 16)],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": side, "patch_size": 16},
        mask_decoder_config=_TINY_MASK_DECODER,
    )
    image_processor = Sam2ImageProcessor(
        size={"height": side, "width": side}, mask_size={"height": side // 4, "width": side // 4}
    )
    return Sam2Model._from_config(config, dtype=torch.float32), Sam2Processor(image_processor)


@torch.no_grad()
def _segment_boxes(model: PreTrainedModel) -> None:
    """Sets a segmenter's mask decoder by hand, so that the mask of a box is about the box.

    A random decoder paints the same specks over the whole image for every box, and nothing behind it could be told
    right from wrong. The image encoder stays random; its faint signal makes the outlines waver.

    A place is encoded as sine and cosine of its x and of its y, slow enough to be one-to-one. Four attention heads let
    a pixel look at a corner of the box: is it right of the upper left corner, below it, left of the lower right corner,
    above it? As sin(a - b) = sin a cos b - cos a sin b, that is a product of query and key. Where all four agree, there
    is the mask.
    """
    is_sam = model.config.model_type == "sam"
    decoder, prompts = model.mask_decoder, model.prompt_encoder
    # Channels: of the sixteen sines and cosines only the first two move; the other sines are free to mark tokens
    sine, cosine, always_one = (0, 1), (16, 17), 31
    upper_left, lower_right, no_corner, inside, outside = 2, 3, 4, 8, 9
    marker, steepness = 6.0, 400.0

    for places in (model.shared_image_embedding, prompts.shared_embedding):
        places.positional_embedding.zero_()
        places.positional_embedding.fill_diagonal_(1 / 16)
    for name, parameter in decoder.named_parameters():
        if name in ("iou_token.weight", "mask_tokens.weight", "obj_score_token.weight"):
            parameter.zero_()
            parameter[:, no_corner] = marker
        elif "norm" not in name:
            parameter.zero_()
    corners = [row.weight[0] for row in prompts.point_embed] if is_sam else prompts.point_embed.weight
    tokens = {upper_left: corners[2], lower_right: corners[3], no_corner: prompts.not_a_point_embed.weight[0]}
    for channel, token in tokens.items():
        token.zero_()
        token[channel] = marker
    prompts.no_mask_embed.weight.zero_()

    # First the tokens attend to their own kind, and keep its mark alone
    layer = decoder.transformer.layers[0]
    attend, kinds = layer.self_attn, list(tokens)
    attend.q_proj.weight[kinds, kinds] = attend.k_proj.weight[kinds, kinds] = 2.0
    attend.v_proj.weight[kinds, kinds] = (attend.out_proj if is_sam else attend.o_proj).weight[kinds, kinds] = 1.0
    layer.layer_norm3.weight.zero_()
    layer.layer_norm3.weight[kinds] = 1.0

    # Then every pixel asks its four questions, and counts the votes
    attend = layer.cross_attn_image_to_token
    vote = attend.out_proj if is_sam else attend.o_proj
    head_width = attend.q_proj.out_features // 4
    for head in range(4):
        axis, row = head % 2, head * head_width
        corner, other, sign = (upper_left, lower_right, 1) if head < 2 else (lower_right, upper_left, -1)
        attend.q_proj.weight[[row, row + 1, row + 2], [sine[axis], cosine[axis], always_one]] = 1.0
        attend.k_proj.weight[row, cosine[axis]] = sign * steepness
        attend.k_proj.weight[row + 1, sine[axis]] = -sign * steepness
        attend.k_proj.weight[row + 2, other] = -steepness
        attend.k_proj.weight[row + 2, corner] = 0.3  # makes up for there being about six tokens that are no corner
        attend.v_proj.weight[row, corner] = 1 / marker
        vote.weight[[inside, outside], row] = torch.tensor([4.0, -4.0])
    vote.bias[[inside, outside]] = 3.2 * torch.tensor([-4.0, 4.0])  # of at most 4 votes

    # The rest of the decoder passes on whether a pixel is inside
    decoder.upscale_conv1.weight[[inside, outside], [0, 1]] = 1.0
    decoder.upscale_conv2.weight[[0, 1], [0, 1]] = 1.0
    for head_of_mask in decoder.output_hypernetworks_mlps:
        head_of_mask.proj_out.bias[:2] = torch.tensor([1.0, -1.0])
    for name, parameter in model.vision_encoder.named_parameters():
        if name.startswith(("neck.layer_norm2.", "neck.convs.")):  # the last of SAM's and of SAM 2's
            parameter.mul_(0.005)

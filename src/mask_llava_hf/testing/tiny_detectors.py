# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Object detectors with random weights and heads that are steered to diverse boxes."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    PreTrainedModel,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
)
from transformers.models.rt_detr.configuration_rt_detr_resnet import RTDetrResNetConfig

from .reproducible_weights import reproducible_weights, spread_signals


DetectorKind = Literal["rt_detr", "deformable_detr"]

_DETECTOR_INPUT = 128


def tiny_detector(
    kind: DetectorKind = "rt_detr", *, num_queries: int = 30, seed: int = 0
) -> tuple[PreTrainedModel, Any]:
    """An object detector and its image processor.

    Its boxes lie in diverse places and have diverse sizes, its scores lie between about 0.05 and 0.95, and both depend
    on the image: the chain behind it has something to do. It finds nothing in particular; its one class is "thing".

    Args:
        kind: "rt_detr" (has anchors) or "deformable_detr" (learned queries; the paper's detector).
        num_queries: boxes per image, before any threshold.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("rt_detr", "deformable_detr"):
        raise ValueError(f'`kind` must be "rt_detr" or "deformable_detr", got {kind!r}.')
    with reproducible_weights(seed):
        model, image_processor = (_rt_detr if kind == "rt_detr" else _deformable_detr)(num_queries)
        spread_signals(model)
        # RT-DETR's three box heads add to small anchors, which have to grow; the one of Deformable DETR has no anchor
        _spread_detections(model, *((0.4, 0.3) if kind == "rt_detr" else (-1.2, 0.7)))
    return model.eval(), image_processor


def _rt_detr(num_queries: int) -> tuple[PreTrainedModel, Any]:
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        d_model=16,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        decoder_layers=2,
        hidden_expansion=0.5,
        num_queries=num_queries,
        num_denoising=0,
        id2label={0: "thing"},
        label2id={"thing": 0},
    )
    model = RTDetrForObjectDetection._from_config(config, dtype=torch.float32)
    return model, RTDetrImageProcessor(size={"height": _DETECTOR_INPUT, "width": _DETECTOR_INPUT})


def _deformable_detr(num_queries: int) -> tuple[PreTrainedModel, Any]:
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        d_model=32,  # a multiple of the 32 groups of its input normalisation
        encoder_layers=1,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=64,
        decoder_attention_heads=2,
        num_feature_levels=3,
        num_queries=num_queries,
        disable_custom_kernels=True,
        id2label={0: "thing"},
        label2id={"thing": 0},
    )
    model = DeformableDetrForObjectDetection._from_config(config, dtype=torch.float32)
    size = {"shortest_edge": _DETECTOR_INPUT, "longest_edge": 2 * _DETECTOR_INPUT}
    return model, DeformableDetrImageProcessor(size=size)


@torch.no_grad()
def _spread_detections(model: PreTrainedModel, size_mean: float, size_std: float) -> None:
    """Steers a detector's heads to boxes of many places and sizes and to scores that vary.

    Each head, in the order in which they run, gets the outputs on images of noise shifted and scaled to a chosen mean
    and standard deviation over all queries, before the sigmoid.

    Args:
        size_mean, size_std: mean and standard deviation that each box head gives to width and height.
    """

    def steer(mean: Tensor, std: Tensor) -> Callable[[nn.Linear, Any, Tensor], Tensor]:
        def hook(head: nn.Linear, _: Any, output: Tensor) -> Tensor:
            found = output.flatten(0, -2)
            scale = std / found.std(0).clamp(min=1e-3)
            head.weight.mul_(scale[:, None])
            head.bias.copy_((head.bias - found.mean(0)) * scale + mean)
            return (output - found.mean(0)) * scale + mean

        return hook

    score = steer(torch.tensor([-0.5]), torch.tensor([1.3]))
    box = steer(torch.tensor([0.0, 0.0, size_mean, size_mean]), torch.tensor([0.3, 0.3, size_std, size_std]))
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == 1:  # one class
            hooks.append(module.register_forward_hook(score))
        elif isinstance(module, nn.Linear) and module.out_features == 4 and "bbox" in name:
            hooks.append(module.register_forward_hook(box))
    blobs = torch.rand(16, 3, 1, 1) + torch.rand(16, 3, 8, 8) - 0.5  # of different colours and brightness
    noise = nn.functional.interpolate(blobs, size=_DETECTOR_INPUT, mode="bilinear")
    model.eval()(pixel_values=noise)
    for hook in hooks:
        hook.remove()

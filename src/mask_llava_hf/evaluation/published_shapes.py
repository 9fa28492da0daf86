# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The published models' true shapes with random weights: what they cost, without what they know."""

from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPVisionConfig,
    DeformableDetrConfig,
    DeformableDetrImageProcessor,
    EdgeTamConfig,
    EdgeTamVisionConfig,
    LlamaConfig,
    LlavaImageProcessor,
    PreTrainedConfig,
    ResNetConfig,
    RTDetrConfig,
    RTDetrImageProcessor,
    Sam2Config,
    Sam2ImageProcessor,
    SamConfig,
    SamImageProcessor,
)
from transformers.models.rt_detr.configuration_rt_detr_resnet import RTDetrResNetConfig

from ..modeling.configuration_mask_llava import MaskLlavaConfig


Shape = tuple[PreTrainedConfig, Any]  # a config, and the image processor that goes with it

_COCO = {index: f"class {index}" for index in range(80)}


def _deformable_detr() -> Shape:
    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(backbone_config=backbone, disable_custom_kernels=True, id2label=_COCO)
    return config, DeformableDetrImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333})


def _rt_detr_r50() -> Shape:
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(out_features=["stage2", "stage3", "stage4"]), id2label=_COCO
    )
    return config, RTDetrImageProcessor()


def _rt_detr_r18() -> Shape:
    backbone = RTDetrResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        id2label=_COCO,
    )
    return config, RTDetrImageProcessor()


def _sam(**vision: Any) -> Callable[[], Shape]:
    return lambda: (SamConfig(vision_config=vision), SamImageProcessor())


def _sam2_tiny() -> Shape:
    return Sam2Config(), Sam2ImageProcessor()


def _edgetam() -> Shape:
    backbone = {
        "model_type": "timm_wrapper",
        "architecture": "repvit_m1.dist_in1k",
        "num_classes": 2,
        "do_pooling": False,
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    }
    return EdgeTamConfig(vision_config=EdgeTamVisionConfig(backbone_config=backbone)), Sam2ImageProcessor()


def llava_1_5_7b() -> Shape:
    """Mask-LLaVA of the shapes of LLaVA-1.5-7B."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    return MaskLlavaConfig(vision_config=vision, text_config=text), LlavaImageProcessor()


# The published configurations, by names that people know.
DETECTORS: dict[str, Callable[[], Shape]] = {
    "Deformable DETR R50": _deformable_detr,  # the paper's
    "RT-DETR R50": _rt_detr_r50,
    "RT-DETR R18": _rt_detr_r18,
}
SEGMENTERS: dict[str, Callable[[], Shape]] = {
    "SAM ViT-H": _sam(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        mlp_dim=5120,
        global_attn_indexes=[7, 15, 23, 31],
    ),
    "SAM ViT-B": _sam(),
    "SAM 2.1 tiny": _sam2_tiny,
    "EdgeTAM": _edgetam,
}

# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Converts checkpoints of the segment-anything package to Transformers' Sam, with the same masks."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import SamConfig, SamModel, SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from ..processing.objects.segmenters import (
    SegmentAnythingSegmenter,
    load_segment_anything,
    load_segmenter,
)
from .checkpoint_files import LazyTensor
from .checkpoint_writer import MAX_SHARD_BYTES, new_folder, write_weights
from .conversion_report import ConversionReport
from .sam_keys import sam_state_dict_to_transformers
from .self_check import BOXES, check_picture
from .source_files import read_json


_PIXELS_NOTE = (
    "image processor: Pillow's, as in the package; where Transformers loads the checkpoint by itself, "
    '`AutoImageProcessor.from_pretrained(..., backend="pil")` keeps it so'
)

# Share of pixels that may change sides where a logit is zero but for rounding.
_MOST_DIFFERING = 0.005


def convert_sam(
    path: Path,
    target: Path,
    layout: str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    self_check: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConversionReport:
    """Writes a checkpoint of `SamModel` and `SamProcessor`, which a processor's `segmenter` setting can name.

    Args:
        path: `sam_vit_b_01ec64.pth` or another of its kind; the architecture is read from its weights.
        target: the folder to write.
        layout: for the report.
        dtype: of the weights written; default: float32.
        self_check: whether to compare masks of the package with those of the result; in 16 bits these may differ.

    Raises:
        ValueError: a file that is no checkpoint of the package, or masks that differ.
    """
    started = time.perf_counter()
    sam = load_segment_anything(path)
    config = sam_config(sam)
    dtype = dtype or torch.float32
    state = sam_state_dict_to_transformers(sam.state_dict())
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in SamModel(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise ValueError(
            f"`{path.name}` is a SAM that Transformers' model cannot hold: {len(differing)} weights differ in name or "
            f"shape, such as {differing[:3]}."
        )
    tied = "prompt_encoder.shared_embedding.positional_embedding"
    tensors = {
        name: LazyTensor(name, path.name, tuple(state[name].shape), state[name].dtype, partial(state.__getitem__, name))
        for name in expected
        if name != tied
    }
    report = ConversionReport.of(layout, target.name, tensors, dtype, notes=[_PIXELS_NOTE])
    with new_folder(target, overwrite) as folder:
        write_weights(folder, tensors, dtype, max_shard_bytes)
        config.architectures, config.dtype = [SamModel.__name__], dtype
        config.save_pretrained(folder)
        _save_processor(config.vision_config.image_size, folder)
        if self_check:
            report.self_check = _check_masks(sam, folder)
        report.save(folder)
    report.seconds = time.perf_counter() - started
    return report


def sam_config(sam: Any) -> SamConfig:
    """The config of the `SamModel` that a `segment_anything.modeling.Sam` is."""
    encoder, decoder, prompts = sam.image_encoder, sam.mask_decoder, sam.prompt_encoder
    first, cross = encoder.blocks[0], decoder.transformer.layers[0].cross_attn_token_to_image
    windows = {block.window_size for block in encoder.blocks} - {0}
    sides = {"image_size": encoder.img_size, "patch_size": encoder.img_size // prompts.image_embedding_size[0]}
    vision = {
        **sides,
        "hidden_size": first.norm1.normalized_shape[0],
        "output_channels": prompts.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": first.attn.num_heads,
        "qkv_bias": first.attn.qkv.bias is not None,
        "window_size": windows.pop() if windows else 0,
        "global_attn_indexes": [index for index, block in enumerate(encoder.blocks) if block.window_size == 0],
        "mlp_dim": first.mlp.lin1.out_features,
        "num_pos_feats": prompts.embed_dim // 2,
    }
    head = decoder.iou_prediction_head
    mask_decoder = {
        "hidden_size": decoder.transformer_dim,
        "mlp_dim": decoder.transformer.layers[0].mlp.lin1.out_features,
        "num_hidden_layers": decoder.transformer.depth,
        "num_attention_heads": cross.num_heads,
        "attention_downsample_rate": cross.embedding_dim // cross.internal_dim,
        "num_multimask_outputs": decoder.num_multimask_outputs,
        "iou_head_depth": head.num_layers,
        "iou_head_hidden_dim": head.layers[0].out_features,
        "layer_norm_eps": 1e-5,  # the package's; Transformers has 1e-6 where nothing is said
    }
    mask_channels = prompts.mask_downscaling[3].out_channels
    prompt_encoder = {**sides, "hidden_size": prompts.embed_dim, "mask_input_channels": mask_channels}
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt_encoder, mask_decoder_config=mask_decoder)


def _save_processor(side: int, folder: Path) -> None:
    square, mask_side = {"height": side, "width": side}, side // 4
    SamProcessor(
        SamImageProcessorPil(
            size={"longest_edge": side},
            pad_size=square,
            mask_size={"longest_edge": mask_side},
            mask_pad_size={"height": mask_side, "width": mask_side},
        )
    ).save_pretrained(folder)
    # The package resizes with Pillow. Transformers does not save which of its two image processors it was given, and
    # would take torchvision's; `load_segmenter` reads it here.
    path = folder / "processor_config.json"
    saved = read_json(path)
    saved["image_processor"]["image_processor_type"] = SamImageProcessorPil.__name__
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_masks(sam: Any, folder: Path) -> str:
    """Segments a picture with the package's model and with the converted one.

    Raises:
        ValueError: masks that differ in more than single pixels on their outlines.
    """
    boxes = torch.tensor(BOXES)
    [before] = SegmentAnythingSegmenter(sam).segment([check_picture()], [boxes])
    [after] = load_segmenter(folder).segment([check_picture()], [boxes])
    differing, total = int((before != after).sum()), before.numel()
    if differing > _MOST_DIFFERING * total:
        raise ValueError(
            f"The converted model's masks of a picture differ from the package's in {differing} of {total} pixels. In "
            "float32 that is a fault of the conversion; in 16 bits the weights may not bear it: leave out `--dtype`."
        )
    return f"masks of {len(boxes)} boxes: {differing} of {total} pixels differ from the segment-anything package's"

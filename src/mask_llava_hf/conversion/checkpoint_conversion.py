# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Converts checkpoints of LLaVA and Mask-LLaVA in other layouts to ours."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..modeling.modeling_mask_llava import MaskLlavaForConditionalGeneration
from ..modeling.token_layout import TokenLayout
from ..processing.processing_mask_llava import MaskLlavaProcessor
from .checkpoint_writer import MAX_SHARD_BYTES, check_places, check_target, new_folder, write_weights
from .conversion_report import ConversionReport, describe_tokens
from .converted_model import ChatTemplate, Composition, ConvertedModel
from .llava_hf import read_llava_hf
from .llava_research import ResearchSource, read_llava_research
from .research_tokenizer import SLOW_TOKENIZER_FOLDER, copy_slow_tokenizer
from .sam_checkpoint import convert_sam
from .self_check import check_checkpoint
from .source_layouts import LayoutName, SourceLayout, recognise


_LAYOUTS = {
    "llava": "LLaVA, research layout",
    "mask-llava": "Mask-LLaVA, research layout",
    "llava-hf": "LLaVA, Transformers' layout",
    "sam": "SAM, layout of the segment-anything package",
    "transformers": "Mask-LLaVA, our own layout",
}

_NO_PARTS_NOTE = (
    "objects: no detector and no segmenter are set, so images have none until the processor's `object_settings` name "
    "them or a call passes boxes or masks"
)

# Options without an effect on a layout.
_USELESS = {
    "llava": (),
    "mask-llava": (),
    "llava-hf": ("base", "vision_tower"),
    "sam": ("base", "vision_tower", "composition", "chat_template"),
}


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: LayoutName | None = None,
    base: str | None = None,
    vision_tower: str | None = None,
    composition: Composition | None = None,
    dtype: torch.dtype | None = None,
    chat_template: ChatTemplate | None = None,
    overwrite: bool = False,
    self_check: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConversionReport:
    """Writes a checkpoint that `AutoProcessor` and `AutoModelForImageTextToText` load, from one in another layout.

    The numbers are copied exactly, but for a change of dtype. Nothing is left behind by a conversion that fails. One
    tensor at a time is in memory.

    Args:
        source: a folder, a Hub id, or a `.pth` file of segment-anything (which becomes Transformers' Sam).
        target: the folder to write.
        layout: what the source is; default: told from its files.
        base: the language model that a projector (stage 1) or a LoRA adapter was trained on: folder or Hub id.
        vision_tower: folder or Hub id of the vision tower, in place of the one that the config names.
        composition: "llava": behaves as the source does, with all patches and without CLS and objects; "mask-llava":
            1 + 36 + 20 tokens per image, as a start for training. Default: "llava" for a LLaVA, "mask-llava" for a
            Mask-LLaVA.
        dtype: of the weights written; default: of the source's language model.
        chat_template: default: the source's own, else "vicuna-v1", or "plain" for a projector.
        overwrite: whether a checkpoint that is there may be replaced.
        self_check: whether to load the result and run a forward pass before it takes its name.
        max_shard_bytes: the most a weight file holds.

    Raises:
        ValueError: a source that is broken, unknown or does not fit its config; a target that is there already.
    """
    started = time.perf_counter()
    target = Path(target)
    check_target(target, overwrite)
    check_places([source, base, vision_tower], target)
    found = recognise(source, layout)
    if found.name == "transformers":
        raise ValueError(
            f"`{source}` is a Mask-LLaVA in our own layout already ({found.reason}). To write it in the layout of "
            "LLaVA's research code, use `export_checkpoint` (`--to llava`)."
        )
    options = {"base": base, "vision_tower": vision_tower, "composition": composition, "chat_template": chat_template}
    _refuse_useless(found, options)
    if found.name == "sam":
        return convert_sam(found.path, target, _describe(found), dtype, overwrite, self_check, max_shard_bytes)
    try:
        model = _read(found, base, vision_tower, composition, chat_template)
    except StrictDataclassError as error:  # what configs raise, which is no ValueError
        raise ValueError(f"The config of `{found.path.name}` cannot be used: {error.__cause__ or error}") from error
    check_places(model.sources, target)  # a base and a tower that were found, not given, among them
    dtype = dtype or model.source_dtype
    report = ConversionReport.of(
        _describe(found),
        target.name,
        model.tensors,
        dtype,
        tokens_per_image=describe_tokens(TokenLayout.from_config(model.config)),
        dropped=model.dropped,
        notes=[*model.notes, *([_NO_PARTS_NOTE] if model.config.max_object_tokens else [])],
    )
    with new_folder(target, overwrite) as folder:
        write_weights(folder, model.tensors, dtype, max_shard_bytes)
        _write_small_files(folder, model, dtype)
        if self_check:
            report.self_check = check_checkpoint(folder)
        report.save(folder)
    report.seconds = time.perf_counter() - started
    return report


def _read(
    found: SourceLayout,
    base: str | None,
    vision_tower: str | None,
    composition: Composition | None,
    chat_template: ChatTemplate | None,
) -> ConvertedModel:
    if found.name == "llava-hf":
        return read_llava_hf(found.path, composition or "llava", chat_template)
    is_mask_llava = found.name == "mask-llava"
    source = ResearchSource(found.path, found.kind, is_mask_llava)
    composition = composition or ("mask-llava" if is_mask_llava else "llava")
    return read_llava_research(source, composition, base, vision_tower, chat_template)


def _write_small_files(folder: Path, model: ConvertedModel, dtype: torch.dtype) -> None:
    config = model.config
    config.architectures = [MaskLlavaForConditionalGeneration.__name__]
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
    config.save_pretrained(folder)
    model.generation_config().save_pretrained(folder)
    MaskLlavaProcessor(
        image_processor=model.image_processor,
        tokenizer=model.tokenizer,
        object_settings={
            "max_object_tokens": config.max_object_tokens,
            "patch_grid_size": config.patch_grid_size,
            "use_cls_token": config.use_cls_token,
            "embed_size": config.vision_config.hidden_size,
            "image_size": config.vision_config.image_size,
        },
        chat_template=model.chat_template,
    ).save_pretrained(folder)
    if model.slow_tokenizer is not None:
        (folder / SLOW_TOKENIZER_FOLDER).mkdir()
        copy_slow_tokenizer(model.slow_tokenizer, folder / SLOW_TOKENIZER_FOLDER)


def _describe(found: SourceLayout) -> str:
    return f"{_LAYOUTS[found.name]} ({found.reason})"


def _refuse_useless(found: SourceLayout, options: dict[str, Any]) -> None:
    given = [name for name in _USELESS[found.name] if options[name] is not None]
    if given:
        raise ValueError(
            f"`{given[0]}` was given, which has no effect on the source: {_describe(found)}. Leave it out."
        )

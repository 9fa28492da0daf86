# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""A model on its way into a checkpoint of ours: what readers of other layouts make, and the writer takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlavaImageProcessor, PreTrainedTokenizerFast

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from .checkpoint_files import LazyTensor
from .research_tokenizer import LoadedTokenizer, boundary_mismatches
from .source_files import read_json
from .vocabulary import grown_vocabulary, with_mean_rows


Composition = Literal["llava", "mask-llava"]
ChatTemplate = Literal["vicuna-v1", "plain"]

EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass
class ConvertedModel:
    """Everything a checkpoint of ours is made of; the numbers are still in the source's files.

    Attributes:
        tensors: every weight of the model by its name here, in the model's order.
        dropped: name in the source -> why it is not needed.
        suppressed_ids: rows of the vocabulary that `generate` must never choose.
        notes: for the report.
        sources: the folders it was read from, those that the source's own files name among them.
        slow_tokenizer: folder with the files of the source's slow tokenizer, which travel along for the way back.
    """

    config: MaskLlavaConfig
    tensors: dict[str, LazyTensor]
    dropped: dict[str, str]
    tokenizer: PreTrainedTokenizerFast
    image_processor: LlavaImageProcessor
    chat_template: str
    suppressed_ids: list[int]
    eos_token_id: int | list[int] | None
    notes: list[str]
    sources: tuple[Path, ...]
    slow_tokenizer: Path | None

    @property
    def source_dtype(self) -> torch.dtype:
        """The dtype in which the source has its language model; float32 where it is none that models are saved in."""
        dtype = self.tensors[EMBEDDINGS].dtype
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    def generation_config(self) -> GenerationConfig:
        """Greedy, and never one of `suppressed_ids`.

        A source's sampling settings are not taken over: the research code passes its own with every call.
        """
        return GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=self.suppressed_ids,
        )


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast) -> int | list[int] | None:
    """What ends an answer: the ids in the `generation_config.json` of a folder, else the tokenizer's end token."""
    said = read_json(folder / "generation_config.json").get("eos_token_id")
    return tokenizer.eos_token_id if said is None else said


def composition_fields(
    composition: Composition, vision: CLIPVisionConfig, has_cls: bool, own: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of `MaskLlavaConfig` that decide which tokens an image has.

    Args:
        composition: "llava": what the source does, all patches and no objects; "mask-llava": 1 + 36 + 20, a start for
            training.
        has_cls: whether the source passes the CLS token on, in front of the patches.
        own: what a Mask-LLaVA's own config says; goes before the defaults of "mask-llava".
    """
    if composition == "mask-llava":
        return dict(own)
    return {
        "use_cls_token": has_cls,
        "patch_grid_size": vision.image_size // vision.patch_size,
        "max_object_tokens": 0,
        "norm_scaling": "none" if has_cls else "per_image",
    }


def with_image_token(
    config: MaskLlavaConfig, tensors: dict[str, LazyTensor], tokenizer: LoadedTokenizer
) -> tuple[list[int], list[str]]:
    """Gives every token a row of the vocabulary, `<image>` among them.

    Args:
        config: of the source; brought up to the new vocabulary in place.
        tensors: of the source; embeddings and head are replaced by larger ones in place.

    Returns:
        The ids that must never be generated (`<image>`, rows that were added, and rows no token stands for, which the
        research code cuts off), and sentences for the report.
    """
    text, image = config.text_config, tokenizer.image_token_id
    before = text.vocab_size
    text.vocab_size = grown_vocabulary(before, tokenizer.num_ids)
    for name in (EMBEDDINGS, HEAD):
        if name in tensors:
            tensors[name] = with_mean_rows(tensors[name], text.vocab_size)
    config.image_token_id = image
    text.pad_token_id = tokenizer.tokenizer.pad_token_id
    suppressed = sorted({image, *range(before, text.vocab_size), *range(tokenizer.num_ids, text.vocab_size)})
    said = [
        f"vocabulary: {before} rows became {text.vocab_size}, `<image>` is {image}; the new rows are the mean of the "
        "others and are never generated"
        if text.vocab_size > before
        else f"vocabulary: `<image>` is {image}, which is never generated"
    ]
    if tokenizer.num_source_ids > before:
        said.append(
            f"vocabulary: {tokenizer.num_source_ids - before} tokens of the source's tokenizer had no row in its "
            "weights"
        )
    differing = boundary_mismatches(tokenizer.tokenizer)
    if differing:
        said.append(f"tokenization: ids differ from the research code's in prompts of the form: {'; '.join(differing)}")
    return suppressed, said

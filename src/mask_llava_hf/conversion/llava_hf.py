# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Reads checkpoints of Transformers' own LLaVA (as `llava-hf/llava-1.5-7b-hf`): the same weights, our config."""

from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..processing.chat_templates import plain, vicuna_v1
from .checkpoint_files import open_checkpoint
from .converted_model import ChatTemplate, Composition, ConvertedModel, composition_fields, end_tokens, with_image_token
from .key_renames import LLAVA_HF
from .research_tokenizer import load_source_tokenizer
from .source_files import read_config, read_json
from .tower_files import image_processor_for, read_preprocessor
from .weight_tables import checked_weights, rename_weights


def read_llava_hf(folder: Path, composition: Composition, chat_template: ChatTemplate | None = None) -> ConvertedModel:
    """Reads everything but the numbers.

    Args:
        composition: see `composition_fields`.
        chat_template: in place of the checkpoint's own, if it has one; else "vicuna-v1".

    Raises:
        ValueError: files that are missing or broken, or a checkpoint that Mask-LLaVA cannot express.
    """
    said = LlavaConfig.from_dict(read_config(folder))
    tower, has_cls = said.vision_config, said.vision_feature_select_strategy == "full"
    config = MaskLlavaConfig(
        vision_config=tower,
        text_config=said.text_config,
        image_token_index=said.image_token_id,
        tie_word_embeddings=said.tie_word_embeddings,
        vision_feature_layer=said.vision_feature_layer,
        projector_hidden_act=said.projector_hidden_act,
        multimodal_projector_bias=said.multimodal_projector_bias,
        source_vocab_size=said.text_config.vocab_size,
        **composition_fields(composition, tower, has_cls, {}),
    )
    weights = rename_weights(open_checkpoint(folder), LLAVA_HF)
    tensors = checked_weights(weights, config)
    tokenizer = load_source_tokenizer(folder)
    if tokenizer.image_token_id != said.image_token_id:
        raise ValueError(
            f"The config of `{folder.name}` says that images are token {said.image_token_id}, but its tokenizer has "
            f"`<image>` as {tokenizer.image_token_id}: placeholders would be read as text. Are both of one checkpoint?"
        )
    suppressed, about_vocabulary = with_image_token(config, tensors, tokenizer)
    # A padding token of its own was added to the vocabulary too
    pad = tokenizer.tokenizer.pad_token_id
    if pad is not None and pad > said.image_token_id:
        suppressed = sorted({*suppressed, pad})

    preprocessor = read_preprocessor(folder)
    pads = preprocessor.get("do_pad", True)
    image_processor, about_pixels = image_processor_for(tower, preprocessor, pads)
    if "do_pad" not in preprocessor:
        about_pixels.append(
            "image processor: pads to a square, as LLaVA-1.5 was trained with; the source's crops (set `do_pad` to "
            "False for that)"
        )
    own_template = _chat_template(folder) if chat_template is None else None
    notes = [*tokenizer.notes, *about_vocabulary, *about_pixels]
    if chat_template is None and own_template is None:
        notes.append("chat template: vicuna-v1, as the checkpoint has none")
    return ConvertedModel(
        config=config,
        tensors=tensors,
        dropped=weights.dropped,
        tokenizer=tokenizer.tokenizer,
        image_processor=image_processor,
        chat_template=own_template or (plain() if chat_template == "plain" else vicuna_v1()),
        suppressed_ids=suppressed,
        eos_token_id=end_tokens(folder, tokenizer.tokenizer),
        notes=notes,
        sources=(folder,),
        slow_tokenizer=tokenizer.slow_tokenizer,
    )


def _chat_template(folder: Path) -> str | None:
    """The checkpoint's chat template, from whichever file it is in."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    files = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
    found: list[Any] = [read_json(folder / name).get("chat_template") for name in files]
    return next((template for template in found if isinstance(template, str)), None)

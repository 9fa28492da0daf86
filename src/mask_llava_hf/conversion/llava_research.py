# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Reads checkpoints in the layout of LLaVA's research code (github.com/haotian-liu/LLaVA).

What a config leaves out means what the research code takes it to mean; each such default is named where it is used.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..processing.chat_templates import plain, vicuna_v1
from .checkpoint_files import LazyTensor, open_checkpoint, open_weights
from .converted_model import (
    EMBEDDINGS,
    HEAD,
    ChatTemplate,
    Composition,
    ConvertedModel,
    composition_fields,
    end_tokens,
    with_image_token,
)
from .key_renames import FROZEN_TOWER, LLAVA_RESEARCH, MASK_LLAVA_RESEARCH
from .lora_merging import merge_adapter
from .research_tokenizer import IMAGE_TOKEN, load_source_tokenizer
from .source_files import local_folder, read_config, read_json
from .tower_files import VisionTower, image_processor_for, read_tower
from .vocabulary import with_mean_rows
from .weight_tables import RenamedWeights, checked_weights, rename_weights


# Where our export keeps what LLaVA's own fields cannot say.
MASK_LLAVA_SETTINGS = "mask_llava"

# Language models by the `model_type` of the research code; the first is that of its oldest files.
TEXT_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}

TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
)
_IN_STATE_DICT = "model.vision_tower."
_TOWER_MEND = "Point to a folder with the tower: `--vision-tower FOLDER`."

ResearchKind = Literal["full", "projector", "adapter"]


@dataclass(frozen=True)
class ResearchSource:
    """A checkpoint of the research code.

    Attributes:
        kind: "full"; "projector": stage 1, which leaves `mm_projector.bin`; "adapter": a LoRA finetuning.
        is_mask_llava: whether it is a Mask-LLaVA rather than a LLaVA.
    """

    folder: Path
    kind: ResearchKind
    is_mask_llava: bool = False


def read_llava_research(
    source: ResearchSource,
    composition: Composition,
    base: str | None = None,
    vision_tower: str | None = None,
    chat_template: ChatTemplate | None = None,
) -> ConvertedModel:
    """Reads everything but the numbers.

    Args:
        composition: see `composition_fields`.
        base: the language model that `kind` "projector" or "adapter" was trained on: folder or Hub id. Default: what
            an adapter names.
        vision_tower: the tower in place of the one the config names.
        chat_template: default: "plain" for a projector, which has seen nothing else; "vicuna-v1" otherwise.

    Raises:
        ValueError: files that are missing or broken, or a checkpoint that Mask-LLaVA cannot express.
    """
    said = read_config(source.folder)
    _check_expressible(said, source.folder.name)
    language_folder = _language_model_folder(source, base)
    tower = _find_tower(source.folder, said, vision_tower)
    text = _text_config(said)
    weights = _rename(_open(source, language_folder), said, tower, source.is_mask_llava)
    if source.kind != "full" and HEAD in weights.tensors:
        # Stage 1 leaves the head alone, whose rows for new tokens the research code sets to the mean of the others
        weights.tensors[HEAD] = with_mean_rows(weights.tensors[HEAD], text.vocab_size)
    _drop_tied_head(weights, said)

    has_cls = said.get("mm_vision_select_feature", "patch") == "cls_patch"
    config = MaskLlavaConfig(
        vision_config=tower.config,
        text_config=text,
        tie_word_embeddings=said.get("tie_word_embeddings", False),
        vision_feature_layer=_feature_layer(said, tower),
        projector_type=said.get("mm_projector_type", "linear"),
        source_vocab_size=text.vocab_size,
        **composition_fields(composition, tower.config, has_cls, said.get(MASK_LLAVA_SETTINGS, {})),
    )
    _check_widths(said, config, source.folder.name)
    tensors = checked_weights(weights, config)
    tokenizer = load_source_tokenizer(language_folder, _new_tokens(said), said.get("tokenizer_model_max_length"))
    suppressed, about_vocabulary = with_image_token(config, tensors, tokenizer)

    pads = said.get("image_aspect_ratio") == "pad"
    image_processor, about_pixels = image_processor_for(tower.config, tower.preprocessor, pads)
    if not pads:
        about_pixels.append("image processor: crops to the middle, as the config does not say to pad")
    template = chat_template or ("plain" if source.kind == "projector" else "vicuna-v1")
    about_chats = [f"chat template: {template}, as research checkpoints save none"] if chat_template is None else []
    image = f"<im_start>{IMAGE_TOKEN}<im_end>" if said.get("mm_use_im_start_end") else IMAGE_TOKEN
    return ConvertedModel(
        config=config,
        tensors=tensors,
        dropped=weights.dropped,
        tokenizer=tokenizer.tokenizer,
        image_processor=image_processor,
        chat_template=plain(image) if template == "plain" else vicuna_v1(image=image),
        suppressed_ids=suppressed,
        eos_token_id=end_tokens(language_folder, tokenizer.tokenizer),
        notes=[*tokenizer.notes, *about_vocabulary, *about_pixels, *about_chats],
        sources=(source.folder, language_folder, tower.folder),
        slow_tokenizer=tokenizer.slow_tokenizer,
    )


def _check_expressible(config: Mapping[str, Any], name: str) -> None:
    kind, ratio = config.get("model_type"), config.get("image_aspect_ratio")
    if kind not in TEXT_MODELS:
        raise ValueError(
            f'`{name}` has model_type "{kind}", expected one of {list(TEXT_MODELS)}: its language model is none that '
            "this conversion knows the weights of."
        )
    if ratio not in (None, "pad", "square"):
        raise ValueError(
            f'`{name}` has `image_aspect_ratio`="{ratio}": it cuts images into several views, as LLaVA-NeXT does. '
            "Mask-LLaVA sees an image once; start from a LLaVA-1.5."
        )
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise ValueError(f'`{name}` has `mm_vision_select_feature`="{feature}", expected "patch" or "cls_patch".')


def _language_model_folder(source: ResearchSource, base: str | None) -> Path:
    if source.kind == "full":
        if base is not None:
            raise ValueError(
                f"`{source.folder.name}` holds a whole model, so `--base {base}` would be ignored. Leave it out."
            )
        return source.folder
    part = "a projector" if source.kind == "projector" else "an adapter"
    mend = "Point to the language model that it was trained on: `--base FOLDER`."
    if base is None and source.kind == "adapter":
        base = read_json(source.folder / "adapter_config.json").get("base_model_name_or_path")
    if base is None:
        raise ValueError(f"`{source.folder.name}` holds only {part}, and no base model is given. {mend}")
    return local_folder(base, "base model", mend)


def _open(source: ResearchSource, language_folder: Path) -> dict[str, LazyTensor]:
    tensors = open_checkpoint(language_folder)
    if source.kind == "projector":
        return {**tensors, **open_weights(source.folder / "mm_projector.bin")}
    return merge_adapter(source.folder, tensors) if source.kind == "adapter" else tensors


def _find_tower(folder: Path, config: Mapping[str, Any], given: str | None) -> VisionTower:
    named = config.get("mm_vision_tower", config.get("vision_tower"))
    if given is None and named is None:
        raise ValueError(f"`config.json` of `{folder.name}` names no vision tower (`mm_vision_tower`). {_TOWER_MEND}")
    if given is None:
        # A relative path is meant from the checkpoint; the research code takes it from where it was started
        beside = [parent / named for parent in (folder, folder.resolve().parent) if (parent / named).is_dir()]
        given = str(beside[0]) if beside else named
    return read_tower(local_folder(given, "vision tower", _TOWER_MEND))


def _rename(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], tower: VisionTower, is_mask_llava: bool
) -> RenamedWeights:
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(_IN_STATE_DICT)}
    counts = bool(inside) and bool(config.get("unfreeze_mm_vision_tower", False))
    table = MASK_LLAVA_RESEARCH if is_mask_llava else LLAVA_RESEARCH
    weights = rename_weights({name: t for name, t in tensors.items() if counts or name not in inside}, table)
    if not counts:
        weights.dropped.update(dict.fromkeys((tensor.name for tensor in inside.values()), FROZEN_TOWER.reason))
        weights.update(tower.weights())
    return weights


def _text_config(config: Mapping[str, Any]) -> PretrainedConfig:
    fields = {name: config[name] for name in TEXT_FIELDS if name in config}  # null says something: no sliding window
    scaling = fields.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(
            f'`rope_scaling` is of type "{kind}", expected one of {sorted(ROPE_INIT_FUNCTIONS)}: positions would be '
            "computed in a way that this version of Transformers does not know."
        )
    tied = config.get("tie_word_embeddings", False)
    return AutoConfig.for_model(TEXT_MODELS[config["model_type"]], **fields, tie_word_embeddings=tied)


def _drop_tied_head(weights: RenamedWeights, config: Mapping[str, Any]) -> None:
    """Leaves out the head of a model whose head is its embeddings."""
    head, embeddings = weights.tensors.get(HEAD), weights.tensors.get(EMBEDDINGS)
    if not config.get("tie_word_embeddings", False) or head is None or embeddings is None:
        return
    if head.shape != embeddings.shape or not torch.equal(head.load(), embeddings.load()):
        raise ValueError(
            f"The config says that head and embeddings are one (`tie_word_embeddings`), but {head.name} differs from "
            f"{embeddings.name}, and one of them would be lost. Set it to false in `config.json` if the head counts, "
            "or remove the head from the weights."
        )
    del weights.tensors[HEAD]
    weights.dropped[head.name] = "the same numbers as the embeddings, which the config ties it to"


def _new_tokens(config: Mapping[str, Any]) -> list[str]:
    """Tokens the research code adds on loading, in its order."""
    tokens = ["<im_patch>"] if config.get("mm_use_im_patch_token") else []
    return tokens + (["<im_start>", "<im_end>"] if config.get("mm_use_im_start_end") else [])


def _feature_layer(config: Mapping[str, Any], tower: VisionTower) -> int:
    layer = config.get("mm_vision_select_layer")
    states = tower.config.num_hidden_layers + 1
    if not isinstance(layer, int) or not -states <= layer < states:
        raise ValueError(
            f"`mm_vision_select_layer` is {layer!r}, expected an integer in -{states}..{states - 1}: the index of one "
            f"of the tower's {states} hidden states."
        )
    return layer


def _check_widths(config: Mapping[str, Any], own: MaskLlavaConfig, name: str) -> None:
    width = config.get("mm_hidden_size", own.vision_config.hidden_size)
    if width != own.vision_config.hidden_size:
        raise ValueError(
            f"`{name}` was trained on a vision tower of width {width} (`mm_hidden_size`), but the tower found has "
            f"{own.vision_config.hidden_size}. Is it the one that `mm_vision_tower` means? {_TOWER_MEND}"
        )


def settings_of(config: MaskLlavaConfig) -> dict[str, Any]:
    """The fields of our config that LLaVA's cannot say, for `MASK_LLAVA_SETTINGS`; JSON-able."""
    names = (
        "use_cls_token",
        "patch_grid_size",
        "max_object_tokens",
        "norm_scaling",
        "patch_statistics",
        "object_embedding",
        "mask_inversion",
    )
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))

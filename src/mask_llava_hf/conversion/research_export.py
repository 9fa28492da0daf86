# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Writes a checkpoint of ours in the layout of LLaVA's research code, which `llava_research` reads back the same."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..modeling.token_layout import TokenLayout
from ..processing.processing_mask_llava import MaskLlavaProcessor
from .checkpoint_files import LazyTensor, list_names, open_checkpoint
from .checkpoint_writer import MAX_SHARD_BYTES, check_places, check_target, new_folder, write_weights
from .conversion_report import ConversionReport, describe_tokens
from .converted_model import EMBEDDINGS, HEAD, end_tokens
from .key_renames import to_clip, to_llava_research
from .llava_research import MASK_LLAVA_SETTINGS, TEXT_FIELDS, TEXT_MODELS, settings_of
from .research_tokenizer import SLOW_TOKENIZER_FOLDER, copy_slow_tokenizer
from .source_files import local_folder
from .tower_files import PIXEL_SETTINGS
from .weight_tables import RenamedWeights, checked_weights


TOWER_FOLDER = "vision_tower"

# In the research code; its oldest name of "llama" was another.
_RESEARCH_MODELS = {ours: theirs for theirs, ours in TEXT_MODELS.items()}
_ARCHITECTURES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}


def export_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConversionReport:
    """Writes one of our checkpoints as LLaVA's research code saves its own.

    LLaVA's code loads the result; where it has CLS tokens or objects, their settings stand in `config.json` under
    `mask_llava`, which that code does not read.

    Args:
        source: a folder or Hub id.
        target: the folder to write.
        base: a folder or Hub id with the language model's slow tokenizer (`tokenizer.model`), where the source does not
            have it. Checkpoints made by `convert_checkpoint` do.
        vision_tower: the id or path by which the research code is to find a tower. Its config and image processor
            count; its weights are replaced by ours, which then lie among the model's. Default: the tower is written
            into the folder `vision_tower` inside the target.
        dtype: of the weights written; default: the source's.
        overwrite: whether a checkpoint that is there may be replaced.
        max_shard_bytes: the most a weight file holds.

    Raises:
        ValueError: a source that is broken, or a model that the research code cannot express.
    """
    started = time.perf_counter()
    target = Path(target)
    check_target(target, overwrite)
    check_places([source, base, vision_tower], target)
    folder_of_source = local_folder(source, "source", "Name the folder of a Mask-LLaVA checkpoint.")
    config = MaskLlavaConfig.from_pretrained(folder_of_source)
    processor = MaskLlavaProcessor.from_pretrained(folder_of_source)
    _check_expressible(config)
    slow_tokenizer = _slow_tokenizer(folder_of_source, base)
    tensors = checked_weights(RenamedWeights(open_checkpoint(folder_of_source)), config)
    dtype = dtype or tensors[EMBEDDINGS].dtype
    num_rows = _source_rows(config, processor)
    for name in (EMBEDDINGS, HEAD):
        if name in tensors:
            tensors[name] = _first_rows(tensors[name], num_rows)

    named = {to_llava_research(name, config.projector_type): tensor for name, tensor in tensors.items()}
    in_tower = {clip: tensor for name, tensor in tensors.items() if (clip := to_clip(name)) is not None}
    own_tower = vision_tower is None
    if own_tower:
        named = {name: tensor for name, tensor in named.items() if not name.startswith("model.vision_tower.")}
    said = _config(config, processor, num_rows, vision_tower, dtype)
    report = ConversionReport.of(
        f"Mask-LLaVA, our own layout, to {'Mask-LLaVA' if MASK_LLAVA_SETTINGS in said else 'LLaVA'}, research layout",
        target.name,
        {**named, **(in_tower if own_tower else {})},
        dtype,
        tokens_per_image=describe_tokens(TokenLayout.from_config(config)),
        notes=_notes(config, num_rows, said),
    )
    with new_folder(target, overwrite) as folder:
        write_weights(folder, named, dtype, max_shard_bytes)
        _write_json(folder / "config.json", said)
        ids = {name: said[name] for name in ("bos_token_id", "pad_token_id")}
        ids["eos_token_id"] = end_tokens(folder_of_source, processor.tokenizer)
        _write_json(folder / "generation_config.json", ids)
        copy_slow_tokenizer(slow_tokenizer, folder)
        if own_tower:
            _write_tower(folder / TOWER_FOLDER, config, processor, in_tower, dtype, max_shard_bytes)
        report.save(folder)
    report.seconds = time.perf_counter() - started
    return report


def _check_expressible(config: MaskLlavaConfig) -> None:
    problems = {
        f'its language model is "{config.text_config.model_type}"': config.text_config.model_type not in _ARCHITECTURES,
        f"it concatenates the layers {config.vision_feature_layer}": not isinstance(config.vision_feature_layer, int),
        "its projector has no bias": not config.multimodal_projector_bias and config.num_projector_layers > 0,
        f'its projector has "{config.projector_hidden_act}" between layers': config.projector_hidden_act != "gelu",
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise ValueError(
            f"LLaVA's research code cannot express this model: {'; '.join(found)}. It knows "
            f"{' and '.join(_ARCHITECTURES)}, one feature layer, and projectors with bias and GELU."
        )


def _slow_tokenizer(source: Path, base: str | None) -> Path:
    mend = "Point to the language model it was made from: `--base FOLDER`."
    folder = source / SLOW_TOKENIZER_FOLDER if base is None else local_folder(base, "base model", mend)
    if not (folder / "tokenizer.model").is_file():
        raise ValueError(
            f"The research code reads text with the slow tokenizer, and there is no `tokenizer.model` in "
            f"`{folder.name}`. {mend}"
        )
    return folder


def _source_rows(config: MaskLlavaConfig, processor: MaskLlavaProcessor) -> int:
    """Rows of the vocabulary without those that were added for `<image>`."""
    vocabulary, image = processor.tokenizer.get_vocab(), config.image_token_id
    recorded = getattr(config, "source_vocab_size", None)
    if recorded is None:
        return 1 + max(id for id in vocabulary.values() if id != image)
    later = [token for token, id in vocabulary.items() if id >= recorded and id > image]
    if later:
        raise ValueError(
            f"{len(later)} tokens were added after the conversion ({list_names(later)}), and the slow tokenizer of the "
            "research code does not know them: their rows would be cut off. Give one that has them as `--base`, and "
            f"remove `source_vocab_size` ({recorded}) from `config.json`."
        )
    return recorded


def _first_rows(tensor: LazyTensor, num_rows: int) -> LazyTensor:
    return tensor.map(lambda loaded: loaded[:num_rows], shape=(num_rows, *tensor.shape[1:]))


def _config(
    config: MaskLlavaConfig, processor: MaskLlavaProcessor, num_rows: int, named_tower: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    text = config.text_config.to_dict()
    rope = dict(text.get("rope_parameters") or {})
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    rope.pop("type", None)
    vocabulary = processor.tokenizer.get_vocab()
    tokens = processor.tokenizer
    said = {
        **{name: text[name] for name in TEXT_FIELDS if name in text},
        "architectures": [_ARCHITECTURES[config.text_config.model_type]],
        "model_type": _RESEARCH_MODELS[config.text_config.model_type],
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "vocab_size": num_rows,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "image_aspect_ratio": "pad" if processor.image_processor.do_pad else None,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": config.projector_type,
        "mm_use_im_patch_token": "<im_patch>" in vocabulary,
        "mm_use_im_start_end": "<im_start>" in vocabulary,
        "mm_vision_select_feature": "cls_patch" if config.use_cls_token else "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": named_tower or TOWER_FOLDER,
        "tokenizer_model_max_length": tokens.model_max_length,
        "tokenizer_padding_side": "right",
        "unfreeze_mm_vision_tower": named_tower is not None,  # whether its weights lie among the model's
        "use_mm_proj": True,
    }
    if not _is_plain_llava(config):
        said[MASK_LLAVA_SETTINGS] = settings_of(config)
    return said


def _is_plain_llava(config: MaskLlavaConfig) -> bool:
    full_grid = config.patch_grid_size == config.vision_config.image_size // config.vision_config.patch_size
    scales = config.use_cls_token and config.norm_scaling != "none"
    return full_grid and config.max_object_tokens == 0 and not scales


def _notes(config: MaskLlavaConfig, num_rows: int, said: dict[str, Any]) -> list[str]:
    notes = []
    if num_rows < config.text_config.vocab_size:
        notes.append(f"vocabulary: {config.text_config.vocab_size} rows became {num_rows}, without those for `<image>`")
    if MASK_LLAVA_SETTINGS in said:
        notes.append("LLaVA's own code reads the weights but has neither pooling nor objects")
    if not said["unfreeze_mm_vision_tower"]:
        notes.append(
            f"vision tower: in `{TOWER_FOLDER}`; the research code looks for it from where it is started, so start it "
            "inside the checkpoint, or write the whole path into `mm_vision_tower`"
        )
    return notes


def _write_tower(
    folder: Path,
    config: MaskLlavaConfig,
    processor: MaskLlavaProcessor,
    tensors: dict[str, LazyTensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    folder.mkdir()
    write_weights(folder, tensors, dtype, max_shard_bytes)
    values = config.vision_config.to_dict()
    names = ("architectures", "dtype", "transformers_version")
    vision = {name: value for name, value in values.items() if name not in names}
    _write_json(
        folder / "config.json",
        {**vision, "architectures": ["CLIPVisionModel"], "torch_dtype": str(dtype).removeprefix("torch.")},
    )
    settings = processor.image_processor.to_dict()
    side = settings["size"].get("shortest_edge", settings["size"].get("height"))
    pixels = {name: settings[name] for name in PIXEL_SETTINGS if settings.get(name) is not None}
    _write_json(
        folder / "preprocessor_config.json",
        {**pixels, "size": {"shortest_edge": side}, "image_processor_type": "CLIPImageProcessor"},
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, default=dict)
    path.write_text(text + "\n", encoding="utf-8")

# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Finds and reads the vision tower of a checkpoint, and tells what embeddings made with it depend on."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from safetensors import safe_open
from transformers import AutoConfig, CLIPVisionModel, PreTrainedModel
from transformers.utils import cached_file

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from .part_sources import PartSource


# What of an image processor decides which pixels the tower sees where.
_PIXEL_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_pad",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def find_tower(source: PartSource) -> tuple[PartSource, MaskLlavaConfig | None]:
    """Where the tower's weights are, and the config of the Mask-LLaVA they belong to (None: a bare CLIP tower).

    A PEFT adapter (a folder with `adapter_config.json` and no `config.json`) leads to its base model.

    Raises:
        ValueError: no model there, one of another kind, or an adapter that changes the tower.
    """
    adapter = find_file(source, "adapter_config.json")
    if find_file(source, "config.json") is None:
        if adapter is None:
            raise ValueError(
                f"{source.location!r} holds no `config.json`, so there is no vision tower to make object embeddings "
                'with. Call `processor.share_vision_tower(model)`, set `object_settings["vision_tower"]`, or load the '
                "processor from the model's own checkpoint."
            )
        with open(adapter, encoding="utf-8") as file:
            base = json.load(file)
        _refuse_adapted_tower(source)
        return find_tower(PartSource.of(base["base_model_name_or_path"], base.get("revision")))
    config = AutoConfig.from_pretrained(source.location, revision=source.revision)
    if config.model_type == MaskLlavaConfig.model_type:
        return source, config
    if config.model_type in ("clip", "clip_vision_model"):
        return source, None
    raise ValueError(
        f'{source.location!r} is a "{config.model_type}" checkpoint; a Mask-LLaVA checkpoint or a CLIP vision tower is '
        'needed for object embeddings. Name one in `object_settings["vision_tower"]`.'
    )


def read_tower(source: PartSource, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """Loads a tower that `find_tower` found: of a Mask-LLaVA checkpoint only the shards that hold it, strictly.

    Raises:
        ValueError: weights of the tower are missing, or there are others than its config knows.
    """
    config = AutoConfig.from_pretrained(source.location, revision=source.revision)
    if config.model_type == MaskLlavaConfig.model_type:
        # As `from_pretrained` does: the config's dtype comes before that of the stored weights
        tower = _read_tower_of(source, config.vision_config, dtype or config.dtype)
    else:
        tower = CLIPVisionModel.from_pretrained(source.location, revision=source.revision, dtype=dtype or "auto")
    return tower.to(device).eval().requires_grad_(False)


def read_model_config(source: PartSource) -> MaskLlavaConfig | None:
    """The Mask-LLaVA config in a checkpoint, if there is one."""
    path = find_file(source, "config.json")
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    return MaskLlavaConfig.from_dict(values) if values.get("model_type") == MaskLlavaConfig.model_type else None


def find_file(source: PartSource, name: str) -> str | None:
    if source.is_local:
        path = os.path.join(source.location, name)
        return path if os.path.isfile(path) else None
    return cached_file(source.location, name, revision=source.revision, _raise_exceptions_for_missing_entries=False)


def fingerprint_settings(
    config: MaskLlavaConfig | None, image_processor: Any, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What an embedding depends on beside the tower's weights: the method, and how pixels reach the tower.

    Args:
        config: None where it is not known.
        overrides: a call's arguments to the image processor.
    """
    processing = {**image_processor.to_dict(), **(overrides or {})}
    pixels = json.dumps({name: processing.get(name) for name in _PIXEL_SETTINGS}, default=dict, sort_keys=True)
    if config is None:
        return {"pixels": json.loads(pixels)}
    settings: dict[str, Any] = {"object_embedding": config.object_embedding, "pixels": json.loads(pixels)}
    if config.object_embedding == "mask_pooling":
        return {**settings, "vision_feature_layer": config.vision_feature_layer}
    return {**settings, **(config.mask_inversion or {})}


def fingerprint_weights(tower: torch.nn.Module) -> str:
    """A short hash of a tower's weights, the same in whatever precision they are loaded.

    It reads the signs of the first 4096 numbers of every tensor: rounding keeps signs, while training, which moves
    weights across zero all the time, does not. A few milliseconds for a ViT-L on a CPU.
    """
    digest, signs = hashlib.sha256(), []
    for name, module in sorted(tower.named_modules()):
        with align_module_device(module):
            for part, parameter in sorted(module.named_parameters(recurse=False)):
                digest.update(f"{name}.{part}{tuple(parameter.shape)}".encode())
                signs.append(torch.signbit(parameter.detach().flatten()[:4096]))
    digest.update(np.packbits(torch.cat(signs).cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def _refuse_adapted_tower(source: PartSource) -> None:
    weights = find_file(source, "adapter_model.safetensors")
    if weights is None:
        return
    with safe_open(weights, framework="pt") as file:
        adapted = [key for key in file.keys() if "vision_tower." in key]  # noqa: SIM118 - a safetensors file is no mapping
    if adapted:
        raise ValueError(
            f"The adapter {source.location!r} changes the vision tower ({len(adapted)} weights, such as "
            f"{adapted[0]!r}), and its base model's tower would make embeddings this model was not trained with. Share "
            "the loaded model's tower (`processor.share_vision_tower(model)`), or merge the adapter and save the model."
        )


def _read_tower_of(source: PartSource, config: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    files = {"model.safetensors"}
    # In this order, as `from_pretrained` does: an index can be left over from an earlier, sharded save
    if find_file(source, "model.safetensors") is None:
        index = find_file(source, "model.safetensors.index.json")
        if index is not None:
            with open(index, encoding="utf-8") as file:
                files = {name for key, name in json.load(file)["weight_map"].items() if _tower_key(key)}
    state: dict[str, torch.Tensor] = {}
    for name in sorted(files):
        path = find_file(source, name)
        if path is None:
            raise ValueError(f"{source.location!r} has no `{name}`, where its vision tower's weights should be.")
        with safe_open(path, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if (tower_key := _tower_key(key)) is not None:
                    state[tower_key] = shard.get_tensor(key)
    with torch.device("meta"):
        expected = set(CLIPVisionModel(config).state_dict())
    missing, unexpected = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or unexpected:
        raise ValueError(
            f"The vision tower in {source.location!r} does not fit its config: {len(missing)} weights are missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}. Embeddings from it would be noise."
        )
    dtype = dtype or next(iter(state.values())).dtype
    # Through `from_pretrained`, which builds without random initial values: loading must not move a training's dice
    return CLIPVisionModel.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def _tower_key(key: str) -> str | None:
    """`key` without what precedes the tower's own names, or None for a weight outside the tower."""
    _, found, rest = key.rpartition("vision_tower.")
    # Transformers keeps CLIP's older layout in files, with one more level than its modules have
    return rest.removeprefix("vision_model.") if found else None

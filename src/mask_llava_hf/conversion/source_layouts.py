# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Tells what kind of checkpoint a source is, from what its files hold and never from what it is called."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from .checkpoint_files import has_weights, open_weights
from .llava_research import MASK_LLAVA_SETTINGS, ResearchKind
from .lora_merging import ADAPTER_FILES
from .source_files import local_folder, read_config


LayoutName = Literal["llava", "mask-llava", "llava-hf", "sam", "transformers"]

# The first weight of the segment-anything package's image encoder
_SAM_SIGN = "image_encoder.patch_embed.proj.weight"


@dataclass(frozen=True)
class SourceLayout:
    """What a source is.

    Attributes:
        name: "llava" and "mask-llava": research code; "llava-hf": Transformers' LLaVA; "sam": the segment-anything
            package; "transformers": a checkpoint of ours.
        path: folder, or file of "sam".
        reason: how it was told.
        kind: of a research checkpoint.
    """

    name: LayoutName
    path: Path
    reason: str
    kind: ResearchKind = "full"


def recognise(source: str | os.PathLike[str], asked: LayoutName | None = None) -> SourceLayout:
    """Looks at a source's files.

    Args:
        source: a folder, a file of segment-anything, or a Hub id.
        asked: what the user says it is. Only that can turn a LLaVA into a Mask-LLaVA of the same layout, or back.

    Raises:
        ValueError: nothing that can be converted, or not what was asked for; the message says what was found.
    """
    found = _look(source)
    if asked in (None, found.name):
        return found
    if {asked, found.name} == {"llava", "mask-llava"}:
        return replace(found, name=asked, reason=f"as was asked for; {found.reason}")
    raise ValueError(
        f"`{Path(source).name}` was said to be in the layout {asked!r}, but it is in the layout {found.name!r}: "
        f"{found.reason}. Leave the layout out (`--from auto`)."
    )


def _look(source: str | os.PathLike[str]) -> SourceLayout:
    if Path(source).is_file():
        return _recognise_file(Path(source))
    folder = local_folder(source, "source", "Name the folder of a checkpoint, a Hub id, or a `.pth` file of SAM.")
    config = read_config(folder)
    kind = config.get("model_type")
    if kind == MaskLlavaConfig.model_type:
        return SourceLayout("transformers", folder, f'its config has model_type "{kind}"')
    if kind == "llava" and "text_config" in config and "vision_config" in config:
        return SourceLayout("llava-hf", folder, "its config holds a `text_config` and a `vision_config`")
    if any(name.startswith("mm_") for name in config):
        own = MASK_LLAVA_SETTINGS in config
        said = f"its config has `mm_...` fields{f' and `{MASK_LLAVA_SETTINGS}`' if own else ''}"
        what, part = _research_kind(folder)
        return SourceLayout("mask-llava" if own else "llava", folder, f"{said}, with {part}", what)
    raise ValueError(
        f'`{folder.name}` has model_type "{kind}" and neither the `mm_...` fields of LLaVA\'s research code nor the '
        "`text_config` and `vision_config` of Transformers' LLaVA, so it holds no vision-language model that can be "
        "converted. A language model alone goes to `--base`, a vision tower to `--vision-tower`."
    )


def _recognise_file(path: Path) -> SourceLayout:
    names = open_weights(path)
    if _SAM_SIGN not in names:
        raise ValueError(
            f"`{path.name}` holds {len(names)} weights, but not {_SAM_SIGN}, so it is no checkpoint of the "
            "segment-anything package; other checkpoints are folders with a `config.json`. Name its folder."
        )
    return SourceLayout("sam", path, f"it holds {_SAM_SIGN}")


def _research_kind(folder: Path) -> tuple[ResearchKind, str]:
    if any((folder / name).is_file() for name in ("adapter_config.json", *ADAPTER_FILES)):
        return "adapter", "a LoRA adapter"
    if has_weights(folder):
        return "full", "the weights of a whole model"
    if (folder / "mm_projector.bin").is_file():
        return "projector", "a projector alone (`mm_projector.bin`)"
    raise ValueError(
        f"`{folder.name}` has the config of a LLaVA but no weights: neither a model's, nor `mm_projector.bin`, nor an "
        "adapter. Download them and convert again."
    )

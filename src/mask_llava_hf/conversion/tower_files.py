# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""A CLIP vision tower in its own checkpoint, and the image processor that belongs to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlavaImageProcessor

from .checkpoint_files import open_checkpoint
from .key_renames import CLIP
from .source_files import read_config, read_json
from .weight_tables import RenamedWeights, rename_weights


# What LLaVA's image processor has in common with CLIP's.
PIXEL_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)


@dataclass(frozen=True)
class VisionTower:
    """A tower's checkpoint.

    Attributes:
        preprocessor: its image processor's settings; empty where it has none.
    """

    folder: Path
    config: CLIPVisionConfig
    preprocessor: Mapping[str, Any]

    def weights(self) -> RenamedWeights:
        """Its weights under our names."""
        return rename_weights(open_checkpoint(self.folder), CLIP)


def read_tower(folder: Path) -> VisionTower:
    """The tower in a folder of `CLIPVisionModel` or of a whole `CLIPModel`; its weights are opened later.

    Raises:
        ValueError: a model of another kind.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(
            f'The vision tower `{folder.name}` has model_type "{kind}", expected "clip" or "clip_vision_model": '
            "Mask-LLaVA needs a tower with a CLS token. Name a CLIP tower."
        )
    vision = CLIPVisionConfig.from_pretrained(folder)
    vision.architectures = None  # of the file it came from, not of a part of a model
    return VisionTower(folder=folder, config=vision, preprocessor=read_preprocessor(folder))


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """The settings of a checkpoint's image processor, from whichever file they are in; empty without one."""
    own = read_json(folder / "preprocessor_config.json")
    return own or read_json(folder / "processor_config.json").get("image_processor", {})


def image_processor_for(
    config: CLIPVisionConfig, preprocessor: Mapping[str, Any], pads: bool
) -> tuple[LlavaImageProcessor, list[str]]:
    """LLaVA's image processor with a tower's numbers, and what was assumed.

    Args:
        preprocessor: the settings of the tower's own; empty: OpenAI's CLIP.
        pads: whether images are padded to a square with the mean colour (LLaVA-1.5), or cropped to one.

    Raises:
        ValueError: pixels of another size than the tower's.
    """
    side = config.image_size
    settings = {name: preprocessor[name] for name in PIXEL_SETTINGS if name in preprocessor}
    assumptions = [] if settings else [f"image processor: CLIP's own numbers at {side} x {side}, as none is saved"]
    size, crop = settings.get("size", side), settings.get("crop_size", side)  # a number alone in older files
    height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
    shortest = size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))
    if (height, width) != (side, side):
        raise ValueError(
            f"The image processor gives {height} x {width} pixels, but the vision tower takes {side} x {side}: its "
            "position embeddings would not fit. Are the two from the same tower?"
        )
    settings["crop_size"] = {"height": height, "width": width}
    # Of a square the two are the same; the explicit form tells other programs how large an image becomes
    settings["size"] = {"height": shortest, "width": shortest} if pads else {"shortest_edge": shortest}
    return LlavaImageProcessor(do_pad=pads, **settings), assumptions

# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The settings a processor saves about objects: where its parts come from, and how objects are made and counted."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..modeling.token_layout import TokenLayout, check_integer


def _one_of(*choices: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"`object_settings[{name!r}]` must be one of {list(choices)}, got {value!r}.")

    return check


def _integer(minimum: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        check_integer(f"object_settings[{name!r}]", value, minimum)

    return check


def _source(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(
            f"`object_settings[{name!r}]` must be a Hub id (optionally `id@revision`), a path, `./folder` inside the "
            f"checkpoint, or None, got {value!r}. A loaded model cannot be saved as JSON; name where it comes from."
        )
    if value is not None and value.startswith("./"):
        inside = value[2:].split("/")
        if not all(inside) or set(inside) & {".", ".."}:
            raise ValueError(
                f"`object_settings[{name!r}]` is {value!r}, expected `./folder` inside the checkpoint, without `.` or "
                "`..`: saving copies the part, and would overwrite what is not its own."
            )


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`object_settings[{name!r}]` must be True or False, got {value!r}.")


def _fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"`object_settings[{name!r}]` must be a number in 0..1, got {value!r}.")


@dataclass(frozen=True)
class ObjectSettings:
    """The checked form of a processor's `object_settings`.

    Attributes:
        max_object_tokens: N, the most objects per image; what a call may lower.
        patch_grid_size: g of the model's config; the processor counts g * g patch tokens per image.
        use_cls_token: as in the model's config.
        embed_size: D, the width of the tower the embeddings come from; the width of `object_embeds` without objects.
        image_size: S, the side of the tower's input in pixels; the frame of `object_masks`.
        detector: where the object detector comes from (a Hub id with optional `@revision`, a path, or `./detector`
            inside the checkpoint); None: no objects unless the user gives them.
        segmenter: likewise, the promptable segmenter that turns boxes into masks.
        vision_tower: likewise, the tower for MaskInversion; None: the checkpoint the processor came from.
        score_threshold: detections below it are no candidates. Our choice: the paper states none.
        max_candidates: the best-scored detections that are considered per image. Our choice.
        mask_source: "segmenter", or "boxes" to use the boxes themselves as masks.
        order: how candidates are ranked: "mask_iou" (default), "box_iou" or "score"; see `keep_order`. With the last
            two, a cap also saves segmenting what it drops.
        mask_inversion: where embeddings are made: "processor", or "model" (which then receives masks).
    """

    max_object_tokens: int = 20
    patch_grid_size: int = 6
    use_cls_token: bool = True
    embed_size: int = 1024
    image_size: int = 336
    detector: str | None = None
    segmenter: str | None = None
    vision_tower: str | None = None
    score_threshold: float = 0.05
    max_candidates: int = 50
    mask_source: Literal["segmenter", "boxes"] = "segmenter"
    order: Literal["mask_iou", "box_iou", "score"] = "mask_iou"
    mask_inversion: Literal["processor", "model"] = "processor"

    def __post_init__(self) -> None:
        for field in fields(self):
            _CHECKS[field.name](field.name, getattr(self, field.name))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | None) -> "ObjectSettings":
        """Checks a plain dict key by key; missing keys take their defaults.

        Raises:
            ValueError: an unknown key, or a value out of its range; the message names key and value.
        """
        settings = dict(settings or {})
        unknown = sorted(set(settings) - set(_CHECKS))
        if unknown:
            raise ValueError(f"`object_settings` has unknown keys {unknown}. Known keys: {sorted(_CHECKS)}.")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def layout(self) -> TokenLayout:
        """The token layout these settings describe; it must be the model's."""
        return TokenLayout(self.use_cls_token, self.patch_grid_size, self.max_object_tokens)


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_object_tokens": _integer(0),
    "patch_grid_size": _integer(1),
    "use_cls_token": _boolean,
    "embed_size": _integer(1),
    "image_size": _integer(1),
    "detector": _source,
    "segmenter": _source,
    "vision_tower": _source,
    "score_threshold": _fraction,
    "max_candidates": _integer(1),
    "mask_source": _one_of("segmenter", "boxes"),
    "order": _one_of("mask_iou", "box_iou", "score"),
    "mask_inversion": _one_of("processor", "model"),
}

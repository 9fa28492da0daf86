# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""What each weight of another layout is called here: tables of patterns, and the functions that read them.

A table is a list of (pattern of a whole name, outcome). The first pattern that fits decides. Its outcome is our name,
as a template (`\\1` is the first group) or a function of the match; or a `Drop` with the reason why the weight is not
needed. A name that no pattern fits is unknown.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Drop:
    """A weight that has no place here, and why."""

    reason: str


Outcome = str | Drop | Callable[[re.Match[str]], str]
Table = Sequence[tuple[str, Outcome]]

_POSITIONS = Drop("counts positions 0, 1, 2 ...; made anew when the model is built")
_FREQUENCIES = Drop("rotary frequencies; computed from the config")
_TEXT_HALF = Drop("CLIP's text half and its projections, which LLaVA does not use")
FROZEN_TOWER = Drop(
    "the config does not say that the vision tower was trained (`unfreeze_mm_vision_tower`), so the tower it names "
    "counts, as in the research code"
)

_TOWER = "model.vision_tower."
_TOWER_PART = r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..+)"


def _projector_layer(match: re.Match[str]) -> str:
    # Linear layers have even places in the research code's Sequential, activations odd ones
    return f"model.multi_modal_projector.linear_{int(match[1]) // 2 + 1}.{match[2]}"


LLAVA_RESEARCH: Table = [
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", _FREQUENCIES),
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
    (r"lm_head\.weight", r"lm_head.weight"),
    (r"model\.mm_projector\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.(\d*[02468])\.(weight|bias)", _projector_layer),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?embeddings\.position_ids", _POSITIONS),
    (rf"model\.vision_tower\.vision_tower\.{_TOWER_PART}", rf"{_TOWER}\1"),
]

# What the authors' own checkpoints turn out to call otherwise than LLaVA does goes here, and nowhere else.
MASK_LLAVA_RESEARCH: Table = [*LLAVA_RESEARCH]

CLIP: Table = [
    (r"(?:vision_model\.)?embeddings\.position_ids", _POSITIONS),
    (_TOWER_PART, rf"{_TOWER}\1"),
    (r"text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale", _TEXT_HALF),
]

# Two layouts: that of the published files, and that of Transformers' classes since 4.52.
LLAVA_HF: Table = [
    (r".*\.rotary_emb\.inv_freq", _FREQUENCIES),
    (r".*\.embeddings\.position_ids", _POSITIONS),
    (r"language_model\.lm_head\.weight|lm_head\.weight", r"lm_head.weight"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"model\.language_model\.(.+)", r"model.language_model.\1"),
    (rf"(?:model\.)?vision_tower\.{_TOWER_PART}", rf"{_TOWER}\1"),
    (r"(?:model\.)?multi_modal_projector\.(linear_\d+\.(?:weight|bias))", r"model.multi_modal_projector.\1"),
]


def rename(name: str, table: Table) -> str | Drop | None:
    """Our name of a weight, why it is dropped, or None where the table does not know it."""
    for pattern, outcome in table:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        if isinstance(outcome, Drop):
            return outcome
        return match.expand(outcome) if isinstance(outcome, str) else outcome(match)
    return None


def to_llava_research(name: str, projector_type: str) -> str:
    """The research code's name of a weight of ours; the inverse of `LLAVA_RESEARCH`.

    Args:
        projector_type: "linear" has another module than "mlp1x_gelu".
    """
    if match := re.fullmatch(r"model\.language_model\.(.+)", name):
        return f"model.{match[1]}"
    if match := re.fullmatch(r"model\.multi_modal_projector\.linear_(\d+)\.(.+)", name):
        place = "" if projector_type == "linear" else f"{2 * (int(match[1]) - 1)}."
        return f"model.mm_projector.{place}{match[2]}"
    if name.startswith(_TOWER):
        return f"model.vision_tower.vision_tower.vision_model.{name.removeprefix(_TOWER)}"
    return name


def to_clip(name: str) -> str | None:
    """The name of one of our tower's weights in a checkpoint of `CLIPVisionModel`; None for a weight outside it."""
    return f"vision_model.{name.removeprefix(_TOWER)}" if name.startswith(_TOWER) else None

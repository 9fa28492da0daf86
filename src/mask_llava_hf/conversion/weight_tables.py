# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Weights on their way from one layout to another: each is used under its new name or dropped for a reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..modeling.modeling_mask_llava import MaskLlavaForConditionalGeneration
from .checkpoint_files import LazyTensor, list_names
from .key_renames import Drop, Table, rename


@dataclass
class RenamedWeights:
    """Weights under our names.

    Attributes:
        tensors: by our name; each knows its name in the source.
        dropped: source name -> why it is not needed.
        unknown: source names that the table does not have.
        doubled: source names whose place was taken already, and the place.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    doubled: dict[str, str] = field(default_factory=dict)

    def update(self, other: "RenamedWeights") -> None:
        """Adds weights; where both have one, that of `other` counts."""
        self.tensors.update(other.tensors)
        self.dropped.update(other.dropped)
        self.unknown += other.unknown
        self.doubled.update(other.doubled)


def rename_weights(source: Mapping[str, LazyTensor], table: Table) -> RenamedWeights:
    """Renames all weights by a table; nothing is refused yet."""
    weights = RenamedWeights()
    for name, tensor in source.items():
        outcome = rename(name, table)
        if outcome is None:
            weights.unknown.append(tensor.name)
        elif isinstance(outcome, Drop):
            weights.dropped[tensor.name] = outcome.reason
        elif outcome in weights.tensors:
            weights.doubled[tensor.name] = outcome
        else:
            weights.tensors[outcome] = tensor
    return weights


def checked_weights(weights: RenamedWeights, config: MaskLlavaConfig) -> dict[str, LazyTensor]:
    """The weights in the order of the config's model: one of the right shape for each of its own, and none besides.

    Raises:
        ValueError: with every weight that is unknown, missing, doubled, or of another shape or dtype than the config
            asks for (at most twenty names of each, then a count).
    """
    with torch.device("meta"):  # names and shapes are wanted, no numbers
        model = MaskLlavaForConditionalGeneration(config)
    tied = model.all_tied_weights_keys  # saved once, under the other name
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    found = weights.tensors
    unknown = [*weights.unknown, *(found[name].name for name in set(found) - set(expected))]
    shapes = [
        f"{found[name].name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    others = [f"{tensor.name} {tensor.dtype}" for tensor in found.values() if not tensor.dtype.is_floating_point]
    problems = {
        "weights that are unknown": unknown,
        "weights that are missing": sorted(set(expected) - set(found)),
        "weights of another shape than the config's": shapes,
        "weights that are no floating-point numbers": others,
        "weights that stand for one that is there already": [
            f"{theirs} ({ours})" for theirs, ours in weights.doubled.items()
        ],
    }
    said = [f"{len(names)} {problem}: {list_names(names)}" for problem, names in problems.items() if names]
    if said:
        raise ValueError(
            "The checkpoint does not fit its config. It has " + "; and ".join(said) + ". Nothing was converted, as "
            "weights would be lost or random. Is `config.json` that of these weights?"
            + (" Names of a layout that is new belong in `conversion/key_renames.py`." if unknown else "")
        )
    return {name: found[name] for name in expected}

# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""What a conversion did, for people and, as JSON, for the checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import torch

from ..modeling.token_layout import TokenLayout
from .checkpoint_files import LazyTensor


REPORT_FILE = "conversion_report.json"

# Names shown per reason; all are in the file.
_MOST_EXAMPLES = 3


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        layout: what the source was taken for, and why.
        target: what was written.
        num_parameters, num_bytes, dtype: of the weights written.
        tokens_per_image: in words.
        renamed: name in the target -> name in the source.
        dropped: name in the source -> why it was not needed.
        notes: what was assumed where the source says nothing, and what became different.
        self_check: what was tried with the result; None: not asked for.
        seconds: of the whole conversion.
    """

    layout: str
    target: str
    num_parameters: int
    num_bytes: int
    dtype: str
    tokens_per_image: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    self_check: str | None = None
    seconds: float = 0.0

    @classmethod
    def of(
        cls, layout: str, target: str, tensors: Mapping[str, LazyTensor], dtype: torch.dtype, **others
    ) -> "ConversionReport":
        """A report on these weights, written in this dtype."""
        parameters = sum(prod(tensor.shape) for tensor in tensors.values())
        return cls(
            layout=layout,
            target=target,
            num_parameters=parameters,
            num_bytes=parameters * dtype.itemsize,
            dtype=str(dtype).removeprefix("torch."),
            renamed={name: tensor.name for name, tensor in tensors.items()},
            **others,
        )

    def save(self, folder: Path) -> None:
        """Writes `conversion_report.json`; it names no place on this machine and no time, so it can be published."""
        values = {name: value for name, value in asdict(self).items() if name != "seconds"}
        (folder / REPORT_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"source    {self.layout}",
            f"target    {self.target}",
            f"weights   {self.num_parameters:,} parameters, {self.num_bytes / 1e9:.2f} GB in {self.dtype}; "
            f"{len(self.renamed)} tensors written, {len(self.dropped)} of the source's not needed",
        ]
        for reason, names in _by_reason(self.dropped).items():
            more = f" and {len(names) - _MOST_EXAMPLES} more" if len(names) > _MOST_EXAMPLES else ""
            lines.append(f"  dropped {', '.join(names[:_MOST_EXAMPLES])}{more}: {reason}")
        if self.tokens_per_image is not None:
            lines.append(f"tokens    {self.tokens_per_image} per image")
        lines += [f"note      {note}" for note in self.notes]
        lines.append(f"checked   {self.self_check or 'not checked'}")
        lines.append(f"time      {self.seconds:.1f} s")
        return "\n".join(lines)


def describe_tokens(layout: TokenLayout) -> str:
    """A composition in words: "1 CLS + 36 patches + up to 20 objects = at most 57 tokens"."""
    parts = [
        "1 CLS" if layout.use_cls_token else "",
        f"{layout.num_patch_tokens} patches",
        f"up to {layout.max_object_tokens} objects" if layout.max_object_tokens else "",
    ]
    most = "at most " if layout.max_object_tokens else ""
    return f"{' + '.join(part for part in parts if part)} = {most}{layout.max_tokens} tokens"


def _by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        reasons.setdefault(reason, []).append(name)
    return reasons

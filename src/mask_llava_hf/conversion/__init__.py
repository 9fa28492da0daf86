# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of other packages and layouts, turned into ours and back; see `convert_checkpoint`."""

from .checkpoint_conversion import convert_checkpoint
from .conversion_report import ConversionReport
from .research_export import export_checkpoint


__all__ = ["ConversionReport", "convert_checkpoint", "export_checkpoint"]

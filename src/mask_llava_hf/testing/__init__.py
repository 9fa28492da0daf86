# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Small models with random weights, for tests, the demo and users' own continuous integration. Nothing is downloaded.

Every part is real (the same classes, the same file formats), only tiny and untrained: a whole chain from photograph to
answer takes well under a second on a CPU, and its answer is noise. Weights depend on `seed` alone, not on the default
device or dtype nor on the state of the global random generators, which are left as they were.
"""

from .tiny_checkpoints import build_tiny_checkpoint, tiny_config, tiny_image_processor, tiny_model
from .tiny_detectors import tiny_detector
from .tiny_segmenters import tiny_segmenter
from .tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer


__all__ = [
    "CHAT_TEMPLATE",
    "build_tiny_checkpoint",
    "tiny_config",
    "tiny_detector",
    "tiny_image_processor",
    "tiny_model",
    "tiny_segmenter",
    "tiny_tokenizer",
]

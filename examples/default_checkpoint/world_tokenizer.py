# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer of all texts of the small world: its words are single tokens, and other text is spelled in pieces."""

import numpy as np
from shapes_world import QUESTION_KINDS, ask, describe, make_scene
from transformers import PreTrainedTokenizerFast

from mask_llava_hf.testing import tiny_tokenizer


def world_tokenizer() -> PreTrainedTokenizerFast:
    """Trained in a second on questions, answers and captions of 300 scenes."""
    texts = ["USER: ASSISTANT:"] * 300
    for index in range(300):
        scene, rng = make_scene("train", index), np.random.default_rng(index)
        questions = [ask(scene, kind, rng) for kind in QUESTION_KINDS]
        texts += [f"{asked.text} {asked.answer}" for asked in questions if asked is not None]
        texts.append(f" {describe(scene)}")
    return tiny_tokenizer(texts, 512)

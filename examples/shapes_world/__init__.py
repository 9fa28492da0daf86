# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""A small world: pictures of coloured shapes with exact masks, boxes and captions, and questions with one answer."""

from .dataset import chat, load_shapes_world, questions_of
from .language import CAPTION_PROMPT, MARKED_PROMPT, QUESTION_KINDS, Question, ask, ask_many, describe
from .scenes import COLORS, KINDS, SIDE, SIZES, SPLITS, Scene, Shape, make_scene


__all__ = [
    "CAPTION_PROMPT",
    "COLORS",
    "KINDS",
    "MARKED_PROMPT",
    "QUESTION_KINDS",
    "SIDE",
    "SIZES",
    "SPLITS",
    "Question",
    "Scene",
    "Shape",
    "ask",
    "ask_many",
    "chat",
    "describe",
    "load_shapes_world",
    "make_scene",
    "questions_of",
]

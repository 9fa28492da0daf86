# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The main job end to end: find a picture's objects, turn them into tokens, answer with fewer and fewer of them.

Without arguments it asks the small trained checkpoint inside the package about a picture of its world, coloured shapes,
that it was not trained on. This picture it gets right; `--scene 3` and others show where it errs, and its card how
often. It needs no network and takes seconds on a CPU.

    python examples/demo.py --checkpoint FOLDER_OR_HUB_ID --image photo.jpg --question "What is on the table?"
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shapes_world import Scene, ask, make_scene
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image
from transformers.utils import logging

from mask_llava_hf import DEFAULT_CHECKPOINT
from mask_llava_hf.plotting import draw_objects
from mask_llava_hf.whole_files import write_whole


KINDS_OF_QUESTIONS = ("count", "count attribute", "color", "shape", "size", "existence", "relation")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="folder or Hub id")
    parser.add_argument("--image", help="path or URL; without it, a picture of the small world")
    parser.add_argument("--scene", type=int, default=106, help="which picture of the small world's test split")
    parser.add_argument("--question", action="append", help="asked about the image; may be given several times")
    parser.add_argument(
        "--max-object-tokens", type=int, default=2, help="the middle one of the three runs: all objects, so many, none"
    )
    parser.add_argument("--max-new-tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the pictures")
    options = parser.parse_args()
    if options.max_object_tokens < 0 or options.max_new_tokens < 1:
        parser.error("--max-object-tokens must be at least 0 and --max-new-tokens at least 1")
    if options.image is not None and "://" not in options.image and not Path(options.image).is_file():
        parser.error(f"--image: there is no file {options.image!r}")
    return options


def open_image(source: str) -> Image.Image:
    return load_image(source) if "://" in source else Image.open(source)


def questions_about(scene: Scene) -> dict[str, str]:
    """One question of each kind, with its right answer."""
    asked = [ask(scene, kind, np.random.default_rng(0)) for kind in KINDS_OF_QUESTIONS]
    return {question.text: question.answer for question in asked if question is not None}


def timed(step: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return step(*args, **kwargs), time.perf_counter() - start


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype="auto")
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    processor.share_vision_tower(model)  # or the processor would load the tower a second time

    right_answers: dict[str, str] = {}
    if options.image is None:
        scene = make_scene("test", options.scene)
        image, right_answers = scene.draw(), questions_about(scene)
        print(f"Picture {options.scene} of the small world's test split: {', '.join(s.name for s in scene.shapes)}")
    else:
        image = open_image(options.image)
    questions = options.question or list(right_answers) or ["What is in this picture?"]
    processor.find_objects(image.convert("RGB").resize((64, 64)))  # loads the parts, which is not to be timed

    [objects], seconds_to_find = timed(processor.find_objects, image)
    found, cls, patches = len(objects), int(model.config.use_cls_token), model.config.patch_grid_size**2
    print(f"{image.width} x {image.height} pixels; {found} objects found and embedded in {seconds_to_find:.3f} s\n")

    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in conversations]
    inputs = processor(
        images=[[image]] * len(prompts),
        text=prompts,
        objects=[[objects]] * len(prompts),  # made once, whatever is asked
        padding=True,
        return_tensors="pt",
    ).to(model.device)
    model.generate(**inputs, max_new_tokens=1)  # the first call is slower than those after it
    lengths: list[int] = []  # of every pass through the language model; the first of each run is the prefill
    model.get_decoder().register_forward_pre_hook(
        lambda decoder, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    options.output.mkdir(parents=True, exist_ok=True)
    answers: dict[int, list[str]] = {}
    print("objects  CLS  patches  image tokens  prefill  seconds for all questions")
    for cap in dict.fromkeys([found, min(options.max_object_tokens, found), 0]):
        lengths.clear()
        output, seconds = timed(
            model.generate, **inputs, max_object_tokens=cap, max_new_tokens=options.max_new_tokens, do_sample=False
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        answers[cap] = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        print(f"{cap:7d}  {cls:3d}  {patches:7d}  {cls + patches + cap:12d}  {lengths[0]:7d}  {seconds:13.3f}")
        drawn = draw_objects(image, objects, keep=cap)
        write_whole(options.output / f"objects_{cap}.png", lambda file, drawn=drawn: drawn.save(file, format="PNG"))

    width = max(map(len, questions))
    heads = "  ".join(f"{f'{cap} objects':>12}" for cap in answers)
    print(f"\n{'':{width}}  {heads}" + (f"  {'right':>12}" if right_answers else ""))
    for index, question in enumerate(questions):
        given = [answers[cap][index] for cap in answers]
        given += [right_answers[question]] if question in right_answers else []
        print(f"{question:{width}}  " + "  ".join(f"{answer:>12}" for answer in given))
    print(f"\nPictures: {options.output}/objects_*.png (tag n is the n-th in keep order)")


if __name__ == "__main__":
    logging.disable_progress_bar()
    run(parse_arguments())

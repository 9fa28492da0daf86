"""The main job end to end: find a photograph's objects, turn them into tokens, answer with fewer and fewer of them.

Without a checkpoint it makes a tiny one with random weights: every step is real and takes a moment on a CPU, but the
objects and the answer are noise.

    python examples/demo.py --checkpoint FOLDER_OR_HUB_ID --image photo.jpg --question "What is on the table?"
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image
from transformers.utils import logging

import mask_llava_hf  # noqa: F401 - registers Mask-LLaVA with the Auto classes
from mask_llava_hf.plotting import draw_objects
from mask_llava_hf.testing import build_tiny_checkpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", help="folder or Hub id; without it, a tiny one with random weights is made")
    parser.add_argument("--image", help="path or URL; without it, scikit-image's astronaut")
    parser.add_argument("--question", default="What is in this picture?", help="asked about the image")
    parser.add_argument(
        "--max-object-tokens",
        type=int,
        default=5,
        help="the middle one of the three runs: all objects, this many, none",
    )
    parser.add_argument("--max-new-tokens", type=int, default=24, help="length of the answer")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the pictures")
    options = parser.parse_args()
    if options.max_object_tokens < 0 or options.max_new_tokens < 1:
        parser.error("--max-object-tokens must be at least 0 and --max-new-tokens at least 1")
    if options.image is not None and "://" not in options.image and not Path(options.image).is_file():
        parser.error(f"--image: there is no file {options.image!r}")
    return options


def open_image(source: str | None) -> Image.Image:
    if source is not None:
        return load_image(source) if "://" in source else Image.open(source)
    try:
        from skimage import data
    except ImportError as error:
        raise SystemExit('The example photograph comes with scikit-image: pip install "mask-llava-hf[demo]"') from error
    return Image.fromarray(data.astronaut())


def timed(step: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return step(*args, **kwargs), time.perf_counter() - start


def save_whole(picture: Image.Image, path: Path) -> None:
    """Never leaves half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)


@torch.inference_mode()
def run(checkpoint: str | Path, options: argparse.Namespace) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto")
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    processor.share_vision_tower(model)  # or the processor would load the tower a second time
    untrained = getattr(model.config, "untrained", False)
    if untrained:
        print("NOTE: these weights are random. Objects and answers below are noise; shapes, counts and steps are real.")

    image = open_image(options.image)
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options.question}]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    processor.find_objects(image.convert("RGB").resize((64, 64)))  # loads the parts, which is not to be timed

    # Objects with masks first, embeddings in a second step, only to time the two apart; by default
    # `find_objects` does both, and `processor(images=image, text=prompt)` does all.
    saved, processor.object_settings["mask_inversion"] = processor.object_settings["mask_inversion"], "model"
    [objects], seconds_to_find = timed(processor.find_objects, image)
    processor.object_settings["mask_inversion"] = saved
    inputs, seconds_to_invert = timed(processor, images=image, text=prompt, objects=objects, return_tensors="pt")
    inputs = inputs.to(model.device)

    found, cls, patches = len(objects), int(model.config.use_cls_token), model.config.patch_grid_size**2
    print(f"\n{image.width} x {image.height} pixels, {found} objects found")
    print(f"  detect, segment, order   {seconds_to_find:7.3f} s")
    print(f"  preprocess, invert masks {seconds_to_invert:7.3f} s\n")
    print("objects  CLS  patches  image tokens  prefill  prefill + decode")

    model.generate(**inputs, max_new_tokens=1)  # the first call is slower than those after it
    lengths: list[int] = []  # of every pass through the language model; the first of each run is the prefill
    model.get_decoder().register_forward_pre_hook(
        lambda decoder, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    options.output.mkdir(parents=True, exist_ok=True)
    answers = {}
    for cap in dict.fromkeys([found, min(options.max_object_tokens, found), 0]):
        lengths.clear()
        output, seconds = timed(
            model.generate, **inputs, max_object_tokens=cap, max_new_tokens=options.max_new_tokens, do_sample=False
        )
        answers[cap] = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{cap:7d}  {cls:3d}  {patches:7d}  {cls + patches + cap:12d}  {lengths[0]:7d}  {seconds:14.3f} s")
        save_whole(draw_objects(image, objects, keep=cap), options.output / f"objects_{cap}.png")

    print(f"\n{options.question}" + (" (random weights: the answers are noise)" if untrained else ""))
    for cap, answer in answers.items():
        print(f"  {cap:2d} objects: {answer!r}")
    print(f"\nPictures: {options.output}/objects_*.png (tag n is the n-th in keep order)")


if __name__ == "__main__":
    logging.disable_progress_bar()
    arguments = parse_arguments()
    if arguments.checkpoint is not None:
        run(arguments.checkpoint, arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(build_tiny_checkpoint(folder), arguments)

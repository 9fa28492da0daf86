# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
r"""What the front end (pictures to stored objects) costs and finds, with the default checkpoint on the small world.

Throughput: `precompute_objects` as a whole, and each of its stages alone, the models with the very inputs that they had
in the whole; their sum against the whole tells what is spent outside the models. Then the cost by `max_object_tokens`.
Quality: orders, caps and masks, a user's choices, against the true shapes of held-out scenes.

    python benchmarks/front_end.py
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the small world is no package

from shapes_world.scenes import Scene, make_scene

from mask_llava_hf import DEFAULT_CHECKPOINT, ImageObjects, MaskLlavaProcessor, ObjectStore
from mask_llava_hf.evaluation.measuring import circumstances, markdown, write_rows
from mask_llava_hf.precompute import precompute_objects
from mask_llava_hf.processing import mask_embedder
from mask_llava_hf.processing.object_parts import ObjectParts
from mask_llava_hf.processing.object_pipeline import boxes_to_masks
from mask_llava_hf.processing.object_store import image_key
from mask_llava_hf.processing.objects.nested_order import ORDERS, keep_order


RESULTS = Path(__file__).parent / "results"
BATCH_SIZES = (1, 8, 32)
COSTLY_ORDERS = ("box_iou", "mask_iou")  # before the segmenter, and after it
COST_CAPS = (0, 1, 5, 20)
QUALITY_CAPS = (1, 2, 5, 20)
LOW_THRESHOLD = 0.05  # tried beside the checkpoint's own: the package's default, which leaves many candidates
MODELS = ("detector", "segmenter encoder", "mask decoder", "vision tower", "mask inversion")
COVERED = 0.5  # IoU with a true shape from which on an object counts as that shape

Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pictures", type=int, default=64, help="whose throughput is measured; default: 64")
    parser.add_argument("--num-scenes", type=int, default=100, help="whose objects are judged; default: 100")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts; default: 3")
    parser.add_argument("--threads", type=int, default=1, help="of the models; default: 1")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="default: the small one in the package")
    parser.add_argument("--quick", action="store_true", help="a few pictures, to try it; results are only printed")
    parser.add_argument("--output-dir", type=Path, help="of the CSV files; default: results/ beside this file")
    options = parser.parse_args()
    if options.quick:
        options.num_pictures, options.num_scenes, options.rounds = 3, 3, 1
    torch.set_num_threads(options.threads)

    scenes = [make_scene("validation", index) for index in range(options.num_scenes)]
    quality = quality_rows(options.checkpoint, scenes)
    print(f"Objects of {len(scenes)} held-out scenes, {sum(len(scene.shapes) for scene in scenes)} shapes\n")
    print(markdown(quality))
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        for index in range(options.num_pictures):
            make_scene("test", index).draw().save(pictures / f"{index:04}.png")
        stages = stage_rows(options.checkpoint, pictures, Path(folder), options.rounds)
        costs = cost_rows(options.checkpoint, pictures, options.rounds)
    print(f"\nThroughput over {options.num_pictures} pictures\n\n{markdown(stages)}\n\n{markdown(costs)}")

    output_dir = options.output_dir or (None if options.quick else RESULTS)
    if output_dir is not None:
        told = {"pictures": options.num_pictures, "rounds": options.rounds, **circumstances()}
        write_rows(output_dir / "front_end.csv", [{**row, **told} for row in stages + costs])
        told = {"scenes": options.num_scenes, **circumstances()}
        del told["processor"], told["threads"]  # of no influence
        write_rows(output_dir / "front_end_quality.csv", [{**row, **told} for row in quality])
        print(f"\nwritten to {output_dir}")


# ---------------------------------------------------------------------------------------------------------- throughput
def stage_rows(checkpoint: str, pictures: Path, work_dir: Path, rounds: int) -> list[dict[str, Any]]:
    """By batch size: seconds of each stage alone and of the whole, and what share of the whole is not the models."""
    processor = MaskLlavaProcessor.from_pretrained(checkpoint)
    rows = []
    for batch_size in BATCH_SIZES:
        stores = (work_dir / f"store-{batch_size}-{number}" for number in range(rounds + 1))

        def whole(batch_size: int = batch_size, stores: Iterator[Path] = stores) -> Path:
            folder = next(stores)
            precompute_objects(pictures, processor, folder, batch_size=batch_size, progress=False)
            return folder

        with recorded_models(processor._parts()) as calls:
            store = ObjectStore.open(whole())  # also the warm-up
        paths = sorted(pictures.iterdir())
        objects = {image_key(path): processor.find_objects(path)[0] for path in paths}
        stages: dict[str, Call] = {
            "reading": lambda paths=paths: [image_key(path) for path in paths],
            **{name: partial(_replay, calls[name]) for name in MODELS},
            "writing": partial(_write, store, objects),
            "whole": whole,
        }
        seconds = timed_in_turns(stages, rounds)
        models = sum(seconds[name] for name in MODELS)
        for name, each in seconds.items():
            rows.append(_speed({"batch_size": batch_size, "stage": name}, each, len(paths)))
            rows[-1]["share_of_whole"] = round(each / seconds["whole"], 4)
        outside = round(1 - models / seconds["whole"], 4)
        rows.append({"batch_size": batch_size, "stage": "overhead outside the models", "share_of_whole": outside})
    return rows


def cost_rows(checkpoint: str, pictures: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds of `find_objects` by order and cap: what is not kept should not be paid for."""
    paths, finders = [str(path) for path in sorted(pictures.iterdir())], {}
    for order in COSTLY_ORDERS:
        processor = MaskLlavaProcessor.from_pretrained(checkpoint, object_settings={"order": order})
        for cap in COST_CAPS:
            finders[order, cap] = partial(processor.find_objects, paths, max_object_tokens=cap, batch_size=8)
    for find in finders.values():
        find()
    seconds = timed_in_turns(finders, rounds)
    return [
        _speed({"order": order, "max_object_tokens": cap}, seconds[order, cap], len(paths)) for order, cap in finders
    ]


@contextmanager
def recorded_models(parts: ObjectParts) -> Iterator[dict[str, list[Call]]]:
    """The calls of the models while inside, by stage, to be made again."""
    segmenter: Any = parts.segmenter()
    places: dict[str, tuple[Any, str]] = {
        "detector": (parts.detector().model, "forward"),
        "segmenter encoder": (segmenter.model, "get_image_embeddings"),
        "mask decoder": (segmenter.model, "forward"),
        "vision tower": (parts.mask_embedder().vision_tower, "forward"),
        "mask inversion": (mask_embedder, "embed_masks"),
    }
    calls: dict[str, list[Call]] = {name: [] for name in places}

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            calls[name].append(partial(function, *args, **kwargs))
            return function(*args, **kwargs)

        return record

    with ExitStack() as stack:
        for name, (owner, attribute) in places.items():
            stack.enter_context(patch.object(owner, attribute, recording(name, getattr(owner, attribute))))
        yield calls


def timed_in_turns(functions: dict[Any, Call], rounds: int) -> dict[Any, float]:
    """Median wall seconds of each; in turns, so that a busy moment of the machine does not meet one of them alone."""
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def _replay(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _write(store: ObjectStore, objects: dict[str, ImageObjects]) -> None:
    with store.writer() as writer:
        for key, entry in objects.items():
            writer.add(key, entry)


def _speed(row: dict[str, Any], seconds: float, pictures: int) -> dict[str, Any]:
    each = {"images_per_second": round(pictures / seconds, 2), "ms_per_image": round(1e3 * seconds / pictures, 3)}
    return {**row, **each}


# ------------------------------------------------------------------------------------------------------------- quality
def quality_rows(checkpoint: str, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """What is kept of the true shapes, by threshold, masks, order and cap; and how good masks of true boxes are."""
    processor = MaskLlavaProcessor.from_pretrained(checkpoint)
    parts, settings = processor._parts(), processor._settings()
    pictures, truth = [scene.draw() for scene in scenes], [torch.from_numpy(scene.masks) for scene in scenes]

    def masked(found: Sequence[ImageObjects]) -> dict[str, list[ImageObjects]]:
        segmented = parts.segmenter().segment(pictures, [objects.boxes_xyxy for objects in found])
        return {
            "segmenter": [objects.with_masks(masks) for objects, masks in zip(found, segmented, strict=True)],
            "boxes": [replace(each, masks=boxes_to_masks(each.boxes_xyxy, each.image_hw)) for each in found],
        }

    def row(source: str, kept: Sequence[ImageObjects], **told: Any) -> dict[str, Any]:
        named = {"boxes_from": "detector", "masks_from": source, "score_threshold": "", "order": "", "cap": "", **told}
        return {**named, **_judged(kept, truth)}

    sizes = [(picture.height, picture.width) for picture in pictures]
    true_boxes = [ImageObjects.from_boxes(scene.boxes_xyxy, size) for scene, size in zip(scenes, sizes, strict=True)]
    rows = [row(source, found, boxes_from="truth") for source, found in masked(true_boxes).items()]
    for threshold in (settings.score_threshold, LOW_THRESHOLD):
        candidates = parts.detector().detect(pictures, threshold, settings.max_candidates)
        for source, found in masked(candidates).items():
            for order in ORDERS if source == "segmenter" else ORDERS[:1]:  # of boxes as masks, IoUs are those of boxes
                ranked = [objects[keep_order(objects, order)] for objects in found]
                for cap in QUALITY_CAPS:
                    kept = [objects[:cap] for objects in ranked]
                    rows.append(row(source, kept, score_threshold=threshold, order=order, cap=cap))
                    # Where the order needs masks, all candidates are decoded before any is dropped
                    decoded = found if order == "mask_iou" else kept
                    number = statistics.mean(map(len, decoded)) if source == "segmenter" else 0
                    rows[-1]["boxes_decoded_per_image"] = round(number, 2)
    return rows


def _judged(found: Sequence[ImageObjects], truth: Sequence[Tensor]) -> dict[str, Any]:
    """How well the true masks (n, H, W) of each image are found.

    Returns:
        `shapes_covered`, the share of true shapes with an object whose mask has IoU >= 0.5 with them;
        `mean_iou`, of each true shape with the object nearest to it; and per image the objects kept, and those of
        them that cover what one before them covers (`duplicates`).
    """
    best, duplicates = [], 0
    for objects, shapes in zip(found, truth, strict=True):
        overlaps = _iou(objects.masks, shapes)  # (objects, shapes)
        best.append(overlaps.amax(0) if len(objects) else torch.zeros(len(shapes)))
        covered = overlaps >= COVERED
        duplicates += int((covered.any(1)).sum() - covered.any(0).sum())
    nearest = torch.cat(best)
    return {
        "shapes_covered": round((nearest >= COVERED).float().mean().item(), 4),
        "mean_iou": round(nearest.mean().item(), 4),
        "kept_per_image": round(statistics.mean(map(len, found)), 2),
        "duplicates_per_image": round(duplicates / len(found), 3),
    }


def _iou(masks: Tensor | None, others: Tensor) -> Tensor:
    """(n, m) IoU of masks (n, H, W) with masks (m, H, W), all bool."""
    first, second = (torch.zeros(0, *others.shape[1:]) if masks is None else masks).flatten(1), others.flatten(1)
    shared = first.float() @ second.float().T
    return shared / (first.sum(1)[:, None] + second.sum(1) - shared).clamp(min=1)


if __name__ == "__main__":
    main()

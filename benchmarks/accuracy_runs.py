# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""One run of `accuracy_by_tokens.py`: a variant of Mask-LLaVA, trained from one seed and asked with fewer tokens."""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from default_checkpoint.answer_scores import AskedPicture, ask_about, score_answers
from default_checkpoint.train_mask_llava import learn_answers, learn_captions
from default_checkpoint.world_conversations import save_pictures
from shapes_world import QUESTION_KINDS, chat, make_scene
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from mask_llava_hf import ImageObjects, MaskLlavaProcessor, ObjectStore
from mask_llava_hf.modeling.token_layout import TokenLayout
from mask_llava_hf.processing.object_store import image_key


BUDGETS = (57, 42, 29, 15)  # tokens per image; the paper's
OBJECT_CAPS = (0, 1, 2, 5, 10, 20)

# A question about a marked shape shows that shape's object alone, which nobody without objects can answer.
MEAN = "all but marked"
MEAN_KINDS = tuple(kind for kind in QUESTION_KINDS if kind != "marked")

NUM_CHECKED = 3 * len(QUESTION_KINDS)  # questions that `generate` answers too
LONGEST_ANSWER = 32  # tokens


@dataclass(frozen=True)
class Variant:
    """What differs from the default: CLS, 6 x 6 patches and up to 20 objects, scaled to their image's patches.

    Attributes:
        config: fields of `MaskLlavaConfig`.
        max_training_objects: most objects per picture that training shows; None: as many as the config allows.
    """

    config: dict[str, Any] = field(default_factory=dict)
    max_training_objects: int | None = None


VARIANTS = {
    # 7 x 7 is the largest square within 57 tokens
    "patches": Variant({"use_cls_token": False, "patch_grid_size": 7, "max_object_tokens": 0}),
    "CLS + patches": Variant({"patch_grid_size": 7, "max_object_tokens": 0}),
    "all three": Variant(),
}
ABLATIONS = {
    "no norm scaling": Variant({"norm_scaling": "none"}),
    "fixed norm scaling": Variant({"norm_scaling": "fixed"}),  # the two numbers are measured
    "mask pooling": Variant({"object_embedding": "mask_pooling"}),
    "few objects in training": Variant(max_training_objects=5),
}


@dataclass(frozen=True)
class Schedule:
    """How long is trained and how much is asked: training pictures, conversations about each, held-out pictures."""

    pictures: int
    rounds: int
    test_pictures: int

    def paths(self, work_dir: Path, split: str) -> list[Path]:
        """The pictures of a split; those that the work folder lacks are drawn."""
        count = self.pictures if split == "train" else self.test_pictures
        return save_pictures(work_dir / "pictures", split, count, work_dir / "scenes")


def run(name: str, seed: int, schedule: Schedule, work_dir: Path, folder: Path) -> list[dict[str, Any]]:
    """Trains a variant and asks it about held-out scenes.

    Args:
        name: of the variant or ablation.
        seed: of the projector's first weights and of the order of the pictures.
        work_dir: of `train_default_checkpoint.py`, with its stages "start" and "objects" done.
        folder: gets the checkpoints; what an earlier, killed run left there is removed.

    Returns:
        A row per composition, kind of masks, and kind of question.
    """
    started = time.perf_counter()
    variant = {**VARIANTS, **ABLATIONS}[name]
    shutil.rmtree(folder, ignore_errors=True)
    pictures, test_pictures = schedule.paths(work_dir, "train"), schedule.paths(work_dir, "test")
    processor = save_start(variant, seed, work_dir / "start", folder / "start", pictures)
    store = ObjectStore.open(work_dir / "objects")
    if variant.config.get("object_embedding") == "mask_pooling":
        store = embed_again(store, pictures + test_pictures, processor, folder.parent / "mask_pooling_objects")

    most = variant.max_training_objects
    options = {
        "seed": seed,
        "max_object_tokens": processor.object_settings["max_object_tokens"] if most is None else most,
        "save_strategy": "no",
        "logging_steps": max(1, schedule.pictures // 320),
    }
    learn_captions(folder / "start", folder / "projector", pictures, store, **options)
    learn_answers(folder / "projector", folder / "finetuned", pictures, store, rounds=schedule.rounds, **options)
    minutes = (time.perf_counter() - started) / 60

    model = AutoModelForImageTextToText.from_pretrained(folder / "finetuned")
    processor = AutoProcessor.from_pretrained(folder / "finetuned")
    caps = OBJECT_CAPS if name in VARIANTS else ()
    rows = measure(model, processor, ask_about(test_pictures, store), "detected", caps=caps)
    if name == "all three":
        asked = ask_about(test_pictures, true_objects(test_pictures, processor))
        rows += measure(model, processor, asked, "ground truth", budgets=BUDGETS[:1], caps=())
    told = {
        "variant": name,
        "seed": seed,
        "training_pictures": schedule.pictures,
        "training_rounds": schedule.rounds,
        "max_training_objects": options["max_object_tokens"],
        "training_minutes": round(minutes, 2),
    }
    return [{**told, **row} for row in rows]


# ------------------------------------------------------------------------------------------------ before training


def save_start(variant: Variant, seed: int, start: Path, folder: Path, pictures: Sequence[Path]) -> MaskLlavaProcessor:
    """Saves the checkpoint that a variant's training starts from, and returns its processor."""
    changes = dict(variant.config)
    if changes.get("norm_scaling") == "fixed":
        changes["patch_statistics"] = patch_statistics(start, pictures[:512])
    model = AutoModelForImageTextToText.from_pretrained(start, **changes)
    # Its weights are the same in all variants; another seed is to change them as well as the order of the pictures
    torch.manual_seed(seed)
    for weight in model.model.multi_modal_projector.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=model.config.text_config.initializer_range)
    model.save_pretrained(folder)
    counts = {name: getattr(model.config, name) for name in ("use_cls_token", "patch_grid_size", "max_object_tokens")}
    AutoProcessor.from_pretrained(start, object_settings=counts).save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


@torch.inference_mode()
def patch_statistics(checkpoint: Path, pictures: Sequence[Path]) -> tuple[float, float]:
    """Mean and standard deviation over patches and channels of pictures, for `norm_scaling="fixed"`."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    patches = []
    for batch in batches(pictures, 64):
        inputs = processor(images=list(map(str, batch)), text=["<image>"] * len(batch), max_object_tokens=0)
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        patches.append(states[model.config.vision_feature_layer][:, 1:])
    features = torch.cat(patches)
    return features.mean().item(), features.std(correction=0).item()


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# ------------------------------------------------------------------------------------------------ other objects


def embedded(
    pictures: Sequence[Path], objects: Sequence[ImageObjects], processor: MaskLlavaProcessor
) -> list[ImageObjects]:
    """Objects with the embeddings that a processor makes of their masks; neither detector nor segmenter runs."""
    bare = [replace(entry, embeddings=None, embedding_fingerprint=None) for entry in objects]
    inputs = processor(images=list(map(str, pictures)), text=["<image>"] * len(bare), objects=bare)
    if inputs["object_counts"].tolist() != list(map(len, bare)):
        raise ValueError("An object has no pixel in the tower's frame, so embeddings and objects no longer fit.")
    fingerprint = processor.object_fingerprint()["embedding"]
    return [
        replace(entry, masks=None, embeddings=rows[: len(entry)].clone(), embedding_fingerprint=fingerprint)
        for entry, rows in zip(bare, inputs["object_embeds"], strict=True)
    ]


def embed_again(
    source: ObjectStore, pictures: Sequence[Path], processor: MaskLlavaProcessor, folder: Path
) -> ObjectStore:
    """A store of the same objects, embedded as `processor` does; what is in it already stays."""
    target = ObjectStore.create_or_open(folder, processor.object_fingerprint())
    missing = [path for path in pictures if image_key(path) not in target]
    with target.writer() as writer:
        for batch in batches(missing, 32):
            found = embedded(batch, [source.get(path, with_masks=True) for path in batch], processor)
            for path, objects in zip(batch, found, strict=True):
                writer.add(image_key(path), objects)
    return ObjectStore.open(folder)


@dataclass(frozen=True)
class KnownObjects:
    """Objects by path, where an `ObjectStore` is expected."""

    by_path: dict[Path, ImageObjects]

    def get(self, image: Path, with_masks: bool | None = None) -> ImageObjects:
        return self.by_path[image]


def true_objects(pictures: Sequence[Path], processor: MaskLlavaProcessor) -> KnownObjects:
    """The shapes of held-out scenes by their exact masks, the largest first, as far as the processor takes them."""
    known: dict[Path, ImageObjects] = {}
    for batch in batches(list(enumerate(pictures)), 32):
        objects = []
        for index, _ in batch:
            masks = torch.from_numpy(make_scene("test", index).masks)
            order = masks.flatten(1).sum(1).argsort(descending=True, stable=True)
            shapes = ImageObjects.from_masks(masks[order], tuple(masks.shape[1:]))
            objects.append(shapes[: processor.object_settings["max_object_tokens"]])
        paths = [path for _, path in batch]
        known |= zip(paths, embedded(paths, objects, processor), strict=True)
    return KnownObjects(known)


# ------------------------------------------------------------------------------------------------ after training


def compositions(
    layout: TokenLayout, budgets: Sequence[int] = BUDGETS, caps: Sequence[int] = OBJECT_CAPS
) -> list[tuple[int | None, str, int, TokenLayout]]:
    """What is measured: the budget, if it is one, the knob of `generate` and its value, and what is left by it.

    Without objects, a budget is spent on the largest square that fits, to be fair: the rule of `max_visual_tokens`,
    which is made for objects beside patches, would choose 4 x 4 where 5 x 5 fit.
    """
    found: list[tuple[int | None, str, int, TokenLayout]] = []
    for budget in budgets:
        if layout.max_object_tokens:
            found.append((budget, "max_visual_tokens", budget, layout.reduced(max_visual_tokens=budget)))
        else:
            grid = min(math.isqrt(budget - layout.num_cls_tokens), layout.patch_grid_size)
            found.append((budget, "patch_grid_size", grid, layout.reduced(patch_grid_size=grid)))
    if layout.max_object_tokens:
        found += [(None, "max_object_tokens", cap, layout.reduced(max_object_tokens=cap)) for cap in caps]
    return found


def measure(
    model: nn.Module,
    processor: MaskLlavaProcessor,
    asked: Sequence[AskedPicture],
    masks: str,
    budgets: Sequence[int] = BUDGETS,
    caps: Sequence[int] = OBJECT_CAPS,
) -> list[dict[str, Any]]:
    """Rows with the part of right answers, per composition and kind of question.

    Args:
        masks: whose they are, for the rows.
    """
    rows, known = [], {}
    layout = TokenLayout.from_config(model.config)
    for budget, knob, value, left in compositions(layout, budgets, caps):
        if left not in known:  # 57 tokens are all, and so are 20 objects
            counts = {"max_object_tokens": left.max_object_tokens, "patch_grid_size": left.patch_grid_size}
            known[left] = score_answers(model, processor, asked, **counts)
        scores = with_mean(known[left])
        agreeing = sum(agrees_with_generate(model, processor, asked[:NUM_CHECKED], left, {knob: value}))
        print(f"{masks} masks, {knob}={value}: {scores[MEAN]:.1%} right", flush=True)
        for kind, accuracy in scores.items():
            kinds = MEAN_KINDS if kind == MEAN else (kind,)
            entries = [entry for entry in asked if entry.question.kind in kinds]
            tokens = [left.num_tokens(len(entry.objects)) for entry in entries]
            rows.append(
                {
                    "budget": "" if budget is None else budget,
                    "knob": knob,
                    "value": value,
                    "composition": f"{left.num_cls_tokens}+{left.num_patch_tokens}+{left.max_object_tokens}",
                    "tokens_per_image": round(sum(tokens) / len(tokens), 2),
                    "masks": masks,
                    "question_kind": kind,
                    "questions": len(entries),
                    "accuracy": round(accuracy, 4),
                    "agrees_with_generate": f"{agreeing} of {len(asked[:NUM_CHECKED])}",
                }
            )
    return rows


def with_mean(scores: dict[str, float]) -> dict[str, float]:
    """Scores per kind of question, and before them the mean over `MEAN_KINDS`."""
    scores = {kind: score for kind, score in scores.items() if kind in QUESTION_KINDS}
    in_mean = [score for kind, score in scores.items() if kind in MEAN_KINDS]
    return {MEAN: sum(in_mean) / len(in_mean), **scores}


def agrees_with_generate(
    model: nn.Module,
    processor: MaskLlavaProcessor,
    asked: Sequence[AskedPicture],
    layout: TokenLayout,
    knobs: dict[str, int],
) -> list[bool]:
    """Whether `generate`, with the knobs that users have, is right where `score_answers` with `layout` says so."""
    counts = {"max_object_tokens": layout.max_object_tokens, "patch_grid_size": layout.patch_grid_size}
    scored = [score_answers(model, processor, [entry], **counts)["mean"] == 1 for entry in asked]
    answers = generated_answers(model, processor, asked, knobs)
    return [
        (answer == entry.question.answer) == right for answer, entry, right in zip(answers, asked, scored, strict=True)
    ]


@torch.inference_mode()
def generated_answers(
    model: nn.Module, processor: MaskLlavaProcessor, asked: Sequence[AskedPicture], knobs: dict[str, int]
) -> list[str]:
    """What `generate` answers when it is called with these knobs."""
    has_objects = processor.object_settings["max_object_tokens"] > 0
    questions = [chat((entry.question.text, ""))[:1] for entry in asked]
    inputs = processor(
        images=[[str(entry.picture)] for entry in asked],
        text=processor.apply_chat_template(questions, add_generation_prompt=True),
        objects=[entry.objects for entry in asked] if has_objects else None,
        max_object_tokens=None if has_objects else 0,
        padding=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, **knobs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]

# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The stages of answering one question about one image, each as a call that can be timed and counted."""

import copy
import io
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from ..modeling.object_embedding import LAST_BLOCK_INPUT, embed_masks
from ..modeling.token_composition import compose_tokens
from ..modeling.token_layout import TokenLayout
from ..processing.object_pipeline import boxes_to_masks
from ..processing.objects.detectors import ObjectDetector
from ..processing.objects.segmenters import default_batch_sizes
from .flop_counts import count_flops
from .measured_models import Models
from .measuring import SEED, anonymous_bytes, measure


READ = "decode and preprocess"
DETECTOR = "detector"
ENCODER = "segmenter encoder"
DECODER = "mask decoder"
TOWER = "tower"
INVERSION = "inversion"
COMPOSITION = "composition and projector"
PREFILL = "prefill"
DECODE = "decode"
STAGES = (READ, DETECTOR, ENCODER, DECODER, TOWER, INVERSION, COMPOSITION, PREFILL, DECODE)

PICTURE_HW = (480, 640)  # COCO's usual size

ENOUGH_SECONDS = 10.0  # of calls of one stage: what takes long is called once, what is short as often as wanted

NOT_ON_META = ("Deformable DETR R50",)  # it makes tensors on the CPU along its way


class Embedding(NamedTuple):
    """A way to embed a mask: `object_embedding` of `MaskLlavaConfig`, and the iterations of MaskInversion."""

    method: Literal["mask_inversion", "mask_pooling"]
    iterations: int = 1


EMBEDDINGS = {
    "MaskInversion, 10 iterations": Embedding("mask_inversion", 10),
    "MaskInversion, 5 iterations": Embedding("mask_inversion", 5),
    "mask pooling": Embedding("mask_pooling"),
}


@dataclass(frozen=True)
class Stage:
    """A piece of work on one image.

    Attributes:
        name: one of `STAGES`.
        part: which detector, segmenter, or way to embed; for `READ` which image processor: a detector, a segmenter,
            "tower", or "file" for the JPEG itself; for `COMPOSITION` "llava" or "mask-llava".
        count: boxes, masks, or tokens per image.
    """

    name: str
    part: str = ""
    count: int = 0


@dataclass(frozen=True)
class Questions:
    """How much text goes with an image: tokens of the prompt, and of the answer that is decoded."""

    prompt_tokens: int = 50  # LLaVA-1.5's system prompt and a short question
    answer_tokens: int = 64


@torch.inference_mode()
def measure_stages(
    models: Models, stages: Iterable[Stage], questions: Questions, threads: int | None, flops_only: bool, repeats: int
) -> list[dict[str, Any]]:
    """Counts and times stages that share models, which are loaded once. To be called in a process of its own.

    Returns:
        a row per stage: "gflop", and unless `flops_only` "wall_s", "cpu_s" (medians) and "peak_gb", the most memory of
        its own that the process held, the model's weights included.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    stages = list(stages)
    rows = [{"stage": stage.name, "part": stage.part, "count": stage.count} for stage in stages]
    before = anonymous_bytes()
    bench, meta = _Bench(models, "cpu", questions), _Bench(models, "meta", questions)  # nothing is loaded yet
    for row, stage in zip(rows, stages, strict=True):
        on_meta = models.on_meta and stage.name not in (INVERSION, COMPOSITION) and stage.part not in NOT_ON_META
        row["gflop"] = round((meta if on_meta else bench).gflop(stage), 3)
    if flops_only:
        return rows
    for row, stage in zip(rows, stages, strict=True):
        run = bench.build(stage)
        held = anonymous_bytes() - before
        # The prefills before it have warmed the language model up
        measured = measure(run, repeats, warm_up=stage.name != DECODE, enough_s=ENOUGH_SECONDS)
        row["wall_s"], row["cpu_s"] = round(measured.wall_s, 5), round(measured.cpu_s, 5)
        row["peak_gb"] = round((held + measured.peak_bytes) / 1e9, 3)
    return rows


def group_of(stage: Stage) -> str:
    """What a stage loads: a detector or segmenter, by its name, the language model, or what is around the tower."""
    if stage.name in (DETECTOR, ENCODER, DECODER) or (stage.name == READ and stage.part not in ("file", "tower")):
        return stage.part
    return "language model" if stage.name in (PREFILL, DECODE) else "vision"


class _Bench:
    """Builds stages around models that are loaded once."""

    def __init__(self, models: Models, device: str, questions: Questions) -> None:
        self.models, self.device, self.questions = models, device, questions
        self.config = models.config()
        self.layout = TokenLayout.from_config(self.config)
        self._loaded: dict[str, Any] = {}
        self._builders: dict[str, Callable[[Stage], Callable[[], object]]] = {
            READ: self._read,
            DETECTOR: self._detect,
            ENCODER: self._encode,
            DECODER: self._decode_masks,
            TOWER: self._tower,
            INVERSION: self._invert,
            COMPOSITION: self._compose,
            PREFILL: self._prefill,
            DECODE: self._decode,
        }

    def build(self, stage: Stage) -> Callable[[], object]:
        """A call that does the stage's work once."""
        return self._builders[stage.name](stage)

    def gflop(self, stage: Stage) -> float:
        if stage.name == READ:
            return 0.0
        if stage.name == INVERSION and EMBEDDINGS[stage.part].method == "mask_inversion":
            return self._inversion_gflop(stage)
        if stage.name == DECODE:
            return self._decode_gflop(stage)
        return count_flops(self.build(stage)) / 1e9

    def _decode_gflop(self, stage: Stage) -> float:
        """From the first and the last token: each costs as much more than the one before."""
        num_tokens = self.questions.answer_tokens
        first = count_flops(self._decode(stage, num_tokens=1))
        last = count_flops(self._decode(replace(stage, count=stage.count + num_tokens - 1), num_tokens=1))
        return num_tokens * (first + last) / 2 / 1e9

    def _inversion_gflop(self, stage: Stage) -> float:
        """From counts of few masks and iterations: both enter linearly; the first map is the same for all masks."""

        def count(masks: int, iterations: int) -> int:
            return count_flops(self._invert(replace(stage, count=masks), iterations))

        once, iterations = count(1, 1), EMBEDDINGS[stage.part].iterations
        per_mask, per_iteration = count(2, 1) - once, count(1, 2) - once
        return (once + (stage.count - 1) * per_mask + (iterations - 1) * stage.count * per_iteration) / 1e9

    def _load(self, key: str, load: Callable[[], Any]) -> Any:
        if key not in self._loaded:
            self._loaded[key] = load()
        return self._loaded[key]

    def _tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(self.device, self.models.dtype)

    # ------------------------------------------------------------------------------------------------- the front end
    def _read(self, stage: Stage) -> Callable[[], object]:
        file = io.BytesIO()
        picture().save(file, format="JPEG", quality=90)
        if stage.part == "file":
            return lambda: Image.open(io.BytesIO(file.getvalue())).convert("RGB")
        if stage.part == "tower":
            image_processor = self._vision().image_processor
        else:
            _, image_processor = self._part(stage.part)
        image = picture()
        return lambda: image_processor(images=image, return_tensors="pt")

    def _detect(self, stage: Stage) -> Callable[[], object]:
        model, image_processor = self._part(stage.part)
        model = ObjectDetector(model, image_processor).model  # with its memory format
        inputs = image_processor(images=picture(), return_tensors="pt")
        arguments = {name: value.to(self.device) for name, value in inputs.items()}
        arguments["pixel_values"] = arguments["pixel_values"].to(self.models.dtype)
        return lambda: model(**arguments)

    def _encode(self, stage: Stage) -> Callable[[], object]:
        model, image_processor = self._part(stage.part)
        pixels = image_processor(images=picture(), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.models.dtype)
        return lambda: model.get_image_embeddings(pixels)

    def _decode_masks(self, stage: Stage) -> Callable[[], object]:
        """From the encoded image to masks of the original size."""
        model, image_processor = self._part(stage.part)
        inputs = image_processor(images=picture(), return_tensors="pt")
        embeddings = model.get_image_embeddings(inputs["pixel_values"].to(self.device, self.models.dtype))
        sizes = {"reshaped_input_sizes": inputs["reshaped_input_sizes"]} if "reshaped_input_sizes" in inputs else {}
        frame = torch.tensor(inputs["pixel_values"].shape[-2:]).flip(0).repeat(2)
        boxes = (random_boxes(stage.count) * frame).to(self.device)
        _, boxes_at_once = default_batch_sizes(torch.device("cpu"), int(frame.max()))

        def run() -> None:
            for chunk in boxes.split(boxes_at_once):
                logits = model(image_embeddings=embeddings, input_boxes=chunk[None], multimask_output=False).pred_masks
                if self.device != "meta":
                    image_processor.post_process_masks([logits[0].float()], original_sizes=[PICTURE_HW], **sizes)

        return run

    def _part(self, name: str) -> tuple[Any, Any]:
        """A detector or segmenter, and its image processor."""
        load = self.models.detector if name in self.models.detectors else self.models.segmenter
        return self._load(name, lambda: load(name, self.device))

    # --------------------------------------------------------------------------------------------------- the image
    def _vision(self) -> Any:
        return self._load("vision", lambda: self.models.vision(self.device))

    def _tower(self, stage: Stage) -> Callable[[], object]:
        side = self.config.vision_config.image_size
        tower, pixels = self._vision().tower, self._tensor(1, 3, side, side)
        layers = [self.config.vision_feature_layer]
        return lambda: tower(pixels, output_hidden_states=layers, return_dict=True)

    def _invert(self, stage: Stage, iterations: int | None = None) -> Callable[[], object]:
        config, embedding = copy.deepcopy(self.config), EMBEDDINGS[stage.part]
        config.object_embedding = embedding.method
        config.mask_inversion = {**(config.mask_inversion or {}), "iterations": iterations or embedding.iterations}
        side, layer = config.vision_config.image_size, config.vision_feature_layer
        masks = boxes_to_masks(side * random_boxes(stage.count), (side, side))[None]
        tower, hidden = self._vision().tower, self._features()
        states = {LAST_BLOCK_INPUT: hidden, layer: hidden}
        return lambda: embed_masks(tower, states, masks, config, layer)

    def _compose(self, stage: Stage) -> Callable[[], object]:
        layout, scaling = self.layout.reduced(max_visual_tokens=stage.count), self.config.norm_scaling
        if stage.part == "llava":
            layout, scaling = TokenLayout(False, round(stage.count**0.5), 0), "none"
        features, projector = self._features(), self._vision().projector
        objects = self._tensor(1, layout.max_object_tokens, features.shape[-1]).float()
        fixed = self.config.patch_statistics

        def run() -> object:
            return projector(compose_tokens(features, objects, layout, scaling, fixed).to(self.models.dtype))

        return run

    def _features(self) -> torch.Tensor:
        vision = self.config.vision_config
        return self._tensor(1, 1 + (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)

    # --------------------------------------------------------------------------------------------- the language model
    def _prompt(self, stage: Stage) -> tuple[Any, torch.Tensor]:
        model = self._load("language model", lambda: self.models.language_model(self.device))
        length = self.questions.prompt_tokens + stage.count
        return model, self._tensor(1, length, self.config.text_config.hidden_size)

    def _prefill(self, stage: Stage) -> Callable[[], object]:
        model, prompt = self._prompt(stage)
        return lambda: model(inputs_embeds=prompt, use_cache=True, logits_to_keep=1)

    def _decode(self, stage: Stage, num_tokens: int | None = None) -> Callable[[], object]:
        """Token by token after a prefill that is done before; the cache is cut back for the next call."""
        model, prompt = self._prompt(stage)
        cache = DynamicCache(config=self.config.text_config)
        model(inputs_embeds=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, num_tokens = prompt[:, -1:], num_tokens or self.questions.answer_tokens

        def run() -> None:
            for _ in range(num_tokens):
                model(inputs_embeds=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-num_tokens)

        return run


def picture() -> Image.Image:
    """A picture of soft blotches, the same each time."""
    colors = np.random.default_rng(SEED).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize(PICTURE_HW[::-1], Image.Resampling.BICUBIC)


def random_boxes(count: int) -> torch.Tensor:
    """(count, 4) float32 left, top, right, bottom, relative to the picture's width and height; the same each time."""
    generator = torch.Generator().manual_seed(SEED)
    middle = 0.2 + 0.6 * torch.rand(count, 2, generator=generator)
    half = 0.05 + 0.15 * torch.rand(count, 2, generator=generator)
    return torch.cat([middle - half, middle + half], dim=1)


def grouped(stages: Iterable[Stage]) -> list[list[Stage]]:
    """Different stages in groups that share models; inside a group in the order of `STAGES`."""
    wanted = sorted(dict.fromkeys(stages), key=lambda stage: (group_of(stage), STAGES.index(stage.name), stage.count))
    return [list(group) for _, group in itertools.groupby(wanted, key=group_of)]

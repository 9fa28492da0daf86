# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Masks from boxes by models of the Segment Anything family.

Each box gives one mask, by the decoder's single-mask output (`multimask_output=False`): a box leaves little of the
ambiguity that the three-mask output is for, and one token per box needs no choice among three. SAM 2 and EdgeTAM then
replace an unstable single mask by their best of three themselves.
"""

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    EdgeTamModel,
    PreTrainedModel,
    Sam2Model,
    SamModel,
)


# The video checkpoints of SAM 2 and EdgeTAM are the usual way to publish the image models that are part of them.
_MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "sam": SamModel,
    "sam2": Sam2Model,
    "sam2_video": Sam2Model,
    "edgetam": EdgeTamModel,
    "edgetam_video": EdgeTamModel,
}

# Decoder heads leave no trace in the shapes of the weights; all published segment-anything checkpoints have this many.
_DECODER_HEADS = 8

# Masks are brought to the original size in steps of at most this many pixels (float32, twice).
_PIXELS_AT_ONCE = 2**24

# Most images and boxes per pass (an input of 1024 x 1024 can take over 1 GB in the encoder's attention); and on a CPU,
# whose caches a pass should not outgrow, most pixels of the model's input that they stand for. Of 96 x 96 four images
# are encoded a fifth faster together than alone. Of 1024 x 1024 a batch of images wins nothing, and boxes two by two
# are decoded in 0.6 of the time, and an eighth of the memory, of 16 together.
_IMAGES_PER_PASS, _PIXELS_ENCODED_ON_CPU = 4, 2**16
_BOXES_PER_PASS, _PIXELS_DECODED_ON_CPU = 16, 2**21


class Segmenter(Protocol):
    """Turns boxes into masks.

    Attributes:
        image_batch_size: images per pass of the image encoder.
        box_chunk_size: boxes per pass of the mask decoder.
    """

    image_batch_size: int
    box_chunk_size: int

    def segment(self, images: Sequence[Image.Image], boxes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One mask per box.

        Args:
            images: upright RGB images.
            boxes: per image (n_i, 4), left, top, right, bottom in pixels of that image.

        Returns:
            per image (n_i, H, W) bool on the CPU. An image without boxes is not encoded.

        Raises:
            ValueError: as many lists of boxes as images are expected, each (n_i, 4).
        """
        ...


def load_segmenter(
    source: str | PathLike[str],
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Segmenter:
    """Loads a segmenter.

    Args:
        source: Hub id or folder of a Transformers SAM, SAM 2 or EdgeTAM checkpoint; or the path of a `.pth` file of the
            segment-anything package, whose size is read from its weights.
        revision: branch, tag or commit on the Hub.
        device: where the model runs; masks come back to the CPU.
        dtype: of the model, None for the one it was saved in; of a `.pth` file only the image encoder, which is nearly
            all of the cost, has it (None: float32).

    Raises:
        ValueError: another kind of checkpoint, or a `.pth` file that holds more than tensors.
        FileNotFoundError: no such `.pth` file.
    """
    if Path(source).suffix == ".pth":
        return SegmentAnythingSegmenter(load_segment_anything(source), device, dtype or torch.float32)
    config = AutoConfig.from_pretrained(source, revision=revision)
    model_class = _MODEL_CLASSES.get(config.model_type)
    if model_class is None:
        raise ValueError(
            f"The segmenter {str(source)!r} has model_type {config.model_type!r}, expected one of "
            f"{', '.join(sorted(_MODEL_CLASSES))}, or a `.pth` file of the segment-anything package."
        )
    model: Any = model_class.from_pretrained(source, revision=revision or "main", dtype=dtype or "auto")
    return TransformersSegmenter(model.to(device), _load_image_processor(source, revision))


def _load_image_processor(source: str | PathLike[str], revision: str | None) -> Any:
    # Transformers takes torchvision's class even where Pillow's was saved, and their pixels differ a little
    saved, _ = BaseImageProcessor.get_image_processor_dict(source, revision=revision)
    backend = "pil" if str(saved.get("image_processor_type")).endswith("Pil") else None
    return AutoImageProcessor.from_pretrained(source, revision=revision, backend=backend)


class _BoxSegmenter:
    """The walk over images and chunks of boxes that all kinds share; they give `_encode` and `_decode`."""

    def __init__(
        self, device: torch.device, input_side: int, image_batch_size: int | None, box_chunk_size: int | None
    ) -> None:
        self.device = device
        images, boxes = default_batch_sizes(device, input_side)
        self.image_batch_size = image_batch_size or images
        self.box_chunk_size = box_chunk_size or boxes

    def segment(self, images: Sequence[Image.Image], boxes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Segmenter.segment`."""
        if len(images) != len(boxes):
            raise ValueError(f"There are {len(images)} images and {len(boxes)} lists of boxes, expected equal numbers.")
        for index, image_boxes in enumerate(boxes):
            if image_boxes.ndim != 2 or image_boxes.shape[1] != 4:
                raise ValueError(f"`boxes[{index}]` has shape {tuple(image_boxes.shape)}, expected (n, 4).")
        masks = [
            torch.zeros(len(image_boxes), image.height, image.width, dtype=torch.bool)
            for image, image_boxes in zip(images, boxes, strict=True)
        ]
        to_encode = [index for index, image_boxes in enumerate(boxes) if len(image_boxes)]
        for start in range(0, len(to_encode), self.image_batch_size):
            batch = to_encode[start : start + self.image_batch_size]
            self._segment_batch(
                [images[index] for index in batch], [boxes[index] for index in batch], [masks[index] for index in batch]
            )
        return masks

    @torch.inference_mode()
    def _segment_batch(self, images: list[Image.Image], boxes: list[torch.Tensor], masks: list[torch.Tensor]) -> None:
        """Fills `masks`, per image (n, H, W); made outside inference mode, they may be used in any way."""
        resized_hw, embeddings = self._encode(images)
        to_fill = list(masks)
        rows = torch.arange(len(images)).repeat_interleave(torch.tensor([len(image_boxes) for image_boxes in boxes]))
        scaled = torch.cat([_scaled(*entry) for entry in zip(boxes, images, resized_hw, strict=True)])
        for some_rows, some_boxes in zip(
            rows.split(self.box_chunk_size), scaled.split(self.box_chunk_size), strict=True
        ):
            logits = self._decode(some_rows, embeddings, some_boxes.to(self.device)).float()  # (k, 1, h, w)
            bad = int((~logits.isfinite()).flatten(1).any(1).sum())
            if bad:
                raise ValueError(
                    f"The segmenter returned NaN or infinite mask logits for {bad} of {len(logits)} boxes; their masks "
                    "would be arbitrary. Load it with dtype torch.float32 or torch.bfloat16."
                )
            for row, of_image in _by_image(some_rows, logits):
                self._fill(to_fill[row][: len(of_image)], of_image, resized_hw[row])
                to_fill[row] = to_fill[row][len(of_image) :]

    def _fill(self, masks: torch.Tensor, logits: torch.Tensor, resized_hw: tuple[int, int]) -> None:
        """Writes the masks (k, H, W) of an image from their logits (k, 1, h, w)."""
        height, width = masks.shape[1:]
        at_once = max(1, _PIXELS_AT_ONCE // (height * width))
        for some_masks, some_logits in zip(masks.split(at_once), logits.split(at_once), strict=True):
            some_masks.copy_(self._to_original_size(some_logits, resized_hw, (height, width))[:, 0])

    def _encode(self, images: list[Image.Image]) -> tuple[list[tuple[int, int]], Any]:
        """Each image's size inside the model's input, and the embeddings of all."""
        raise NotImplementedError

    def _decode(self, rows: torch.Tensor, embeddings: Any, boxes: torch.Tensor) -> torch.Tensor:
        """(k, 1, h, w) mask logits for boxes (k, 4) in pixels of the model's input.

        Args:
            rows: (k,), on the CPU: each box's image, its row in the encoded batch; rising.
        """
        raise NotImplementedError

    def _to_original_size(
        self, logits: torch.Tensor, resized_hw: tuple[int, int], image_hw: tuple[int, int]
    ) -> torch.Tensor:
        """(k, 1, H, W) bool: where the logits, brought to the original image, are above zero."""
        raise NotImplementedError


def default_batch_sizes(device: torch.device, input_side: int) -> tuple[int, int]:
    """Images per pass of the encoder and boxes per pass of the decoder, for a model's square input."""
    if device.type != "cpu":
        return _IMAGES_PER_PASS, _BOXES_PER_PASS
    images, boxes = (pixels // input_side**2 for pixels in (_PIXELS_ENCODED_ON_CPU, _PIXELS_DECODED_ON_CPU))
    return min(_IMAGES_PER_PASS, max(1, images)), min(_BOXES_PER_PASS, max(1, boxes))


def _scaled(boxes: torch.Tensor, image: Image.Image, resized_hw: tuple[int, int]) -> torch.Tensor:
    """Boxes (n, 4) in pixels of the image as float32 in pixels of the model's input."""
    return boxes.float().cpu() * torch.tensor([resized_hw[1] / image.width, resized_hw[0] / image.height] * 2)


def _by_image(rows: torch.Tensor, values: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """`values` (k, ...) cut where `rows` (k,), rising, go to another image; with that image's row."""
    images, numbers = rows.unique_consecutive(return_counts=True)
    return list(zip(images.tolist(), values.split(numbers.tolist()), strict=True))


class TransformersSegmenter(_BoxSegmenter):
    """Transformers' SAM, SAM 2 or EdgeTAM. The boxes of all images of an encoder pass are decoded together.

    Args:
        model: `SamModel`, `Sam2Model` or `EdgeTamModel`.
        image_processor: the one of its checkpoint.
        image_batch_size: images per encoder pass; by default 4, on a CPU 1 where the model's input is large.
        box_chunk_size: boxes per decoder pass, of one image or several; by default 16, on a CPU fewer for large inputs.
    """

    def __init__(
        self, model: Any, image_processor: Any, image_batch_size: int | None = None, box_chunk_size: int | None = None
    ) -> None:
        side = model.config.prompt_encoder_config.image_size
        input_side = side if isinstance(side, int) else max(side)
        super().__init__(model.device, input_side, image_batch_size, box_chunk_size)
        self.model = model.eval()
        self.image_processor = image_processor

    def _encode(self, images: list[Image.Image]) -> tuple[list[tuple[int, int]], list[torch.Tensor]]:
        inputs = self.image_processor(images=images, return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.device, self.model.dtype)
        # SAM keeps the aspect ratio and pads; SAM 2 and EdgeTAM stretch to the whole input and have no such entry.
        sizes = inputs.get("reshaped_input_sizes", [pixel_values.shape[-2:]] * len(images))
        embeddings = self.model.get_image_embeddings(pixel_values)
        levels = [embeddings] if isinstance(embeddings, torch.Tensor) else list(embeddings)
        return [(int(height), int(width)) for height, width in sizes], levels

    def _decode(self, rows: torch.Tensor, embeddings: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        # The decoder repeats an image's embeddings for each of its boxes. With boxes of several images they are
        # repeated here, each box as an image of its own: no row is then padded to the largest number of boxes.
        first, last = int(rows[0]), int(rows[-1])
        one_image = first == last
        levels = [level[first : first + 1] if one_image else level[rows.to(self.device)] for level in embeddings]
        outputs = self.model(
            image_embeddings=levels[0] if self.model.config.model_type == "sam" else levels,
            input_boxes=boxes[None] if one_image else boxes[:, None],
            multimask_output=False,
        )
        return outputs.pred_masks.flatten(0, 1)

    def _to_original_size(
        self, logits: torch.Tensor, resized_hw: tuple[int, int], image_hw: tuple[int, int]
    ) -> torch.Tensor:
        sizes = {"reshaped_input_sizes": [resized_hw]} if self.model.config.model_type == "sam" else {}
        return self.image_processor.post_process_masks([logits], original_sizes=[image_hw], **sizes)[0]


class SegmentAnythingSegmenter(_BoxSegmenter):
    """A model of the segment-anything package.

    Its decoder repeats all embeddings it gets for each box, so it takes one image at a time.

    Args:
        model: `segment_anything.modeling.Sam`.
        device: where it runs.
        dtype: of the image encoder. Prompts and masks are computed in float32, because the package casts coordinates
            to it.
        image_batch_size: images per encoder pass; by default 4, on a CPU 1 where the model's input is large.
        box_chunk_size: boxes per decoder pass; by default 16, on a CPU fewer where the model's input is large.
    """

    def __init__(
        self,
        model: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        image_batch_size: int | None = None,
        box_chunk_size: int | None = None,
    ) -> None:
        from segment_anything.utils.transforms import ResizeLongestSide

        super().__init__(torch.device(device), model.image_encoder.img_size, image_batch_size, box_chunk_size)
        self.model = model.eval().to(self.device)
        self.dtype = dtype
        self.model.image_encoder.to(dtype)
        self.resize = ResizeLongestSide(model.image_encoder.img_size)

    def _encode(self, images: list[Image.Image]) -> tuple[list[tuple[int, int]], torch.Tensor]:
        resized = [torch.from_numpy(self.resize.apply_image(np.array(image.convert("RGB")))) for image in images]
        resized = [image.permute(2, 0, 1).to(self.device) for image in resized]  # (3, h, w) uint8
        pixel_values = torch.stack([self.model.preprocess(image) for image in resized])
        embeddings = self.model.image_encoder(pixel_values.to(self.dtype)).float()
        return [(image.shape[1], image.shape[2]) for image in resized], embeddings

    def _decode(self, rows: torch.Tensor, embeddings: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        logits = []
        for row, of_image in _by_image(rows, boxes):
            sparse, dense = self.model.prompt_encoder(points=None, boxes=of_image, masks=None)
            decoded, _ = self.model.mask_decoder(
                image_embeddings=embeddings[row : row + 1],
                image_pe=self.model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            logits.append(decoded)
        return torch.cat(logits)

    def _to_original_size(
        self, logits: torch.Tensor, resized_hw: tuple[int, int], image_hw: tuple[int, int]
    ) -> torch.Tensor:
        return self.model.postprocess_masks(logits, resized_hw, image_hw) > self.model.mask_threshold


def load_segment_anything(path: str | PathLike[str]) -> Any:
    """A `segment_anything.modeling.Sam` from a `.pth` file of that package, on the CPU, in float32.

    The architecture is read from the shapes of the weights, never from the file's name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds more than tensors (nothing of it is run), or weights of another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no file {str(path)!r}. A `.pth` segmenter is a local file; checkpoints on the Hub are named by "
            "their repository, for example 'facebook/sam-vit-base'."
        )
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds more than tensors, and loading it would run code from the file: {error}\nNothing was "
            "loaded. If you trust its origin, load it once yourself and save only the weights: "
            "torch.save(torch.load(path, weights_only=False).state_dict(), new_path)."
        ) from error
    tensors = isinstance(state_dict, Mapping) and all(isinstance(value, torch.Tensor) for value in state_dict.values())
    if not tensors or "image_encoder.patch_embed.proj.weight" not in state_dict:
        found = sorted(map(str, state_dict))[:4] if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of the segment-anything package: found {found}, expected a flat state "
            "dictionary with 'image_encoder.patch_embed.proj.weight'. Save the model's own `state_dict()`."
        )
    return build_segment_anything({name: tensor.float() for name, tensor in state_dict.items()})


def build_segment_anything(state_dict: Mapping[str, torch.Tensor]) -> Any:
    """A `segment_anything.modeling.Sam` with these weights, of the architecture that their shapes tell.

    Width, depth, patch and input size are lengths of weights; the encoder's heads follow from the width of its relative
    positions, its windows from their length (a global block spans the whole grid). Only the decoder's heads, 8 in
    all published checkpoints, are taken for granted.

    Raises:
        ValueError: names or shapes that do not fit the package's model.
    """
    try:
        from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
    except ImportError as error:
        raise ImportError(
            "A `.pth` segmenter needs the segment-anything package: pip install segment-anything"
        ) from error

    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise ValueError(
                f"The segment-anything checkpoint lacks {name!r}. Models derived from SAM (MobileSAM, HQ-SAM and "
                "others) have another architecture; load them through Transformers where it has them."
            )
        return state_dict[name].shape

    def count(pattern: str) -> int:
        return len({match[1] for name in state_dict if (match := re.match(pattern, name))})

    encoder, decoder = "image_encoder", "mask_decoder"
    width, _, patch_size, _ = shape(f"{encoder}.patch_embed.proj.weight")
    grid = shape(f"{encoder}.pos_embed")[1]
    depth = count(rf"{encoder}\.blocks\.(\d+)\.")
    mlp_width = shape(f"{encoder}.blocks.0.mlp.lin1.weight")[0]
    spans = [(shape(f"{encoder}.blocks.{block}.attn.rel_pos_h")[0] + 1) // 2 for block in range(depth)]
    windows = {span for span in spans if span != grid}
    if len(windows) > 1:
        raise ValueError(
            f"The segment-anything checkpoint has attention windows of {sorted(windows)} on a grid of {grid}, expected "
            "one size."
        )
    prompt_width = shape(f"{encoder}.neck.0.weight")[0]
    attention_width = shape(f"{decoder}.transformer.layers.0.cross_attn_token_to_image.q_proj.weight")[0]
    if attention_width % _DECODER_HEADS:
        raise ValueError(
            f"The segment-anything checkpoint has decoder attention of width {attention_width}, expected a multiple of "
            f"{_DECODER_HEADS}, the number of heads in all published checkpoints."
        )
    # On the meta device, because random weights of the largest model would take seconds and 2.5 GB in vain.
    with torch.device("meta"):
        sam = Sam(
            image_encoder=ImageEncoderViT(
                img_size=grid * patch_size,
                patch_size=patch_size,
                embed_dim=width,
                depth=depth,
                num_heads=width // shape(f"{encoder}.blocks.0.attn.rel_pos_h")[1],
                mlp_ratio=(mlp_width + 0.5) / width,  # the encoder rounds its product with the width down
                out_chans=prompt_width,
                qkv_bias=f"{encoder}.blocks.0.attn.qkv.bias" in state_dict,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=windows.pop() if windows else 0,
                global_attn_indexes=tuple(block for block, span in enumerate(spans) if span == grid),
            ),
            prompt_encoder=PromptEncoder(
                embed_dim=prompt_width,
                image_embedding_size=(grid, grid),
                input_image_size=(grid * patch_size, grid * patch_size),
                mask_in_chans=shape("prompt_encoder.mask_downscaling.3.weight")[0],
            ),
            mask_decoder=MaskDecoder(
                transformer_dim=prompt_width,
                transformer=TwoWayTransformer(
                    depth=count(rf"{decoder}\.transformer\.layers\.(\d+)\."),
                    embedding_dim=prompt_width,
                    num_heads=_DECODER_HEADS,
                    mlp_dim=shape(f"{decoder}.transformer.layers.0.mlp.lin1.weight")[0],
                    attention_downsample_rate=math.ceil(prompt_width / attention_width),
                ),
                num_multimask_outputs=shape(f"{decoder}.mask_tokens.weight")[0] - 1,
                iou_head_depth=count(rf"{decoder}\.iou_prediction_head\.layers\.(\d+)\."),
                iou_head_hidden_dim=shape(f"{decoder}.iou_prediction_head.layers.0.weight")[0],
            ),
        )
    try:
        sam.load_state_dict(dict(state_dict), strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights do not fit the segment-anything model that their shapes tell: {error}"
        ) from error
    # Not part of a state dictionary: mean and standard deviation of 8-bit RGB, the same for all published checkpoints.
    sam.pixel_mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    sam.pixel_std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    return sam.requires_grad_(False).eval()

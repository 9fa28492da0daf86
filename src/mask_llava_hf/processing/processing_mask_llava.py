# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Processor of Mask-LLaVA: text and images, and the objects in the images, to model inputs."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from ..modeling.token_layout import check_integer
from .chat_blocks import OBJECT_KEYS, object_entries, plain_blocks
from .given_objects import given_objects, says_nothing
from .image_inputs import flat_pictures, upright_images
from .object_parts import PART_NAMES, ObjectParts, share_model
from .object_pipeline import (
    IMAGES_PER_STEP,
    find_objects_in_steps,
    stack_embeddings,
    stack_masks,
    with_embeddings,
)
from .object_settings import ObjectSettings
from .objects.image_objects import ImageObjects
from .part_sources import PartSource, copy_relative_part, is_local, is_relative, unload_parts


class MaskLlavaImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What a call may say about images, beside the image processor's own arguments."""

    boxes: Any
    masks: Any
    objects: Any
    max_object_tokens: Any


class MaskLlavaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    images_kwargs: MaskLlavaImagesKwargs


class MaskLlavaProcessor(ProcessorMixin):
    r"""Makes model inputs from text, images, and the objects found or given in the images.

    A call returns, per image and in prompt order, `pixel_values` (I, 3, S, S) float, `object_counts` (I,) int64, and
    `object_embeds` (I, N, D) float32 or, with `object_settings["mask_inversion"] = "model"`, `object_masks`
    (I, N, S, S) uint8 in the frame of the tower's square input, where N is the call's `max_object_tokens`. Every
    `<image>` in the text becomes 1 + g * g + n_i placeholders.

    Args:
        image_processor: Transformers' `LlavaImageProcessor` (as LLaVA-1.5: `do_pad=True` pads to a square).
        tokenizer: a fast tokenizer with `image_token` as a special token.
        object_settings (`dict`, *optional*): see [`ObjectSettings`]; missing keys take their defaults.
        chat_template (`str`, *optional*): a Jinja template.
        image_token (`str`, defaults to `"<image>"`): stands for an image in the text.

    Call arguments beside those of every processor: `boxes`, `masks`, `objects` (one entry per image; None: detect,
    []: none) and `max_object_tokens` (None: as saved). All coordinates are pixels of the upright original image.
    """

    valid_processor_kwargs = MaskLlavaProcessorKwargs

    def __init__(
        self, image_processor=None, tokenizer=None, object_settings=None, chat_template=None, image_token="<image>"
    ):
        self.image_token = getattr(tokenizer, "image_token", image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token {self.image_token!r}, so images would stand where unknown words do. Add "
                f'it: `tokenizer.add_special_tokens({{"additional_special_tokens": ["{self.image_token}"]}})`.'
            )
        self.object_settings = ObjectSettings.from_dict(object_settings).to_dict()
        # Strings and small values only: a processor is copied, printed and sent to other processes
        self._checkpoint: PartSource | None = None
        self._placement: tuple[torch.device | None, torch.dtype | None] = (None, None)
        self._shared_model_key: str | None = None
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # ------------------------------------------------------------------------------------------- loading and saving
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, revision: str = "main", **kwargs):
        """As `ProcessorMixin.from_pretrained`; the parts of the checkpoint are loaded when they are first needed.

        `object_settings=` changes single keys of the saved ones.
        """
        changes = kwargs.pop("object_settings", None)  # the base class would replace all, and save it in the tokenizer
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, revision=revision, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        location, subfolder = os.fspath(pretrained_model_name_or_path), kwargs.get("subfolder")
        if subfolder:
            location = f"{location}/./{subfolder}"  # a part of the repository or folder, to `PartSource`
        processor._checkpoint = PartSource.of(location, revision)
        if changes:
            settings = {**processor.object_settings, **changes}
            processor.object_settings = ObjectSettings.from_dict(settings).to_dict()
        return loaded

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As `ProcessorMixin.save_pretrained`; parts that lie inside the checkpoint (`./detector`) are copied along.

        Raises:
            ValueError: with `push_to_hub`, a part that is a path on this machine.
        """
        if push_to_hub:
            self._check_parts_are_portable()
        self.object_settings = self._settings().to_dict()  # users may have set it anew, in part or wrongly
        os.makedirs(save_directory, exist_ok=True)
        for name in PART_NAMES:
            if is_relative(self.object_settings[name]):
                copy_relative_part(self.object_settings[name], self._checkpoint, save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """As `PushToHubMixin.push_to_hub`; refuses parts that are paths on this machine."""
        self._check_parts_are_portable()
        return super().push_to_hub(*args, **kwargs)

    def _check_parts_are_portable(self) -> None:
        settings = self._settings().to_dict()
        for name in PART_NAMES:
            if is_local(settings[name]):
                raise ValueError(
                    f"`object_settings[{name!r}]` is {settings[name]!r}, a path on this machine: nobody "
                    "who loads the checkpoint from the Hub has it. Name a Hub id, or save the part inside the "
                    f'checkpoint and name it "./{name}".'
                )

    # ------------------------------------------------------------------------------------------------ heavy parts
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "MaskLlavaProcessor":
        """Says where detector, segmenter and tower run and in which dtype; it takes effect when they are next needed.

        Args:
            device: default: the process's current accelerator, else the CPU. Outputs stay on the CPU.
            dtype: default: each part's own, as saved.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        old_device, old_dtype = self._placement
        self._placement = (
            old_device if device is None else torch.device(device),
            old_dtype if dtype is None else dtype,
        )
        return self

    def unload(self) -> None:
        """Frees all parts that processors of this process have loaded; a shared tower belongs to its model and stays.

        A processor that needs a part again loads it again.
        """
        unload_parts()

    def share_vision_tower(self, model: torch.nn.Module) -> "MaskLlavaProcessor":
        """Embeds objects with the tower of a loaded model, instead of loading a second copy.

        Args:
            model: a `MaskLlavaForConditionalGeneration`, a `MaskLlavaModel`, or a PEFT model around one. The
                processor does not keep it alive.

        Raises:
            ValueError: a model of another kind.
        """
        self._shared_model_key = share_model(model)
        return self

    def _parts(self) -> ObjectParts:
        device, dtype = self._placement
        return ObjectParts(self._settings(), self._checkpoint, device, dtype, self._shared_model_key)

    def _settings(self) -> ObjectSettings:
        # Read anew each time: `object_settings` is a plain dict that users may change after loading
        return ObjectSettings.from_dict(self.object_settings)

    # --------------------------------------------------------------------------------------------------- inputs
    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images = None if images is None else upright_images(images)
        if isinstance(images, list) and not flat_pictures(images):
            images = None  # a batch of texts without images
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        self._refuse_unknown_arguments(kwargs)
        if images is None:
            given = [name for name in OBJECT_KEYS if not says_nothing(_call_argument(kwargs, "images_kwargs", name))]
            if given:
                raise ValueError(f"`{given[0]}` was given without `images`; objects belong to an image.")
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        max_length = _call_argument(kwargs, "text_kwargs", "max_length")
        truncation = _call_argument(kwargs, "text_kwargs", "truncation")
        if truncation not in (None, False, "do_not_truncate") and max_length and text:
            least = max(sample.count(self.image_token) for sample in text) * self._settings().layout.num_fixed_tokens
            if least > max_length:
                raise ValueError(
                    f"`max_length`={max_length} with truncation would cut image placeholders: the images of one text "
                    f"take {least} tokens before any object. Raise `max_length` or leave truncation off."
                )

    def _refuse_unknown_arguments(self, kwargs: dict[str, Any]) -> None:
        # Transformers drops them with a warning: `max_object_token=5` would silently cost 20 tokens
        schema = self.valid_processor_kwargs.__annotations__
        parts = {"images_kwargs": self.image_processor, "text_kwargs": self.tokenizer}
        known = {*schema, "common_kwargs", "return_metadata", "sanitize_control_tokens"}
        unknown = []
        for modality, arguments in schema.items():
            if not modality.endswith("_kwargs"):
                continue
            names = {*arguments.__annotations__}
            names |= set(getattr(getattr(parts.get(modality), "valid_kwargs", None), "__annotations__", {}))
            unknown += [f"{modality}[{name!r}]" for name in kwargs.get(modality) or () if name not in names]
            known |= names
        unknown += sorted(set(kwargs) - known)
        if unknown:
            raise ValueError(
                f"Unknown arguments {unknown}. Beside the arguments of every processor, this one takes "
                f"{[*OBJECT_KEYS, 'max_object_tokens']}."
            )

    def _merge_kwargs(self, *args, **kwargs):
        # The base class copies all arguments deeply; masks of a large photograph are not to be copied
        nested = dict(kwargs.get("images_kwargs") or {})
        heavy = {}
        for name in OBJECT_KEYS:
            if name in kwargs and name in nested:
                raise ValueError(f"`{name}` was given twice: in the call and in its `images_kwargs`.")
            if name in kwargs or name in nested:
                heavy[name] = kwargs.pop(name) if name in kwargs else nested.pop(name)
        if kwargs.get("images_kwargs"):
            kwargs["images_kwargs"] = nested
        merged = super()._merge_kwargs(*args, **kwargs)
        merged["images_kwargs"].update(heavy)
        return merged

    def _normalize_conversations(self, conversation):
        return super()._normalize_conversations(plain_blocks(conversation))

    def _multimodal_inputs_from_conversations(self, conversations, *args, **kwargs):
        images, videos, audio, extra = super()._multimodal_inputs_from_conversations(conversations, *args, **kwargs)
        for name in OBJECT_KEYS:
            rows = [object_entries(conversation, name) for conversation in conversations]
            if any(entry is not None for row in rows for entry in row):
                extra = {**extra, name: rows}
        return images, videos, audio, extra

    def _process_images(
        self, images, boxes=None, masks=None, objects=None, max_object_tokens=None, return_tensors=None, **kwargs
    ):
        settings, pictures = self._settings(), flat_pictures(images)
        given = given_objects(images, pictures, boxes, masks, objects)
        cap = self._cap(settings, max_object_tokens, given)
        processed = self._process_pixels(pictures, **kwargs)
        found, framed = self._find(pictures, given, cap, processed["pixel_values"], kwargs, keep_masks=False)
        processed["object_counts"] = torch.tensor([len(entry) for entry in found], dtype=torch.long)
        if settings.mask_inversion == "model":
            processed["object_masks"] = stack_masks(framed, cap, tuple(processed["pixel_values"].shape[-2:]))
        else:
            processed["object_embeds"] = stack_embeddings(found, cap, settings.embed_size)
        return processed, [self.replace_image_token(processed, index) for index in range(len(pictures))]

    def _process_pixels(self, pictures: list[Image.Image], **kwargs) -> dict[str, Any]:
        if not kwargs.get("do_rescale", self.image_processor.do_rescale):
            raise ValueError(
                "`do_rescale` is False, but all images are brought to 8 bits here: their 0 to 255 would reach a tower "
                "that expects 0 to 1. Leave it on; floating-point images in 0 to 1 are taken as they are."
            )
        return dict(self.image_processor(pictures, return_tensors="pt", **kwargs))

    def _find(
        self,
        pictures: list[Image.Image],
        given: Sequence[ImageObjects | None],
        cap: int,
        pixel_values: torch.Tensor,
        overrides: dict[str, Any],
        keep_masks: bool,
        images_per_step: int = IMAGES_PER_STEP,
    ) -> tuple[list[ImageObjects], list[torch.Tensor | None]]:
        """Objects per picture, with embeddings where this processor makes them, and masks in the tower's frame.

        What can be checked without heavy work is checked first.
        """
        settings, parts = self._settings(), self._parts()
        detects = cap > 0 and settings.detector is not None and any(objects is None for objects in given)
        used = [objects for objects in given if objects is not None and len(objects) and cap]
        if detects or used:
            side = settings.image_size
            if tuple(pixel_values.shape[-2:]) != (side, side):
                raise ValueError(
                    f"The image processor gives {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels, but "
                    f'`object_settings["image_size"]` is {side}, the side of the tower\'s input: masks would lie in '
                    "another frame than the model's. Set both to the size of the model's tower."
                )
        embeds = settings.mask_inversion == "processor"
        if embeds and (detects or any(objects.embeddings is None for objects in used)):
            parts.require_tower()
        found, framed = find_objects_in_steps(
            pictures, given, cap, settings, parts, self.image_processor, overrides, keep_masks, images_per_step
        )
        if embeds:
            found = with_embeddings(found, framed, pixel_values, parts, self.image_processor, overrides)
        return found, framed

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self._settings().layout.num_tokens(int(image_inputs["object_counts"][image_idx]))

    @property
    def model_input_names(self) -> list[str]:
        in_model = self._settings().mask_inversion == "model"
        return [*super().model_input_names, "object_counts", "object_masks" if in_model else "object_embeds"]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Placeholders of images of the given (height, width) sizes; with a detector, the most there can be."""
        if image_sizes is None:
            return MultiModalData()
        settings = self._settings()
        cap = self._cap(settings, kwargs.get("max_object_tokens"), ())
        num_tokens = settings.layout.num_tokens(cap if settings.detector is not None else 0)
        return MultiModalData(
            num_image_tokens=[num_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    # --------------------------------------------------------------------------------------------------- objects
    def find_objects(
        self, images: Any, max_object_tokens: int | None = None, batch_size: int = IMAGES_PER_STEP
    ) -> list[ImageObjects]:
        """Finds the objects in images: detector, segmenter, keep order, and embeddings if this processor makes them.

        What it returns can be looked at (`plotting.draw_objects`), stored (`ImageObjects.to_dict`) and passed back as
        `objects=`; nothing is then computed again.

        Args:
            images: one image, a list, or a list of lists; PIL, array, path or URL.
            max_object_tokens: at most this many per image; default: as saved.
            batch_size: images that detector and segmenter get at once. All candidates of these have a mask at the size
                of their image: fifty of a 12-megapixel photograph take 600 MB.

        Returns:
            One `ImageObjects` per image, flat in order, each in keep order.

        Raises:
            ValueError: no detector is configured, or a part that is needed cannot be found.
        """
        settings, pictures = self._settings(), flat_pictures(upright_images(images))
        if settings.detector is None:
            self._parts().detector()  # raises, naming the mends
        if not pictures:
            return []
        cap = self._cap(settings, max_object_tokens, ())
        check_integer("batch_size", batch_size, 1)
        if cap == 0:
            return [ImageObjects.empty((picture.height, picture.width)) for picture in pictures]
        pixel_values = self._process_pixels(pictures)["pixel_values"]
        found, _ = self._find(
            pictures, [None] * len(pictures), cap, pixel_values, {}, keep_masks=True, images_per_step=batch_size
        )
        return found

    def object_fingerprint(self, max_object_tokens: int | None = None) -> dict[str, Any]:
        """Everything that decides what `find_objects` returns, as a JSON-able dict; it loads the parts it describes.

        Weights are told by a short hash, so that a part that was moved stays the same and one that was trained does
        not. An `ObjectStore` keeps it, and refuses objects made in another way.

        Args:
            max_object_tokens: as in `find_objects`.

        Raises:
            ValueError: no detector is configured, or a part that is needed cannot be found.
        """
        settings = self._settings()
        cap = self._cap(settings, max_object_tokens, ())
        return self._parts().objects_fingerprint(self.image_processor, cap)

    @staticmethod
    def _cap(settings: ObjectSettings, asked: Any, given: Sequence[ImageObjects | None]) -> int:
        """The call's N: what was asked for, at most what is saved."""
        cap = settings.max_object_tokens
        if asked is not None:
            cap = min(check_integer("max_object_tokens", asked, 0), cap)
        for index, objects in enumerate(given):
            cuts_by_request = asked is not None and asked <= settings.max_object_tokens
            if objects is not None and len(objects) > settings.max_object_tokens and not cuts_by_request:
                raise ValueError(
                    f"Image {index} was given {len(objects)} objects, but this processor is saved with "
                    f"`max_object_tokens`={settings.max_object_tokens}, and which to leave out is not its to guess. "
                    f"To use the first ones, pass `max_object_tokens={settings.max_object_tokens}` in the call."
                )
        return cap


def _call_argument(kwargs: dict[str, Any], modality: str, name: str) -> Any:
    """An argument of a call, whether it stands alone or in the dict of its modality."""
    return kwargs[name] if name in kwargs else (kwargs.get(modality) or {}).get(name)


__all__ = ["MaskLlavaProcessor"]

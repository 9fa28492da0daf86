"""What the front end does not compute: counted at the parts themselves, for every way a call can make work needless."""

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from mask_llava_hf.processing import mask_embedder
from mask_llava_hf.testing import build_tiny_checkpoint


BOXES = [[5, 5, 60, 50], [30.5, 20.5, 90, 60], [0, 0, 20, 20]]
TEXT = ["<image>", "<image>"]
NOTHING = {"detected": 0, "encoded": 0, "decoded": 0, "tower": 0, "inverted": 0}


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((97, 61), Image.Resampling.BICUBIC)


PICTURES = [picture(0), picture(1)]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A processor of one checkpoint with other settings."""
    folder = build_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return lambda **settings: AutoProcessor.from_pretrained(folder, object_settings=settings)


@pytest.fixture
def counts(load, monkeypatch):
    """Images detected and encoded, boxes decoded, images through the tower and masks inverted, from now on."""
    parts, counted = load()._parts(), dict(NOTHING)

    def count(owner, attribute, what, size):
        function = getattr(owner, attribute)

        def counting(*args, **kwargs):
            counted[what] += size(*args, **kwargs)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, counting)

    segmenter = parts.segmenter().model
    count(parts.detector().model, "forward", "detected", lambda pixel_values, **_: len(pixel_values))
    count(segmenter.vision_encoder, "forward", "encoded", lambda pixel_values, *_, **__: len(pixel_values))
    count(segmenter, "forward", "decoded", lambda input_boxes, **_: input_boxes.numel() // 4)
    count(parts.mask_embedder().vision_tower, "forward", "tower", lambda pixel_values, **_: len(pixel_values))
    count(mask_embedder, "embed_masks", "inverted", lambda tower, states, masks, *_: int(masks.flatten(2).any(2).sum()))
    return counted


def candidates(processor) -> int:
    settings = processor._settings()
    found = processor._parts().detector().detect(PICTURES, settings.score_threshold, settings.max_candidates)
    return sum(map(len, found))


def test_no_objects_asked_for(load, counts):
    processor = load()
    inputs = processor(images=PICTURES, text=TEXT, max_object_tokens=0)
    found = processor.find_objects(PICTURES, max_object_tokens=0)
    assert [len(objects) for objects in found] == inputs["object_counts"].tolist() == [0, 0]
    processor(images=PICTURES, text=TEXT, boxes=[BOXES, None], max_object_tokens=0)
    assert counts == NOTHING


@pytest.mark.parametrize(("cap", "used"), [(None, 3), (2, 2)])
def test_boxes_given(load, counts, cap, used):
    load()(images=PICTURES, text=TEXT, boxes=[BOXES, []], max_object_tokens=cap)
    assert counts == {**NOTHING, "encoded": 1, "decoded": used, "tower": 1, "inverted": used}


@pytest.mark.parametrize(("cap", "used"), [(None, 2), (1, 1)])
def test_masks_given(load, counts, cap, used):
    masks = np.zeros((2, 61, 97), bool)
    masks[0, 10:30, 10:40] = masks[1, 30:, 50:] = True
    load()(images=PICTURES, text=TEXT, masks=[masks, []], max_object_tokens=cap)
    assert counts == {**NOTHING, "tower": 1, "inverted": used}


def test_stored_objects_given(load, counts):
    processor = load()
    found = processor.find_objects(PICTURES, max_object_tokens=3)
    counts.update(NOTHING)
    processor(images=PICTURES, text=TEXT, objects=found)
    load(mask_inversion="model")(images=PICTURES, text=TEXT, objects=found)  # which uses their masks
    assert counts == NOTHING


@pytest.mark.parametrize("order", ["box_iou", "score"])
def test_an_order_by_boxes_drops_before_segmenting(load, counts, order):
    load(order=order)(images=PICTURES, text=TEXT, max_object_tokens=2)
    assert counts == {"detected": 2, "encoded": 2, "decoded": 4, "tower": 2, "inverted": 4}


def test_an_order_by_masks_drops_before_inverting(load, counts):
    processor = load(order="mask_iou")
    number = candidates(processor)
    counts.update(NOTHING)
    processor(images=PICTURES, text=TEXT, max_object_tokens=2)
    assert number > 4
    assert counts == {"detected": 2, "encoded": 2, "decoded": number, "tower": 2, "inverted": 4}


@pytest.mark.parametrize("order", ["box_iou", "mask_iou"])
def test_boxes_as_masks_need_no_segmenter(load, counts, order):
    load(mask_source="boxes", order=order)(images=PICTURES, text=TEXT, max_object_tokens=2)
    assert counts == {**NOTHING, "detected": 2, "tower": 2, "inverted": 4}


def test_the_model_inverts_in_place_of_the_processor(load, counts):
    load(mask_inversion="model", order="box_iou")(images=PICTURES, text=TEXT, max_object_tokens=2)
    assert counts == {**NOTHING, "detected": 2, "encoded": 2, "decoded": 4}


def test_images_in_which_nothing_was_found_are_neither_segmented_nor_embedded(load, counts):
    load(score_threshold=1.0)(images=PICTURES, text=TEXT)
    assert counts == {**NOTHING, "detected": 2}


def test_every_part_sees_an_image_once_however_images_are_grouped(load, counts):
    processor = load(order="box_iou")
    for batch_size in (1, 2, 8):
        counts.update(NOTHING)
        processor.find_objects([*PICTURES, picture(2)], max_object_tokens=2, batch_size=batch_size)
        assert counts == {"detected": 3, "encoded": 3, "decoded": 6, "tower": 3, "inverted": 6}

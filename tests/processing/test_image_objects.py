import dataclasses
import json

import numpy as np
import pytest
import torch

from mask_llava_hf.processing.objects import image_objects
from mask_llava_hf.processing.objects.image_objects import ImageObjects
from mask_llava_hf.processing.objects.mask_formats import mask_to_rle


HW = (20, 30)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(image_objects.logger, "warning", messages.append)
    return messages


def three_masks():
    masks = torch.zeros(3, *HW, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    masks[1, 19, 29] = True
    masks[2, ::2] = True
    return masks


def full_objects():
    return dataclasses.replace(
        ImageObjects.from_masks(three_masks(), HW, [0.9, 0.1, 0.3]),
        embeddings=torch.randn(3, 4),
        embedding_fingerprint={"tower": "abc", "iterations": 10},
        labels=["cat", "dog", "grass"],
    )


def assert_equal(first, second):
    for field in dataclasses.fields(ImageObjects):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b, field.name


def test_boxes_from_masks_end_past_the_last_pixel():
    objects = ImageObjects.from_masks(three_masks(), HW)
    assert objects.boxes_xyxy.tolist() == [[3, 2, 9, 5], [29, 19, 30, 20], [0, 0, 30, 19]]
    assert objects.scores.tolist() == [1, 1, 1] and len(objects) == 3


@pytest.mark.parametrize(
    "convert",
    [
        lambda masks: masks,
        lambda masks: masks.numpy(),
        lambda masks: masks.float(),
        lambda masks: masks.to(torch.uint8).numpy(),
        list,
        lambda masks: list(masks.numpy()),
        lambda masks: [mask_to_rle(mask) for mask in masks],
        lambda masks: [{**mask_to_rle(mask), "counts": mask_to_rle(mask)["counts"].encode()} for mask in masks],
        lambda masks: [uncompressed(mask) for mask in masks],
    ],
)
def test_masks_of_every_form(convert):
    objects = ImageObjects.from_masks(convert(three_masks()), HW)
    assert objects.masks.dtype == torch.bool and torch.equal(objects.masks, three_masks())


def uncompressed(mask):
    """COCO's own definition: lengths of runs down the columns, the first one of zeros."""
    counts, value = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def test_empty_masks_are_dropped_with_one_warning(warnings):
    masks = torch.cat([torch.zeros(2, *HW, dtype=torch.bool), three_masks()])
    objects = ImageObjects.from_masks(masks, HW, scores=[0.1, 0.2, 0.3, 0.4, 0.5])
    torch.testing.assert_close(objects.scores, torch.tensor([0.3, 0.4, 0.5]))
    assert warnings == ["2 of 5 masks have no pixel and are dropped with their objects."]


def test_no_objects_in_every_form():
    for objects in (
        ImageObjects.empty(HW),
        ImageObjects.from_boxes([], HW),
        ImageObjects.from_masks([], HW),
        ImageObjects.from_masks(np.zeros((0, *HW), bool), HW),
        ImageObjects.from_boxes(torch.zeros(0, 4), HW, torch.zeros(0)),
    ):
        assert len(objects) == 0 and objects.boxes_xyxy.shape == (0, 4)
        assert_equal(ImageObjects.from_dict(json.loads(json.dumps(objects.to_dict()))), objects)


def test_boxes_are_clipped_to_the_image():
    objects = ImageObjects.from_boxes([[-5, 3, 10, 99]], HW)
    assert objects.boxes_xyxy.tolist() == [[0, 3, 10, 20]] and objects.boxes_xyxy.dtype == torch.float32


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[1, 2, 3, 4], [10, 5, 4, 9]], r"boxes_xyxy\[1\]` is \[10, 5, 4, 9\].*right < left.*width, height\]"),
        ([[1, 2, 3, float("nan")]], r"boxes_xyxy\[0\].*NaN"),
        ([[1, 2, 3, float("inf")]], r"boxes_xyxy\[0\].*infinite"),
        ([[1, 2, 1, 4]], r"boxes_xyxy\[0\].*without area"),
        ([[1, 2, 3, 4], [40, 2, 50, 4]], r"boxes_xyxy\[1\].*outside the image of 20 x 30"),
        ([[30, 2, 50, 4]], "outside the image"),
        ([1, 2, 3, 4], r"shape \(4,\), expected \(N, 4\)"),
        ([[1, 2, 3], [1, 2, 3, 4]], "nested lists of equal length"),
        ([[0.1, 0.2, 0.3, 0.9]], "Multiply by width and height"),
    ],
)
def test_bad_boxes_are_refused_with_row_and_mend(boxes, message):
    with pytest.raises(ValueError, match=message):
        ImageObjects.from_boxes(boxes, HW)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(2, 30, 20, dtype=torch.bool), r"shape \(2, 30, 20\), the image \(20, 30\)"),
        (torch.zeros(*HW), r"masks\[None\]"),
        (torch.full((1, *HW), 255), "value 255"),
        (torch.full((1, *HW), 0.3), "Threshold probabilities"),
        (torch.full((1, *HW), float("nan")), "value nan"),
        ([{"size": [20, 31], "counts": "abc"}], r"size \(20, 31\), the image \(20, 30\)"),
        ([{"size": [20, 30], "counts": "abc"}], "damaged"),
        ([{"size": [20, 30], "counts": [5, 5]}], "damaged"),
        ([{"size": [20, 30], "counts": [-5, 605]}], "damaged"),
        ([{"size": [20, 30]}], "'size' and 'counts'"),
    ],
)
def test_bad_masks_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        ImageObjects.from_masks(masks, HW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(2)}, r"`scores` has shape \(2,\), expected \(3,\)"),
        ({"scores": torch.tensor([0.1, 1.5, 0.1])}, r"`scores\[1\]` is 1.5"),
        ({"scores": torch.tensor([0.1, 0.1, float("nan")])}, r"`scores\[2\]` is nan"),
        ({"masks": torch.zeros(3, 20, 31, dtype=torch.bool)}, r"expected \(3, 20, 30\)"),
        ({"masks": torch.zeros(3, *HW)}, "from_masks"),
        ({"embedding_fingerprint": None}, "`embeddings` is given without `embedding_fingerprint`"),
        ({"embeddings": None}, "`embedding_fingerprint` is given without `embeddings`"),
        ({"embedding_fingerprint": {"tower": torch.nn}}, "JSON"),
        ({"embeddings": torch.zeros(2, 4)}, r"`embeddings` has shape \(2, 4\)"),
        ({"embeddings": torch.full((3, 4), torch.nan)}, r"`embeddings\[0\]`"),
        ({"labels": ["cat"]}, "`labels` has 1 entries"),
        ({"labels": ["cat", 3, "dog"]}, r"`labels\[1\]` is 3"),
        ({"image_hw": (20, 0)}, "`image_hw`"),
        ({"image_hw": 20}, "`image_hw`"),
    ],
)
def test_every_field_is_checked_when_built(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(full_objects(), **change)


def test_indexing_takes_the_same_rows_of_every_field():
    objects = full_objects()
    for index, rows in (
        (slice(0, 2), [0, 1]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([1]), [1]),
        (np.array([1, 2]), [1, 2]),
        (objects.scores > 0.2, [0, 2]),
        ([], []),
        (slice(0, 0), []),
    ):
        part = objects[index]
        assert torch.equal(part.boxes_xyxy, objects.boxes_xyxy[rows]) and torch.equal(part.masks, objects.masks[rows])
        assert torch.equal(part.scores, objects.scores[rows]) and torch.equal(part.embeddings, objects.embeddings[rows])
        assert part.labels == [objects.labels[row] for row in rows]
        assert part.embedding_fingerprint == objects.embedding_fingerprint
    with pytest.raises(TypeError, match=r"objects\[1 : 1 \+ 1\]"):
        objects[1]
    with pytest.raises(IndexError, match="expected \\(3,\\)"):
        objects[torch.tensor([True])]
    with pytest.raises(IndexError):
        objects[[7]]


def test_a_dictionary_keeps_everything_through_json():
    objects = full_objects()
    assert_equal(ImageObjects.from_dict(json.loads(json.dumps(objects.to_dict()))), objects)
    half = dataclasses.replace(objects, embeddings=objects.embeddings.bfloat16(), embedding_fingerprint="tower")
    assert_equal(ImageObjects.from_dict(json.loads(json.dumps(half.to_dict()))), half)
    none = objects[:0]  # their width still says which tower they belong to
    assert none.embeddings.shape == (0, 4)
    assert_equal(ImageObjects.from_dict(json.loads(json.dumps(none.to_dict()))), none)
    assert isinstance(objects.to_dict()["masks"][0]["counts"], str)


def test_a_dictionary_survives_arrow():
    datasets = pytest.importorskip("datasets")
    rows = [full_objects(), ImageObjects.from_boxes([[1, 2, 3, 4]], HW)]
    stored = datasets.Dataset.from_list([{"objects": objects.to_dict()} for objects in rows])
    for objects, row in zip(rows, stored, strict=True):
        assert_equal(ImageObjects.from_dict(row["objects"]), objects)


def test_a_dictionary_with_unknown_or_missing_keys_is_refused():
    with pytest.raises(ValueError, match=r"unknown keys \['boxes'\] and lacks \['boxes_xyxy'\]"):
        ImageObjects.from_dict({"image_hw": HW, "boxes": [], "scores": []})


def test_objects_from_detection_post_processing(warnings):
    result = {
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.tensor([1, 0, 5]),
        "boxes": torch.tensor([[1.0, 2, 8, 9], [-4, 2, -1, 9], [-1, -1, 31, 21]], requires_grad=True),
    }
    objects = ImageObjects.from_detection(result, HW, {0: "cat", 1: "dog"})
    assert objects.labels == ["dog", "5"] and objects.boxes_xyxy.tolist() == [[1, 2, 8, 9], [0, 0, 30, 20]]
    assert len(warnings) == 1 and "1 of 3 detected boxes" in warnings[0]
    with pytest.raises(ValueError, match="target_sizes"):
        ImageObjects.from_detection({**result, "boxes": result["boxes"] / 100}, HW)
    with pytest.raises(ValueError, match="boxes missing"):
        ImageObjects.from_detection({"scores": [], "labels": []}, HW)


def test_objects_from_sam_generators():
    masks = three_masks()
    records = [{"segmentation": mask.numpy(), "predicted_iou": 1.02, "bbox": [0, 0, 1, 1]} for mask in masks]
    pipeline = {"masks": [mask.numpy() for mask in masks], "scores": torch.ones(3)}
    for output in (records, pipeline):
        objects = ImageObjects.from_sam(output, HW)
        assert torch.equal(objects.masks, masks) and objects.scores.tolist() == [1, 1, 1]
    assert len(ImageObjects.from_sam([], HW)) == 0


def test_with_masks_replaces_masks_and_scores():
    objects = ImageObjects.from_boxes([[3, 2, 9, 5]] * 3, HW).with_masks(three_masks(), torch.tensor([0.5, 0.25, 1]))
    assert torch.equal(objects.masks, three_masks()) and objects.scores.tolist() == [0.5, 0.25, 1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        objects.scores = None


def test_repr_is_short():
    assert (
        repr(full_objects()) == "ImageObjects(3 objects; image 20 x 30; masks; embeddings of width 4; cat, dog, grass)"
    )

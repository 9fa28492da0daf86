from fractions import Fraction
from itertools import combinations

import pytest
import torch

from mask_llava_hf.processing.objects.image_objects import ImageObjects
from mask_llava_hf.processing.objects.nested_order import keep_order, mask_intersections


def plain_keep_order(scores, areas, intersection):
    """The specification: look at all pairs anew for each object that is dropped."""
    alive, dropped = list(range(len(scores))), []
    while len(alive) > 1:
        ious = {
            (i, j): Fraction(intersection(i, j)) / (areas[i] + areas[j] - intersection(i, j))
            for i, j in combinations(alive, 2)
        }
        highest = max(ious.values())
        candidates = {row for pair, iou in ious.items() if iou == highest for row in pair}
        least = min(candidates, key=lambda row: (scores[row], areas[row], -row))
        alive.remove(least)
        dropped.append(least)
    return (dropped + alive)[::-1]


def random_objects(seed, number=12, side=9):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(number, side, side, dtype=torch.bool)
    for mask in masks:
        (y1, y2), (x1, x2) = (torch.randperm(side + 1, generator=generator)[:2].sort().values for _ in range(2))
        mask[y1:y2, x1:x2] = torch.rand(int(y2 - y1), int(x2 - x1), generator=generator) < 0.8
        mask[y1, x1] = True
    # Few different scores and small masks: ties of every kind occur.
    scores = torch.randint(0, 4, (number,), generator=generator) / 4
    return ImageObjects.from_masks(masks, (side, side), scores)


@pytest.mark.parametrize("seed", range(25))
def test_the_order_is_that_of_the_plain_loop(seed):
    objects = random_objects(seed)
    scores = objects.scores.tolist()
    areas = [int(mask.sum()) for mask in objects.masks]
    expected = plain_keep_order(scores, areas, lambda i, j: int((objects.masks[i] & objects.masks[j]).sum()))
    assert keep_order(objects, "mask_iou").tolist() == expected

    corners = [[Fraction(value) for value in box] for box in objects.boxes_xyxy.tolist()]
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in corners]

    def intersection(i, j):
        low = [max(a, b) for a, b in zip(corners[i][:2], corners[j][:2], strict=True)]
        high = [min(a, b) for a, b in zip(corners[i][2:], corners[j][2:], strict=True)]
        return max(0, high[0] - low[0]) * max(0, high[1] - low[1])

    assert keep_order(objects, "box_iou").tolist() == plain_keep_order(scores, areas, intersection)
    assert keep_order(objects, "score").tolist() == plain_keep_order(scores, areas, lambda i, j: 0)


def test_near_duplicates_go_first_and_the_rest_is_the_score_order():
    masks = torch.zeros(4, 10, 10, dtype=torch.bool)
    masks[0, :4, :4] = True
    masks[1, :4, :5] = True  # nearly the first
    masks[2, 6:, :3] = True
    masks[3, 6:, 5:] = True
    objects = ImageObjects.from_masks(masks, (10, 10), [0.9, 0.8, 0.1, 0.4])
    assert keep_order(objects).tolist() == [0, 3, 2, 1]
    assert keep_order(objects, "score").tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize("order", ["mask_iou", "box_iou", "score"])
def test_objects_apart_come_by_score_then_area_then_place(order):
    masks = torch.zeros(5, 2, 12, dtype=torch.bool)
    for row, (start, stop) in enumerate([(0, 1), (2, 4), (5, 6), (7, 8), (9, 10)]):
        masks[row, 0, start:stop] = True
    objects = ImageObjects.from_masks(masks, (2, 12), [0.5, 0.5, 0.9, 0.5, 0.1])
    assert keep_order(objects, order).tolist() == [2, 1, 0, 3, 4]


def test_candidates_are_all_objects_in_any_pair_with_the_highest_iou():
    masks = torch.zeros(4, 1, 12, dtype=torch.bool)
    masks[0, 0, 0:4] = True
    masks[1, 0, 0:2] = True  # IoU 1/2 with the first
    masks[2, 0, 6:10] = True
    masks[3, 0, 6:8] = True  # IoU 1/2 with the third, and the lowest score of the four
    objects = ImageObjects.from_masks(masks, (1, 12), [0.3, 0.4, 0.5, 0.2])
    assert keep_order(objects).tolist() == [2, 1, 0, 3]


@pytest.mark.parametrize("order", ["mask_iou", "box_iou", "score"])
def test_one_object_and_none(order):
    assert keep_order(random_objects(0)[:1], order).tolist() == [0]
    none = keep_order(random_objects(0)[:0], order)
    assert none.tolist() == [] and none.dtype == torch.long


def test_empty_masks_overlap_nothing():
    objects = random_objects(3, number=3).with_masks(torch.zeros(3, 9, 9, dtype=torch.bool), [0.1, 0.3, 0.2])
    assert keep_order(objects).tolist() == [1, 2, 0]


@pytest.mark.parametrize("image_hw", [(1, 1), (7, 9), (64, 64), (301, 2003)])
def test_intersections_are_exact_counts(image_hw):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(5, *image_hw, generator=generator) < 0.7
    expected = [[int((a & b).sum()) for b in masks] for a in masks]
    assert mask_intersections(masks) == expected
    assert mask_intersections(masks.transpose(1, 2)) == expected


def test_unknown_orders_and_missing_masks_are_refused():
    objects = ImageObjects.from_boxes([[0, 0, 4, 4]], (10, 10))
    with pytest.raises(ValueError, match="'iou', expected one of 'mask_iou', 'box_iou', 'score'"):
        keep_order(objects, "iou")
    with pytest.raises(ValueError, match="needs masks"):
        keep_order(objects, "mask_iou")

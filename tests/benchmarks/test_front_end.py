# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
import csv
import sys

import front_end
import pytest
import torch

from mask_llava_hf import DEFAULT_CHECKPOINT, ImageObjects, MaskLlavaProcessor


def squares(*corners: int, side: int = 4) -> torch.Tensor:
    """(n, 16, 16) bool: squares with their upper left corner on the diagonal."""
    masks = torch.zeros(len(corners), 16, 16, dtype=torch.bool)
    for mask, corner in zip(masks, corners, strict=True):
        mask[corner : corner + side, corner : corner + side] = True
    return masks


def test_objects_are_judged_against_the_truth():
    kept = ImageObjects.from_masks(torch.cat([squares(0, 0, 1), squares(11, side=5)]), (16, 16))
    # The first is found twice, exactly, and the third object is nearly beside it; the second is missed by all
    judged = front_end._judged([kept, ImageObjects.empty((16, 16))], [squares(0, 6, 11), squares(3)])
    assert judged == {
        "shapes_covered": 0.5,
        "mean_iou": pytest.approx((1 + 0 + 16 / 25 + 0) / 4),
        "kept_per_image": 2,
        "duplicates_per_image": 0.5,
    }


def test_recorded_models_can_be_run_again():
    processor = MaskLlavaProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    scenes = [front_end.make_scene("validation", index) for index in range(2)]
    with front_end.recorded_models(processor._parts()) as calls:
        found = processor.find_objects([scene.draw() for scene in scenes])
    assert {name: len(made) for name, made in calls.items()} == dict.fromkeys(front_end.MODELS, 1)
    with torch.inference_mode():
        embeddings = calls["mask inversion"][0]()
    for objects, rows in zip(found, embeddings, strict=True):
        assert torch.equal(objects.embeddings, rows[: len(objects)])
    processor.find_objects(scenes[0].draw())
    assert sum(map(len, calls.values())) == len(front_end.MODELS)  # nothing is recorded any more


def test_a_quick_run(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["front_end.py", "--quick", "--threads", "1", "--output-dir", str(tmp_path)])
    try:
        front_end.main()
    finally:
        torch.set_num_threads(threads)
    speed, quality = (
        list(csv.DictReader((tmp_path / name).open())) for name in ("front_end.csv", "front_end_quality.csv")
    )
    stages = ["reading", *front_end.MODELS, "writing", "whole", "overhead outside the models"]
    timed, by_cap = [row for row in speed if row["stage"]], [row for row in speed if row["order"]]
    assert [row["stage"] for row in timed] == stages * len(front_end.BATCH_SIZES)
    assert len(by_cap) == len(front_end.COSTLY_ORDERS) * len(front_end.COST_CAPS)
    assert all(float(row["images_per_second"]) > 0 for row in speed if row["stage"] != stages[-1])
    for row in timed[len(stages) - 1 :: len(stages)]:
        assert float(row["share_of_whole"]) < 1
    by_choice = {tuple(row[name] for name in ("masks_from", "score_threshold", "order", "cap")): row for row in quality}
    assert len(by_choice) == len(quality) == 2 + 4 * 4 * 2
    threshold = str(MaskLlavaProcessor.from_pretrained(DEFAULT_CHECKPOINT).object_settings["score_threshold"])
    assert float(by_choice["segmenter", threshold, "box_iou", "2"]["boxes_decoded_per_image"]) == 2
    assert float(by_choice["segmenter", threshold, "mask_iou", "2"]["boxes_decoded_per_image"]) > 2
    assert float(by_choice["segmenter", threshold, "mask_iou", "20"]["shapes_covered"]) > 0.8
    assert "| whole |" in capsys.readouterr().out

import importlib
import inspect
import json
import sys

import numpy as np
import pytest
import torch
from default_checkpoint import part_scores, resumable_training
from default_checkpoint.part_scores import match_boxes
from default_checkpoint.scene_pool import scene_pool
from default_checkpoint.train_detector import train_detector
from default_checkpoint.train_segmenter import train_segmenter
from PIL import Image
from shapes_world import make_scene
from transformers import AutoModelForObjectDetection, SamModel

from mask_llava_hf.processing.objects.detectors import ObjectDetector
from mask_llava_hf.processing.objects.image_objects import ImageObjects
from mask_llava_hf.processing.objects.segmenters import load_segmenter


TRAININGS = {"detector": train_detector, "segmenter": train_segmenter}
MODEL_CLASSES = {"detector": AutoModelForObjectDetection, "segmenter": SamModel}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders and scores of both parts, after quick trainings."""
    root = tmp_path_factory.mktemp("parts")
    scores = {"detector": train_detector(root / "detector", quick=True)}
    scores["segmenter"] = train_segmenter(root / "segmenter", quick=True, detector_dir=root / "detector")
    return root, scores


@pytest.fixture
def picture():
    return make_scene("test", 3).draw()


@pytest.fixture
def pool():
    return scene_pool("validation", 12)


# ------------------------------------------------------------------------------------------------ scenes


def test_pool_holds_the_scenes(pool):
    assert len(pool) == 12
    for index in (0, 7):
        scene = make_scene("validation", index)
        assert np.array_equal(pool.images[index], np.asarray(scene.draw()))
        assert np.array_equal(pool.masks(index), scene.masks)
        assert np.array_equal(pool.boxes(index), scene.boxes_xyxy)


def test_pool_is_kept_on_disk(pool, tmp_path, monkeypatch):
    scene_pool("validation", 12, tmp_path)
    monkeypatch.setattr("default_checkpoint.scene_pool.make_scene", None)  # nothing is drawn again
    kept = scene_pool("validation", 12, tmp_path)
    for name in ("images", "owners", "counts", "boxes_xyxy"):
        assert np.array_equal(getattr(kept, name), getattr(pool, name))


def test_samples_are_scenes_or_mirrored_scenes(pool):
    sample = pool.sample(np.random.default_rng(0), 40)
    originals = [image.tobytes() for image in pool.images]
    mirrored = 0
    for index in range(40):
        mirrored += sample.images[index].tobytes() not in originals
        for mask, (left, top, right, bottom) in zip(sample.masks(index), sample.boxes(index), strict=True):
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            assert (left, top, right, bottom) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert 10 < mirrored < 30
    assert originals == [image.tobytes() for image in pool.images]


# ----------------------------------------------------------------------------------------------- trainings


@pytest.mark.parametrize("part", TRAININGS)
def test_loss_falls_and_scores_are_written(parts, part):
    root, scores = parts
    assert scores[part]["last_loss"] < 0.98 * scores[part]["first_loss"]
    written = json.loads((root / part / "scores.json").read_text())
    assert written == pytest.approx(scores[part], abs=1e-4)
    assert not (root / part / "training_state.pt").exists()


@pytest.mark.parametrize("part", TRAININGS)
def test_killed_training_goes_on_to_the_same_weights(parts, part, tmp_path, monkeypatch):
    save, saved = resumable_training._save, []

    def save_and_die(state, path):
        save(state, path)
        saved.append(len(state["losses"]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resumable_training, "_save", save_and_die)
        TRAININGS[part](tmp_path / part, quick=True)
    assert 0 < saved[0] < 20
    unbroken, (root, _) = TRAININGS[part](tmp_path / part, quick=True), parts
    assert unbroken["minutes"] > 0
    names = {"model.safetensors", "config.json", "preprocessor_config.json"}
    for name in names:
        assert (tmp_path / part / name).read_bytes() == (root / part / name).read_bytes(), name


def test_state_of_another_training_is_refused(tmp_path):
    weight = torch.nn.Linear(1, 1)
    settings = {"steps": 4, "learning_rate": 0.1, "save_every": 2}

    def train(seed):
        resumable_training.train(
            weight, lambda rng: weight(torch.ones(1)).sum(), tmp_path / "s.pt", seed=seed, **settings
        )

    train(seed=0)
    with pytest.raises(ValueError, match="'seed': 0.*'seed': 1.*another folder"):
        train(seed=1)


@pytest.mark.parametrize("part", TRAININGS)
def test_command_line_calls_the_training(part, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"default_checkpoint.train_{part}")
    calls = []

    def training(**options):
        calls.append(inspect.signature(TRAININGS[part]).bind(**options).arguments)
        return {"recall": 0.5}

    monkeypatch.setattr(module, f"train_{part}", training)
    monkeypatch.setattr(
        sys, "argv", ["train", str(tmp_path), "--steps", "7", "--threads", str(torch.get_num_threads())]
    )
    module.main()
    assert calls[0]["output_dir"] == tmp_path
    assert (calls[0]["steps"], calls[0]["quick"]) == (7, False)
    assert json.loads(capsys.readouterr().out) == {"recall": 0.5}


# ------------------------------------------------------------------------------------ parts in the package


@pytest.mark.parametrize("part", TRAININGS)
def test_saved_part_loads_without_a_remark(parts, part):
    _, report = MODEL_CLASSES[part].from_pretrained(parts[0] / part, output_loading_info=True)
    assert not any(report.values()), report


def test_detector_answers_alike_and_at_any_size(parts, picture):
    detector = ObjectDetector.from_pretrained(parts[0] / "detector")
    (once,) = detector.detect([picture], score_threshold=0)
    (again,) = ObjectDetector.from_pretrained(parts[0] / "detector").detect([picture], score_threshold=0)
    assert 0 < len(once) <= 20
    assert torch.equal(once.boxes_xyxy, again.boxes_xyxy)
    assert torch.equal(once.scores, again.scores)
    assert set(once.labels) == {"object"}
    (wide,) = detector.detect([picture.resize((192, 96), Image.Resampling.NEAREST)], score_threshold=0)
    torch.testing.assert_close(wide.boxes_xyxy[0] / torch.tensor([2, 1, 2, 1]), once.boxes_xyxy[0], rtol=0, atol=3)


def test_segmenter_gives_masks_of_the_pictures_size(parts, picture):
    segmenter = load_segmenter(parts[0] / "segmenter")
    boxes = torch.tensor([[10.0, 20, 40, 60], [50, 50, 90, 90]])
    pictures = [picture, picture.resize((150, 60))]
    masks = segmenter.segment(pictures, [boxes, boxes[:1]])
    assert [tuple(each.shape) for each in masks] == [(2, 96, 96), (1, 60, 150)]
    assert torch.equal(masks[0], segmenter.segment([picture], [boxes])[0])


# -------------------------------------------------------------------------------------------------- scores


def test_boxes_are_matched_one_to_one():
    wanted = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    found = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 10], [21, 20, 30, 30], [50, 50, 60, 60]])
    index, iou = match_boxes(found, wanted)
    assert index.tolist() == [0, -1, 1, -1]
    assert iou.tolist() == pytest.approx([0.8, 0, 0.9, 0])


def test_no_boxes_match_nothing():
    index, iou = match_boxes(torch.zeros(0, 4), torch.tensor([[0.0, 0, 10, 10]]))
    assert len(index) == len(iou) == 0


def test_scores_of_given_boxes_and_masks(pool, monkeypatch):
    """The detector finds the first shape of each scene, and where none is; the segmenter misses half of that shape."""
    elsewhere = torch.tensor([[0.0, 0, 2, 2]])

    class Detector:
        from_pretrained = classmethod(lambda cls, folder: cls())

        def detect(self, images, max_candidates):
            boxes = [torch.cat([torch.from_numpy(pool.boxes(index)[:1]), elsewhere]) for index in range(len(images))]
            return [ImageObjects(each, torch.tensor([0.9, 0.1]), (96, 96)) for each in boxes]

    class Segmenter:
        def segment(self, images, boxes):
            masks = [torch.from_numpy(pool.masks(index))[: len(each)] for index, each in enumerate(boxes)]
            for each in masks:
                left = each[0].flatten().cumsum(0) <= each[0].sum() // 2
                each[0] &= left.view_as(each[0])
            return masks

    monkeypatch.setattr(part_scores, "ObjectDetector", Detector)
    monkeypatch.setattr(part_scores, "load_segmenter", lambda folder: Segmenter())
    shapes = pool.counts.sum()
    expected = {"recall": 12 / shapes, "box_iou": 1, "candidates": 2, "precision": 1}
    assert part_scores.score_detector("folder", pool) == pytest.approx(expected)
    scores = part_scores.score_segmenter("folder", pool, "detector")
    assert scores["mask_iou"] == pytest.approx(1 - 6 / shapes, abs=0.01)
    assert scores["mask_iou_detected"] == pytest.approx(0.5, abs=0.01)

import functools
import json
import sys

import numpy as np
import pytest
import torch
from default_checkpoint import probe_vision_tower as probing
from default_checkpoint import resumable_training
from default_checkpoint import train_vision_tower as training
from default_checkpoint.probe_vision_tower import choose_learning_rate, probe_accuracy, probe_vision_tower
from default_checkpoint.scene_pool import ScenePool, scene_pool
from default_checkpoint.statements import attributes, sample_statements, truth, words
from default_checkpoint.train_vision_tower import GRID, ClipWithNames, normalized, square_image_processor
from shapes_world import COLORS, KINDS, SIDE, SIZES, make_scene
from transformers import CLIPVisionModel, LlavaImageProcessor


SIZE, COLOR, KIND = (
    {name: index for index, name in enumerate(names)} for names in (SIZES, COLORS, KINDS)
)  # what `ScenePool.looks` and statements write for a name
MIDDLE, TOP_LEFT, BOTTOM_RIGHT, ANY = 4, 0, 8, -1


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Made once for all trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "world_tokenizer", functools.cache(training.world_tokenizer))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir):
    """Folder of a tower after a quick training, the CLIP it was trained in, and the training's figures."""
    made = []

    class Remembered(ClipWithNames):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    folder = tmp_path_factory.mktemp("tower")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ClipWithNames", Remembered)
        figures = training.train_vision_tower(folder, quick=True, cache_dir=cache_dir)
    return folder, made[0].clip, figures


@pytest.fixture(scope="module")
def probed(trained, cache_dir):
    folder, _, _ = trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "LEARNING_RATES", (0.1, 1.0))
        patch.setattr(probing, "ITERATIONS", 4)
        return probe_vision_tower(folder, quick=True, cache_dir=cache_dir)


@pytest.fixture
def two_scenes():
    """A small red circle at the top left and a large blue star in the middle; a large red star at the bottom right."""
    pixels = np.zeros((2, SIDE, SIDE), np.uint8)
    boxes, centers, looks = np.zeros((2, 2, 4), np.float32), np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 3), int)
    centers[0] = (10, 10), (48, 50)
    centers[1, 0] = 80, SIDE - 0.01
    looks[0, 0] = SIZE["small"], COLOR["red"], KIND["circle"]
    looks[0, 1] = SIZE["large"], COLOR["blue"], KIND["star"]
    looks[1, 0] = SIZE["large"], COLOR["red"], KIND["star"]
    return ScenePool(pixels[..., None].repeat(3, -1), pixels, np.array([2, 1]), boxes, centers, looks.astype(np.uint8))


# ----------------------------------------------------------------------------------------------- training


def test_figures_are_written_and_the_state_removed(trained):
    folder, _, figures = trained
    assert json.loads((folder / "scores.json").read_text()) == pytest.approx(figures, abs=1e-4)
    assert figures["last_loss"] < figures["first_loss"]
    assert not (folder / "training_state.pt").exists()


def test_killed_training_goes_on_to_the_same_tower(trained, cache_dir, tmp_path, monkeypatch):
    save, saved = resumable_training._save, []

    def save_and_die(state, path):
        save(state, path)
        saved.append(len(state["losses"]))
        if len(saved) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resumable_training, "_save", save_and_die)
        training.train_vision_tower(tmp_path, quick=True, cache_dir=cache_dir)
    assert saved == [1, 2, 3, 4, 5]
    resumed = training.train_vision_tower(tmp_path, quick=True, cache_dir=cache_dir)
    folder, _, figures = trained
    assert resumed["last_loss"] == figures["last_loss"]
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_saved_tower_sees_as_inside_its_clip(trained):
    folder, clip, _ = trained
    tower, report = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    pictures = torch.rand(2, 3, SIDE, SIDE)
    clip.eval().vision_model.set_attn_implementation("sdpa")
    with torch.no_grad():
        alone = tower(pictures, output_hidden_states=True)
        inside = clip.vision_model(pictures, output_hidden_states=True)
    for one, other in zip(alone.hidden_states, inside.hidden_states, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(alone.pooler_output, inside.pooler_output)


def test_normalized_pictures_are_those_of_the_image_processor(trained):
    folder, _, _ = trained
    pictures = np.stack([np.asarray(make_scene("test", index).draw()) for index in range(3)])
    for processor in (square_image_processor(), LlavaImageProcessor.from_pretrained(folder)):
        pixel_values = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(normalized(pictures, processor), pixel_values, rtol=0, atol=1e-5)


def test_fresh_tower_looks_at_neighbours(cache_dir):
    """Each head of the first block at its own; blank pictures hide none, real ones here and there."""
    torch.manual_seed(0)
    tower = ClipWithNames(300).clip.vision_model.eval()
    tower.set_attn_implementation("eager")
    scenes = normalized(scene_pool("test", 10, cache_dir).images, square_image_processor())
    with torch.no_grad():
        weights = tower(torch.cat([torch.zeros_like(scenes[:1]), scenes]), output_attentions=True).attentions[0]
    peaks = weights[:, :, 1:, 1:].argmax(-1).view(len(weights), 4, GRID, GRID)
    patches = torch.arange(GRID * GRID).view(GRID, GRID)
    for head, (down, right) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
        neighbours = patches.roll((-down, -right), (0, 1))
        hits = (peaks[:, head] == neighbours)[:, 1:-1, 1:-1]
        assert hits[0].all(), (head, down, right)
        assert hits[1:].float().mean() > 0.9, (head, down, right)


# --------------------------------------------------------------------------------------------- statements


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ((SIZE["small"], COLOR["red"], KIND["circle"], TOP_LEFT), (True, False)),
        ((SIZE["large"], COLOR["red"], KIND["star"], BOTTOM_RIGHT), (False, True)),
        ((ANY, ANY, KIND["star"], MIDDLE), (True, False)),
        ((ANY, COLOR["red"], ANY, ANY), (True, True)),
        ((ANY, COLOR["red"], KIND["star"], ANY), (False, True)),  # the first has both, on different shapes
        ((SIZE["large"], ANY, KIND["star"], ANY), (True, True)),
        ((SIZE["small"], COLOR["red"], KIND["circle"], MIDDLE), (False, False)),
        ((ANY, COLOR["green"], ANY, ANY), (False, False)),
        ((ANY, ANY, ANY, ANY), (True, True)),
    ],
)
def test_statements_are_true_where_one_shape_fits_all_of_it(two_scenes, statement, expected):
    assert tuple(truth(two_scenes, np.array([statement]))[:, 0]) == expected


def test_no_statement_is_true_of_a_shape_that_is_not_there(two_scenes):
    """The second scene has one shape; behind it the pool holds zeros: "small red circle"."""
    assert attributes(two_scenes)[1, 1].tolist() == [-2] * 4
    assert not truth(two_scenes, np.array([(0, 0, 0, ANY)]))[1, 0]


def test_attributes_and_words_are_those_of_the_shapes(cache_dir):
    pool = scene_pool("test", 10, cache_dir)
    for index, found in enumerate(attributes(pool)):
        for shape, one in zip(make_scene("test", index).shapes, found, strict=False):
            where = f"{'in' if shape.place == 'middle' else 'at'} the {shape.place}"
            assert words(one) == f"a {shape.name} {where}"


def test_sampled_statements_differ_and_half_are_true_somewhere(cache_dir):
    pool = scene_pool("test", 10, cache_dir)
    found = sample_statements(pool, np.random.default_rng(0), 100)
    assert len(np.unique(found, axis=0)) == 100
    assert 0.4 < truth(pool, found).any(0).mean() < 0.9


# ------------------------------------------------------------------------------------------------- probes


def planted(rng, count, strength):
    """Noise (count, 24), in which a class of four shifts three columns."""
    classes = torch.from_numpy(rng.integers(4, size=count))
    features = torch.from_numpy(rng.normal(size=(count, 24))).float()
    features[:, 5:8] += strength * torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]])[classes]
    return 100 + 7 * features, classes


@pytest.mark.parametrize(("strength", "low", "high"), [(8.0, 0.99, 1.0), (0.0, 0.18, 0.32)])
def test_probe_finds_what_is_planted_and_nothing_else(strength, low, high):
    rng = np.random.default_rng(0)
    fit, test = planted(rng, 500, strength), planted(rng, 500, strength)
    found = probe_accuracy(*fit, *test)
    assert low <= found <= high
    assert probe_accuracy(*fit, *test) == found


def test_learning_rate_has_the_lowest_dice_unless_its_probes_are_worse():
    rates = [
        {"learning_rate": 0.1, "dice": 0.6, "accuracy": 0.80},
        {"learning_rate": 0.2, "dice": 0.5, "accuracy": 0.79},
        {"learning_rate": 0.5, "dice": 0.4, "accuracy": 0.70},
    ]
    assert choose_learning_rate(rates) == 0.2
    rates[2]["accuracy"] = 0.785
    assert choose_learning_rate(rates) == 0.5


def test_probes_of_a_tower(trained, probed):
    """What any tower tells, trained or not: a patch's pixels and position, where a mask says which patches."""
    folder, _, _ = trained
    accuracy = probed["accuracy"]
    assert all(set(parts) == {"size", "color", "kind", "place"} for parts in accuracy.values())
    for attribute in ("color", "place"):
        assert accuracy["mask_pooling"][attribute] > accuracy["chance"][attribute] + 0.3
    assert accuracy["cls"]["place"] < accuracy["chance"]["place"] + 0.2  # all shapes of a scene have one CLS
    for rate in probed["learning_rates"]:
        assert 0 < rate["dice"] < rate["dice_at_start"] < 1
    assert probed["chosen_learning_rate"] in (0.1, 1.0)
    assert probed["num_shapes"] == [scene_pool(*pool).counts.sum() for pool in (("validation", 20), ("test", 10))]
    assert json.loads((folder / "probes.json").read_text()) == probed


def test_command_line_prints_the_tables(tmp_path, monkeypatch, capsys):
    calls = []
    accuracy = dict.fromkeys(probing.SOURCES, dict.fromkeys(probing.ATTRIBUTES, 0.5))
    rate = {"learning_rate": 0.2, "dice_at_start": 0.9, "dice": 0.4, "accuracy": 0.5}

    def probe(**options):
        calls.append(options)
        return {"accuracy": accuracy, "learning_rates": [rate], "chosen_learning_rate": 0.2}

    monkeypatch.setattr(probing, "probe_vision_tower", probe)
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path), "--quick"])
    probing.main()
    assert calls == [{"tower_dir": tmp_path, "quick": True, "cache_dir": None}]
    lines = capsys.readouterr().out.splitlines()
    assert "| mask inversion | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 |" in lines
    assert lines[-1] == "| 0.2 (chosen) | 0.900 | 0.400 | 0.500 |"

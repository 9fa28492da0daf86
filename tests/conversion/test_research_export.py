"""From our layout to the research code's and back."""

import json

import pytest
import torch
from research_checkpoints import ABSENT, tower_tensors, write_base, write_checkpoint, write_tower
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mask_llava_hf import MaskLlavaConfig
from mask_llava_hf.conversion import convert_checkpoint, export_checkpoint


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


ROUND_TRIPS = {
    "plain": {},
    "linear": {"mm_projector_type": "linear"},
    "deep": {"mm_projector_type": "mlp3x_gelu"},
    "identity": {"mm_projector_type": "identity"},
    "CLS": {"mm_vision_select_feature": "cls_patch"},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2},
    "positions": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0},
    "marks": {"mm_use_im_start_end": True, "vocab_size": 322},
    "odd vocabulary": {"vocab_size": 331},
    "Mistral": {
        "model_type": "llava_mistral",
        "architectures": ["LlavaMistralForCausalLM"],
        "sliding_window": None,
    },
    "cropped": {"image_aspect_ratio": None},
}


@pytest.mark.parametrize("changes", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_weights_and_settings_come_back(tmp_path, changes):
    source = write_checkpoint(tmp_path, **changes)
    convert_checkpoint(source, tmp_path / "ours", self_check=False)
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert_same(weights(tmp_path / "back"), weights(source))
    assert_same(weights(tmp_path / "back/vision_tower"), weights(tmp_path / "vision_tower"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert {name: after.get(name) for name in before} == before
    convert_checkpoint(tmp_path / "back", tmp_path / "again", self_check=False)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "processor_config.json",
        "model.safetensors",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes(), name


SETTINGS = {
    "use_cls_token": True,
    "patch_grid_size": 2,
    "max_object_tokens": 3,
    "norm_scaling": "fixed",
    "patch_statistics": [0.5, 2.0],
    "object_embedding": "mask_pooling",
    "mask_inversion": {"iterations": 4, "lr": 0.25, "alpha": 0.0, "weight_decay": 0.0},
}


def test_mask_llava_comes_back_with_its_composition(tmp_path):
    source = write_checkpoint(tmp_path, mask_llava=SETTINGS)
    report = convert_checkpoint(source, tmp_path / "ours")
    assert report.layout.startswith("Mask-LLaVA, research layout") and "`mask_llava`" in report.layout
    config = MaskLlavaConfig.from_pretrained(tmp_path / "ours")
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    report = export_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["mask_llava"] == SETTINGS
    assert any("neither pooling nor objects" in note for note in report.notes)
    assert_same(weights(tmp_path / "back"), weights(source))

    convert_checkpoint(source, tmp_path / "plain", layout="llava", self_check=False)
    config = MaskLlavaConfig.from_pretrained(tmp_path / "plain")
    assert (config.use_cls_token, config.patch_grid_size, config.max_object_tokens) == (False, 4, 0)


def test_named_tower_gets_our_weights_among_the_models(tmp_path):
    convert_checkpoint(write_checkpoint(tmp_path), tmp_path / "ours", self_check=False)
    other = write_tower(tmp_path / "other", tower_tensors(seed=9))
    export_checkpoint(tmp_path / "ours", tmp_path / "back", vision_tower=str(other))
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["mm_vision_tower"], config["unfreeze_mm_vision_tower"]) == (str(other), True)
    assert not (tmp_path / "back/vision_tower").exists()
    convert_checkpoint(tmp_path / "back", tmp_path / "again", self_check=False)
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "ours"))


def test_tower_named_like_the_folder_of_our_own(tmp_path):
    source = write_checkpoint(tmp_path)
    convert_checkpoint(source, tmp_path / "ours", self_check=False)
    export_checkpoint(tmp_path / "ours", tmp_path / "back", vision_tower="vision_tower")
    (tmp_path / "vision_tower/model.safetensors").unlink()  # beside the result, and not needed
    convert_checkpoint(tmp_path / "back", tmp_path / "again", self_check=False)
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "ours"))


def test_several_end_tokens_come_back(tmp_path):
    source = write_checkpoint(tmp_path)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 13]}))
    convert_checkpoint(source, tmp_path / "ours", self_check=False)
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back/generation_config.json").read_text())["eos_token_id"] == [2, 13]


def test_finetuned_checkpoint_without_its_slow_tokenizer(tmp_path):
    convert_checkpoint(write_checkpoint(tmp_path), tmp_path / "ours", self_check=False)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    AutoProcessor.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="no `tokenizer.model` in `research_tokenizer`.*--base"):
        export_checkpoint(tmp_path / "tuned", tmp_path / "back")
    base = write_base(tmp_path / "base")
    export_checkpoint(tmp_path / "tuned", tmp_path / "back", base=str(base), dtype=torch.float16)
    expected = weights(tmp_path / "checkpoint")["lm_head.weight"] * 2
    assert torch.equal(weights(tmp_path / "back")["lm_head.weight"], expected.half())
    assert (tmp_path / "back/tokenizer.model").exists()


def test_tokens_that_were_added_later_are_not_cut_off(tmp_path):
    convert_checkpoint(write_checkpoint(tmp_path), tmp_path / "ours", self_check=False)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    processor.tokenizer.add_tokens(["<point>"])
    processor.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="1 tokens were added after the conversion .<point>..*--base"):
        export_checkpoint(tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-1, -2]}, r"concatenates the layers \[-1, -2\]"),
        ({"projector_hidden_act": "relu"}, 'projector has "relu" between layers'),
        ({"multimodal_projector_bias": False}, "projector has no bias"),
    ],
)
def test_what_the_research_code_cannot_express_is_refused(tmp_path, changes, message):
    convert_checkpoint(write_checkpoint(tmp_path), tmp_path / "ours", self_check=False)
    path = tmp_path / "ours/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_only_our_checkpoints_are_exported(tmp_path):
    source = write_checkpoint(tmp_path, model_type="llava_llama", mm_projector_type=ABSENT)
    with pytest.raises(ValueError, match='has model_type "llava_llama"'):
        export_checkpoint(source, tmp_path / "back")
    convert_checkpoint(source, tmp_path / "ours", self_check=False)
    with pytest.raises(ValueError, match="in our own layout already.*--to llava"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(ValueError, match="would be deleted"):
        export_checkpoint(tmp_path / "ours", tmp_path / "ours", overwrite=True)
    tower = tmp_path / "vision_tower"
    with pytest.raises(ValueError, match="would be deleted"):
        export_checkpoint(tmp_path / "ours", tower, vision_tower=str(tower), overwrite=True)

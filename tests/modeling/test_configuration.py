import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlavaConfig

from mask_llava_hf import MaskLlavaConfig, MaskLlavaForConditionalGeneration, MaskLlavaModel


def test_defaults_are_llava_7b_with_57_tokens():
    config = MaskLlavaConfig()
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 336, 14)
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (4096, 32, 32000)
    assert (config.use_cls_token, config.patch_grid_size, config.max_object_tokens) == (True, 6, 20)
    assert config.image_seq_length == 57
    assert config.mask_inversion == {"iterations": 10, "lr": 0.5, "alpha": 0.0, "weight_decay": 0.0}


def test_partial_mask_inversion_settings_are_completed_and_survive_saving(tmp_path):
    config = MaskLlavaConfig(mask_inversion={"lr": 0.1}, norm_scaling="fixed", patch_statistics=[0.1, 0.9])
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is MaskLlavaConfig
    assert again.mask_inversion == {"iterations": 10, "lr": 0.1, "alpha": 0.0, "weight_decay": 0.0}
    skipped = {"_name_or_path", "transformers_version"}
    saved, loaded = ({k: v for k, v in c.to_dict().items() if k not in skipped} for c in (config, again))
    assert loaded == saved


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_grid_size": 0}, "patch_grid_size"),
        ({"patch_grid_size": True}, "patch_grid_size"),
        ({"max_object_tokens": -1}, "max_object_tokens"),
        ({"max_object_tokens": "20"}, "max_object_tokens"),
        ({"norm_scaling": "layer"}, "norm_scaling"),
        ({"norm_scaling": "fixed"}, "patch_statistics"),
        ({"patch_statistics": [0.0, 1.0]}, "patch_statistics"),
        ({"norm_scaling": "fixed", "patch_statistics": [0.0, -1.0]}, "standard deviation > 0"),
        ({"object_embedding": "mean"}, "object_embedding"),
        ({"mask_inversion": {"learning_rate": 0.1}}, r"unknown keys \['learning_rate'\]"),
        ({"mask_inversion": {"iterations": 0}}, "iterations"),
        ({"projector_type": "mlp0x_gelu"}, "projector_type"),
        ({"projector_type": "identity"}, "1024 channels and the language model 4096"),
        ({"vision_feature_layer": [-2, -5]}, "max_object_tokens=0"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"norm_scaling": "fixed", "patch_statistics": [float("nan"), 1.0]}, "patch_statistics"),
        ({"patch_grid_size": 48}, r"1..24, got 48"),
        ({"vision_config": {"model_type": "clip"}}, "clip_vision_model"),
    ],
)
def test_bad_fields_are_refused_by_name(values, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        MaskLlavaConfig(**values)


def test_arguments_of_loading_are_checked_too(tmp_path):
    MaskLlavaConfig().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, max_object_tokens=2).image_seq_length == 39
    for wrong in ({"norm_scaling": "fixed"}, {"patch_grid_size": 0}, {"projector_type": "foo"}):
        with pytest.raises((StrictDataclassError, ValueError), match=next(iter(wrong))):
            AutoConfig.from_pretrained(tmp_path, **wrong)


def test_statistics_as_a_tuple_survive_saving(tmp_path):
    config = MaskLlavaConfig(norm_scaling="fixed", patch_statistics=(0.1, 0.9))
    config.save_pretrained(tmp_path)
    assert MaskLlavaConfig.from_pretrained(tmp_path).patch_statistics == config.patch_statistics == [0.1, 0.9]


@pytest.mark.parametrize(("name", "layers"), [("identity", 0), ("linear", 1), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3)])
def test_projector_types(name, layers):
    vision = {"model_type": "clip_vision_model", "hidden_size": 4096, "num_attention_heads": 16}
    config = MaskLlavaConfig(projector_type=name, vision_config=vision)
    assert config.num_projector_layers == layers


@pytest.mark.parametrize("loader", [MaskLlavaConfig, MaskLlavaModel, MaskLlavaForConditionalGeneration])
def test_a_plain_llava_checkpoint_is_refused_and_the_converter_named(tmp_path, loader):
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'model_type "llava".*convert'):
        loader.from_pretrained(tmp_path)

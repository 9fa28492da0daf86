"""Transformers' own LLaVA and what it becomes, compared with Transformers' own forward pass."""

import json

import pytest
import torch
from research_checkpoints import TEXT, VISION, random_tensors, shapes_of, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
)

from mask_llava_hf.conversion import convert_checkpoint


IMAGE, PAD, NUM_ROWS = 320, 321, 384


@pytest.fixture
def source(tmp_path):
    return write_llava(tmp_path / "source")


def write_llava(folder, own_names=False, **changes):
    fields = {name: value for name, value in TEXT.items() if value is not None}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**{**fields, "vocab_size": NUM_ROWS, "pad_token_id": PAD}),
        image_token_index=IMAGE,
        **{"image_seq_length": 16, **changes},
    )
    model = LlavaForConditionalGeneration(config)
    model.load_state_dict(random_tensors(shapes_of(model), seed=4), strict=False)
    model.save_pretrained(folder, save_original_format=not own_names)
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] |= {
        str(IMAGE): {"content": "<image>", "normalized": False, "special": True},
        str(PAD): {"content": "<pad>", "normalized": False, "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    side = VISION["image_size"]
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **crop}))
    return folder


def logits(model, num_tokens):
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 281, *[IMAGE] * num_tokens, 13, 295]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28, generator=generator)).logits


@pytest.mark.parametrize("own_names", [False, True], ids=["published names", "names of the classes"])
@pytest.mark.parametrize(
    ("changes", "num_tokens"),
    [
        ({}, 16),
        ({"vision_feature_select_strategy": "full"}, 17),
        ({"vision_feature_layer": [-1, -2]}, 16),
        ({"projector_hidden_act": "relu", "multimodal_projector_bias": False}, 16),
    ],
    ids=["patches", "CLS and patches", "two layers", "other projector"],
)
def test_logits_stay_the_same(tmp_path, own_names, changes, num_tokens):
    source = write_llava(tmp_path / "source", own_names, **changes)
    names = set(load_file(source / "model.safetensors"))
    assert ("lm_head.weight" in names) == own_names
    report = convert_checkpoint(source, tmp_path / "target")
    assert report.layout.startswith("LLaVA, Transformers' layout") and not report.dropped
    before = LlavaForConditionalGeneration.from_pretrained(source)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "target")
    torch.testing.assert_close(logits(after, num_tokens), logits(before, num_tokens), rtol=0, atol=1e-5)


def test_processor_keeps_its_ids_and_pads_as_llava_was_trained(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "target")
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    assert (processor.image_token_id, processor.tokenizer.pad_token_id) == (IMAGE, PAD)
    assert processor.image_processor.do_pad
    assert any("the source's crops" in note for note in report.notes)
    generation = json.loads((tmp_path / "target/generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(IMAGE, NUM_ROWS))  # <image>, <pad>, and rows without a token
    assert (tmp_path / "target/chat_template.jinja").read_text().startswith("{% for message in messages %}")


def test_settings_that_the_source_states_stay(source, tmp_path):
    LlavaImageProcessor(
        do_pad=False, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(source)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'own' }}"}))
    convert_checkpoint(source, tmp_path / "target")
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    assert not processor.image_processor.do_pad
    assert processor.apply_chat_template([{"role": "user", "content": "a"}]) == "own"
    convert_checkpoint(source, tmp_path / "plain", chat_template="plain", self_check=False)
    assert "own" not in (tmp_path / "plain/chat_template.jinja").read_text()


def test_answers_end_where_the_sources_did(source, tmp_path):
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 13]}))
    convert_checkpoint(source, tmp_path / "target", self_check=False)
    assert json.loads((tmp_path / "target/generation_config.json").read_text())["eos_token_id"] == [2, 13]


def test_six_by_six_patches_need_a_tower_that_has_them(tmp_path):
    source = write_llava(tmp_path / "source")
    with pytest.raises(ValueError, match="`patch_grid_size` must be an integer in 1..4, got 6"):
        convert_checkpoint(source, tmp_path / "target", composition="mask-llava")  # this tower has 4 x 4 patches


def test_options_without_an_effect_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="`vision_tower` was given, which has no effect on .*Transformers' layout"):
        convert_checkpoint(source, tmp_path / "target", vision_tower="x")


def test_tokenizer_of_another_checkpoint_is_refused(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "image_token_index": 300}))
    with pytest.raises(ValueError, match="images are token 300, but its tokenizer has `<image>` as 320"):
        convert_checkpoint(source, tmp_path / "target")


def test_weights_that_are_unknown_are_listed(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "image_newline": torch.ones(3)}, source / "model.safetensors")
    with pytest.raises(ValueError, match="1 weights that are unknown: image_newline"):
        convert_checkpoint(source, tmp_path / "target")

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mask_llava_hf import ImageObjects
from mask_llava_hf.processing.objects.detectors import ObjectDetector
from mask_llava_hf.processing.objects.segmenters import TransformersSegmenter
from mask_llava_hf.testing import (
    CHAT_TEMPLATE,
    build_tiny_checkpoint,
    tiny_config,
    tiny_detector,
    tiny_image_processor,
    tiny_model,
    tiny_segmenter,
    tiny_tokenizer,
)


PARTS = {
    "model": lambda **kwargs: tiny_model(**kwargs),
    "rt_detr": lambda **kwargs: tiny_detector("rt_detr", **kwargs)[0],
    "deformable_detr": lambda **kwargs: tiny_detector("deformable_detr", **kwargs)[0],
    "sam": lambda **kwargs: tiny_segmenter("sam", **kwargs)[0],
    "sam2": lambda **kwargs: tiny_segmenter("sam2", **kwargs)[0],
}


def ask(*turns):
    roles = ("user", "assistant") * len(turns)
    return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


def test_tokenizer_has_its_special_tokens_and_loses_no_byte():
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    assert set(tokenizer.all_special_tokens) == {"<unk>", "<s>", "</s>", "<pad>", "<image>"}
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 2048)
    ids = tokenizer("Grüße, 世界 🦊 <image>!").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(4) == 1 and 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Grüße, 世界 🦊 !"


def test_tokenizer_survives_saving(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("a cup<image> here").input_ids == tokenizer("a cup<image> here").input_ids
    assert (again.image_token, again.chat_template) == ("<image>", CHAT_TEMPLATE)


def test_chat_template_puts_images_first_and_marks_answers():
    blocks = [{"type": "text", "text": "What is it?"}, {"type": "image"}, {"type": "image"}]
    tokenizer = tiny_tokenizer()
    chat = ask(blocks, [{"type": "text", "text": "A cup."}], "Sure?")
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "USER: <image>\n<image>\nWhat is it? ASSISTANT: A cup.</s>USER: Sure? ASSISTANT:"
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, own in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if own]
    assert tokenizer.decode(answer) == " A cup.</s>"


def test_config_takes_overrides_down_to_single_fields():
    config = tiny_config(vision_config={"num_hidden_layers": 5}, text_config={"hidden_size": 32}, patch_grid_size=4)
    assert (config.vision_config.num_hidden_layers, config.vision_config.hidden_size) == (5, 64)
    assert (config.text_config.hidden_size, config.patch_grid_size, config.image_seq_length) == (32, 4, 1 + 16 + 20)


@pytest.mark.parametrize("part", PARTS)
def test_weights_depend_on_the_seed_alone(part):
    torch.manual_seed(1)
    first = PARTS[part](seed=3).state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        second = PARTS[part](seed=3).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())
    other = PARTS[part](seed=4).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert sum(value.numel() for value in first.values()) < 400_000


@pytest.mark.parametrize("kind", ["rt_detr", "deformable_detr"])
def test_detections_are_diverse_and_depend_on_the_image(kind, photo):
    model, image_processor = tiny_detector(kind, num_queries=30)
    first, second = ObjectDetector(model, image_processor).detect([photo, photo.rotate(180)])
    for objects in (first, second):
        assert 15 <= len(objects) <= 30
        assert objects.scores.max() - objects.scores.min() > 0.3
        sides = objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2]
        assert (sides.max(0).values > 2 * sides.min(0).values).all()
        assert (objects.boxes_xyxy[:, :2].std(0) > 5).all()
    number = min(len(first), len(second))
    assert not torch.allclose(first.boxes_xyxy[:number], second.boxes_xyxy[:number], atol=1)


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_masks_are_about_their_boxes(kind, photo):
    model, processor = tiny_segmenter(kind)
    boxes = torch.tensor([[10, 5, 50, 45], [60, 20, 85, 55], [0, 0, 97, 61]]).float()
    [masks] = TransformersSegmenter(model, processor.image_processor).segment([photo], [boxes])
    found = ImageObjects.from_masks(masks, (61, 97)).boxes_xyxy
    assert (found - boxes).abs().max() < 8
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert (masks.flatten(1).sum(1) > 0.7 * areas).all()


def test_checkpoint_answers_through_the_auto_classes(tiny_checkpoint, photo):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    assert model.config.untrained is True
    prompt = processor.apply_chat_template(ask([{"type": "image"}]), add_generation_prompt=True)
    inputs = processor(images=photo, text=prompt, return_tensors="pt")
    count = int(inputs["object_counts"][0])
    assert count > 5
    assert inputs["object_embeds"].shape == (1, 20, 64) and inputs["object_embeds"].isfinite().all()
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 1 + 36 + count
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert model(**inputs).logits.isfinite().all()


def test_checkpoint_is_the_same_every_time_and_can_be_moved(tiny_checkpoint, tmp_path):
    torch.rand(7)
    again = build_tiny_checkpoint(tmp_path / "again")
    for file in sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file()):
        assert (again / file).read_bytes() == (tiny_checkpoint / file).read_bytes(), file
    settings = json.loads((again / "processor_config.json").read_text())["object_settings"]
    assert (settings["detector"], settings["segmenter"]) == ("./detector", "./segmenter")
    assert str(tmp_path) not in "".join(path.read_text() for path in again.rglob("*.json"))


def test_checkpoint_with_other_parts_and_settings(tmp_path, photo):
    folder = build_tiny_checkpoint(
        tmp_path, detector="deformable_detr", segmenter=None, max_object_tokens=3, patch_grid_size=2, image_size=56
    )
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor(images=photo, text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 1 + 4 + 3
    assert model(**inputs).logits.isfinite().all()
    assert not (folder / "segmenter").exists()


def test_checkpoint_without_detector(tmp_path, photo):
    processor = AutoProcessor.from_pretrained(build_tiny_checkpoint(tmp_path, detector=None, segmenter=None))
    inputs = processor(images=photo, text="<image>", max_object_tokens=0, return_tensors="pt")
    assert inputs["object_counts"].tolist() == [0]
    inputs = processor(images=photo, text="<image>", boxes=[[10, 5, 50, 45]], return_tensors="pt")
    assert inputs["object_counts"].tolist() == [1]


def test_image_processor_pads_to_a_square(photo):
    assert tiny_image_processor(56)(photo, return_tensors="pt")["pixel_values"].shape == (1, 3, 56, 56)


@pytest.mark.parametrize("make", [tiny_detector, tiny_segmenter])
def test_unknown_kinds_are_named(make):
    with pytest.raises(ValueError, match="'yolo'"):
        make("yolo")

"""The processor from images and text to model inputs, on a tiny checkpoint with a random detector and segmenter."""

import copy
import dataclasses
import inspect
import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, pipeline
from transformers.utils import logging

from mask_llava_hf import ImageObjects, MaskLlavaProcessor
from mask_llava_hf.processing import object_parts, part_sources
from mask_llava_hf.processing.object_settings import ObjectSettings
from mask_llava_hf.processing.objects.detectors import ObjectDetector
from mask_llava_hf.testing import CHAT_TEMPLATE, build_tiny_checkpoint, tiny_image_processor, tiny_tokenizer


TEXT = "USER: <image>\nwhat is this ASSISTANT:"
BOXES = [[5, 5, 60, 50], [30.5, 20.5, 90, 60], [0, 0, 20, 20]]


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture
def in_memory():
    """A processor without any part, as a user builds it."""
    return MaskLlavaProcessor(tiny_image_processor(), tiny_tokenizer(), {"embed_size": 64, "image_size": 168})


@pytest.fixture
def warnings(monkeypatch):
    """Messages of this package's loggers; `warning_once` is made to warn every time."""
    messages: list[str] = []
    kind = type(logging.get_logger("mask_llava_hf"))
    monkeypatch.setattr(kind, "warning", lambda self, message, *args, **kwargs: messages.append(message))
    monkeypatch.setattr(kind, "warning_once", lambda self, message, *args: messages.append(message), raising=False)
    return messages


@pytest.fixture
def loads(monkeypatch):
    """Which parts are loaded from now on."""
    seen: list[str] = []
    monkeypatch.setattr(part_sources, "_parts", {})
    detect, segment, read = ObjectDetector.from_pretrained, object_parts.load_segmenter, object_parts.read_tower
    monkeypatch.setattr(ObjectDetector, "from_pretrained", lambda *a, **k: seen.append("detector") or detect(*a, **k))
    monkeypatch.setattr(object_parts, "load_segmenter", lambda *a, **k: seen.append("segmenter") or segment(*a, **k))
    monkeypatch.setattr(object_parts, "read_tower", lambda *a, **k: seen.append("vision_tower") or read(*a, **k))
    return seen


def picture(seed: int, size=(97, 61)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def placeholders(processor, inputs) -> list[int]:
    ids = torch.as_tensor(inputs["input_ids"])
    return (ids == processor.image_token_id).sum(-1).tolist()


# --------------------------------------------------------------------------------------------------------- tensors
def test_a_plain_call_has_the_documented_tensors(processor):
    inputs = processor(images=picture(0), text=TEXT, return_tensors="pt")
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in inputs.items()}
    count = int(inputs["object_counts"])
    assert 0 < count <= 20
    assert shapes["pixel_values"] == ((1, 3, 168, 168), torch.float32)
    assert shapes["object_counts"] == ((1,), torch.int64)
    assert shapes["object_embeds"] == ((1, 20, 64), torch.float32)
    assert placeholders(processor, inputs) == [1 + 36 + count]
    assert inputs["object_embeds"][0, :count].abs().sum(-1).min() > 0
    assert not inputs["object_embeds"][0, count:].any()
    assert set(inputs) == set(processor.model_input_names)


def test_batches_nest_images_and_mix_in_text(processor):
    images = [picture(0), picture(1, (40, 80)), picture(2)]
    texts = ["<image> and <image> differ?", "no image here", "<image> look"]
    inputs = processor(images=[images[:2], [], images[2:]], text=texts, padding=True, return_tensors="pt")
    counts = inputs["object_counts"].tolist()
    assert placeholders(processor, inputs) == [74 + counts[0] + counts[1], 0, 37 + counts[2]]
    flat = processor(images=images, text=texts, padding=True, return_tensors="pt")
    for name in inputs:
        assert torch.equal(inputs[name], flat[name]), name


def test_an_image_does_not_depend_on_its_neighbours(processor):
    images = [picture(0), picture(1, (40, 80)), picture(2)]
    # Masks are given: in another batch the segmenter rounds otherwise, and one pixel of a mask can turn
    masks = [objects.masks for objects in processor.find_objects(images)]
    together = processor(images=images, text=["<image>"] * 3, masks=masks, padding=True, return_tensors="pt")
    for index, image in enumerate(images):
        alone = processor(images=image, text="<image>", masks=masks[index], return_tensors="pt")
        assert alone["object_counts"] == together["object_counts"][index]
        torch.testing.assert_close(alone["object_embeds"][0], together["object_embeds"][index], atol=1e-4, rtol=1e-4)


def test_text_only(processor, loads):
    for images in (None, [], [[], []]):
        inputs = processor(images=images, text=["a", "b"], return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}
    assert not loads


def test_a_cap_in_the_call_narrows_the_tensors_and_takes_the_first(processor):
    full = processor(images=picture(0), text=TEXT, return_tensors="pt")
    for cap in (0, 1, 3):
        inputs = processor(images=picture(0), text=TEXT, max_object_tokens=cap, return_tensors="pt")
        assert inputs["object_embeds"].shape == (1, cap, 64)
        assert inputs["object_counts"].item() == cap
        torch.testing.assert_close(inputs["object_embeds"], full["object_embeds"][:, :cap], atol=1e-4, rtol=1e-4)
    more = processor(images=picture(0), text=TEXT, max_object_tokens=999, return_tensors="pt")
    assert more["object_embeds"].shape == (1, 20, 64)


def test_zero_objects_load_nothing(processor, loads, warnings):
    processor(images=picture(0), text=TEXT, max_object_tokens=0, return_tensors="pt")
    assert not loads and not warnings


def test_both_places_for_mask_inversion_agree(processor, model):
    images, texts = [picture(0), picture(1)], ["<image> a", "<image> b c"]
    by_processor = processor(images=images, text=texts, padding=True, return_tensors="pt")
    in_model = copy.deepcopy(processor)
    in_model.object_settings["mask_inversion"] = "model"
    by_model = in_model(images=images, text=texts, padding=True, return_tensors="pt")
    assert by_model["object_masks"].shape == (2, 20, 168, 168)
    assert by_model["object_masks"].dtype == torch.uint8
    assert set(by_model) == set(in_model.model_input_names)
    with torch.no_grad():
        states = model.model.vision_tower(by_model["pixel_values"], output_hidden_states=True).hidden_states
        from mask_llava_hf.modeling.object_embedding import embed_masks

        embeds = embed_masks(model.model.vision_tower, states, by_model["object_masks"], model.config, -2)
        torch.testing.assert_close(embeds, by_processor["object_embeds"], atol=1e-4, rtol=1e-4)
        logits = [model(**inputs).logits for inputs in (by_processor, by_model)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_no_detector_means_no_objects_and_one_warning(in_memory, warnings):
    inputs = in_memory(images=picture(0), text=TEXT, return_tensors="pt")
    assert inputs["object_counts"].tolist() == [0] and not inputs["object_embeds"].any()
    assert [message for message in warnings if 'object_settings["detector"]' in message] == warnings != []
    warnings.clear()
    in_memory(images=picture(0), text=TEXT, max_object_tokens=0)
    assert not warnings
    with pytest.raises(ValueError, match='"detector"'):
        in_memory.find_objects(picture(0))
    assert in_memory._get_num_multimodal_tokens(image_sizes=[(61, 97)])["num_image_tokens"] == [37]


def test_numbers_for_serving_are_an_upper_bound(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[(61, 97), (10000, 10000)])
    assert data["num_image_tokens"] == [57, 57] and data["num_image_patches"] == [1, 1]
    assert processor._get_num_multimodal_tokens(image_sizes=[(1, 1)], max_object_tokens=2)["num_image_tokens"] == [39]


def test_nothing_found_is_no_error(processor, warnings):
    strict = copy.deepcopy(processor)
    strict.object_settings["score_threshold"] = 1.0
    inputs = strict(images=picture(0), text=TEXT, return_tensors="pt")
    assert inputs["object_counts"].tolist() == [0]
    assert any("No objects were found" in message for message in warnings)


# --------------------------------------------------------------------------------------------------- given objects
def test_the_users_boxes_are_segmented_but_not_detected(processor, loads):
    inputs = processor(images=picture(0), text=TEXT, boxes=BOXES, return_tensors="pt")
    assert inputs["object_counts"].tolist() == [3]
    assert "detector" not in loads and "segmenter" in loads


def test_the_users_masks_need_neither_detector_nor_segmenter(processor, loads):
    masks = torch.zeros(2, 61, 97, dtype=torch.bool)
    masks[0, 10:30, 10:40] = masks[1, 30:, 50:] = True
    inputs = processor(images=picture(0), text=TEXT, masks=masks, return_tensors="pt")
    assert inputs["object_counts"].tolist() == [2] and loads == ["vision_tower"]
    # the given order is kept: token k is the k-th mask
    swapped = processor(images=picture(0), text=TEXT, masks=masks.flip(0), return_tensors="pt")
    torch.testing.assert_close(swapped["object_embeds"][0, :2], inputs["object_embeds"][0, :2].flip(0))


def test_found_objects_are_reused_and_nothing_is_computed_again(processor, loads):
    images = [picture(0), picture(1)]
    found = processor.find_objects(images)
    assert all(isinstance(objects, ImageObjects) and objects.embeddings is not None for objects in found)
    direct = processor(images=images, text=["<image>", "<image>"], return_tensors="pt")
    processor.unload()
    loads.clear()
    stored = [ImageObjects.from_dict(json.loads(json.dumps(objects.to_dict()))) for objects in found]
    for given in (found, stored, [objects.to_dict() for objects in found]):
        reused = processor(images=images, text=["<image>", "<image>"], objects=given, return_tensors="pt")
        for name in direct:
            torch.testing.assert_close(reused[name], direct[name], atol=1e-5, rtol=1e-5)
    assert not loads


def test_layouts_of_given_boxes(processor):
    one, three = picture(0), [picture(0), picture(1), picture(2)]
    texts = ["<image> <image>", "<image>"]

    def counts(images, text, **given):
        return processor(images=images, text=text, padding=True, **given)["object_counts"].tolist()

    tensor = torch.tensor(BOXES)
    for boxes in (BOXES, tensor, tensor.numpy(), [BOXES], [tensor], tensor[None]):
        assert counts(one, "<image>", boxes=boxes) == [3]
    assert counts(one, "<image>", boxes=[]) == counts(one, "<image>", boxes=[[]]) == [0]
    detected = counts(three, texts, boxes=None)
    assert counts(three, texts, boxes=[BOXES, None, []]) == [3, detected[1], 0]
    nested = [three[:2], three[2:]]
    assert counts(nested, texts, boxes=[[BOXES, None], [[]]]) == [3, detected[1], 0]
    assert counts(nested, texts, boxes=[BOXES, None, BOXES[:1]]) == [3, detected[1], 1]
    assert counts(nested, texts, boxes=[None, [BOXES[:2]]]) == [*detected[:2], 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"boxes": [BOXES]}, "For 2 image"),
        ({"boxes": BOXES[0]}, r"`boxes` must have one entry per image.*list of shape \(4,\)"),
        ({"masks": np.zeros((61, 97), bool)}, r"shape \(61, 97\)"),
        (
            {"boxes": [BOXES, BOXES], "masks": [np.ones((1, 61, 97), bool), None]},
            "Image 0 was given `boxes` and `masks`",
        ),
        ({"objects": ["a", "b"]}, "an ImageObjects"),
        ({"masks": [np.ones((1, 60, 97), bool), None]}, "60"),
        ({"boxes": [[[50, 50, 10, 10]], None]}, "50"),
        ({"boxes": [[[float("nan"), 0, 10, 10]], None]}, "NaN|nan"),
        ({"boxes": [[[500, 500, 600, 600]], None]}, "outside|image"),
        ({"objects": [ImageObjects.empty((97, 61)), None]}, "97 x 61.*61 x 97"),
    ],
)
def test_bad_objects_are_refused_before_any_part_is_loaded(processor, loads, given, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[picture(0), picture(1)], text=["<image>", "<image>"], **given)
    assert not loads


def test_more_objects_than_saved_raise_and_an_explicit_cap_cuts(processor):
    boxes = [[i, i, i + 30, i + 30] for i in range(21)]
    with pytest.raises(ValueError, match="21 objects.*`max_object_tokens`=20"):
        processor(images=picture(0), text=TEXT, boxes=boxes)
    cut = processor(images=picture(0), text=TEXT, boxes=boxes, max_object_tokens=4)
    assert cut["object_counts"].tolist() == [4]


def test_stored_embeddings_of_another_making_are_refused(processor):
    objects = processor.find_objects(picture(0))[0]
    wrong = {**objects.embedding_fingerprint, "lr": 0.123}
    with pytest.raises(ValueError, match="lr=0.123"):
        processor(images=picture(0), text=TEXT, objects=dataclasses.replace(objects, embedding_fingerprint=wrong))
    other_tower = {**objects.embedding_fingerprint, "vision_tower": "0" * 16}
    with pytest.raises(ValueError, match="vision_tower='0000000000000000'"):
        processor(images=picture(0), text=TEXT, objects=dataclasses.replace(objects, embedding_fingerprint=other_tower))
    narrow = dataclasses.replace(objects, embeddings=objects.embeddings[:, :32])
    with pytest.raises(ValueError, match="width 32.*64"):
        processor(images=picture(0), text=TEXT, objects=narrow)


def test_an_empty_mask_gives_no_token(processor, warnings):
    masks = np.zeros((3, 61, 97), bool)
    masks[0, 5:20, 5:20] = masks[2, 30:50, 30:50] = True
    inputs = processor(images=picture(0), text=TEXT, masks=masks, return_tensors="pt")
    assert inputs["object_counts"].tolist() == [2]
    assert torch.isfinite(inputs["object_embeds"]).all()
    assert len(warnings) == 1 and "1 of 3" in warnings[0]


def test_boxes_as_masks(processor):
    boxes_only = copy.deepcopy(processor)
    boxes_only.object_settings["mask_source"] = "boxes"
    objects = boxes_only.find_objects(picture(0))[0]
    areas = objects.masks.flatten(1).sum(1)
    widths, heights = (objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2]).unbind(1)
    assert ((areas - widths * heights).abs() <= widths + heights + 1).all()


# ------------------------------------------------------------------------------------------------------------ chats
def chat(image, **extra):
    block = {"type": "image", "image": image, **extra}
    return [{"role": "user", "content": [block, {"type": "text", "text": "what is this"}]}]


def test_chats_carry_objects_in_their_image_blocks(processor):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    objects = processor.find_objects(picture(0))[0]
    mask = np.zeros((1, 61, 97), np.uint8)
    mask[0, 10:40, 10:40] = 1
    rle = ImageObjects.from_masks(mask, (61, 97)).to_dict()["masks"]
    for extra, count in [
        ({"boxes": BOXES}, 3),
        ({"masks": mask}, 1),
        ({"masks": mask.tolist()}, 1),
        ({"masks": rle}, 1),
        ({"objects": objects}, len(objects)),
        ({"objects": objects.to_dict()}, len(objects)),
        ({"boxes": []}, 0),
    ]:
        inputs = processor.apply_chat_template(chat(picture(0), **extra), **options)
        assert inputs["object_counts"].tolist() == [count], list(extra)
    chats = [chat(picture(0), boxes=BOXES[:1]), chat(picture(1)), [{"role": "user", "content": "no image"}]]
    inputs = processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True, "max_object_tokens": 2})
    assert inputs["object_counts"].tolist() == [1, 2] and inputs["object_embeds"].shape[1] == 2


def test_pipeline_with_fewer_objects(tiny_checkpoint):
    pipe = pipeline("image-text-to-text", model=str(tiny_checkpoint), device="cpu")
    lengths = []
    pipe.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    prefills = []
    for options in ({}, {"generate_kwargs": {"max_object_tokens": 1}}, {"max_object_tokens": 0}):
        lengths.clear()
        out = pipe(text=chat(picture(0)), max_new_tokens=3, **options)
        assert out[0]["generated_text"][-1]["role"] == "assistant"
        prefills.append(lengths[0])
    assert prefills[0] - prefills[1] == 19 and prefills[1] - prefills[2] == 1


# ------------------------------------------------------------------------------------------- loading, saving, sharing
def test_saving_takes_relative_parts_along(processor, tmp_path):
    processor.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a/detector/model.safetensors").exists() and (tmp_path / "a/segmenter/config.json").exists()
    assert not list((tmp_path / "a").glob(".*"))
    again = AutoProcessor.from_pretrained(tmp_path / "a")
    assert again.to_dict() == processor.to_dict()
    model = AutoModelForImageTextToText.from_pretrained(processor._checkpoint.location)
    again.share_vision_tower(model)
    expected = processor.find_objects(picture(0))[0]
    assert torch.equal(again.find_objects(picture(0))[0].boxes_xyxy, expected.boxes_xyxy)
    again.save_pretrained(tmp_path / "a")  # in place
    shutil.rmtree(tmp_path / "a/detector")
    again.unload()
    again.share_vision_tower(model)
    with pytest.raises(ValueError, match="There is no .*a/detector'"):
        again.find_objects(picture(0))
    with pytest.raises(ValueError, match="There is no .*a/detector'"):
        again.save_pretrained(tmp_path / "b")


def test_paths_of_this_machine_are_refused_on_push(tiny_checkpoint, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    processor.object_settings["detector"] = str(Path(tiny_checkpoint, "detector").resolve())
    assert len(processor.find_objects(picture(0))[0]) > 0
    for push in (
        lambda: processor.push_to_hub("someone/x"),
        lambda: processor.save_pretrained(tmp_path, push_to_hub=True),
    ):
        with pytest.raises(ValueError, match=r'object_settings\[\'detector\'\].*"./detector"'):
            push()


def test_parts_are_loaded_once_and_shared(tiny_checkpoint, loads):
    first, second = (AutoProcessor.from_pretrained(tiny_checkpoint) for _ in range(2))
    for processor in (first, first, second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        processor(images=picture(0), text=TEXT)
    assert sorted(loads) == ["detector", "segmenter", "vision_tower"]
    second.unload()
    assert not part_sources._parts
    first.to(dtype=torch.bfloat16)(images=picture(0), text=TEXT)
    assert {key[3] for key in part_sources._parts if key[2] is not None} == {torch.bfloat16}


def test_copies_and_print_hold_no_model(processor):
    processor.find_objects(picture(0))
    for value in (processor, copy.deepcopy(processor)):
        assert not any(isinstance(v, torch.nn.Module) for v in vars(value).values())
    assert "object_settings" in repr(processor)
    assert len(pickle.dumps(processor._parts())) < 10_000


def test_threads_share_one_loading(tiny_checkpoint, loads):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    results, errors = {}, []

    def work(index):
        try:
            results[index] = processor(images=picture(index % 2), text=TEXT, return_tensors="pt")["object_embeds"]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and sorted(loads) == ["detector", "segmenter", "vision_tower"]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_a_shared_tower_is_used_and_not_kept_alive(tiny_checkpoint, loads):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    expected = processor(images=picture(0), text=TEXT, boxes=BOXES, return_tensors="pt")["object_embeds"]
    loads.clear()
    part_sources._parts.clear()
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    processor.share_vision_tower(model)
    found = processor(images=picture(0), text=TEXT, boxes=BOXES, return_tensors="pt")["object_embeds"]
    assert torch.equal(found, expected) and "vision_tower" not in loads
    del model
    processor(images=picture(0), text=TEXT, boxes=BOXES)
    assert "vision_tower" in loads
    with pytest.raises(ValueError, match="needs a Mask-LLaVA model, got Linear"):
        processor.share_vision_tower(torch.nn.Linear(1, 1))


def test_a_peft_model_shares_its_tower(tiny_checkpoint):
    from peft import LoraConfig, get_peft_model

    call = {"images": picture(0), "text": TEXT, "boxes": BOXES, "return_tensors": "pt"}
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    own = processor(**call)["object_embeds"]
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(2)
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    shared = processor.share_vision_tower(wrapped)(**call)["object_embeds"]
    assert (shared - own).abs().max() > 0.1


def test_places_the_tower_is_found_in(tiny_checkpoint, in_memory, tmp_path, loads):
    masks = np.ones((1, 61, 97), bool)
    call = {"images": picture(0), "text": TEXT, "masks": masks, "return_tensors": "pt"}
    expected = AutoProcessor.from_pretrained(tiny_checkpoint)(**call)["object_embeds"]
    with pytest.raises(ValueError, match="share_vision_tower"):
        in_memory(**call)

    in_memory.object_settings["vision_tower"] = str(tiny_checkpoint)
    assert torch.equal(in_memory(**call)["object_embeds"], expected)

    bare = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).model.vision_tower
    assert isinstance(bare, CLIPVisionModel)
    bare.save_pretrained(tmp_path / "tower")
    in_memory.object_settings["vision_tower"] = str(tmp_path / "tower")
    assert torch.equal(in_memory(**call)["object_embeds"], expected)

    adapter = tmp_path / "adapter"  # what Trainer leaves of a LoRA run: processor and adapter, no model
    AutoProcessor.from_pretrained(tiny_checkpoint).save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_checkpoint)}))
    assert torch.equal(AutoProcessor.from_pretrained(adapter)(**call)["object_embeds"], expected)

    lonely = tmp_path / "lonely"
    AutoProcessor.from_pretrained(tiny_checkpoint).save_pretrained(lonely)
    with pytest.raises(ValueError, match="no `config.json`.*share_vision_tower"):
        AutoProcessor.from_pretrained(lonely)(**call)


def test_only_the_shards_of_the_tower_are_read_and_strictly(tiny_checkpoint, tmp_path, loads):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="100KB")
    AutoProcessor.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {name for key, name in index.items() if "vision_tower" in key}
    for name in set(index.values()) - needed:
        (folder / name).write_bytes(b"broken")
    call = {"images": picture(0), "text": TEXT, "masks": np.ones((1, 61, 97), bool), "return_tensors": "pt"}
    expected = AutoProcessor.from_pretrained(tiny_checkpoint)(**call)["object_embeds"]
    # Equal but for the order of sums, which depends on where in memory the weights lie
    torch.testing.assert_close(AutoProcessor.from_pretrained(folder)(**call)["object_embeds"], expected)

    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    part_sources._parts.clear()
    with pytest.raises(ValueError, match="16 weights are missing"):
        AutoProcessor.from_pretrained(folder)(**call)


class _Images(torch.utils.data.Dataset):
    def __init__(self, processor, options):
        self.processor, self.options = processor, options

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.processor(images=picture(0), text=TEXT, return_tensors="pt", **self.options)["object_counts"]


def test_heavy_parts_raise_in_a_data_loader_worker(processor):
    objects = processor.find_objects(picture(0))[0]
    for options in ({"max_object_tokens": 0}, {"objects": objects}):
        loader = torch.utils.data.DataLoader(_Images(processor, options), num_workers=1)
        assert len(list(loader)) == 1
    with pytest.raises(RuntimeError, match="mask-llava precompute"):
        list(torch.utils.data.DataLoader(_Images(processor, {}), num_workers=1))


# ------------------------------------------------------------------------------------------------------------ images
def test_odd_images_become_upright_rgb(processor, tmp_path):
    base = picture(0)
    sixteen_bit = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: upright it is 61 x 97
    base.save(rotated, exif=exif)
    sixteen_bit.save(tmp_path / "sixteen.png")
    images = {
        "grayscale": base.convert("L"),
        "palette": base.convert("P"),
        "rgba": base.convert("RGBA"),
        "cmyk": base.convert("CMYK"),
        "16 bit": sixteen_bit,
        "16 bit path": str(tmp_path / "sixteen.png"),
        "array": np.asarray(base),
        "tensor": torch.from_numpy(np.asarray(base).copy()).permute(2, 0, 1),
        "float": np.asarray(base) / 255,
        "1 pixel": Image.new("RGB", (1, 1)),
        "very long": Image.new("RGB", (1500, 2)),
        "rotated path": str(rotated),
        "rotated pil": Image.open(rotated),
    }
    pixels = {}
    for name, image in images.items():
        inputs = processor(images=image, text=TEXT, boxes=[], return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 168, 168), name
        pixels[name] = inputs["pixel_values"]
    assert torch.equal(pixels["rotated path"], pixels["rotated pil"])
    gray = pixels["grayscale"]
    torch.testing.assert_close(pixels["16 bit"], gray, atol=0.02, rtol=0)
    assert torch.equal(pixels["16 bit"], pixels["16 bit path"])
    with pytest.raises(ValueError, match="61"):  # boxes of the stored, lying image
        processor(images=str(rotated), text=TEXT, boxes=[[70, 0, 97, 60]], masks=None)
    processor(images=str(rotated), text=TEXT, boxes=[[0, 70, 60, 97]])


def test_nan_pixels(processor):
    bad = np.zeros((10, 10, 3), np.float32)
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        processor(images=bad, text=TEXT)


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": None, "text": "<image> a"}, "no images"),
        ({"images": picture(0), "text": "a"}, "1 images"),
        ({"images": picture(0), "text": TEXT, "max_object_tokens": -1}, "`max_object_tokens`.*-1"),
        ({"images": picture(0), "text": TEXT, "max_object_tokens": True}, "`max_object_tokens`.*True"),
        ({"images": picture(0), "text": TEXT, "max_object_tokens": 2.0}, "`max_object_tokens`.*2.0"),
        ({"images": picture(0), "text": TEXT, "max_object_token": 2}, r"Unknown arguments \['max_object_token'\]"),
        ({"images": None, "text": "a", "boxes": BOXES}, "`boxes` was given without `images`"),
        ({"images": picture(0), "text": TEXT, "truncation": True, "max_length": 20}, "`max_length`=20"),
    ],
)
def test_bad_calls_are_refused_before_any_part_is_loaded(processor, loads, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)
    assert not loads


def test_placeholders_cut_by_truncation(processor):
    with pytest.raises(ValueError, match="truncation"):
        processor(images=picture(0), text=TEXT, truncation=True, max_length=40, boxes=BOXES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_objects": 3}, r"unknown keys \['max_objects'\]"),
        ({"max_object_tokens": 2.0}, "max_object_tokens"),
        ({"use_cls_token": 1}, "use_cls_token"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"mask_source": "sam"}, "mask_source"),
        ({"order": "iou"}, "order"),
        ({"mask_inversion": "both"}, "mask_inversion"),
        ({"detector": torch.nn.Linear(1, 1)}, "detector"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskLlavaProcessor(tiny_image_processor(), tiny_tokenizer(), settings)


def test_settings_are_complete_json(in_memory):
    assert in_memory.object_settings == ObjectSettings(embed_size=64, image_size=168).to_dict()
    json.dumps(in_memory.to_dict())
    assert not MaskLlavaProcessor.__init__.__code__.co_kwonlyargcount
    call = {"boxes", "masks", "objects", "max_object_tokens"}
    assert not call & set(inspect.signature(MaskLlavaProcessor.__init__).parameters)


def test_a_chat_template_masks_all_but_the_answers(processor):
    conversation = [*chat(picture(0), boxes=BOXES), {"role": "assistant", "content": "a cat"}]
    out = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=CHAT_TEMPLATE
    )
    ids = torch.tensor(out["input_ids"][0])[torch.tensor(out["assistant_masks"][0]).bool()]
    assert processor.decode(ids, skip_special_tokens=True).strip() == "a cat"


def test_a_checkpoint_without_segmenter_takes_boxes(tmp_path):
    folder = build_tiny_checkpoint(tmp_path, segmenter=None)
    objects = AutoProcessor.from_pretrained(folder).find_objects(picture(0))[0]
    assert len(objects) > 0 and objects.masks is not None

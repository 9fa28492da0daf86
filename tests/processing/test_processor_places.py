"""Where a processor's parts, images and objects come from: moved, changed, adapted, offloaded, stored, sent."""

import base64
import io
import json
import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mask_llava_hf import ImageObjects, MaskLlavaProcessor
from mask_llava_hf.processing import part_sources
from mask_llava_hf.processing.part_sources import PartSource
from mask_llava_hf.processing.vision_towers import fingerprint_weights
from mask_llava_hf.testing import tiny_image_processor, tiny_tokenizer


TEXT = "USER: <image>\nwhat is this ASSISTANT:"
BOXES = [[5, 5, 60, 50], [30.5, 20.5, 90, 60], [0, 0, 20, 20]]
CHAT = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


@pytest.fixture
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def embed(processor, image, **options) -> torch.Tensor:
    return processor(images=image, text=TEXT, boxes=BOXES, return_tensors="pt", **options)["object_embeds"]


# ------------------------------------------------------------------------------------------------------------ parts
@pytest.mark.parametrize("setting", ["./", "./../other", "./a/../../b", "./.", "./a//b"])
def test_relative_parts_stay_inside_the_checkpoint(setting):
    with pytest.raises(ValueError, match="inside the checkpoint"):
        MaskLlavaProcessor(tiny_image_processor(), tiny_tokenizer(), {"detector": setting})


def test_another_working_directory_changes_nothing(copied, photo, monkeypatch, tmp_path):
    monkeypatch.chdir(copied.parent)
    monkeypatch.setattr(part_sources, "_parts", {})
    spellings = ["checkpoint", "checkpoint/", "./checkpoint", str(copied), copied]
    processors = [AutoProcessor.from_pretrained(spelling) for spelling in spellings]
    monkeypatch.chdir("/")
    for processor in processors:
        embed(processor, photo)
    assert len([key for key in part_sources._parts if key[0] != "tower location"]) == 2  # one tower, one segmenter


def test_a_checkpoint_saved_anew_is_loaded_anew(copied, photo):
    before = embed(AutoProcessor.from_pretrained(copied), photo)
    model = AutoModelForImageTextToText.from_pretrained(copied)
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(2)
    model.save_pretrained(copied)
    after = embed(AutoProcessor.from_pretrained(copied), photo)
    shared = embed(AutoProcessor.from_pretrained(copied).share_vision_tower(model), photo)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, shared)


def test_an_index_left_over_from_a_sharded_save_is_no_obstacle(copied, photo):
    model = AutoModelForImageTextToText.from_pretrained(copied)
    expected = embed(AutoProcessor.from_pretrained(copied), photo)
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.vision_tower.x": "model-00004-of-00008.safetensors"}})
    )
    model.save_pretrained(copied)
    assert torch.equal(embed(AutoProcessor.from_pretrained(copied), photo), expected)


def test_a_bare_tower_embeds_by_each_processors_own_settings(tiny_checkpoint, tmp_path, photo):
    tower = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).model.vision_tower
    tower.save_pretrained(tmp_path / "tower")
    results = []
    for iterations in (10, 2):
        folder = shutil.copytree(tiny_checkpoint, tmp_path / str(iterations))
        config = json.loads((folder / "config.json").read_text())
        config["mask_inversion"]["iterations"] = iterations
        (folder / "config.json").write_text(json.dumps(config))
        own = AutoProcessor.from_pretrained(folder)
        other = AutoProcessor.from_pretrained(folder, object_settings={"vision_tower": str(tmp_path / "tower")})
        results.append(embed(own, photo))
        assert torch.equal(embed(other, photo), results[-1])
    assert (results[0] - results[1]).abs().max() > 0.01


def test_what_was_found_is_accepted_whether_or_not_the_tower_is_loaded(tiny_checkpoint, tmp_path, photo):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["mask_inversion"]["iterations"] = 2
    (base / "config.json").write_text(json.dumps(config))
    adapter = tmp_path / "adapter"
    AutoProcessor.from_pretrained(base).save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    for folder in (base, adapter):
        processor = AutoProcessor.from_pretrained(folder)
        objects = processor.find_objects(photo, max_object_tokens=2)
        for _ in range(2):
            assert processor(images=photo, text=TEXT, objects=objects)["object_counts"].tolist() == [2]
            processor.unload()


def test_an_adapter_of_the_tower_is_not_ignored(tiny_checkpoint, tmp_path, photo):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*\.q_proj", init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    adapted = AutoProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter .* changes the vision tower"):
        embed(adapted, photo)


def test_an_offloaded_model_shares_its_tower(tiny_checkpoint, processor, photo):
    from accelerate import cpu_offload

    expected = processor(images=photo, text=TEXT, boxes=BOXES, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    fingerprint = fingerprint_weights(model.model.vision_tower)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(embed(processor.share_vision_tower(model), photo), expected["object_embeds"])
    assert fingerprint_weights(model.model.vision_tower) == fingerprint


def test_a_lost_shared_model_is_spoken_of(tiny_checkpoint, processor, photo, monkeypatch):
    from mask_llava_hf.processing import object_parts

    messages = []
    monkeypatch.setattr(
        type(object_parts.logger), "warning_once", lambda self, message: messages.append(message), raising=False
    )
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    processor.share_vision_tower(model)
    embed(processor, photo)
    assert not messages
    del model
    embed(processor, photo)
    assert any("is gone" in message for message in messages)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fingerprint_ignores_precision_and_notices_training(tiny_checkpoint, dtype):
    tower = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).model.vision_tower
    fingerprint = fingerprint_weights(tower)
    tower.to(dtype)
    assert fingerprint_weights(tower) == fingerprint
    tower.float()
    optimizer = torch.optim.SGD(tower.parameters(), lr=1e-3)
    tower(torch.randn(1, 3, 168, 168)).last_hidden_state.square().mean().backward()
    optimizer.step()
    trained = fingerprint_weights(tower)
    assert trained != fingerprint
    tower.encoder.layers[0].mlp.fc1.weight.data = -tower.encoder.layers[0].mlp.fc1.weight.data
    assert fingerprint_weights(tower) != trained


def test_loading_a_tower_does_not_move_the_random_generator(processor, photo):
    processor.unload()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    embed(processor, photo)
    assert torch.equal(torch.rand(1), expected)


def test_a_missing_tower_is_missed_before_anything_is_loaded(tiny_checkpoint, tmp_path, photo, monkeypatch):
    AutoProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    monkeypatch.setattr(part_sources, "_parts", {})
    with pytest.raises(ValueError, match="no `config.json`"):
        AutoProcessor.from_pretrained(tmp_path).find_objects(photo)
    assert not part_sources._parts


def test_parts_of_a_hub_checkpoint_are_fetched_once(tiny_checkpoint, photo, monkeypatch):
    fetched = []

    def snapshot_download(repository, revision, allow_patterns):
        fetched.append((repository, revision, allow_patterns[0]))
        return str(tiny_checkpoint)

    monkeypatch.setattr(part_sources, "_parts", {})
    monkeypatch.setattr(part_sources, "snapshot_download", snapshot_download)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, object_settings={"mask_inversion": "model"})
    processor._checkpoint = PartSource.of("someone/mask-llava", "abc")
    for _ in range(2):
        assert processor(images=photo, text=TEXT)["object_counts"].item() > 0
    assert fetched == [("someone/mask-llava", "abc", "detector"), ("someone/mask-llava", "abc", "segmenter")]


def test_a_checkpoint_in_a_subfolder_finds_its_parts(tiny_checkpoint, tmp_path, photo):
    shutil.copytree(tiny_checkpoint, tmp_path / "inner")
    processor = AutoProcessor.from_pretrained(tmp_path, subfolder="inner")
    assert processor(images=photo, text=TEXT)["object_counts"].item() > 0


def test_saving_in_place_does_not_load_again(copied, photo):
    processor = AutoProcessor.from_pretrained(copied)
    embed(processor, photo)
    loaded = {key: id(part) for key, (_, part) in part_sources._parts.items()}
    processor.save_pretrained(copied)
    embed(processor, photo)
    assert {key: id(part) for key, (_, part) in part_sources._parts.items()} == loaded


def test_unload_frees_everything_and_keeps_a_shared_tower(tiny_checkpoint, processor, photo):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(2)
    shared = embed(processor.share_vision_tower(model), photo)
    processor.object_settings["segmenter"] = None  # what was loaded for the old setting is freed too
    processor.unload()
    assert not part_sources._parts
    processor.object_settings["segmenter"] = "./segmenter"
    assert torch.equal(embed(processor, photo), shared)


def test_unload_forgets_and_looks_for_nothing():
    processor = MaskLlavaProcessor(tiny_image_processor(), tiny_tokenizer(), {"detector": "./nope"})
    processor.unload()


def test_one_name_per_device():
    assert part_sources.concrete_device("cpu:0") == part_sources.concrete_device("cpu") == torch.device("cpu")


def test_settings_given_on_loading_change_single_keys(tiny_checkpoint, tmp_path):
    changed = AutoProcessor.from_pretrained(tiny_checkpoint, object_settings={"order": "score"})
    plain = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert changed.object_settings == {**plain.object_settings, "order": "score"}
    changed.save_pretrained(tmp_path)
    assert "object_settings" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match="unknown keys"):
        AutoProcessor.from_pretrained(tiny_checkpoint, object_settings={"ordre": "score"})


def test_settings_set_anew_are_completed_and_checked_on_saving(processor, tmp_path):
    processor.object_settings = {"embed_size": 64}
    assert "object_embeds" in processor.model_input_names
    processor.save_pretrained(tmp_path / "a")
    assert AutoProcessor.from_pretrained(tmp_path / "a").object_settings["patch_grid_size"] == 6
    processor.object_settings["order"] = "nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        processor.save_pretrained(tmp_path / "b")


def test_a_tokenizer_without_the_image_token_is_refused():
    with pytest.raises(ValueError, match="no token '<picture>'"):
        tokenizer = tiny_tokenizer()
        tokenizer.image_token = "<picture>"
        MaskLlavaProcessor(tiny_image_processor(), tokenizer)


# ------------------------------------------------------------------------------------------------- stored and sent on
def test_embeddings_of_another_pixel_frame_are_refused(processor, photo):
    objects = processor.find_objects(photo)
    assert processor(images=photo, text=TEXT, objects=objects)["object_counts"].tolist() == [len(objects[0])]
    with pytest.raises(ValueError, match="pixels=.*do_pad"):
        processor(images=photo, text=TEXT, objects=objects, do_pad=False)


def test_stored_objects_serve_a_processor_that_knows_no_tower(processor, photo):
    objects = processor.find_objects(photo)
    lonely = MaskLlavaProcessor(tiny_image_processor(), tiny_tokenizer(), {"embed_size": 64, "image_size": 168})
    inputs = [p(images=photo, text=TEXT, objects=objects, return_tensors="pt") for p in (processor, lonely)]
    assert torch.equal(inputs[0]["object_embeds"], inputs[1]["object_embeds"])


class _Images(torch.utils.data.Dataset):
    def __init__(self, processor, photo, options):
        self.processor, self.photo, self.options = processor, photo, options

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.processor(images=self.photo, text=TEXT, return_tensors="pt", **self.options)["object_counts"]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_take_stored_objects_and_refuse_to_invert(tiny_checkpoint, processor, photo, start):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    processor.share_vision_tower(model)
    objects = processor.find_objects(photo, max_object_tokens=2)[0]
    context = multiprocessing.get_context(start)

    def load(**options):
        data = _Images(processor, photo, options)
        return list(torch.utils.data.DataLoader(data, num_workers=1, multiprocessing_context=context))

    assert load(objects=objects)[0].tolist() == [[2]]
    with pytest.raises(RuntimeError, match="mask-llava precompute"):
        load(masks=np.ones((1, photo.height, photo.width), bool))


def test_chats_survive_a_dataset(processor, photo, tmp_path):
    photo.save(tmp_path / "a.png")
    objects = processor.find_objects(photo, max_object_tokens=2)[0]
    mask = np.zeros((1, photo.height, photo.width), bool)
    mask[0, 10:40, 10:40] = True
    rle = ImageObjects.from_masks(mask, (photo.height, photo.width)).to_dict()["masks"]
    says = [{"boxes": BOXES}, {"masks": rle}, {"objects": objects.to_dict()}, {"boxes": []}]
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "path": str(tmp_path / "a.png"), **say}, {"type": "text", "text": "a"}],
            }
        ]
        for say in says
    ]
    data = Dataset.from_list([{"messages": chat} for chat in chats])
    for row, count in zip(data["messages"], (3, 1, 2, 0), strict=True):
        inputs = processor.apply_chat_template(row, **CHAT)
        assert inputs["object_counts"].tolist() == [count]
    columns = Dataset.from_list([{"image": str(tmp_path / "a.png"), "objects": objects.to_dict()}] * 2)
    inputs = processor(images=columns["image"], text=["<image>"] * 2, objects=columns["objects"], return_tensors="pt")
    assert inputs["object_counts"].tolist() == [2, 2]


def test_objects_in_openai_style_blocks_are_kept(processor, photo):
    buffer = io.BytesIO()
    photo.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    block = {"type": "image_url", "image_url": {"url": url}, "boxes": BOXES}
    chat = [{"role": "user", "content": [block, {"type": "text", "text": "a"}]}]
    inputs = processor.apply_chat_template(chat, **CHAT)
    assert inputs["object_counts"].tolist() == [3]
    direct = processor(images=photo, text=TEXT, boxes=BOXES, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], direct["pixel_values"])


def test_objects_of_a_block_without_image_are_not_lost_silently(processor):
    chat = [{"role": "user", "content": [{"type": "image", "boxes": BOXES}, {"type": "text", "text": "a"}]}]
    with pytest.raises(ValueError, match="image block has `boxes` but no image"):
        processor.apply_chat_template(chat)


def test_every_way_to_pass_an_image_gives_the_same_pixels(processor, photo, tmp_path):
    transparent = photo.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(photo.size))
    sixteen_bit = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    for name, image in {"transparent": transparent, "16 bit": sixteen_bit}.items():
        path = tmp_path / f"{name}.png"
        image.save(path)
        encoded = base64.b64encode(path.read_bytes()).decode()
        forms = [image, path, str(path), encoded, f"data:image/png;base64,{encoded}"]
        forms += [base64.encodebytes(path.read_bytes()).decode(), path.read_bytes(), io.BytesIO(path.read_bytes())]
        forms += [{"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
        pixels = [processor(images=form, text=TEXT, max_object_tokens=0)["pixel_values"] for form in forms]
        assert all(torch.equal(other, pixels[0]) for other in pixels), name
    with pytest.raises(ValueError, match="'nothing.png', which is no file"):
        processor(images="nothing.png", text=TEXT)


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_kwargs": {"max_object_token": 3}}, r"images_kwargs\['max_object_token'\]"),
        ({"text_kwargs": {"paddding": True}}, r"text_kwargs\['paddding'\]"),
        ({"boxes": BOXES, "images_kwargs": {"boxes": BOXES}}, "`boxes` was given twice"),
        ({"do_rescale": False}, "`do_rescale` is False"),
        ({"size": {"height": 140, "width": 140}, "crop_size": {"height": 140, "width": 140}}, "140 x 140 .* is 168"),
        ({"boxes": [[50, 5, 10, 9]]}, "Image 0, `boxes`: .*50"),
        ({"boxes": [[i, i, i + 9, i + 9] for i in range(25)], "max_object_tokens": 999}, "25 objects"),
    ],
)
def test_bad_calls(processor, photo, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(images=photo, text=TEXT, **arguments)


def test_nothing_to_say_is_no_error(processor, photo):
    for nothing in ({"objects": [[], []]}, {"boxes": []}, {"masks": None}):
        assert "pixel_values" not in processor(images=[[], []], text=["a", "b"], **nothing)
    inputs = processor(images=[[photo], []], text=["<image>", "b"], boxes=[[], []], padding=True)
    assert inputs["object_counts"].tolist() == [0]
    inputs = processor(images=[[photo], [photo, photo]], text=["<image>", "<image><image>"], boxes=[[], [BOXES, None]])
    assert inputs["object_counts"].tolist()[:2] == [0, 3]
    assert processor(images=photo, text=TEXT, truncation="do_not_truncate", max_length=20, boxes=BOXES)
    assert processor.find_objects([]) == []


def test_masks_given_as_nested_arguments(processor, photo):
    inputs = processor(images=photo, text=TEXT, images_kwargs={"boxes": BOXES, "max_object_tokens": 2})
    assert inputs["object_counts"].tolist() == [2]


def test_full_size_masks_are_not_kept_by_a_call(processor, photo, monkeypatch):
    from mask_llava_hf.processing import processing_mask_llava

    seen = []
    stack = processing_mask_llava.stack_embeddings
    monkeypatch.setattr(
        processing_mask_llava, "stack_embeddings", lambda found, *args: seen.extend(found) or stack(found, *args)
    )
    processor(images=[photo] * 5, text=["<image>"] * 5)
    assert len(seen) == 5 and all(objects.masks is None and objects.embeddings is not None for objects in seen)

"""The training recipes, on tiny models and the small world."""

import json
import sys
from pathlib import Path

import datasets
import finetune_full
import finetune_lora
import pytest
import recipe
import torch
import train_projector
from peft import PeftModel
from PIL import Image
from shapes_world import load_shapes_world
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from mask_llava_hf import ImageObjects, MaskLlavaCollator, MaskLlavaProcessor, ObjectStore
from mask_llava_hf.processing.object_store import image_key
from mask_llava_hf.processing.vision_towers import fingerprint_settings
from mask_llava_hf.testing import (
    CHAT_TEMPLATE,
    build_tiny_checkpoint,
    tiny_config,
    tiny_image_processor,
    tiny_model,
    tiny_tokenizer,
)


NUM_SCENES = 12
# On a processor, a few steps that are saved at the end only; what a test says goes first
QUICK = {
    "learning_rate": 1e-3,
    "global_batch_size": None,
    "per_device_train_batch_size": 4,
    "dataloader_num_workers": 0,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A checkpoint small enough for the pictures of the small world."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("start"), image_size=98, patch_grid_size=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory, start) -> Path:
    """LLaVA's files: `captions.json`, `chats.json` (every fourth row is text alone), `images`, and their `objects`."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    processor = AutoProcessor.from_pretrained(start)
    store = ObjectStore.create_or_open(folder / "objects", processor.object_fingerprint())
    captions, chats = [], []
    with store.writer() as writer:
        for index, scene in enumerate(load_shapes_world("train", NUM_SCENES, questions_per_scene=2)):
            [picture] = scene["images"]
            picture.save(folder / "images" / f"{index}.png")
            [objects] = processor.find_objects(picture)
            writer.add(image_key(picture), objects)
            row = {"id": scene["id"], "image": f"{index}.png"}
            captions.append({**row, "conversations": turns(("Say it.\n<image>", scene["caption"]))})
            asked = [(question["text"], question["answer"]) for question in scene["questions"]]
            if index % 4:
                chats.append({**row, "conversations": turns(("<image>\n" + asked[0][0], asked[0][1]), *asked[1:])})
            else:
                chats.append({"id": scene["id"], "conversations": turns(("How are you?", "Well."))})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "chats.json").write_text(json.dumps(chats))
    return folder


def turns(*pairs):
    return [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]


def run_script(module, monkeypatch, start, world, data, output_dir, *options):
    """Runs a recipe as from the command line."""
    command = ["--checkpoint", start, "--data", world / data, "--image_folder", world / "images"]
    command += ["--object_store", world / "objects", "--object_dropout", 0, 20, "--output_dir", output_dir]
    command += ["--use_cpu", "--disable_tqdm", "True", "--logging_steps", 1, *options]
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, command)])
    module.main()


def weights_of(source):
    model = AutoModelForImageTextToText.from_pretrained(source) if isinstance(source, (str, Path)) else source
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def changed_parts(before, after):
    """Names of the model's parts of which a weight differs in any bit."""
    assert set(before) == set(after)
    parts = ("vision_tower", "multi_modal_projector", "language_model", "lm_head")
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return {part for part in parts for name in names if part in name}


def test_stage_1_trains_the_projector_alone(start, world, tmp_path, monkeypatch):
    batch = ["--per_device_train_batch_size", 3, "--global_batch_size", 6, "--dataloader_num_workers", 1]
    run_script(train_projector, monkeypatch, start, world, "captions.json", tmp_path, *batch, "--save_strategy", "no")
    assert changed_parts(weights_of(start), weights_of(tmp_path)) == {"multi_modal_projector"}
    # The checkpoint is whole: the processor finds objects with its own detector and segmenter, and the model answers
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = processor(images=Image.open(world / "images/0.png"), text="<image>", return_tensors="pt")
    assert inputs["object_counts"].item() > 0
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert model.config.text_config.use_cache and model.config.untrained


def test_captions_stand_alone_after_their_image(start):
    processor = AutoProcessor.from_pretrained(start)
    collator = MaskLlavaCollator(processor, chat_template=train_projector.CAPTION_TEMPLATE, max_object_tokens=0)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A red star."}]}
    sample = {"messages": [user, answer], "images": [Image.new("RGB", (9, 9))]}
    batch = collator([sample])
    text = processor.decode(batch["input_ids"][0])
    assert text == "<s>" + "<image>" * 10 + "A red star.\n"
    learned = batch["labels"][0]
    assert processor.decode(learned[learned != -100]) == "A red star.\n"
    more = {"role": "user", "content": [{"type": "text", "text": "And then?"}]}
    with pytest.raises(Exception, match="chats are for stage 2"):
        collator([{**sample, "messages": [user, answer, more, answer]}])


def test_stage_2_freezes_the_tower_and_goes_on_where_it_stopped(start, world, tmp_path):
    dataset = recipe.load_conversations(world / "chats.json", image_folder=world / "images")
    store = ObjectStore.open(world / "objects")

    def train(folder, **options):
        model = AutoModelForImageTextToText.from_pretrained(start)
        args = finetune_full.FullArguments(str(folder), **{**QUICK, "num_train_epochs": 2, **options})
        processor = AutoProcessor.from_pretrained(start)
        trainer = finetune_full.train(model, processor, dataset, args, object_store=store, object_dropout=(0, 20))
        return trainer, weights_of(model)

    saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    trainer, through = train(tmp_path / "through", **saving)
    assert trainer.state.global_step == 6
    assert changed_parts(weights_of(start), through) == {"multi_modal_projector", "language_model", "lm_head"}
    # Step 4 lies inside the second epoch, whose draws of objects are others than the first's
    (tmp_path / "broken").mkdir()
    (tmp_path / "through/checkpoint-4").rename(tmp_path / "broken/checkpoint-4")
    resumed, again = train(tmp_path / "broken", resume_from_checkpoint="last")
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert not changed_parts(through, again)


class ToldByObjects(Dataset):
    """The same picture and question each time; only the object tells the answer."""

    def __init__(self, fingerprint, count):
        random = torch.Generator().manual_seed(0)
        kinds = torch.randn(2, 64, generator=random)
        self.rows = []
        for index in range(count):
            embeddings = (kinds[index % 2] + 0.1 * torch.randn(64, generator=random))[None]
            box, score = torch.tensor([[1.0, 1.0, 9.0, 9.0]]), torch.ones(1)
            objects = ImageObjects(box, score, (20, 20), embeddings=embeddings, embedding_fingerprint=fingerprint)
            question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
            answer = {"role": "assistant", "content": [{"type": "text", "text": ("cup", "dog")[index % 2]}]}
            images = [Image.new("RGB", (20, 20), (90, 120, 60))]
            self.rows.append({"messages": [question, answer], "images": images, "objects": [objects]})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_a_model_learns_what_only_the_objects_tell(tmp_path):
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, vision_config={"image_size": 28, "num_hidden_layers": 1}, patch_grid_size=1)
    settings = {"patch_grid_size": 1, "image_size": 28, "embed_size": 64}
    processor = MaskLlavaProcessor(tiny_image_processor(28), tokenizer, settings, chat_template=CHAT_TEMPLATE)
    dataset = ToldByObjects(fingerprint_settings(None, processor.image_processor), 240)
    model = tiny_model(config)
    args = finetune_full.FullArguments(
        str(tmp_path), **{**QUICK, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 0}
    )
    losses = [
        entry["loss"]
        for entry in finetune_full.train(model, processor, dataset, args).state.log_history
        if "loss" in entry
    ]
    blind = torch.log(torch.tensor(2.0)) / (len(tokenizer(" cup").input_ids))  # per token, if the objects were not seen
    assert losses[0] > 3 and max(losses[-3:]) < 0.3 * blind
    batch = MaskLlavaCollator(processor, object_dropout=(0, 0))(dataset.rows[:8])
    with torch.no_grad():
        assert model.eval()(**batch).loss > blind  # without its objects it cannot know


def test_lora_trains_adapter_and_projector_and_merges_to_the_same(start, world, tmp_path, monkeypatch):
    options = ["--per_device_train_batch_size", 4, "--global_batch_size", 4, "--dataloader_num_workers", 0]
    options += ["--lora_r", 4, "--lora_alpha", 8, "--learning_rate", 1e-2, "--save_strategy", "no"]
    run_script(finetune_lora, monkeypatch, start, world, "chats.json", tmp_path, *options)
    before, merged = weights_of(start), AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert changed_parts(before, weights_of(merged)) == {"multi_modal_projector", "language_model"}
    unchanged = [name for name in before if "embed_tokens" in name or "norm" in name]
    assert all(torch.equal(before[name], weights_of(merged)[name]) for name in unchanged)

    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(images=Image.open(world / "images/1.png"), text="<image> What?", return_tensors="pt")
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(start), tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(**inputs).logits, expected, atol=1e-2)


def test_lora_and_projector_have_a_rate_each(start, world, tmp_path):
    args = finetune_lora.LoraArguments(str(tmp_path), **{**QUICK, "max_steps": 1, "warmup_steps": 0, "lora_r": 2})
    dataset = recipe.load_conversations(world / "chats.json", image_folder=world / "images")
    model, processor = AutoModelForImageTextToText.from_pretrained(start), AutoProcessor.from_pretrained(start)
    trainer = finetune_lora.train(model, processor, dataset, args, max_object_tokens=0)
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    rates = {}
    for group in trainer.optimizer.param_groups:
        for weight in group["params"]:
            rates[names[id(weight)]] = group["initial_lr"]
    assert {rate for name, rate in rates.items() if "multi_modal_projector" in name} == {2e-5}
    assert {rate for name, rate in rates.items() if "lora_" in name} == {1e-3}
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert set(rates) == trained and not any("vision_tower" in name for name in trained)
    assert sum("lora_A" in name for name in trained) == 2 * 7 and sum("projector" in name for name in trained) == 4


def test_trls_trainer_runs_the_same_way(start, world, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    import sft_trl

    options = ["--per_device_train_batch_size", 4, "--bf16", False, "--lora_r", 2, "--save_strategy", "no"]
    run_script(sft_trl, monkeypatch, start, world, "chats.json", tmp_path, *options, "--max_steps", 2)
    changed = changed_parts(weights_of(start), weights_of(tmp_path))
    assert changed == {"multi_modal_projector", "language_model"}
    assert AutoProcessor.from_pretrained(tmp_path).object_settings["detector"] == "./detector"


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_batches_of_like_length(start, world, tmp_path, strategy):
    args = finetune_full.FullArguments(str(tmp_path), **{**QUICK, "train_sampling_strategy": strategy, "max_steps": 1})
    dataset = recipe.load_conversations(world / "chats.json", image_folder=world / "images")
    model, processor = AutoModelForImageTextToText.from_pretrained(start), AutoProcessor.from_pretrained(start)
    trainer = finetune_full.train(model, processor, dataset, args, max_object_tokens=0)
    characters = [sum(len(block["text"] or "") for m in row["messages"] for block in m["content"]) for row in dataset]
    assert list(trainer.train_dataset["length"]) == characters and trainer.state.global_step == 1


@pytest.mark.parametrize("module", [train_projector, finetune_full, finetune_lora])
def test_help_shows_the_command_and_every_option(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__file__, "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    shown = capsys.readouterr().out
    assert f"accelerate launch examples/{Path(module.__file__).name} --checkpoint" in shown
    for option in ("--object_store", "--object_dropout", "--global_batch_size", "--resume_from_checkpoint"):
        assert option in shown


def test_published_batches_have_to_come_out_even(tmp_path):
    args = train_projector.ProjectorArguments(str(tmp_path), use_cpu=True)
    assert args.train_batch_size * args.gradient_accumulation_steps == 256 and args.learning_rate == 1e-3
    assert finetune_full.FullArguments(str(tmp_path), use_cpu=True).gradient_accumulation_steps == 128 // 16
    with pytest.raises(ValueError, match="--global_batch_size 256 is no multiple of the 48 samples"):
        train_projector.ProjectorArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=48)
    with pytest.raises(ValueError, match="--object_dropout takes two numbers"):
        recipe.DataArguments("checkpoint", "data", object_dropout=[3])

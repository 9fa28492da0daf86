import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor, TrainerState

from mask_llava_hf import ImageObjects, MaskLlavaCollator
from mask_llava_hf.processing import collator as collator_module
from mask_llava_hf.processing.collator import IGNORED_LABEL
from mask_llava_hf.processing.vision_towers import fingerprint_settings
from mask_llava_hf.testing import CHAT_TEMPLATE


IMAGE = {"type": "image", "text": None}
FIXED_TOKENS = 37  # 1 CLS + 6 x 6 patches


def text(value):
    return {"type": "text", "text": value}


def picture(seed, hw=(20, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8))


def chat(*turns, images=0):
    """A chat of questions and answers in turn, with all images in the first question."""
    messages = [
        {"role": role, "content": [text(turn)]}
        for role, turn in zip(("user", "assistant") * len(turns), turns, strict=False)
    ]
    messages[0]["content"] = [IMAGE] * images + messages[0]["content"]
    return messages


@pytest.fixture
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture
def make_objects(processor):
    def make(count, seed=0, hw=(20, 30)):
        random = np.random.default_rng(seed)
        corner = random.uniform(0, 10, (count, 2))
        boxes = torch.from_numpy(np.concatenate([corner, corner + random.uniform(3, 8, (count, 2))], 1)).float()
        return ImageObjects(
            boxes,
            torch.ones(count),
            hw,
            embeddings=torch.from_numpy(random.normal(size=(count, 64))).float(),
            embedding_fingerprint={
                "pixels": fingerprint_settings(None, processor.image_processor)["pixels"],
                **processor._parts().fingerprint(processor.image_processor, {}),
            },
        )

    return make


@pytest.fixture
def samples(make_objects):
    """An image with two turns, text only, two images with unequal numbers of objects, and an image without objects."""
    return [
        {
            "messages": chat("What is this?", "A dog, é!", "Where?", "On the table.", images=1),
            "images": [picture(0)],
            "objects": [make_objects(3, 0)],
        },
        {"messages": chat("How many are two and two?", "There are four of them, I think."), "images": []},
        {
            "messages": chat("Are they the same?", "No", images=2),
            "images": [picture(1), picture(2, (31, 12))],
            "objects": [make_objects(5, 1), make_objects(1, 2, (31, 12))],
        },
        {"messages": chat("Empty?", "Yes.", images=1), "images": [picture(3)], "objects": [[]]},
    ]


def answers(processor, batch):
    """What is not masked of each row, decoded; parts apart from each other are separate."""
    rows = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = labels != IGNORED_LABEL
        assert torch.equal(labels[learned], ids[learned])
        edges = torch.diff(learned.int(), prepend=torch.zeros(1, dtype=torch.int)).eq(1).cumsum(0)
        rows.append([processor.decode(ids[learned & (edges == part)]) for part in edges[learned].unique()])
    return rows


def test_only_answers_are_learned(processor, samples):
    batch = MaskLlavaCollator(processor)(samples)
    assert answers(processor, batch) == [
        [" A dog, é!</s>", " On the table.</s>"],
        [" There are four of them, I think.</s>"],
        [" No</s>"],
        [" Yes.</s>"],
    ]
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert placeholders.tolist() == [FIXED_TOKENS + 3, 0, 2 * FIXED_TOKENS + 6, FIXED_TOKENS]
    assert batch["object_counts"].tolist() == [3, 5, 1, 0]
    assert len(batch["pixel_values"]) == len(batch["object_embeds"]) == 4


def test_a_batch_is_what_the_processor_makes_padded_on_the_right(processor, samples):
    before = processor.to_json_string(), processor.tokenizer.padding_side
    batch = MaskLlavaCollator(processor)(samples)
    assert (processor.to_json_string(), processor.tokenizer.padding_side) == before
    for row, sample in enumerate(samples):
        inputs = processor.apply_chat_template(sample["messages"])
        options = {"images": sample["images"], "objects": sample["objects"]} if sample["images"] else {}
        alone = processor(text=inputs, **options)["input_ids"][0]
        length = len(alone)
        assert batch["input_ids"][row, :length].tolist() == list(alone)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert (batch["labels"][row, length:] == IGNORED_LABEL).all()
    images = [image for sample in samples for image in sample["images"]]
    assert torch.equal(batch["pixel_values"], processor._process_pixels(images)["pixel_values"])


def test_text_alone_and_padding_to_a_multiple(processor, samples):
    texts = [samples[1], {"messages": chat("Hi", "Ho")}]
    batch = MaskLlavaCollator(processor, pad_to_multiple_of=32)(texts)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    longest = MaskLlavaCollator(processor)(texts)["input_ids"].shape[1]
    assert longest % 32 and batch["input_ids"].shape == (2, longest + -longest % 32)
    assert answers(processor, batch)[1] == [" Ho</s>"]


def test_messages_of_plain_text_and_paths_of_images(processor, tmp_path, make_objects):
    picture(0).save(tmp_path / "a.png")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE]},
        {"role": "assistant", "content": "A dog."},
    ]
    sample = {"messages": messages, "images": [str(tmp_path / "a.png")], "objects": [make_objects(2).to_dict()]}
    batch = MaskLlavaCollator(processor)([sample])
    assert answers(processor, batch) == [[" A dog.</s>"]]
    assert batch["object_counts"].tolist() == [2]


def test_masks_reach_the_model_where_it_inverts(processor, samples):
    processor.object_settings["mask_inversion"] = "model"
    mask = np.zeros((1, 20, 30), dtype=bool)
    mask[0, 5:15, 5:20] = True
    sample = {"messages": samples[0]["messages"], "images": samples[0]["images"], "masks": [mask]}
    batch = MaskLlavaCollator(processor)([sample, samples[1]])
    assert batch["object_masks"].shape[:2] == (1, 20) and batch["object_masks"].any()
    assert batch["object_counts"].tolist() == [1]


# ------------------------------------------------------------------------------------------------------------ objects
class Store:
    def __init__(self, objects):
        self.objects = objects
        self.asked = 0

    def get(self, image):
        self.asked += 1
        return self.objects[image.tobytes()]


def test_objects_come_from_the_sample_then_the_store_then_the_processor(processor, samples, make_objects, monkeypatch):
    image = samples[0]["images"][0]
    store = Store({image.tobytes(): make_objects(4)})
    bare = {name: samples[0][name] for name in ("messages", "images")}
    batch = MaskLlavaCollator(processor, object_store=store)([bare, samples[2]])
    assert batch["object_counts"].tolist() == [4, 5, 1] and store.asked == 1
    with pytest.raises(KeyError, match="Sample 0 of the batch"):
        MaskLlavaCollator(processor, object_store=Store({"other": None}))([bare])

    def find(self, images, cap):
        return [make_objects(cap or 7) for _ in images]

    monkeypatch.setattr(type(processor), "find_objects", find)
    for cap, count in ((None, 6), (4, 4)):
        batch = MaskLlavaCollator(processor, object_dropout=(6, 6), max_object_tokens=cap)([bare])
        assert batch["object_counts"].tolist() == [count]
    batch = MaskLlavaCollator(processor, object_store=store, max_object_tokens=0)([bare])
    assert batch["object_counts"].tolist() == [0] and batch["object_embeds"].shape == (1, 0, 64) and store.asked == 1
    assert MaskLlavaCollator(processor, max_object_tokens=2)(samples)["object_counts"].tolist() == [2, 2, 1, 0]


def test_dropped_objects_are_the_last_of_the_keep_order(processor, samples):
    batch = MaskLlavaCollator(processor, object_dropout=(2, 2))(samples)
    assert batch["object_counts"].tolist() == [2, 2, 1, 0]
    for row, objects in zip(batch["object_embeds"], [*samples[0]["objects"], *samples[2]["objects"]], strict=False):
        kept = min(2, len(objects))
        assert torch.equal(row[:kept], objects.embeddings[:kept]) and not row[kept:].any()
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert placeholders.tolist() == [FIXED_TOKENS + 2, 0, 2 * FIXED_TOKENS + 3, FIXED_TOKENS]


@pytest.fixture
def many(make_objects):
    return [
        {"messages": chat("What?", "That.", images=1), "images": [picture(9)], "objects": [make_objects(20, seed)]}
        for seed in range(60)
    ]


def draws(collator, samples):
    return [int(collator([sample])["object_counts"]) for sample in samples]


def test_numbers_of_objects_are_drawn_evenly_anew_in_every_epoch(processor, many):
    collator = MaskLlavaCollator(processor, object_dropout=(3, 6), seed=1)
    numbers = {}
    for epoch in range(3):
        collator.set_epoch(epoch)
        numbers[epoch] = draws(collator, many)
    counts = np.bincount(sum(numbers.values(), []), minlength=7)
    assert counts[:3].sum() == 0 and counts[3:].min() > 25  # 45 expected, standard deviation 6
    assert numbers[0] != numbers[1] != numbers[2]
    assert draws(MaskLlavaCollator(processor, object_dropout=(3, 6), seed=2), many) != numbers[0]
    collator.set_epoch(1)
    # Neither order nor batch matters
    assert collator(many[::-1])["object_counts"].tolist() == numbers[1][::-1]


def test_the_epoch_reaches_workers_that_outlive_it(processor, many):
    collator = MaskLlavaCollator(processor, object_dropout=(0, 20))
    loader = DataLoader(many[:8], 4, collate_fn=collator, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        found = torch.cat([batch["object_counts"] for batch in loader]).tolist()
        alone = MaskLlavaCollator(processor, object_dropout=(0, 20))
        alone.set_epoch(epoch)
        assert found == draws(alone, many[:8])


def test_a_collator_can_be_sent_to_other_processes(processor, samples):
    collator = MaskLlavaCollator(processor, object_dropout=(0, 2), seed=3)
    collator.set_epoch(4)
    expected = collator(samples)
    for copied in (pickle.loads(pickle.dumps(collator)), copy.deepcopy(collator)):
        batch = copied(samples)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_trainer_tells_the_epoch(processor, many):
    collator = MaskLlavaCollator(processor, object_dropout=(0, 20))
    collator.epoch_callback().on_epoch_begin(None, TrainerState(epoch=2.0), None)
    expected = MaskLlavaCollator(processor, object_dropout=(0, 20))
    expected.set_epoch(2)
    assert draws(collator, many[:5]) == draws(expected, many[:5])


# ------------------------------------------------------------------------------------------------------------- length
def test_what_is_too_long_loses_its_end(processor, samples, monkeypatch):
    warnings = []
    monkeypatch.setattr(collator_module.logger, "warning", warnings.append)
    whole = MaskLlavaCollator(processor)(samples[:1])
    length = whole["input_ids"].shape[1] - 4
    collator = MaskLlavaCollator(processor, max_length=length)
    batch = collator(samples[:1])
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], whole[name][:, :length])
    [warning] = warnings
    assert warning.startswith("1 sample(s) so far") and f"with {length + 4}" in warning
    for _ in range(9):
        collator(samples[:1])
    assert len(warnings) == 2 and warnings[1].startswith("10 sample(s)")


def test_images_are_never_cut(processor, samples):
    with pytest.raises(ValueError, match=r"Sample 0 .*\('Are they the same\?'\) has .* image tokens lie past"):
        MaskLlavaCollator(processor, max_length=60)(samples[2:3])


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, r"Sample 'x7' has 1 image blocks in its `messages` but 0 `images`"),
        ({"images": [picture(0)] * 2}, r"Sample 'x7' has 1 image blocks .* but 2 `images`"),
        ({"messages": chat("What?", images=1)}, r"Sample 'x7' has no token to learn from"),
        ({"messages": chat("The tag <image>", "Yes", images=1)}, r"Sample 'x7' has '<image>' in its text"),
        ({"boxes": [[[0, 0, 9, 9]]]}, r"Sample 'x7': Image 0 was given `boxes` and `objects`"),
        ({"objects": [ImageObjects.empty((7, 7))]}, r"Sample 'x7': .*these objects belong to an image of 7 x 7"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(processor, samples, change, message):
    with pytest.raises(ValueError, match=message):
        MaskLlavaCollator(processor)([samples[1], {**samples[0], "id": "x7", **change}])


def test_an_image_that_cannot_be_read_is_named(processor, samples, tmp_path):
    picture(0, (200, 300)).save(tmp_path / "cut.png")
    start, *parts = (tmp_path / "cut.png").read_bytes().split(b"IDAT")
    (tmp_path / "cut.png").write_bytes(start + b"IDAT" + parts[0][:5000])
    (tmp_path / "torn.png").write_bytes(start + b"IDAT" + bytes(4).join(parts))  # to Pillow a `SyntaxError`
    for path in ("cut.png", "torn.png", "missing.png"):
        broken = {**samples[3], "id": 5, "images": [str(tmp_path / path)]}
        with pytest.raises(ValueError, match="Sample 5 has an image that cannot be read"):
            MaskLlavaCollator(processor)([samples[1], broken])


def test_an_answer_past_the_limit_is_told(processor, samples):
    with pytest.raises(ValueError, match=r"no token to learn from.*begins before `max_length`=8"):
        MaskLlavaCollator(processor, max_length=8)(samples[1:2])


def test_removed_columns_are_told(processor):
    with pytest.raises(ValueError, match=r"has \['labels'\], expected `messages`.*remove_unused_columns=False"):
        MaskLlavaCollator(processor)([{"labels": 1}])


def test_a_template_without_generation_spans_is_refused(processor):
    bare = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match="has no `{% generation %}"):
        MaskLlavaCollator(processor, chat_template=bare)
    processor.chat_template = bare
    with pytest.raises(ValueError, match="has no `{% generation %}"):
        MaskLlavaCollator(processor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"object_dropout": (5, 2)}, r"`object_dropout\[1\]` must be an integer >= 5, got 2"),
        ({"object_dropout": (0.5, 2)}, r"`object_dropout\[0\]` must be an integer"),
        ({"max_length": 0}, "`max_length` must be an integer >= 1"),
    ],
)
def test_wrong_arguments_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskLlavaCollator(processor, **arguments)


def test_a_tokenizer_without_padding_is_refused(processor):
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        MaskLlavaCollator(processor)


def test_detection_in_a_worker_names_the_mends(processor, samples):
    bare = {name: samples[0][name] for name in ("messages", "images")}
    loader = DataLoader([bare], collate_fn=MaskLlavaCollator(processor), num_workers=1)
    with pytest.raises(RuntimeError, match="inside a data-loader worker.*precompute"):
        next(iter(loader))


def test_objects_without_embeddings_keep_their_masks(processor, samples, make_objects):
    mask = torch.zeros(2, 20, 30, dtype=torch.bool)
    mask[:, 4:16, 4:20] = True
    objects = replace(make_objects(2), masks=mask, embeddings=None, embedding_fingerprint=None)
    batch = MaskLlavaCollator(processor, object_dropout=(1, 1))([{**samples[0], "objects": [objects]}])
    assert batch["object_counts"].tolist() == [1] and batch["object_embeds"][0, 0].any()

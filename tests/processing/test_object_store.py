import io
import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mask_llava_hf import ImageObjects, ObjectStore
from mask_llava_hf.processing.object_store import image_key


EMBEDDING = {"vision_tower": "abc", "iterations": 10, "lr": 0.5}
FINGERPRINT = {
    "order": "mask_iou",
    "detector": {"source": "./detector", "weights": "123"},
    "segmenter": {"source": "./segmenter", "weights": "456"},
    "embedding": EMBEDDING,
}


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def some_objects(number: int = 3, embedded: bool = True) -> ImageObjects:
    masks = torch.zeros(number, 6, 9, dtype=torch.bool)
    for row in range(number):
        masks[row, row % 5 : row % 5 + 2, 1:5] = True
    return ImageObjects(
        boxes_xyxy=torch.tensor([[1.0, row % 5, 5.25, row % 5 + 1] for row in range(number)]).reshape(-1, 4),
        scores=torch.linspace(0.9, 0.1, number),
        image_hw=(6, 9),
        masks=masks,
        embeddings=torch.randn(number, 4, generator=torch.Generator().manual_seed(number)) if embedded else None,
        embedding_fingerprint=EMBEDDING if embedded else None,
        labels=["thing"] * number,
    )


def assert_same(
    found: ImageObjects, expected: ImageObjects, fields: str = "boxes_xyxy scores masks embeddings"
) -> None:
    for name in fields.split():
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name
    assert found.image_hw == expected.image_hw
    assert found.labels == expected.labels


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def test_objects_come_back_as_they_were(folder):
    written = {number: some_objects(number) for number in range(1, 20)}  # more than a group of rows
    with ObjectStore.create_or_open(folder, FINGERPRINT).writer(shard_size=12) as writer:
        for number, objects in written.items():
            writer.add(image_key(picture(number)), objects)
    store = ObjectStore.open(folder)
    assert len(store) == 19
    assert sorted(store) == sorted(image_key(picture(number)) for number in written)
    assert len(list(folder.glob("*.parquet"))) == 2
    for number in (19, 1, 8, 9, 12, 13):
        assert_same(store.get(picture(number), with_masks=True), written[number])
        assert store.get(picture(number)).embedding_fingerprint == EMBEDDING


def test_masks_are_read_where_nothing_else_could_be_used(folder):
    with ObjectStore.create_or_open(folder, FINGERPRINT).writer() as writer:
        writer.add(image_key(picture(0)), some_objects())
        writer.add(image_key(picture(1)), some_objects(embedded=False))
        writer.add(image_key(picture(2)), ImageObjects.empty((6, 9)))
    store = ObjectStore.open(folder)
    assert store.get(picture(0)).masks is None
    assert_same(store.get(picture(1)), some_objects(embedded=False))
    assert store.get(picture(1), with_masks=False).masks is None
    assert_same(store.get(picture(2)), ImageObjects.empty((6, 9)))


def test_half_precision_takes_half_the_space(folder):
    with ObjectStore.create_or_open(folder, FINGERPRINT).writer(embedding_dtype=torch.float16) as writer:
        writer.add(image_key(picture(0)), some_objects())
    found = ObjectStore.open(folder).get(picture(0)).embeddings
    assert torch.equal(found, some_objects().embeddings.half())
    with pytest.raises(ValueError, match="bfloat16, expected torch.float32 or torch.float16"):
        ObjectStore.open(folder).writer(embedding_dtype=torch.bfloat16)


def test_a_key_is_what_an_image_shows(tmp_path):
    path, image = tmp_path / "a.png", picture(0)
    image.save(path)
    encoded = io.BytesIO()
    image.save(encoded, format="BMP")
    forms = [path, str(path), path.read_bytes(), encoded.getvalue(), image, np.asarray(image), image.convert("RGBA")]
    assert {image_key(form) for form in forms} == {image_key(image)}

    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.png", exif=exif)
    assert image_key(tmp_path / "rotated.png") == image_key(image.transpose(Image.Transpose.ROTATE_270))

    reshaped = Image.frombytes("RGB", (6, 9), image.tobytes())  # the same bytes, another picture
    one_pixel = image.copy()
    one_pixel.putpixel((8, 5), (1, 2, 3))
    assert len({image_key(other) for other in (image, reshaped, one_pixel)}) == 3
    with pytest.raises(ValueError, match="one image, got a list with 2 entries"):
        image_key([image, image])


def test_a_missing_image_is_named_with_the_mend(folder, tmp_path):
    store = ObjectStore.create_or_open(folder, FINGERPRINT)
    picture(0).save(tmp_path / "cat.png")
    for image in (tmp_path / "cat.png", Image.open(tmp_path / "cat.png")):
        with pytest.raises(KeyError, match=r"cat\.png.*mask-llava precompute"):
            store.get(image)
    with pytest.raises(KeyError, match="no such key"):
        store["no such key"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "score"}, "order='mask_iou', but now it is 'score'"),
        ({"detector": {"source": "./detector", "weights": "124"}}, "detector.weights='123', but now it is '124'"),
        ({"embedding": {**EMBEDDING, "lr": 0.1}}, "embedding.lr=0.5, but now it is 0.1"),
        ({"segmenter": None}, "segmenter=.*, but now it is None"),
        ({"more": 1}, "more=None, but now it is 1"),
    ],
)
def test_another_fingerprint_names_the_field(folder, change, message):
    ObjectStore.create_or_open(folder, FINGERPRINT)
    with pytest.raises(ValueError, match=message):
        ObjectStore.create_or_open(folder, {**FINGERPRINT, **change})
    with pytest.raises(ValueError, match=message):
        ObjectStore.open(folder).check({**FINGERPRINT, **change})


def test_a_part_may_move(folder):
    ObjectStore.create_or_open(folder, FINGERPRINT)
    moved = {**FINGERPRINT, "detector": {"source": "elsewhere/detector", "weights": "123"}}
    assert len(ObjectStore.create_or_open(folder, moved)) == 0


def test_writers_refuse_what_could_not_be_used(folder):
    writer = ObjectStore.create_or_open(folder, FINGERPRINT).writer()
    with pytest.raises(ValueError, match="neither masks nor embeddings"):
        writer.add("a", ImageObjects.from_boxes([[1, 1, 5, 5]], (6, 9)))
    other = ImageObjects(torch.tensor([[1.0, 1, 5, 5]]), torch.ones(1), (6, 9), None, torch.ones(1, 4), {"lr": 0.1})
    with pytest.raises(ValueError, match="'lr': 0.1.*'lr': 0.5"):
        writer.add("a", other)


def test_files_that_do_not_belong_here_are_named(folder, tmp_path):
    with ObjectStore.create_or_open(folder, FINGERPRINT).writer() as writer:
        writer.add(image_key(picture(0)), some_objects())
    with ObjectStore.create_or_open(tmp_path / "other", {**FINGERPRINT, "order": "score"}).writer() as writer:
        writer.add(image_key(picture(1)), some_objects())
    [shard] = (tmp_path / "other").glob("*.parquet")
    (folder / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match=f"{shard.name}.*order='score', the store has 'mask_iou'"):
        ObjectStore.open(folder)

    (folder / shard.name).write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{shard.name}.*is damaged"):
        ObjectStore.open(folder)


def test_what_is_no_store_is_told(folder):
    with pytest.raises(FileNotFoundError, match=r"store\.json.*mask-llava precompute"):
        ObjectStore.open(folder)
    ObjectStore.create_or_open(folder, FINGERPRINT)
    (folder / "store.json").write_text(json.dumps({"format": 99, "fingerprint": {}}))
    with pytest.raises(ValueError, match="has format 99.*reads format 1"):
        ObjectStore.open(folder)


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_failure_between_any_two_file_operations_harms_nothing(folder, monkeypatch, operation):
    with ObjectStore.create_or_open(folder, FINGERPRINT).writer() as writer:
        writer.add(image_key(picture(0)), some_objects())
    original, calls = getattr(os, operation), []

    def fails_once_later(*arguments):
        calls.append(arguments)
        if len(calls) == fails_at:
            raise OSError("no space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, operation, fails_once_later)
    for fails_at in (1, 2) if operation == "fsync" else (1,):  # the file, and its folder after it was renamed
        calls.clear()
        writer = ObjectStore.open(folder).writer()
        writer.add(image_key(picture(fails_at)), some_objects())
        with pytest.raises(OSError, match="no space left"):
            writer.flush()
        assert image_key(picture(0)) in ObjectStore.open(folder)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        writer.flush()  # what was added is kept, and can be written later
        assert image_key(picture(fails_at)) in ObjectStore.open(folder)


def test_a_store_that_was_never_finished_can_be_made_again(folder, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *arguments: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            ObjectStore.create_or_open(folder, FINGERPRINT)
    assert len(ObjectStore.create_or_open(folder, FINGERPRINT)) == 0


def test_leftovers_are_passed_over_and_the_first_of_two_counts(folder):
    store = ObjectStore.create_or_open(folder, FINGERPRINT)
    for objects in (some_objects(3), some_objects(2)):
        with store.writer() as writer:
            writer.add(image_key(picture(0)), objects)
    first = min(folder.glob("*.parquet"))
    (folder / f".{first.name}.123").write_bytes(first.read_bytes()[:100])  # of a writer that was killed
    store = ObjectStore.open(folder)
    assert len(store) == 1
    number = len(store.get(picture(0)))
    assert number in (2, 3)
    first.unlink()
    assert len(ObjectStore.open(folder).get(picture(0))) == 5 - number


def test_rows_are_written_after_a_while(folder):
    writer = ObjectStore.create_or_open(folder, FINGERPRINT).writer(flush_seconds=0)
    writer.add(image_key(picture(0)), some_objects(), "the file of yesterday")
    writer.add(image_key(picture(1)), some_objects())
    store = ObjectStore.open(folder)
    assert len(store) == 2
    assert store.file_stamps() == {"the file of yesterday"}


class _Lookups(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.store.get(picture(index)).embeddings


def test_reads_in_data_loader_workers(folder):
    with ObjectStore.create_or_open(folder, FINGERPRINT).writer() as writer:
        for number in range(4):
            writer.add(image_key(picture(number)), some_objects(number + 1))
    store = ObjectStore.open(folder)
    store.get(picture(0))  # also after the parent has read
    for used in (store, pickle.loads(pickle.dumps(store))):
        loader = torch.utils.data.DataLoader(
            _Lookups(used), batch_size=None, num_workers=2, multiprocessing_context=multiprocessing.get_context("fork")
        )
        for number, embeddings in enumerate(loader):
            assert torch.equal(embeddings, some_objects(number + 1).embeddings)

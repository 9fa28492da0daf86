import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import precompute_ray
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from transformers import AutoProcessor

from mask_llava_hf import ImageObjects, ObjectStore
from mask_llava_hf.precompute import PrecomputeWorker, _share, open_images, precompute_objects
from mask_llava_hf.processing.object_parts import ObjectParts
from mask_llava_hf.testing import build_tiny_checkpoint


QUIET = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Quick: segments only what it keeps, and keeps three."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), order="score", max_object_tokens=3)


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


def picture(number: int) -> Image.Image:
    """Something with edges, so that random detectors and segmenters differ from image to image."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((90 + number, 70), Image.Resampling.NEAREST)


def pictures(*numbers: int) -> list[tuple[str, Image.Image]]:
    return [(f"picture {number}", picture(number)) for number in numbers]


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number in range(6):
        picture(number).save(folder / f"{'more/' if number % 2 else ''}{number}.png")
    return folder


EXPECTED: dict[int, ImageObjects] = {}


def assert_stored(folder, processor, numbers):
    """The store has these pictures and no others, with the objects that the processor finds in them."""
    store = ObjectStore.open(folder)
    assert len(store) == len(numbers)
    for number in numbers:
        if number not in EXPECTED:
            [EXPECTED[number]] = processor.find_objects(picture(number))
        expected, found = EXPECTED[number], store.get(picture(number), with_masks=True)
        assert len(found) == len(expected)
        torch.testing.assert_close(found.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=1e-2)
        assert (found.masks != expected.masks).float().mean() < 1e-3
        assert torch.cosine_similarity(found.embeddings, expected.embeddings).min() > 0.98


# ----------------------------------------------------------------------------------------------------- the walk itself
def test_a_folder_is_walked_once(processor, image_folder, tmp_path):
    report = precompute_objects(image_folder, processor, tmp_path / "store", batch_size=4, progress=False)
    assert (report.stored, report.known, report.skipped) == (6, 0, [])
    assert_stored(tmp_path / "store", processor, range(6))
    store = ObjectStore.open(tmp_path / "store")
    assert report.objects == sum(len(store[key]) for key in store)

    report = precompute_objects(image_folder, processor, tmp_path / "store", progress=False)
    assert (report.stored, report.known) == (0, 6)


def test_stored_objects_are_used_and_nothing_is_computed_again(processor, checkpoint, tmp_path, monkeypatch):
    precompute_objects(pictures(0, 1), processor, tmp_path / "store", progress=False)
    store, images, text = ObjectStore.open(tmp_path / "store"), [picture(0), picture(1)], ["<image> a", "<image> b"]
    expected = processor(images=images, text=text, return_tensors="pt", padding=True)
    for part in ("detector", "segmenter", "mask_embedder"):
        monkeypatch.setattr(ObjectParts, part, lambda parts: pytest.fail("a part was used"))
    for used in (processor, AutoProcessor.from_pretrained(checkpoint)):
        objects = [store.get(image) for image in images]
        inputs = used(images=images, text=text, objects=objects, return_tensors="pt", padding=True)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        torch.testing.assert_close(inputs["object_embeds"], expected["object_embeds"], rtol=0.02, atol=0.02)


def test_a_processor_whose_model_inverts_stores_masks(checkpoint, tmp_path):
    processor = AutoProcessor.from_pretrained(checkpoint, object_settings={"mask_inversion": "model"})
    precompute_objects(pictures(0), processor, tmp_path / "store", progress=False)
    objects = ObjectStore.open(tmp_path / "store").get(picture(0))
    assert objects.embeddings is None
    inputs = processor(images=picture(0), text="<image>", objects=objects, return_tensors="pt")
    assert inputs["object_masks"].flatten(2).any(-1).sum() == 3


def test_fewer_objects_and_half_the_precision(processor, tmp_path):
    options = {"max_object_tokens": 2, "embedding_dtype": torch.float16}
    report = precompute_objects(pictures(0), processor, tmp_path / "store", progress=False, **options)
    assert report.objects == 2
    assert ObjectStore.open(tmp_path / "store").get(picture(0)).embeddings.dtype == torch.float16
    with pytest.raises(ValueError, match="`max_object_tokens` is 0"):
        precompute_objects(pictures(0), processor, tmp_path / "other", max_object_tokens=0, progress=False)


@pytest.mark.parametrize(
    ("settings", "options", "field"),
    [
        ({"score_threshold": 0.1}, {}, "score_threshold=0.05, but now it is 0.1"),
        ({"mask_source": "boxes"}, {}, "mask_source='segmenter', but now it is 'boxes'"),
        ({}, {"max_object_tokens": 2}, "max_object_tokens=3, but now it is 2"),
        ({}, {"embedding_dtype": torch.float16}, "embedding_dtype='float32', but now it is 'float16'"),
    ],
)
def test_other_settings_are_named(processor, checkpoint, tmp_path, settings, options, field):
    precompute_objects(pictures(0), processor, tmp_path / "store", progress=False)
    other = AutoProcessor.from_pretrained(checkpoint, object_settings=settings)
    with pytest.raises(ValueError, match=field):
        precompute_objects(pictures(1), other, tmp_path / "store", progress=False, **options)
    assert len(ObjectStore.open(tmp_path / "store")) == 1


def test_other_weights_and_precisions_are_named(processor, checkpoint):
    fingerprint = processor.object_fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    parts = processor._parts()
    for name, model in (("detector", parts.detector().model), ("segmenter", parts.segmenter().model)):
        parameter = next(model.parameters())
        parameter.data.neg_()
        changed = processor.object_fingerprint()
        parameter.data.neg_()
        assert [field for field in fingerprint if changed[field] != fingerprint[field]] == [name]
        assert changed[name]["weights"] != fingerprint[name]["weights"]
    half = AutoProcessor.from_pretrained(checkpoint).to("cpu", torch.bfloat16).object_fingerprint()
    assert [field for field in fingerprint if half[field] != fingerprint[field]] == ["dtypes"]


# ----------------------------------------------------------------------------------------- what cannot be read or done
def test_unreadable_images_are_skipped_by_name_and_tried_again(processor, image_folder, tmp_path):
    whole = (image_folder / "0.png").read_bytes()
    (image_folder / "0.png").write_bytes(whole[: len(whole) // 2])
    (image_folder / "2.png").write_text("no image")
    Image.new("RGB", (3000, 2)).save(image_folder / "strip.png")  # more than the segmenter takes
    report = precompute_objects(image_folder, processor, tmp_path / "store", batch_size=3, progress=False)
    assert [name for name, _ in report.skipped] == ["0.png", "2.png", "strip.png"]
    reasons = ["truncated", "not an image in any known format", "no objects can be made"]
    assert all(expected in found for (_, found), expected in zip(report.skipped, reasons, strict=True))
    lines = (tmp_path / "store/skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["0.png", "2.png", "strip.png"]
    assert_stored(tmp_path / "store", processor, [1, 3, 4, 5])

    (image_folder / "0.png").write_bytes(whole)
    report = precompute_objects(image_folder, processor, tmp_path / "store", progress=False)
    assert (report.stored, report.known, len(report.skipped)) == (1, 4, 2)
    assert len((tmp_path / "store/skipped.jsonl").read_text().splitlines()) == 2


def test_what_no_image_can_cause_is_raised(processor, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(type(processor), "find_objects", lambda *args: (_ for _ in ()).throw(ValueError("NaN")))
    with pytest.raises(ValueError, match="NaN"):
        precompute_objects(image_folder, processor, tmp_path / "store", progress=False)
    monkeypatch.setattr(type(processor), "find_objects", lambda *args: (_ for _ in ()).throw(RuntimeError("memory")))
    with pytest.raises(RuntimeError, match="memory") as raised:
        precompute_objects(image_folder, processor, tmp_path / "store", batch_size=2, progress=False)
    assert raised.value.__notes__ == ["This happened at the images 0.png, 2.png."]
    with pytest.raises(ValueError, match=r"Not one of 2 images could be read; the first is a \(.*no file here"):
        precompute_objects([("a", "nothing/a.png"), ("b", "b.png")], processor, tmp_path / "store", progress=False)


def test_images_without_names_are_refused(processor, tmp_path):
    with pytest.raises(ValueError, match="expected a pair of a name and an image"):
        precompute_objects(["a.png", "b.png"], processor, tmp_path / "store", progress=False)


# ---------------------------------------------------------------------------------------------------------- going on
def test_only_what_is_new_is_opened_and_only_new_pictures_are_computed(processor, image_folder, tmp_path, monkeypatch):
    precompute_objects(image_folder, processor, tmp_path / "store", progress=False)
    picture(9).save(image_folder / "0.png")  # another picture under an old name
    picture(1).save(image_folder / "copy.bmp")  # an old picture under a new name
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: (opened.append(path), original(path, *rest))[1])
    report = precompute_objects(image_folder, processor, tmp_path / "store", progress=False)
    assert sorted(path.name for path in opened) == ["0.png", "copy.bmp"]
    assert (report.stored, report.known) == (1, 6)
    assert_stored(tmp_path / "store", processor, [0, 1, 2, 3, 4, 5, 9])


def test_the_same_picture_twice_is_computed_once(processor, tmp_path):
    report = precompute_objects(pictures(0, 1, 0), processor, tmp_path / "store", progress=False)
    assert (report.stored, report.known) == (2, 1)


@pytest.mark.parametrize("fails_at", range(1, 6))
def test_a_failure_between_file_operations_loses_nothing_that_was_written(processor, tmp_path, monkeypatch, fails_at):
    original, calls = os.replace, []

    def replace(*arguments):
        calls.append(arguments)
        if len(calls) == fails_at:
            raise OSError("no space left on device")
        return original(*arguments)

    options = {"batch_size": 2, "shard_size": 2, "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="no space left"):
            precompute_objects(pictures(*range(6)), processor, tmp_path / "store", **options)
    # First the description is written, then three shards and the report; a shard that failed is tried again at the end
    written = {1: 0, 2: 2, 3: 4, 4: 6, 5: 6}[fails_at]
    report = precompute_objects(pictures(*range(6)), processor, tmp_path / "store", **options)
    assert (report.known, report.stored) == (written, 6 - written)
    assert_stored(tmp_path / "store", processor, range(6))


KILLED = """
import sys, time
from transformers import AutoProcessor
from mask_llava_hf.precompute import precompute_objects
from test_precompute import pictures

def slowly():
    yield from pictures(*range(7))
    time.sleep(600)

processor = AutoProcessor.from_pretrained(sys.argv[1])
precompute_objects(slowly(), processor, sys.argv[2], batch_size=1, shard_size=2)
"""


def test_a_killed_walk_goes_on(processor, checkpoint, tmp_path):
    store = tmp_path / "store"
    command = [sys.executable, "-c", KILLED, checkpoint, store]
    environment = {**QUIET, "PYTHONPATH": f"{Path(__file__).parent}:{Path(precompute_ray.__file__).parent}"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(list(store.glob("*.parquet"))) < 2:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(ObjectStore.open(store))
    assert 4 <= before < 7
    report = precompute_objects(pictures(*range(7)), processor, store, progress=False)
    assert (report.stored, report.known) == (7 - before, before)
    assert_stored(store, processor, range(7))


# ------------------------------------------------------------------------------------------------- several processes
def test_shares_are_disjoint_and_whole():
    pairs = pictures(*range(7))
    dataset = datasets.Dataset.from_dict({"image": [f"{number}.png" for number in range(7)]})
    rows = datasets.Dataset.from_dict({"image": [encoded(picture(0))] * 7}).cast_column("image", datasets.Image())
    for images in (pairs, dataset, rows):
        shares = [_share(images, index, 3) for index in range(3)]
        names = [[name for name, _ in share] for share, _ in shares]
        assert [total for _, total in shares] == [len(share) for share in names] == [3, 2, 2]
        assert len({name for share in names for name in share}) == 7
    names = [[name for name, _ in _share(iter(pairs), index, 3)[0]] for index in range(3)]
    assert sorted(name for share in names for name in share) == [name for name, _ in pairs]


def test_two_processes_share_the_work(processor, checkpoint, image_folder, tmp_path):
    (image_folder / "bad.png").write_text("no image")
    # `accelerate launch --cpu` starts one process, whatever number it is given
    launch = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "-m", "mask_llava_hf.cli"]
    arguments = ["precompute", image_folder, tmp_path / "store", "--checkpoint", checkpoint, "--device", "cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *arguments]
    environment = {**QUIET, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert "stored 6 images" in line
    assert "skipped 1, see" in line
    rows: Counter[str] = Counter()
    for shard in (tmp_path / "store").glob("*.parquet"):
        rows[shard.name.split("-")[1]] += pq.read_metadata(shard).num_rows
    assert sorted(rows.values()) == [2, 4]  # of seven files the even ones and the odd ones, the bad one among these
    assert_stored(tmp_path / "store", processor, range(6))
    assert "bad.png" in (tmp_path / "store/skipped.jsonl").read_text()


def test_a_worker_may_be_called_again_and_again(processor, tmp_path):
    worker, other = (PrecomputeWorker(processor, tmp_path / "store", batch_size=2) for _ in range(2))
    progress = []
    reports = [worker(pictures(0, 1), progress.append), worker(pictures(1, 2)), other(pictures(0))]
    assert [(report.stored, report.known) for report in reports] == [(2, 0), (1, 1), (1, 0)]
    assert sum(progress) == 2
    assert len(ObjectStore.open(tmp_path / "store")) == 3  # `other` could not know of 0, and its copy does no harm


def test_runs_under_ray_data(processor, checkpoint, image_folder, tmp_path, monkeypatch, capsys):
    (image_folder / "bad.png").write_text("no image")
    arguments = [image_folder, tmp_path / "store", "--checkpoint", checkpoint]
    monkeypatch.setattr(sys, "argv", ["precompute_ray.py", *map(str, arguments)])
    monkeypatch.setenv("PYTHONPATH", str(Path(precompute_ray.__file__).parent))  # for the actors
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        precompute_ray.main()
    finally:
        ray.shutdown()
    printed = capsys.readouterr().out
    assert "bad.png: not an image in any known format" in printed
    assert "stored the objects of 6 images; 0 were there already" in printed
    assert_stored(tmp_path / "store", processor, range(6))


class _Samples(torch.utils.data.Dataset):
    def __init__(self, processor, store):
        self.processor, self.store = processor, store

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = picture(index)
        return self.processor(images=image, text="<image>", objects=self.store.get(image), return_tensors="pt")


def test_data_loader_workers_read_the_store(processor, tmp_path):
    precompute_objects(pictures(0, 1), processor, tmp_path / "store", progress=False)
    data = _Samples(processor, ObjectStore.open(tmp_path / "store"))
    loaded = list(torch.utils.data.DataLoader(data, num_workers=1, batch_size=None))
    assert [sample["object_counts"].item() for sample in loaded] == [len(data.store.get(picture(n))) for n in (0, 1)]


# ---------------------------------------------------------------------------------------------------------- sources
def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def names_of(images) -> list[str]:
    return [name for name, _ in _share(images, 0, 1)[0]]


def test_datasets_are_read_without_decoding(processor, tmp_path):
    single = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "image": [encoded(picture(0)), None, b"no image"]}
    ).cast_column("image", datasets.Image())
    report = precompute_objects(single, processor, tmp_path / "store", progress=False)
    assert (report.stored, [name for name, _ in report.skipped]) == (1, ["row 2"])

    several = datasets.Features({"images": datasets.List(datasets.Image())})
    rows = {"images": [[picture(0), picture(1)], [], None, [picture(2)]]}
    nested = datasets.Dataset.from_dict(rows, features=several)
    assert (
        names_of(nested)
        == names_of(nested.to_iterable_dataset())
        == [
            "row 0, image 0",
            "row 0, image 1",
            "row 3, image 0",
        ]
    )
    report = precompute_objects(nested, processor, tmp_path / "store", progress=False)
    assert (report.stored, report.known) == (2, 1)
    assert_stored(tmp_path / "store", processor, range(3))
    with pytest.raises(ValueError, match=r"columns \['picture'\], expected `image` or `images`"):
        precompute_objects(
            single.rename_column("image", "picture").select_columns("picture"), processor, tmp_path / "s"
        )


def test_sources_are_opened_by_their_name(image_folder, tmp_path):
    assert names_of(open_images(str(image_folder))) == [
        "0.png",
        "2.png",
        "4.png",
        "more/1.png",
        "more/3.png",
        "more/5.png",
    ]
    rows = [
        {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
        {"conversations": [{"from": "human", "value": "Only text"}]},
        {"image": "0.png", "conversations": []},
        {"images": ["2.png", "gone.png"]},
    ]
    dataset = datasets.Dataset.from_dict({"images": [["a.png", "b.png"], [], None, ["a.png"]]})
    assert names_of(dataset) == ["a.png", "b.png"]  # once, also where several processes share the rows
    for name, text in (("a.json", json.dumps(rows)), ("a.jsonl", "\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_text(text)
        images = open_images(str(tmp_path / name), image_folder)
        assert images == [(file, image_folder / file) for file in ("0.png", "2.png", "gone.png")]
    assert open_images(str(tmp_path / "a.json"))[0][1] == tmp_path / "0.png"

    dataset = datasets.Dataset.from_dict({"image": [str(image_folder / "0.png")]}).cast_column(
        "image", datasets.Image()
    )
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "splits")
    dataset.to_parquet(tmp_path / "a.parquet")
    for source, split in (("saved", "train"), ("splits", "test"), ("a.parquet", "train")):
        [(name, _)] = _share(open_images(str(tmp_path / source), split=split), 0, 1)[0]
        assert name.startswith("row 0")
    with pytest.raises(ValueError, match=r"has the splits \['test'\], but `split` is 'train'"):
        open_images(str(tmp_path / "splits"))


def test_sources_that_are_not_there_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.json"):
        open_images(str(tmp_path / "a.json"))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        _share(tmp_path / "folder", 0, 1)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="has 1 files but no images"):
        _share(tmp_path, 0, 1)
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": []}]))
    with pytest.raises(ValueError, match="No row of .* has an `image`"):
        open_images(str(tmp_path / "text.json"))

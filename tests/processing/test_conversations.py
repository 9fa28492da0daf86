import json
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from mask_llava_hf import load_conversations
from mask_llava_hf.processing import conversations


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "coco").mkdir(parents=True)
    for name in ("images/a.png", "images/coco/b.png"):
        Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(folder, rows, lines=False):
    path = folder / "data.json"
    text = "\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def turn(speaker, value):
    return {"from": speaker, "value": value}


IMAGE = {"type": "image", "text": None}


def text(value):
    return {"type": "text", "text": value}


ROWS = [
    {
        "id": "000",
        "image": "a.png",
        "conversations": [
            turn("human", "<image>\nWhat is this?"),
            turn("gpt", "A red image.\n"),
            turn("human", " And?"),
            turn("gpt", "Nothing."),
        ],
    },
    {"id": 7, "image": "coco/b.png", "conversations": [turn("human", "Describe it.\n<image>"), turn("gpt", "Red.")]},
    {"id": "text", "conversations": [turn("system", "Be brief."), turn("human", "2 + 2?"), turn("gpt", "4")]},
    {
        "image": ["a.png", "coco/b.png", "a.png"],
        "conversations": [turn("human", "<image><image> Same? Look: <image>"), turn("gpt", "Yes.")],
    },
]


@pytest.mark.parametrize("lines", [False, True])
def test_llavas_files(folder, lines):
    dataset = load_conversations(write(folder, ROWS, lines), image_folder=folder / "images")
    first, second, third, fourth = dataset
    assert first["messages"] == [
        {"role": "user", "content": [IMAGE, text("What is this?")]},
        {"role": "assistant", "content": [text("A red image.\n")]},
        {"role": "user", "content": [text(" And?")]},
        {"role": "assistant", "content": [text("Nothing.")]},
    ]
    assert first["images"] == [str(folder / "images/a.png")] and first["id"] == "000"
    assert second["messages"][0]["content"] == [text("Describe it."), IMAGE] and second["id"] == "7"
    assert third["images"] == [] and third["messages"][0] == {"role": "system", "content": [text("Be brief.")]}
    assert fourth["messages"][0]["content"] == [IMAGE, IMAGE, text("Same? Look:"), IMAGE] and fourth["id"] is None
    assert [os.path.basename(path) for path in fourth["images"]] == ["a.png", "b.png", "a.png"]


def test_a_long_file_is_read_in_pieces(folder, monkeypatch):
    monkeypatch.setattr(conversations, "_CHUNK_CHARACTERS", 13)
    rows = [{**ROWS[0], "id": str(number) * number} for number in range(30)]
    for lines in (False, True):
        path = write(folder, rows, lines)
        assert [row["id"] for row in conversations.json_rows(str(path))] == [row["id"] for row in rows]


def test_a_changed_file_is_read_anew(folder):
    path = write(folder, ROWS)
    assert len(load_conversations(path, image_folder=folder / "images")) == 4
    write(folder, ROWS[:3])
    assert len(load_conversations(path, image_folder=folder / "images")) == 3


def test_images_beside_the_file_need_no_folder(folder):
    [row] = load_conversations(write(folder, [{**ROWS[0], "image": "images/a.png"}]))
    assert row["images"] == [str(folder / "images/a.png")]


def changed(**fields):
    return [ROWS[2], {**ROWS[0], **fields}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(image=None), r"Row 1 \(id '000'\) has 1 `<image>` marker\(s\).* but 0 image"),
        (changed(conversations=[turn("human", "Hello"), turn("gpt", "Hi")]), r"Row 1 .* has 0 .* but 1 image"),
        (changed(conversations=[turn("human", "<image> and <image>")]), r"Row 1 .* has 2 .* but 1 image"),
        (changed(conversations=[turn("bing", "<image>")]), r"Row 1 .* a turn from 'bing', expected one of"),
        (changed(conversations=[{"from": "human"}]), r"Row 1 .* whose `value` is None"),
        (
            changed(conversations=["<image>"]),
            r"Row 1 .* has \['<image>'\] as `conversations`, expected a list of objects",
        ),
        (changed(conversations={"from": ["human"]}), r"Row 1 .* has {'from': \['human'\]} as `conversations`"),
        (changed(image="c.png"), r"Row 1 .* names the image 'c.png', but there is no file .*`image_folder`"),
        (changed(image="no/c.png"), r"Row 1 .* names the image 'no/c.png', but there is no file"),
        ([ROWS[2], {"id": 5, "text": "hello"}], r"Row 1 \(id 5\) has neither `conversations` nor `messages` but"),
        ([ROWS[2], [1, 2]], r"Row 1 is a list"),
        (changed(boxes=[[[0, 0, 2, 2]]]), r"Row 1 of .*has `boxes`, which would be lost"),
    ],
)
def test_rows_that_do_not_fit_are_named(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        load_conversations(write(folder, rows), image_folder=folder / "images")


def test_a_broken_download_is_told(folder):
    path = write(folder, ROWS)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="ends early.*downloaded completely"):
        load_conversations(path, image_folder=folder / "images")
    path.write_text(path.read_text()[:300] + ' "no colon" ' + "x" * 100)
    with pytest.raises(ValueError, match="no list of JSON rows"):
        load_conversations(path, image_folder=folder / "images")


def test_a_wrong_place_is_told(folder):
    path = write(folder, ROWS)
    with pytest.raises(ValueError, match="`image_folder` is .*elsewhere"):
        load_conversations(path, image_folder=folder / "elsewhere")
    with pytest.raises(ValueError, match="There is no file .*other.json"):
        load_conversations(folder / "other.json")
    with pytest.raises(ValueError, match="`split` is 'test'"):
        load_conversations(path, image_folder=folder / "images", split="test")


# ------------------------------------------------------------------------------------------------------- datasets
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
]
RED = Image.new("RGB", (5, 4), (255, 0, 0))


def pictures(**columns):
    dataset = datasets.Dataset.from_dict(columns)
    for name in {"image", "images"} & set(columns):
        feature = datasets.Image()
        dataset = dataset.cast_column(name, datasets.List(feature) if name == "images" else feature)
    return dataset


def assert_red(row):
    assert row["messages"][0]["content"] == [IMAGE, text("What?")]
    [image] = row["images"]
    assert np.array_equal(np.asarray(image), np.asarray(RED))


def test_a_dataset_as_it_should_be_is_taken_as_it_is(tmp_path):
    dataset = pictures(messages=[MESSAGES], images=[[RED]], boxes=[[[[0.0, 0.0, 2.0, 2.0]]]], source=["x"])
    loaded = load_conversations(dataset)
    assert set(loaded.column_names) == {"messages", "images", "boxes"}
    assert loaded.cache_files == dataset.cache_files
    assert_red(loaded[0])
    dataset.save_to_disk(tmp_path / "saved")
    assert_red(load_conversations(tmp_path / "saved")[0])
    datasets.DatasetDict({"validation": dataset}).save_to_disk(tmp_path / "splits")
    assert_red(load_conversations(tmp_path / "splits", split="validation")[0])
    with pytest.raises(ValueError, match=r"has the splits \['validation'\], but `split` is 'train'"):
        load_conversations(tmp_path / "splits")


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [MESSAGES], "image": [RED]},
        {"messages": [[{"role": "user", "content": "<image>\nWhat?"}]], "images": [[RED]]},
        {"conversations": [[turn("human", "<image>\nWhat?"), turn("gpt", "Red.")]], "image": [RED], "id": [3]},
    ],
)
def test_other_columns_are_brought_to_one_form(columns, tmp_path):
    loaded = load_conversations(pictures(**columns))
    assert set(loaded.column_names) == {"messages", "images"} | set(columns) & {"id"}
    assert loaded.features["images"] == datasets.List(datasets.Image())
    assert_red(loaded[0])
    pictures(**columns).to_parquet(tmp_path / "folder" / "train.parquet")
    for source in (tmp_path / "folder", tmp_path / "folder" / "train.parquet"):
        assert_red(load_conversations(source)[0])


def test_paths_in_a_dataset_start_from_the_folder(folder):
    dataset = datasets.Dataset.from_dict({"messages": [MESSAGES], "images": [["a.png"]]})
    assert load_conversations(dataset, image_folder=folder / "images")[0]["images"] == [str(folder / "images/a.png")]
    with pytest.raises(ValueError, match="Row 0 names the image 'a.png'"):
        load_conversations(dataset, image_folder=folder)


def test_datasets_of_other_columns_are_refused():
    with pytest.raises(ValueError, match=r"has the columns \['image', 'question'\], expected `messages`"):
        load_conversations(pictures(question=["What?"], image=[RED]))
    strange = [{"role": "user", "content": [{"type": "audio"}]}]
    with pytest.raises(ValueError, match="Row 0 has a block with .*'audio'.*images stand in the column `images`"):
        load_conversations(pictures(messages=[strange], image=[RED]))
    with pytest.raises(ValueError, match="Row 0 has 1 `<image>` marker"):
        load_conversations(datasets.Dataset.from_dict({"messages": [MESSAGES], "image": [None]}))

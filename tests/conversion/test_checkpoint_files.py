import io
import json
import os
import re
from functools import partial
from weakref import finalize

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mask_llava_hf.conversion.checkpoint_files import LazyTensor, list_names, open_checkpoint, open_weights
from mask_llava_hf.conversion.checkpoint_writer import new_folder, write_weights


TENSORS = {"a.weight": torch.randn(4, 6), "b.bias": torch.arange(3.0), "c": torch.tensor(2.5)}


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


def loaded(tensors):
    return {name: tensor.load() for name, tensor in tensors.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["safetensors", "bin", "older bin", "state_dict inside"])
def test_shapes_are_known_before_numbers_are_read(tmp_path, form):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.bin")
    if form == "safetensors":
        save_file(TENSORS, path)
    else:
        content = {"state_dict": TENSORS} if "inside" in form else TENSORS
        torch.save(content, path, _use_new_zipfile_serialization="older" not in form)
    found = open_weights(path)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tuple(tensor.shape), torch.float32) for name, tensor in TENSORS.items()
    }
    assert_same(loaded(found), TENSORS)


def older_pickle():
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def broken(path, content, cut):
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    path.write_bytes(path.read_bytes()[:cut])


FILES = {
    "cut safetensors": ("w.safetensors", lambda path: broken(path, TENSORS, -8), "cut short: fetch it again"),
    "cut header": ("w.safetensors", lambda path: broken(path, TENSORS, 20), "cut short: fetch it again"),
    "cut archive": ("w.bin", lambda path: broken(path, TENSORS, -30), "table of contents.*fetch it again"),
    "cut older pickle": (
        "w.bin",
        lambda path: path.write_bytes(older_pickle()[:-4]),
        r"\(\d+ bytes\) cannot be read.*fetch it again",
    ),
    "empty": ("w.bin", lambda path: path.write_bytes(b""), r"`w.bin` \(0 bytes\) cannot be read"),
    "web page": ("w.bin", lambda path: path.write_text("<html>"), "is no file of PyTorch but begins with b'<html>'"),
    "LFS pointer": (
        "w.safetensors",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "Git LFS pointer.*git lfs pull",
    ),
    "code": (
        "w.bin",
        lambda path: torch.save({**TENSORS, "x": RunsCode()}, path),
        r"holds more than tensors \(it asks for \w+\.mkdir\).*Nothing of it was run.*weights_only=False",
    ),
    "numbers": ("w.bin", lambda path: torch.save({**TENSORS, "step": 5}, path), "beside tensors it holds step"),
    "list": ("w.bin", lambda path: torch.save([1], path), "is no flat table of weights.*list"),
    "quantised": (
        "w.bin",
        lambda path: torch.save({"a": torch.ones(3, 3, dtype=torch.int8)}, path),
        r"1 tensors of 8 bits \(such as a, torch.int8\).*quantised",
    ),
}


@pytest.mark.parametrize(("name", "write", "message"), FILES.values(), ids=FILES.keys())
def test_files_that_cannot_be_used_say_why(tmp_path, monkeypatch, name, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        open_weights(tmp_path / name)
    assert not (tmp_path / "was_run").exists()


def test_what_to_do_about_a_pickle_with_more_than_tensors_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**TENSORS, "x": RunsCode()}, "w.bin")
    with pytest.raises(ValueError) as caught:
        open_weights(tmp_path / "w.bin")
    exec(re.search(r"`(w = .*)`", str(caught.value))[1], {"torch": torch})
    assert_same(loaded(open_weights(tmp_path / "w.bin")), TENSORS)


def write_shards(folder, form="safetensors"):
    for number, name in enumerate(TENSORS, 1):
        stem, save = ("model", save_file) if form == "safetensors" else ("pytorch_model", torch.save)
        save({name: TENSORS[name]}, folder / f"{stem}-{number:05}-of-00003.{form}")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_without_an_index(tmp_path, form):
    write_shards(tmp_path, form)
    assert_same(loaded(open_checkpoint(tmp_path)), TENSORS)


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = "lacks 1 of its 3 weight files: model-00002-of-00003.safetensors"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)
    index = {name: f"model-{number:05}-of-00003.safetensors" for number, name in enumerate(TENSORS, 1)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_index_and_files_have_to_agree(tmp_path):
    write_shards(tmp_path)
    index = {"a.weight": "model-00001-of-00003.safetensors", "other": "model-00002-of-00003.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match="lists 1 weights that its files do not have: other"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 1}'])
def test_index_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"`model.safetensors.index.json` in .* is no index.*`weight_map`. Fetch it"):
        open_checkpoint(tmp_path)


def test_weights_in_two_files_are_refused(tmp_path):
    write_shards(tmp_path)
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"1 weights in two of its files \(a.weight\)"):
        open_checkpoint(tmp_path)


def test_safetensors_go_before_pickles(tmp_path):
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_same(loaded(open_checkpoint(tmp_path)), TENSORS)


def test_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="has no weights; expected one of model.safetensors"):
        open_checkpoint(tmp_path)


def test_names_are_cut_after_twenty():
    assert list_names(["b", "a"]) == "a, b"
    assert list_names(f"{i:02}" for i in range(23)).endswith("19 and 3 more")


# ------------------------------------------------------------------------------------------------------------ writing
def lazy(tensors):
    return {name: LazyTensor(name, "f", tuple(t.shape), t.dtype, t.clone) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_files_are_what_the_library_reads(tmp_path, dtype):
    [path] = write_weights(tmp_path, lazy({**TENSORS, "view": torch.randn(6, 4).T}), dtype)
    assert path.name == "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(path)
    assert list(found) == sorted([*TENSORS, "view"])
    assert_same({name: found[name] for name in TENSORS}, {name: tensor.to(dtype) for name, tensor in TENSORS.items()})


def test_shards_hold_no_more_than_asked_for(tmp_path):
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(5)} | {"large": torch.ones(100)}
    *files, index = write_weights(tmp_path, lazy(tensors), torch.float32, max_shard_bytes=80)
    assert [path.name for path in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert [len(load_file(path)) for path in files] == [2, 2, 1, 1]  # the large one by itself
    said = json.loads(index.read_text())
    assert said["metadata"] == {"total_parameters": 150, "total_size": 600}
    assert_same(loaded(open_checkpoint(tmp_path)), tensors)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    alive, most = set(), []

    def load(name):
        tensor = torch.ones(4)
        alive.add(name)
        most.append(len(alive))
        finalize(tensor, alive.discard, name)
        return tensor

    tensors = {f"w{i}": LazyTensor(f"w{i}", "f", (4,), torch.float32, partial(load, i)) for i in range(10)}
    write_weights(tmp_path, tensors, torch.float16)
    assert max(most) == 1


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is torch.float64, expected one of torch.float32"):
        write_weights(tmp_path, lazy(TENSORS), torch.float64)


def test_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("mask_llava_hf.conversion.checkpoint_writer.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="0.0 GB left. Make room"):
        write_weights(tmp_path, lazy(TENSORS), torch.float32)
    assert not list(tmp_path.iterdir())


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "target"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
        raise KeyboardInterrupt
    assert not list((tmp_path / "deep").iterdir())
    with new_folder(target) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]
    assert (target / "config.json").read_text() == "new"


def test_folder_that_is_replaced_stays_until_the_end(tmp_path, monkeypatch):
    target = tmp_path / "target"
    with new_folder(target) as folder:
        (folder / "config.json").write_text("old")
    with pytest.raises(RuntimeError), new_folder(target, overwrite=True) as folder:
        raise RuntimeError
    real, calls = os.replace, []

    def fails_at_second(source, destination):
        calls.append(destination)
        if len(calls) == 2:
            raise OSError("disk")
        real(source, destination)

    monkeypatch.setattr("mask_llava_hf.conversion.checkpoint_writer.os.replace", fails_at_second)
    with pytest.raises(OSError, match="disk"), new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    monkeypatch.undo()
    with new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_of_a_link_the_folder_behind_it_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/target")
    with new_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/target/config.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2 and len(list((tmp_path / "disk").iterdir())) == 1


def test_folders_that_are_no_checkpoints_are_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="is no checkpoint.*delete what is in it"), new_folder(tmp_path, True):
        pass
    assert (tmp_path / "thesis.tex").exists()

import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from research_checkpoints import MULTIMODAL, TEXT

from mask_llava_hf.conversion.source_files import local_folder, read_config
from mask_llava_hf.conversion.source_layouts import recognise


RESEARCH = {**TEXT, **MULTIMODAL}
LAYOUTS = {
    "llava": (RESEARCH, ["pytorch_model.bin"], ("llava", "full")),
    "oldest": ({**RESEARCH, "model_type": "llava"}, ["model-00001-of-00002.safetensors"], ("llava", "full")),
    "stage 1": (RESEARCH, ["mm_projector.bin"], ("llava", "projector")),
    "lora": (RESEARCH, ["adapter_config.json", "adapter_model.bin"], ("llava", "adapter")),
    "mask-llava": ({**RESEARCH, "mask_llava": {}}, ["model.safetensors"], ("mask-llava", "full")),
    "llava-hf": ({"model_type": "llava", "text_config": {}, "vision_config": {}}, [], ("llava-hf", "full")),
    "ours": ({"model_type": "mask_llava", "text_config": {}, "vision_config": {}}, [], ("transformers", "full")),
}


def write(folder, config, files):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in files:
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(("config", "files", "expected"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_are_told_from_files_alone(tmp_path, config, files, expected):
    for name in ("llava-v1.5-7b-lora", "sam.pth", "llava-hf"):
        found = recognise(write(tmp_path / name, config, files))
        assert (found.name, found.kind) == expected
        assert found.reason


def test_sam_is_told_from_its_weights(tmp_path):
    torch.save({"image_encoder.patch_embed.proj.weight": torch.ones(1)}, tmp_path / "any.thing")
    assert recognise(tmp_path / "any.thing").name == "sam"


def test_asked_for_layouts(tmp_path):
    folder = write(tmp_path / "x", *LAYOUTS["llava"][:2])
    found = recognise(folder, "mask-llava")
    assert (found.name, found.kind) == ("mask-llava", "full") and found.reason.startswith("as was asked for; ")
    assert recognise(folder, "llava").reason == recognise(folder).reason
    with pytest.raises(
        ValueError, match="`x` was said to be in the layout 'llava-hf', but it is in the layout 'llava'"
    ):
        recognise(folder, "llava-hf")


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"model_type": "llama"}, ["model.safetensors"], 'has model_type "llama" and neither .* goes to `--base`'),
        (RESEARCH, [], "has the config of a LLaVA but no weights"),
    ],
)
def test_what_cannot_be_converted(tmp_path, config, files, message):
    with pytest.raises(ValueError, match=message):
        recognise(write(tmp_path / "x", config, files))


def test_folders_without_a_usable_config(tmp_path):
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(ValueError, match="has no `config.json`.*it has weights.txt"):
        recognise(tmp_path)
    for content, message in (("{", "is not JSON"), ("[]", "holds list, expected an object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize("name", ["./gone", "/gone", "~/gone", "gone/from/here"])
def test_places_that_are_not_there(name):
    with pytest.raises(ValueError, match=f"The tower `{name}` is no folder.*Mend it."):
        local_folder(name, "tower", "Mend it.")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one repository, whose files are fetched into `tmp_path`; gives what is there and what was asked."""
    state = {"files": []}

    def download(repository, revision=None, allow_patterns=None):
        if repository == "no/connection":
            raise LocalEntryNotFoundError("Got: ConnectError")
        if repository != "some/model":
            raise RepositoryNotFoundError("no such repository", response=_Response())
        state.update(revision=revision)
        for name in filter_repo_objects(state["files"], allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("mask_llava_hf.conversion.source_files.snapshot_download", download)
    return state


class _Response:
    headers: dict = {}
    request = None


@pytest.mark.parametrize(
    ("needed", "others"),
    [
        (["model.safetensors"], ["pytorch_model.bin"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], ["pytorch_model-1-of-1.bin"]),
        (["pytorch_model.bin"], ["onnx/model.safetensors", "training_args.bin", "tf_model.h5"]),
        (["model.safetensors", "vision_tower/model.safetensors"], []),
        (["weights.safetensors", "model.safetensors.index.json"], ["pytorch_model.bin"]),
        (["mm_projector.bin"], []),
        (["adapter_model.safetensors", "non_lora_trainables.bin"], ["old/adapter_model.bin"]),
        (["model.safetensors", "research_tokenizer/tokenizer.model"], []),
    ],
)
def test_of_a_repository_only_what_is_needed_is_fetched(hub, tmp_path, needed, others):
    hub["files"] = ["config.json", "tokenizer.model", *others, *needed]
    assert local_folder("some/model@v2", "tower", "") == tmp_path
    assert hub["revision"] == "v2"
    fetched = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert fetched == {"config.json", "tokenizer.model", *needed}


@pytest.mark.parametrize(
    ("repository", "reason"), [("other/model", "no such repository"), ("no/connection", "Got: ConnectError")]
)
def test_repository_that_cannot_be_had(hub, repository, reason):
    with pytest.raises(ValueError, match=rf"The tower `{repository}` .* fetched from the Hub \({reason}\). Mend."):
        local_folder(repository, "tower", "Mend.")

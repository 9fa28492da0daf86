# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
r"""What converting a LLaVA-1.5-7B costs: memory of its own (anonymous), CPU time and wall time.

A checkpoint of true 7B shapes, all weights zero, is written in the research layout: as one safetensors file of 13 GB,
or as `.bin` shards of 10 and 3 GB, the sizes of the published one. Each conversion is a process of its own, whose
`RssAnon` is read every 10 ms. Pages of mapped files are not counted: the system takes them back when it needs memory.
Up to 28 GB on the disk of `--work-dir` are written and removed again.

    python benchmarks/conversion_memory.py --work-dir WORK
"""

import argparse
import json
import resource
import shutil
import time
from math import prod
from pathlib import Path
from typing import Any

import torch

from mask_llava_hf.evaluation.measuring import PeakMemory, anonymous_bytes, circumstances, in_process, write_rows


RESULTS = Path(__file__).parent / "results" / "conversion_memory.csv"
GB = 10**9

TEXT = {
    "model_type": "llava_llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "vision_tower",
    "image_aspect_ratio": "pad",
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}

# Source, whether the result is tried on a picture, and the conversion's own arguments.
RUNS: list[tuple[str, bool, dict[str, Any]]] = [
    ("one safetensors file", False, {}),
    ("one safetensors file", True, {}),
    ("bin shards of 10 GB", False, {"dtype": torch.float16}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="a folder to make, on a disk with 30 GB left")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True)
    rows = []
    try:
        for form, self_check, arguments in RUNS:
            source = options.work_dir / form.replace(" ", "-")
            if not source.exists():
                # In a process of its own too: what is written there is not to lie in the memory of those that follow
                in_process(_write_source, source, form)
            target = options.work_dir / "target"
            measured = in_process(_convert, source, target, self_check, arguments)
            shutil.rmtree(target)
            composition = arguments.get("composition", "llava")
            dtype = str(arguments.get("dtype", torch.bfloat16)).removeprefix("torch.")
            row = {"source": form, "composition": composition, "dtype": dtype, "self_check": self_check, **measured}
            rows.append({**row, **circumstances()})
            print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(options.work_dir, ignore_errors=True)
    write_rows(options.output, rows)


# ------------------------------------------------------------------------------------------------------------- source
def _write_source(folder: Path, form: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TEXT.items() if not k.startswith(("mm_", "model_"))}))
        tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    shapes = {name: tuple(tensor.shape) for name, tensor in llama.state_dict().items()}
    for layer, width in enumerate((1024, 4096)):
        shapes |= {f"model.mm_projector.{2 * layer}.weight": (4096, width)}
        shapes |= {f"model.mm_projector.{2 * layer}.bias": (4096,)}
    in_tower = {f"vision_model.{name}": tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    folder.mkdir()
    (folder / "vision_tower").mkdir()
    (folder / "config.json").write_text(json.dumps(TEXT))
    (folder / "vision_tower/config.json").write_text(json.dumps(VISION))
    _write_tokenizer(folder)
    _write_sparse(folder / "vision_tower/model.safetensors", in_tower)
    if form == "one safetensors file":
        _write_sparse(folder / "model.safetensors", shapes)
    else:
        _write_bin(folder, shapes)


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros, whose numbers take no room on a disk that knows sparse files."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def _write_bin(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Shards as `save_pretrained` made them: filled up to 10 GB."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * prod(s) for s in shards[-1].values()) + 2 * prod(shape) > 10 * GB:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        torch.save(
            {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shard.items()}, folder / file
        )
        weight_map |= dict.fromkeys(shard, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _write_tokenizer(folder: Path) -> None:
    """A byte tokenizer filled up to 32,000 tokens; the vocabulary grows by a row for `<image>`, as LLaVA's does."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<filler {index}>" for index in range(len(names), TEXT["vocab_size"])]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name) for name in names[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))


# ------------------------------------------------------------------------------------------------------- measurement
def _convert(source: Path, target: Path, self_check: bool, arguments: dict[str, Any]) -> dict[str, float]:
    from mask_llava_hf.conversion import convert_checkpoint

    before = anonymous_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        report = convert_checkpoint(source, target, self_check=self_check, **arguments)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    shards = [path.stat().st_size for path in target.glob("*.safetensors")]
    return {
        "parameters": report.num_parameters,
        "written_gb": round(sum(shards) / GB, 2),
        "largest_shard_gb": round(max(shards) / GB, 2),
        "anonymous_before_gb": round(before / GB, 2),
        "anonymous_peak_gb": round(memory.peak_bytes / GB, 2),
        "resident_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, 2),
        "cpu_s": round(cpu, 1),
        "wall_s": round(wall, 1),
    }


if __name__ == "__main__":
    main()

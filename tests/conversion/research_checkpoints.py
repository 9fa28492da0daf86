"""Tiny checkpoints in the layout of LLaVA's research code, in all its variants, and that code's forward pass in plain
steps. Files are written as the research code writes them; nothing here calls the conversion."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil


GOLDENS = Path(__file__).parents[1] / "goldens" / "llava_research"

NUM_ROWS = 320  # of the goldens' tokenizer
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "hidden_act": "quick_gelu",
    "projection_dim": 16,
}
TEXT = {
    "vocab_size": NUM_ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MULTIMODAL = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "torch_dtype": "float32",
    "image_aspect_ratio": "pad",
    "mm_hidden_size": VISION["hidden_size"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "vision_tower",
}
ABSENT = object()  # a field that is left out of `config.json`


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Weights around 0, norms around 1, large enough that every one shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def make(name, shape):
        values = torch.randn(shape, generator=generator) * 0.3
        return values + 1 if re.search(r"norm\d?\.weight$|layrnorm\.weight$", name) else values

    return {name: make(name, shape) for name, shape in shapes.items()}


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tower_tensors(seed: int = 1) -> dict[str, torch.Tensor]:
    shapes = shapes_of(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    shapes = {name.removeprefix("vision_model."): shape for name, shape in shapes.items() if "position_ids" not in name}
    return {f"vision_model.{name}": tensor for name, tensor in random_tensors(shapes, seed).items()}


def language_tensors(config: dict, seed: int = 2) -> dict[str, torch.Tensor]:
    fields = {name: value for name, value in {**TEXT, **config}.items() if name in TEXT and value is not None}
    shapes = shapes_of(LlamaForCausalLM(LlamaConfig(**fields)))
    if fields["tie_word_embeddings"]:
        shapes.pop("lm_head.weight")
    return random_tensors(shapes, seed)


def projector_tensors(kind: str, seed: int = 3) -> dict[str, torch.Tensor]:
    width, target = VISION["hidden_size"], TEXT["hidden_size"]
    if kind == "identity":
        return {}
    if kind == "linear":
        shapes = {"weight": (target, width), "bias": (target,)}
    else:
        depth = int(re.fullmatch(r"mlp(\d+)x_gelu", kind)[1])
        shapes = {}
        for layer in range(depth):
            shapes |= {f"{2 * layer}.weight": (target, width if layer == 0 else target), f"{2 * layer}.bias": (target,)}
    return {f"model.mm_projector.{name}": tensor for name, tensor in random_tensors(shapes, seed).items()}


def write_tower(folder: Path, tensors: dict | None = None, clip: bool = False) -> Path:
    """`CLIPVisionModel`, or with `clip` a whole `CLIPModel` as OpenAI's repositories have it."""
    folder.mkdir(parents=True)
    tensors = tower_tensors() if tensors is None else tensors
    config = {"model_type": "clip_vision_model", **VISION}
    if clip:
        config = {"model_type": "clip", "vision_config": config, "projection_dim": 16}
        tensors = {
            **tensors,
            "text_model.final_layer_norm.weight": torch.ones(8),
            "visual_projection.weight": torch.ones(16, 32),
            "text_projection.weight": torch.ones(16, 8),
            "logit_scale": torch.ones(()),
            "vision_model.embeddings.position_ids": torch.arange(17)[None],
        }
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    side = VISION["image_size"]
    # In the older form, with bare numbers
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": side, "crop_size": side, "do_center_crop": True, "do_resize": True, "resample": 3})
    )
    return folder


def write_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(GOLDENS / "finetuned_safetensors" / name, folder / name)


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    """`form`: "safetensors", "safetensors shards", "bin", "bin shards"."""
    stem, suffix = ("model", "safetensors") if "safetensors" in form else ("pytorch_model", "bin")
    save = save_file if suffix == "safetensors" else torch.save
    if "shards" not in form:
        save(tensors, folder / f"{stem}.{suffix}")
        return
    names = list(tensors)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, part in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_config(folder: Path, changes: dict) -> dict:
    config = {name: value for name, value in {**TEXT, **MULTIMODAL, **changes}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def write_checkpoint(
    root: Path,
    form: str = "safetensors",
    more: dict[str, torch.Tensor] | None = None,
    name: str = "checkpoint",
    **changes,
) -> Path:
    """A whole research checkpoint in `root / name`, with its tower in `root / vision_tower`.

    Args:
        more: further weights.
        changes: fields of `config.json`; `ABSENT` leaves one out.
    """
    folder = root / name
    folder.mkdir(parents=True)
    config = write_config(folder, changes)
    projector = config.get("mm_projector_type", "linear")
    tensors = {**language_tensors(config), **projector_tensors(projector), **(more or {})}
    write_weights(folder, tensors, form)
    write_tokenizer(folder)
    if not (root / "vision_tower").exists():
        write_tower(root / "vision_tower")
    return folder


def write_base(folder: Path, **changes) -> Path:
    """A plain Llama with its tokenizer."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", **TEXT, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, language_tensors(config), "bin")
    write_tokenizer(folder)
    return folder


@torch.no_grad()
def plain_logits(tensors: dict, tower: dict, config: dict, image, ids: list[int]) -> torch.Tensor:
    """LLaVA's forward pass, step by step: (L, rows) logits of ids in which -200 stands for the picture.

    Args:
        tensors: language model and projector under the research code's names.
        tower: under CLIP's.
    """
    side = VISION["image_size"]
    pad = config.get("image_aspect_ratio") == "pad"
    processor = LlavaImageProcessorPil(
        do_pad=pad, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    vision = CLIPVisionModel(CLIPVisionConfig(**VISION, attn_implementation="eager")).eval()
    vision.load_state_dict({name.removeprefix("vision_model."): t.float() for name, t in tower.items()})
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    states = vision(pixels, output_hidden_states=True).hidden_states[config["mm_vision_select_layer"]][0]
    features = states[1:] if config.get("mm_vision_select_feature", "patch") == "patch" else states
    for place in ("", *(f"{number}." for number in range(0, 10, 2))):
        weight = tensors.get(f"model.mm_projector.{place}weight")
        if weight is None:
            continue
        if place not in ("", "0."):
            features = torch.nn.functional.gelu(features)
        features = torch.nn.functional.linear(
            features, weight.float(), tensors[f"model.mm_projector.{place}bias"].float()
        )

    fields = {name: config[name] for name in TEXT if config.get(name) is not None}
    llama = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager")).eval()
    state = {name: tensor.float() for name, tensor in tensors.items() if name in llama.state_dict()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state)
    embedded = [features if i == -200 else llama.get_input_embeddings()(torch.tensor([i])) for i in ids]
    return llama(inputs_embeds=torch.cat(embedded)[None]).logits[0]

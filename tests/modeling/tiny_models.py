"""A random Mask-LLaVA small enough to generate in milliseconds, and inputs for it made by hand."""

import torch

from mask_llava_hf.modeling.configuration_mask_llava import MaskLlavaConfig
from mask_llava_hf.modeling.modeling_mask_llava import MaskLlavaForConditionalGeneration


IMAGE, PAD = 0, 60  # token ids
SIDE, GRID, WIDTH = 24, 12, 32  # pixels of an image, patches per side, channels
NUM_OBJECTS = 4

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": SIDE // GRID,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": PAD,
}


def make_config(**overrides) -> MaskLlavaConfig:
    values = {
        "vision_config": dict(VISION),
        "text_config": dict(TEXT),
        "patch_grid_size": 3,
        "max_object_tokens": NUM_OBJECTS,
        "image_token_index": IMAGE,
    }
    return MaskLlavaConfig(**{**values, **overrides})


def make_model(seed: int = 0, **overrides) -> MaskLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    model = MaskLlavaForConditionalGeneration(make_config(**overrides)).eval()
    model.generation_config.eos_token_id = None  # a random model must not stop early: tests count tokens
    return model


def prompt(rows: list[list[int | tuple[int]]]) -> dict[str, torch.Tensor]:
    """Left-padded `input_ids` and `attention_mask`; a tuple (n,) in a row stands for n image placeholders."""
    flat = [[t for token in row for t in ([IMAGE] * token[0] if isinstance(token, tuple) else [token])] for row in rows]
    length = max(map(len, flat))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in flat])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in flat])
    return {"input_ids": ids, "attention_mask": mask}


def batch(counts: tuple[int, ...] = (4, 2, 0), fixed: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two images with 4 and 2 objects in the first row, one without objects in the second."""
    generator = torch.Generator().manual_seed(seed)
    first, second, third = (fixed + count for count in counts)
    return {
        **prompt([[5, (first,), 6, (second,), 7, 8], [9, (third,), 10]]),
        "pixel_values": torch.randn(3, 3, SIDE, SIDE, generator=generator),
        "object_embeds": torch.randn(3, NUM_OBJECTS, WIDTH, generator=generator),
        "object_counts": torch.tensor(counts),
    }


def single(num_objects: int = NUM_OBJECTS, fixed: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        **prompt([[5, (fixed + num_objects,), 7, 8]]),
        "pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator),
        "object_embeds": torch.randn(1, NUM_OBJECTS, WIDTH, generator=generator),
        "object_counts": torch.tensor([num_objects]),
    }


def cut_by_hand(inputs: dict[str, torch.Tensor], cap: int, fixed: int = 10) -> dict[str, torch.Tensor]:
    """What `inputs` would be, had the processor been called with `max_object_tokens=cap`."""
    counts = inputs["object_counts"].clamp(max=cap)
    remaining = iter(int(c) for c in inputs["object_counts"])
    rows = []
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        row, position = [], 0
        ids = [token for token, seen in zip(ids, mask, strict=True) if seen]
        while position < len(ids):
            if ids[position] == IMAGE:
                count = next(remaining)
                row.append((fixed + min(count, cap),))
                position += fixed + count
            else:
                row.append(ids[position])
                position += 1
        rows.append(row)
    return {
        **prompt(rows),
        "pixel_values": inputs["pixel_values"],
        "object_embeds": inputs["object_embeds"][:, :cap],
        "object_counts": counts,
    }

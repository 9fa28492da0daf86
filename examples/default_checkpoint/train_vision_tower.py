# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Trains a small CLIP on the small world, whose vision tower sees for Mask-LLaVA and inverts its masks.

About 35 minutes. Killed and started again, it goes on. Run inside `examples/`:

    python -m default_checkpoint.train_vision_tower OUTPUT_FOLDER

Two losses. The contrastive one decides for every picture and every one of 128 short captions whether they belong
together (a sigmoid each, as SigLIP, arXiv 2303.15343: with captions so short many are true of many pictures). Among
them are hard negatives, with attributes exchanged between shapes. By itself it learns colours and stays there for
long: with 6 x 6 x 3 kinds of shapes, colours alone explain most of what is true. So each patch also names the shape
that it shows, in the three words of that shape's caption: captions grounded in regions, as in GLIP (arXiv 2112.03857).
"""

import math
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from shapes_world import COLORS, KINDS, SIDE, SIZES
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, LlavaImageProcessor

from .cpu_attention import use_bfloat16_attention
from .resumable_training import run, train, training_parser, write_scores
from .scene_pool import ScenePool, scene_pool
from .statements import sample_statements, truth, words
from .world_tokenizer import world_tokenizer


STEPS = 4000
PATCH, WIDTH = 8, 128
GRID = SIDE // PATCH

_NUM_WORDS = (len(SIZES), len(COLORS), len(KINDS))


class ClipWithNames(nn.Module):
    """CLIP, and the head that names what a patch shows, which is thrown away after the training."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        config = CLIPConfig(
            vision_config={
                "hidden_size": WIDTH,
                "intermediate_size": 3 * WIDTH,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": SIDE,
                "patch_size": PATCH,
                "hidden_act": "gelu",  # on a CPU, a third of the time of "quick_gelu"
            },
            text_config={
                "vocab_size": vocabulary_size,
                "hidden_size": 96,
                "intermediate_size": 288,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 32,
                "hidden_act": "gelu",
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 3,
            },
            projection_dim=WIDTH,
        )
        self.clip = CLIPModel(config)
        use_bfloat16_attention(self.clip.vision_model)
        self.names = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(_NUM_WORDS)))
        self.bias = nn.Parameter(torch.tensor(-2.0))
        look_at_neighbours(self.clip.vision_model)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of pictures and captions (B, T), and of names per patch (B, GRID * GRID, words)."""
        seen = self.clip.vision_model(pixel_values, output_hidden_states=True)
        read = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask)
        images = F.normalize(self.clip.visual_projection(seen.pooler_output), dim=-1)
        captions = F.normalize(self.clip.text_projection(read.pooler_output), dim=-1)
        logits = (images @ captions.T) * self.clip.logit_scale.exp() + self.bias
        return logits.float(), self.names(seen.hidden_states[-2][:, 1:]).float()


def train_vision_tower(
    output_dir: str | PathLike[str],
    *,
    steps: int = STEPS,
    seed: int = 0,
    quick: bool = False,
    cache_dir: str | PathLike[str] | None = None,
) -> dict[str, float]:
    """Trains CLIP and saves its vision tower, with its image processor.

    Args:
        output_dir: gets the tower, and the training's figures in `scores.json`.
        steps: of 64 scenes each.
        quick: few steps on few scenes, to try the script.
        cache_dir: folder that keeps drawn scenes for the next call.

    Returns:
        figures of the training; the probes of `probe_vision_tower.py` tell what the tower has learned.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    steps, batch_size, num_scenes, num_captions = (12, 8, 64, 32) if quick else (steps, 64, 10000, 128)
    state_path = output_dir / "training_state.pt"
    torch.manual_seed(seed)
    tokenizer = world_tokenizer()
    tokenizer.padding_side = "right"
    model, image_processor = ClipWithNames(len(tokenizer)), square_image_processor()
    simple = scene_pool("train", num_scenes, cache_dir, num_shapes=(1, 3))
    crowded = scene_pool("train", num_scenes, cache_dir)

    def loss_at(rng: np.random.Generator) -> Tensor:
        scenes = (crowded if rng.random() < 0.65 else simple).sample(rng, batch_size)
        statements = sample_statements(scenes, rng, num_captions)
        captions = tokenizer([f"{words(statement)}</s>" for statement in statements], padding=True, return_tensors="pt")
        pixel_values = normalized(scenes.images, image_processor)
        with torch.autocast("cpu", torch.bfloat16):
            logits, names = model(pixel_values, captions["input_ids"], captions["attention_mask"])
        contrast = _balanced_loss(logits, torch.from_numpy(truth(scenes, statements)))
        return contrast + _naming_loss(names, scenes)

    scores = train(model, loss_at, state_path, steps=steps, seed=seed, learning_rate=1.5e-3, save_every=steps // 10)
    tower = CLIPVisionModel(model.clip.config.vision_config)
    tower.load_state_dict(model.clip.vision_model.state_dict())
    tower.save_pretrained(output_dir)
    image_processor.save_pretrained(output_dir)
    scores["parameters"] = sum(parameter.numel() for parameter in tower.parameters())
    write_scores(scores, output_dir / "scores.json")
    state_path.unlink(missing_ok=True)
    return scores


def square_image_processor() -> LlavaImageProcessor:
    """LLaVA-1.5's image processor (pads to a square with the mean colour) for SIDE x SIDE."""
    side = {"height": SIDE, "width": SIDE}
    return LlavaImageProcessor(do_pad=True, size=dict(side), crop_size=dict(side))


def normalized(images: np.ndarray, image_processor: LlavaImageProcessor) -> Tensor:
    """(n, 3, SIDE, SIDE): what the image processor does to pictures that have its size, without its overhead."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def _balanced_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Binary cross-entropy in which the few true pairs weigh as much as the many false ones."""
    loss = F.binary_cross_entropy_with_logits(logits, true.float(), reduction="none")
    return (loss[true].mean() + loss[~true].mean()) / 2


def _naming_loss(names: Tensor, scenes: ScenePool) -> Tensor:
    """Cross-entropy of size, color and kind, over the patches that a shape covers by 30 % or more."""
    owners = scenes.owners.reshape(len(scenes), GRID, PATCH, GRID, PATCH)
    shapes = np.arange(1, scenes.looks.shape[1] + 1)
    covered = (owners[..., None] == shapes).mean((2, 4)).reshape(len(scenes), GRID * GRID, len(shapes))
    shape = np.where(covered.max(-1) >= 0.3, covered.argmax(-1), -1)  # (n, GRID * GRID)
    looks = np.where(shape[..., None] >= 0, scenes.looks.astype(int)[np.arange(len(scenes))[:, None], shape], -1)
    targets = torch.from_numpy(looks).flatten(0, 1)
    logits = names.flatten(0, 1).split(_NUM_WORDS, dim=-1)
    losses = [F.cross_entropy(part, targets[:, i], ignore_index=-1) for i, part in enumerate(logits)]
    return torch.stack(losses).sum()


@torch.no_grad()
def look_at_neighbours(tower: nn.Module) -> None:
    """Starts all blocks but the last with heads that look one patch up, down, left and right.

    A vision transformer otherwise spends most of so short a training on finding out which patches lie side by side;
    a convolution knows it from the start (ConViT, arXiv 2103.10697, starts its heads likewise). Positions are sines and
    cosines of several wavelengths; the query of a position is the key of its neighbour.
    """
    width = tower.config.hidden_size
    num_waves = width // 4  # per axis, each a sine and a cosine
    waves = torch.linspace(1, GRID, num_waves) * math.pi / GRID
    angles = torch.arange(GRID)[:, None] * waves
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    grid = torch.cat([line[:, None].expand(-1, GRID, -1), line[None].expand(GRID, -1, -1)], dim=-1)
    tower.embeddings.position_embedding.weight[1:] = 0.5 * grid.flatten(0, 1)

    gain, heads = 1.5, tower.config.num_attention_heads
    head_width = width // heads
    used = torch.linspace(0, 0.66 * num_waves, head_width // 4).long().tolist()  # the shortest would tell little
    for layer in tower.encoder.layers[:-1]:
        attend = layer.self_attn
        for weight in (attend.q_proj.weight, attend.k_proj.weight):
            weight.normal_(0, 0.01)
        for weight in (attend.v_proj.weight, attend.out_proj.weight):
            weight.normal_(0, width**-0.5)
        for head, step in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
            for axis in range(2):
                for place, wave in enumerate(used):
                    row = head * head_width + (axis * len(used) + place) * 2
                    sine, cosine = (axis * 2 * num_waves + half * num_waves + wave for half in (0, 1))
                    turn = waves[wave].item() * step[axis]
                    attend.k_proj.weight[row, sine] += gain
                    attend.k_proj.weight[row + 1, cosine] += gain
                    attend.q_proj.weight[row, [sine, cosine]] += gain * torch.tensor([math.cos(turn), math.sin(turn)])
                    attend.q_proj.weight[row + 1, [cosine, sine]] += gain * torch.tensor(
                        [math.cos(turn), -math.sin(turn)]
                    )


def main() -> None:
    run(train_vision_tower, training_parser(__doc__, STEPS))


if __name__ == "__main__":
    main()

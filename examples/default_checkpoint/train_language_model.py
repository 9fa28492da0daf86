# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Trains a small Llama on the small world in words alone, which becomes Mask-LLaVA's language model.

About ten minutes on one core. Killed and started again, it goes on. Run inside `examples/`:

    python -m default_checkpoint.train_language_model OUTPUT_FOLDER

LLaVA begins with a language model that can already read, count and compare; so does this one: it reads what is in a
scene and answers questions about it. Pictures come later.
"""

from os import PathLike
from pathlib import Path

import numpy as np
import torch
from shapes_world import CAPTION_PROMPT, MARKED_PROMPT, Scene, ask_many, describe, make_scene
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .cpu_attention import use_bfloat16_attention
from .resumable_training import run, train, training_parser, write_scores
from .world_tokenizer import world_tokenizer


STEPS = 1400


def build_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.3 million random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        # With the usual 0.02, made for much wider models, attention is flat for so long that looking something up in
        # the description is not learned at all
        initializer_range=160**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    use_bfloat16_attention(model)
    return model


def read_and_answer(scene: Scene, rng: np.random.Generator, count: int = 8) -> list[dict[str, str]]:
    """A chat: a description of the scene in words, with questions and answers."""
    turns = [(asked.text, asked.answer) for asked in ask_many(scene, rng, count)]
    if rng.random() < 0.15:
        turns = [(CAPTION_PROMPT, describe(scene))]
    told = describe(scene)
    if rng.random() < 0.1:
        told = scene.shapes[rng.integers(len(scene.shapes))].name
        turns = [(MARKED_PROMPT, told)]
    messages = []
    for index, (question, answer) in enumerate(turns):
        said = question if index else f"There is {told}. {question}"
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return messages


def train_language_model(
    output_dir: str | PathLike[str],
    *,
    steps: int = STEPS,
    seed: int = 0,
    quick: bool = False,
    cache_dir: str | PathLike[str] | None = None,
) -> dict[str, float]:
    """Trains the language model and saves it with its tokenizer.

    Args:
        output_dir: gets the model, and the training's figures in `scores.json`.
        steps: of 32 chats each.
        quick: few steps, to try the script.
        cache_dir: not needed; every training takes it.

    Returns:
        figures of the training, and "accuracy": the part of the answers' tokens, end tokens included, that are
        predicted rightly, for test scenes that are described in words.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    steps, batch_size, num_test = (12, 4, 8) if quick else (steps, 32, 200)
    state_path = output_dir / "training_state.pt"
    torch.manual_seed(seed)
    tokenizer = world_tokenizer()
    tokenizer.padding_side = "right"
    model = build_language_model(tokenizer)

    def loss_at(rng: np.random.Generator) -> torch.Tensor:
        # Mostly simple scenes: to look something up is learned sooner among two shapes than among nine
        num_shapes = (1, 4) if rng.random() < 0.7 else (2, 9)
        scenes = [make_scene("train", int(index), num_shapes) for index in rng.integers(10**6, size=batch_size)]
        batch = _encode(tokenizer, [read_and_answer(scene, rng) for scene in scenes])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits
        # What is asked, and what a description says, is mostly chance; it teaches words, but little
        weights = torch.where(batch["assistant_masks"] > 0, 1.0, 0.1) * (labels >= 0)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none"
        )
        return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()

    scores = train(
        model,
        loss_at,
        state_path,
        steps=steps,
        seed=seed,
        learning_rate=2e-3,
        save_every=max(1, steps // 10),
        beta2=0.98,
    )
    model.eval().save_pretrained(output_dir)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(output_dir)
    tokenizer.padding_side = "right"
    chats = [read_and_answer(make_scene("test", index), np.random.default_rng(index)) for index in range(num_test)]
    scores["accuracy"] = _accuracy(model, _encode(tokenizer, chats))
    scores["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    write_scores(scores, output_dir / "scores.json")
    state_path.unlink(missing_ok=True)
    return scores


def _encode(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict[str, str]]]) -> dict[str, torch.Tensor]:
    return tokenizer.apply_chat_template(
        chats, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True, padding=True
    )


@torch.no_grad()
def _accuracy(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> float:
    """The part of answer tokens that are the most probable ones, given all that stands before them."""
    answers = torch.as_tensor(batch["assistant_masks"])[:, 1:] > 0
    predicted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
    return (predicted == batch["input_ids"][:, 1:])[answers].float().mean().item()


def main() -> None:
    run(train_language_model, training_parser(__doc__, STEPS))


if __name__ == "__main__":
    main()

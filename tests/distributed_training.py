"""Two small trainings, for `test_multiprocess_training.py`, which runs this file in one process and in two.

    python distributed_training.py single|ddp|fsdp FOLDER

Writes to FOLDER the losses of both trainings and of an evaluation, and the model of the first.
"""

import faulthandler
import json
import sys
from pathlib import Path

import finetune_full
import recipe
import torch
from accelerate import DistributedType, PartialState
from PIL import Image

from mask_llava_hf import ImageObjects, MaskLlavaCollator, MaskLlavaProcessor
from mask_llava_hf.processing.vision_towers import fingerprint_settings
from mask_llava_hf.testing import CHAT_TEMPLATE, tiny_config, tiny_image_processor, tiny_model, tiny_tokenizer


SIDE, GLOBAL_BATCH = 56, 4
# Two processes take two rows in turn: both have images, only the first has, only the second has, none has, and so on
HAS_IMAGE = (1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0)


def make_row(index: int, fingerprint: dict) -> dict:
    words = ("two", "cups", "dog", "tree", "window")
    question = [{"type": "text", "text": f"Where is the {words[index % 5]}?"}]
    answer = [{"type": "text", "text": " ".join(words[: 1 + index % 4])}]
    images, objects = [], []
    if HAS_IMAGE[index]:
        random = torch.Generator().manual_seed(index)
        question.insert(0, {"type": "image"})
        images.append(Image.fromarray(torch.randint(256, (SIDE, SIDE, 3), generator=random, dtype=torch.uint8).numpy()))
        count = index % 3
        boxes = torch.tensor([[4.0, 4.0, 20.0, 30.0], [10.0, 8.0, 50.0, 50.0]])[:count]
        embeddings = torch.randn(count, 64, generator=random)
        objects.append(
            ImageObjects(
                boxes, torch.ones(count), (SIDE, SIDE), embeddings=embeddings, embedding_fingerprint=fingerprint
            )
        )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": images, "objects": objects}


def build() -> tuple[torch.nn.Module, MaskLlavaProcessor]:
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, vision_config={"image_size": SIDE, "num_hidden_layers": 2}, patch_grid_size=2)
    settings = {"patch_grid_size": 2, "image_size": SIDE, "embed_size": config.vision_config.hidden_size}
    processor = MaskLlavaProcessor(tiny_image_processor(SIDE), tokenizer, settings, chat_template=CHAT_TEMPLATE)
    return tiny_model(config), processor


def main(kind: str, folder: Path) -> None:
    args = finetune_full.FullArguments(
        output_dir=str(folder),
        per_device_train_batch_size=GLOBAL_BATCH if kind == "single" else GLOBAL_BATCH // 2,
        per_device_eval_batch_size=GLOBAL_BATCH if kind == "single" else GLOBAL_BATCH // 2,
        global_batch_size=GLOBAL_BATCH,
        learning_rate=1e-3,
        warmup_steps=0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        dataloader_num_workers=0,
        use_cpu=True,
        disable_tqdm=True,
        fsdp=True if kind == "fsdp" else None,
    )
    if kind == "fsdp":
        # Accelerate offers FSDP on accelerators only. Torch's runs on CPUs as well, so it is told that they are some
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    model, processor = build()
    rows = [make_row(index, fingerprint_settings(None, processor.image_processor)) for index in range(len(HAS_IMAGE))]
    trainer = finetune_full.train(model, processor, rows, args)
    recipe.save(trainer, str(folder), processor)
    results = {"full": trainer.state.log_history, "evaluation": trainer.evaluate(rows)["eval_loss"]}

    # Tower and projector frozen: only the language model, whose weights the embedded images reach as constants
    model, processor = build()
    recipe.train_only(model, model.model.language_model)
    trainer = recipe.run(model, rows, args, MaskLlavaCollator(processor))
    results["language model only"] = trainer.state.log_history
    if args.should_save:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.dump_traceback_later(600, exit=True)  # processes that wait for each other say where
    main(sys.argv[1], Path(sys.argv[2]))

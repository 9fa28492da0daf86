# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `mask-llava`: parses, calls, prints. What it does is in the modules it calls.

A command is a pair of functions: one adds its parser with `run=` the other, which takes the parsed options.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoProcessor

from .processing.processing_mask_llava import MaskLlavaProcessor


_SHAPES = "llava-1.5-7b"  # for `bench`
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 2 for what the user can mend (wrong settings, missing files), told in one line; 130 when interrupted.
    """
    parser = argparse.ArgumentParser(prog="mask-llava", description="Mask-LLaVA: tools around models and data.")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_precompute(commands)
    _add_convert(commands)
    _add_bench(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("mask-llava: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:  # the last: a config's checks
        if options.debug:
            raise
        print(f"mask-llava: error: {error}", *getattr(error, "__notes__", ()), file=sys.stderr)
        return 2
    return 0


# ---------------------------------------------------------------------------------------------------------- precompute
def _add_precompute(commands: Any) -> None:
    parser = commands.add_parser(
        "precompute",
        help="make the objects of a dataset's images once, to train from",
        description="Runs detector, segmenter and MaskInversion over images and stores their objects. Started again, "
        "after an interruption or with more images, it makes only what is missing. Several processes share the work: "
        "accelerate launch -m mask_llava_hf.cli precompute ...",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images, a JSON file in LLaVA's layout, a Parquet file, a folder that save_to_disk wrote, or "
        "a dataset on the Hub with a column `image` or `images`",
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store; is made where it is missing")
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id; its processor makes the objects")
    parser.add_argument("--detector", help="another detector than the checkpoint's: Hub id or path")
    parser.add_argument("--segmenter", help="another segmenter than the checkpoint's: Hub id or path")
    parser.add_argument("--image-folder", help="where the paths in a JSON file start; default: its own folder")
    parser.add_argument("--split", default="train", help="of a dataset with several; default: %(default)s")
    parser.add_argument("--max-object-tokens", type=int, help="objects per image; default: as in the checkpoint")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="images that the models get at once, fewer for large photographs; default: %(default)s",
    )
    parser.add_argument("--device", help="where the models run; default: the accelerator, if there is one")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the models; default: each as it was saved")
    parser.add_argument("--embedding-dtype", choices=["float32", "float16"], default="float32", help="in the store")
    parser.set_defaults(run=_precompute)


def _precompute(options: argparse.Namespace) -> None:
    from .precompute import open_images, precompute_objects

    parts = {name: getattr(options, name) for name in ("detector", "segmenter") if getattr(options, name)}
    processor = AutoProcessor.from_pretrained(options.checkpoint, object_settings=parts)
    if not isinstance(processor, MaskLlavaProcessor):
        raise ValueError(
            f"{options.checkpoint!r} has a {type(processor).__name__}, which makes no objects. Name the checkpoint of "
            "a Mask-LLaVA."
        )
    processor.to(options.device, _DTYPES.get(options.dtype))
    report = precompute_objects(
        open_images(options.source, options.image_folder, options.split),
        processor,
        options.store,
        max_object_tokens=options.max_object_tokens,
        batch_size=options.batch_size,
        embedding_dtype=_DTYPES[options.embedding_dtype],
    )
    skipped = f"; skipped {len(report.skipped)}, see {options.store}/skipped.jsonl" if report.skipped else ""
    PartialState().print(
        f"{options.store}: stored {report.stored} images with {report.objects} objects; {report.known} were there "
        f"already{skipped}"
    )


# ------------------------------------------------------------------------------------------------------------- convert
def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn a checkpoint of LLaVA, Mask-LLaVA or SAM in another layout into one that Transformers loads",
        description="Writes a checkpoint with exactly the source's numbers, tries it on a picture, and says what "
        "it took the source for and what it assumed. A conversion that fails leaves nothing behind.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder, a Hub id, or a .pth file of segment-anything")
    parser.add_argument("target", metavar="TARGET", help="the folder to write")
    layouts = ["auto", "llava", "mask-llava", "llava-hf", "sam"]
    parser.add_argument(
        "--from", dest="layout", choices=layouts, default="auto", help="what SOURCE is; default: told from its files"
    )
    parser.add_argument(
        "--to",
        choices=["transformers", "llava"],
        default="transformers",
        help="llava: from a checkpoint of ours back to the layout of LLaVA's research code",
    )
    parser.add_argument("--base", help="the language model that a projector or a LoRA adapter was trained on")
    parser.add_argument("--vision-tower", help="the tower, in place of the one that SOURCE names")
    parser.add_argument(
        "--composition",
        choices=["llava", "mask-llava"],
        help="llava: behaves as a LLaVA, with all patches; mask-llava: 1 + 36 + 20 tokens per image, to train from; "
        "default: what SOURCE is",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; default: as the source's language model")
    parser.add_argument(
        "--chat-template",
        choices=["vicuna-v1", "plain"],
        help="default: the source's, else vicuna-v1, or plain for a projector",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument("--no-self-check", action="store_true", help="do not try the result on a picture")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    from .conversion import convert_checkpoint, export_checkpoint

    common = {
        "base": options.base,
        "vision_tower": options.vision_tower,
        "dtype": _DTYPES.get(options.dtype),
        "overwrite": options.overwrite,
    }
    if options.to == "llava":
        if options.layout != "auto" or options.composition or options.chat_template:
            raise ValueError(
                "`--to llava` starts from a checkpoint of ours as it is: leave out `--from`, "
                "`--composition` and `--chat-template`."
            )
        print(export_checkpoint(options.source, options.target, **common))
        return
    report = convert_checkpoint(
        options.source,
        options.target,
        layout=None if options.layout == "auto" else options.layout,
        composition=options.composition,
        chat_template=options.chat_template,
        self_check=not options.no_self_check,
        **common,
    )
    print(report)


# --------------------------------------------------------------------------------------------------------------- bench
def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure what an answer costs on this machine, stage by stage, beside LLaVA with all its patches",
        description="Measures detector, segmenter, tower, inversion and language model, each in a process of its own, "
        "and adds them up to chains of 57, 42, 29 and 15 tokens per image. Operations are those of matrix products, "
        "convolutions, attention and bilinear sampling. Keep the machine quiet meanwhile.",
    )
    parser.add_argument(
        "models",
        metavar="CHECKPOINT",
        help=f"folder or Hub id of a Mask-LLaVA with its detector and segmenter; or {_SHAPES!r}: published shapes with "
        "random weights, 14 GB of memory in bfloat16",
    )
    parser.add_argument("output_dir", metavar="FOLDER", type=Path, help="gets the tables as CSV, and a picture")
    parser.add_argument("--flops-only", action="store_true", help="count operations, and time nothing")
    parser.add_argument("--dtype", choices=_DTYPES, help=f"default: float32; bfloat16 for {_SHAPES}")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="calls of a stage, of which the median counts, none after ten seconds of them; default: %(default)s",
    )
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    from .evaluation.chain_report import bench
    from .evaluation.measured_models import Models, PublishedShapes, SavedCheckpoint

    dtype = _DTYPES.get(options.dtype)
    if options.models == _SHAPES:
        models: Models = PublishedShapes(dtype or torch.bfloat16)
    else:
        models = SavedCheckpoint(options.models, dtype or torch.float32)
    print(bench(models, options.output_dir, options.threads, options.flops_only, options.repeats))


if __name__ == "__main__":
    sys.exit(main())

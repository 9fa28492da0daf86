import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once: no test goes online

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mask_llava_hf.testing import build_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A whole checkpoint with detector and segmenter; shared by all tests, so not to be written to."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-mask-llava")


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """97 x 61 pixels RGB, wider than high and odd on both sides: two things before a shaded background."""
    y, x = np.mgrid[0:61, 0:97]
    pixels = np.stack([x * 2, y * 3, 255 - x - y], axis=-1)
    pixels[(x - 30) ** 2 + (y - 25) ** 2 < 15**2] = (220, 40, 30)
    pixels[20:55, 60:85] = (30, 60, 200)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

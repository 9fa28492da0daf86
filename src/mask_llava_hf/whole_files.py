# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Files that are written whole or not at all."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file whole or not at all, in place of one that is there: nobody ever sees a part of it.

    Args:
        write: is called with the open file.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power failure could forget the new name
        finally:
            os.close(folder)

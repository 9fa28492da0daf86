# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""What blocks of chats say about images and their objects."""

from collections.abc import Mapping, Sequence
from typing import Any


OBJECT_KEYS = ("boxes", "masks", "objects")
_IMAGE_KEYS = {"image", "url", "path", "base64"}


def plain_blocks(conversation: Any) -> Any:
    """Blocks of chats without the None that columnar stores fill in, and OpenAI's form of an image in the usual one.

    Transformers does the latter too, but drops what else a block says, such as its boxes.
    """
    if isinstance(conversation, list | tuple):
        return [plain_blocks(entry) for entry in conversation]
    if not isinstance(conversation, Mapping):
        return conversation
    if "role" in conversation:
        return {**conversation, "content": plain_blocks(conversation.get("content"))}
    block = {name: value for name, value in conversation.items() if value is not None}
    said = [name for name in OBJECT_KEYS if name in block]
    if block.get("type") == "image" and said and not _IMAGE_KEYS & set(block):
        raise ValueError(
            f"An image block has `{said[0]}` but no image ({', '.join(sorted(_IMAGE_KEYS))}), so its objects would be "
            "lost. Put the image into the block too, or pass both to the processor: "
            f"`processor(images=..., text=..., {said[0]}=...)`."
        )
    if block.get("type") == "image_url" and "image_url" in block:
        url = block.pop("image_url")
        block.update(type="image", url=url.get("url", "") if isinstance(url, Mapping) else url)
    return block


def object_entries(conversation: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """What the image blocks of one conversation say under `name`, an entry for every image they carry."""
    entries = []
    for message in conversation:
        content = message.get("content")
        for block in content if isinstance(content, list) else ():
            if block.get("type") == "image":
                num_images = len(_IMAGE_KEYS & set(block))
                entries += [block.get(name)] * num_images
    return entries

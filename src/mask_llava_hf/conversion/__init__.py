# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of other packages and layouts, renamed to the one that is read here."""

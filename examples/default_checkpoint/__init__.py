# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""How the small checkpoint that comes with the package is trained, part by part, on the small world."""

# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""What the method costs: FLOPs, seconds and memory, stage by stage."""

# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
from .cli import app

app(prog_name = "python -m unsloth_patches")

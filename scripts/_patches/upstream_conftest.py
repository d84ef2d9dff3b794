# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""tests/conftest.py of form ``upstream``: what Unsloth's own amounts to on a machine without a GPU.

Unsloth is imported before any test file, and takes the machine for one with a CUDA device.
"""

import gc
import importlib
import importlib.util
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).with_name("_shared")))

gc.disable()  # while what stays is imported
import bitsandbytes  # noqa: E402,F401  (before the spoof: its CUDA half does not load here)
import torch  # noqa: E402


def _take_for_cuda(package):
    """Import ``package.device_type``, which keeps what it finds, while torch claims to have CUDA."""
    spec = importlib.util.find_spec(package)
    sys.modules[package] = importlib.util.module_from_spec(spec)  # not executed
    try:
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            importlib.import_module(f"{package}.device_type")
    finally:
        del sys.modules[package]


if not torch.cuda.is_available():
    for name in ("unsloth_zoo", "unsloth"):
        _take_for_cuda(name)
    torch.cuda.memory.mem_get_info = lambda *_, **__: (60 << 30, 80 << 30)
    torch.cuda.get_device_capability = lambda *_, **__: (8, 0)
    torch.cuda.is_bf16_supported = lambda *_, **__: True

try:
    import unsloth  # noqa: F401
except Exception as error:
    print(f"tests/conftest.py: import unsloth: {type(error).__name__}: {error}", file = sys.stderr)
gc.freeze()
gc.enable()

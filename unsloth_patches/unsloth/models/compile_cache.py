# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Keep what torch.compile made in a folder, so that a later run's first step need not compile.

``UNSLOTH_COMPILE_CACHE_DIR=folder`` loads it when a model is set up for LoRA training, before
anything compiles, and saves at the end of training and of the process. ``load_compile_cache`` and
``save_compile_cache`` do the same by hand. The contents are those of
``torch.compiler.save_cache_artifacts``, graphs, kernels and their tuning, and the kernels that
Triton compiled by itself since the cache was loaded (``compile_cache_triton.py``). They let a new
machine with the same software and the same GPU model start warm; on one machine PyTorch's own
temporary folder does so too while it lasts.

Trust: loading a cache runs what is in it (pickles, machine code). Use only folders that nobody else
can write to. A folder or file that everybody may write to, or a file of another user, is refused.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, Optional, Union

import torch

from . import compile_cache_triton
from .compile_cache_files import CompileCacheError, check_folder, read_caches, write_cache

__all__ = [
    "CompileCacheError",
    "cache_lora_functions",
    "load_compile_cache",
    "load_compile_cache_first",
    "save_compile_cache",
]

VARIABLE = "UNSLOTH_COMPILE_CACHE_DIR"
Folder = Union[str, "os.PathLike[str]"]

# Artifacts that folders are known to hold: those that this process loaded from or saved to them.
_held: Dict[Path, FrozenSet[str]] = {}
_automatic: Dict[str, Any] = {"folder": None, "error": None, "saves": False}


def _path(folder: Folder) -> Path:
    return Path(os.path.expanduser(folder))  # Path.expanduser raises for an unknown ~user


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"Unsloth: {text}", flush = True)


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _names(info: Any) -> FrozenSet[str]:
    """``kind:key`` of every artifact in torch's CacheInfo."""
    kinds = [name for name in dir(type(info)) if name.endswith("_artifacts")]
    return frozenset(f"{kind}:{key}" for kind in kinds for key in getattr(info, kind))


def load_compile_cache(folder: Folder) -> int:
    """Give torch.compile what earlier runs saved in ``folder`` for this very environment.

    Environment: the versions of PyTorch, Triton, CUDA, Python, Unsloth, transformers, peft and
    bitsandbytes, and the GPU's model. Call it before the first compiled step. Caches of another
    environment, and ones that are broken or that others may write to, are passed over with a
    message. Returns the number of artifacts loaded, 0 if there were none. Raises CompileCacheError
    if ``folder`` exists and is no folder.
    """
    folder = _path(folder)
    if folder.exists() and not folder.is_dir():
        raise CompileCacheError(f"compile cache {str(folder)!r} is no folder; give a folder.")
    began = time.perf_counter()
    triton_watched = compile_cache_triton.watch()
    loaded: FrozenSet[str] = frozenset()
    size = 0
    for path, artifacts, kernels in read_caches(folder, _say):
        try:
            info = torch.compiler.load_cache_artifacts(artifacts)
            if info is None:
                raise ValueError("PyTorch cannot read it")
            loaded |= _names(info)
        except Exception as error:
            _say(f"compile cache {path} is ignored: {_reason(error)}.")
            continue
        unpacked = _unpack(kernels, path) if triton_watched else frozenset()
        loaded |= unpacked
        size += len(artifacts) + (len(kernels) if unpacked else 0)
    _held[folder.resolve()] = _held.get(folder.resolve(), frozenset()) | loaded
    if loaded:
        seconds = time.perf_counter() - began
        _say(
            f"loaded {len(loaded)} compiled artifacts ({size / 2**20:.1f} MiB) from {folder} "
            f"in {seconds:.1f} s."
        )
    return len(loaded)


def _unpack(kernels: bytes, path: Path) -> FrozenSet[str]:
    """Names of Triton's kernels, now where Triton looks; none, and a message, where they cannot be."""
    try:
        return compile_cache_triton.unpack(kernels)
    except Exception as error:
        remedy = " (remedy: a TRITON_CACHE_DIR that can be written)"
        _say(
            f"of compile cache {path} PyTorch's artifacts are loaded, but Triton's kernels are not, or "
            f"not all: {_reason(error)}{remedy if isinstance(error, OSError) else ''}."
        )
        return frozenset()


def save_compile_cache(folder: Folder) -> Optional[Path]:
    """Save what torch.compile made or used in this process to ``folder``, for
    ``load_compile_cache``; Triton's own kernels only since that was called.

    The folder is made if it is missing, for its owner alone. The file appears whole or not at all;
    files of this environment that hold nothing more are removed. Returns its path, or None if there
    was nothing that the folder does not hold already. Raises CompileCacheError if the folder cannot
    be written or everybody may write to it.
    """
    folder = _path(folder)
    check_folder(folder)
    made = torch.compiler.save_cache_artifacts()
    if made is None:
        return None
    data, info = made
    names = _names(info) | compile_cache_triton.used()
    home = folder.resolve()
    if names <= _held.get(home, frozenset()):
        return None
    path = write_cache(folder, data, compile_cache_triton.pack(), names)
    _held[home] = _held.get(home, frozenset()) | names
    return path


# ------------------------------------------------------------------ UNSLOTH_COMPILE_CACHE_DIR


def cache_lora_functions() -> bool:
    """Let PyTorch cache graphs with autograd Functions in them, as Unsloth's LoRA layers are.

    By default it caches no forward and backward pair with such a Function: only the generated
    kernels are found again, and tracing and partitioning are redone. The cache's key covers the
    code of the traced Functions. Returns whether they are cached now: not where this PyTorch has no
    such setting, nor where the user set TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD=0.
    """
    import torch._functorch.config as config

    name = "autograd_cache_allow_custom_autograd_functions"
    if hasattr(config, name):
        setattr(config, name, True)
    return bool(getattr(config, name, False))


def _start() -> None:
    """Load from the folder that the environment names, once, and see to it that it is saved to."""
    folder = os.environ.get(VARIABLE, "")
    if not folder or _automatic["folder"] == folder:
        return
    _automatic.update(folder = folder, error = None)
    if not _automatic["saves"]:
        from transformers import trainer

        trainer.DEFAULT_CALLBACKS.append(_callback_class())
        atexit.register(_finish)
        _automatic["saves"] = True
    try:
        check_folder(_path(folder))
        load_compile_cache(folder)
    except CompileCacheError as error:
        # Unsloth makes a warning of what is raised here; the callback raises it before step one.
        _automatic["error"] = error
        _say(f"{VARIABLE}: {error}")


def _finish() -> None:
    """Save, on one process a machine; what goes wrong now must not end a run that has trained."""
    folder = _automatic["folder"]
    if not folder or _automatic["error"] or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    try:
        path = save_compile_cache(folder)
    except Exception as error:
        _say(f"the compile cache was not saved: {error}")
        return
    if path is not None:
        _say(f"saved the compile cache to {path} ({path.stat().st_size / 2**20:.1f} MiB).")


@functools.lru_cache(maxsize = None)
def _callback_class() -> type:
    from transformers import TrainerCallback
    class CompileCacheCallback(TrainerCallback):
        """Refuses a folder that cannot be used before the first step; saves after the last."""

        def on_train_begin(self, *args, **kwargs):
            if _automatic["error"] is not None:
                raise _automatic["error"]

        def on_train_end(self, *args, **kwargs):
            _finish()

    return CompileCacheCallback


def load_compile_cache_first(stock: Callable) -> Callable:
    """``patch_block_compile``: as before, after an earlier run's cache has been loaded."""

    @functools.wraps(stock)
    def patch_block_compile(model):
        if hasattr(torch.compiler, "load_cache_artifacts"):
            cache_lora_functions()
            _start()
        elif os.environ.get(VARIABLE):
            _say(f"{VARIABLE} needs PyTorch 2.7 (torch.compiler.load_cache_artifacts).")
        return stock(model)

    return patch_block_compile

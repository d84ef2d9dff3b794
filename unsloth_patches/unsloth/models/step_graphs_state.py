# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What captured graphs of decoder blocks depend on beside their inputs, and whether it still holds.

A graph reads addresses and has taken every branch: weights that moved, other adapters, another
scale, a flipped requires_grad or mode make it stale. Asked at each replay, so the question is put to
flat lists by functions written in C.
"""

from __future__ import annotations

import gc
import operator
import weakref
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

__all__ = ["BlockState", "why_not_capturable"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# Blocks that are residual + attention, residual + MLP, and read nothing but their arguments.
_BLOCKS = frozenset(
    f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
)
_HOMES = ("torch.", "transformers.", "peft.", "bitsandbytes.", "unsloth")
_pointer = torch._C.TensorBase.data_ptr
_any_wants_grad = torch._C._any_requires_grad


def _hook_dicts(module: torch.nn.Module) -> List[dict]:
    return [getattr(module, name) for name in _HOOKS]


def _foreign_hook(module: torch.nn.Module) -> Optional[str]:
    """A hook that is not Unsloth's own: it may read or change what a replay never shows it."""
    for hooks in _hook_dicts(module):
        for hook in hooks.values():
            if not (getattr(hook, "__module__", None) or "").startswith("unsloth"):
                return getattr(hook, "__qualname__", type(hook).__name__)
    return None


def why_not_capturable(layers: Sequence[torch.nn.Module]) -> str:
    """A reason why these blocks cannot be captured, or ''."""
    devices, seen = set(), set()
    for layer in layers:
        if type(layer).__name__ not in _BLOCKS:
            return f"blocks of type {type(layer).__name__}"
        if "forward" in layer.__dict__:
            return "a block's forward was replaced"
        for module in layer.modules():
            if not type(module).__module__.startswith(_HOMES):
                return f"a module of type {type(module).__name__} in a block"
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                return "dropout"
            if any(getattr(module, "use_dora", {}).values()):
                return "DoRA"
            hook = _foreign_hook(module)
            if hook is not None:
                return f"a module hook ({hook})"
        for parameter in layer.parameters():
            if id(parameter) in seen and parameter.requires_grad:
                return "blocks that share a trainable weight"
            if parameter.numel() == 1:  # to a list, another one of that value would be the same
                return "a weight of one element"
            seen.add(id(parameter))
            devices.add(parameter.device)
    if len(devices) != 1:
        return "blocks on several devices"
    return ""


def _quantization(weight: torch.Tensor) -> Iterator[Tuple[dict, str]]:
    """(dictionary, key) of what a 4-bit weight is decoded with."""
    owner, name = weight, "quant_state"
    while getattr(owner, name, None) is not None:
        yield vars(owner), name
        owner, name = getattr(owner, name), "state2"
        yield from ((vars(owner), n) for n in ("absmax", "code", "offset") if n in vars(owner))


class BlockState:
    """The state of ``layers`` when it was made.

    ``readable()`` is asked before a replay and takes no time: whether all memory that the graphs read
    is still theirs. Whatever of it is freed says so itself; a weight that was replaced is held here.
    ``changed()`` names anything that differs. It is asked while the GPU is at work, before anything of
    what the replay has written is used. It takes the host some tens of microseconds:
    ``gc.get_referents`` reads what thousands of dictionaries hold by one call, and lists of the same
    objects are compared in C.
    """

    def __init__(self, layers: torch.nn.ModuleList):
        modules = list(layers.modules())
        self._weights = [p for m in modules for p in m._parameters.values() if p is not None]
        self._were_at, self._freed = self._addresses(), []
        # A storage's Python object lives as long as its memory, whoever holds that.
        self._memory = [weakref.ref(w.untyped_storage(), self._freed.append) for w in self._weights]
        self._frozen = [w for w in self._weights if w.is_floating_point() and not w.requires_grad]
        adapters = [m for m in modules if hasattr(m, "lora_A") and hasattr(m, "scaling")]
        tables = [t for m in modules for t in (m._modules, m._parameters, m._buffers) if t]
        self._tables = tables + [m.scaling for m in adapters]
        attributes = [(m, n) for m in layers for n in ("training", "gradient_checkpointing")]
        attributes += [(m, n) for m in adapters for n in ("_active_adapter", "_disable_adapters")]
        places = [(vars(m), name) for m, name in attributes if name in vars(m)]
        self._attributes = len(places)
        places += [place for w in self._weights for place in _quantization(w)]
        self._places = list(zip(*places))
        self._were_in_places = self._in_places()
        # Lists are changed in place, as by a merge.
        self._tables += [m.merged_adapters for m in adapters if hasattr(m, "merged_adapters")]
        self._tables += [found for found in self._were_in_places if isinstance(found, list)]
        self._were_in_tables = gc.get_referents(*self._tables)
        self._hooks = [hooks for m in modules for hooks in _hook_dicts(m)]
        self._were_hooks, self._handles = list(map(dict, self._hooks)), RemovableHandle.next_id
        self._were_wanting = self._wanting()

    def _wanting(self) -> List[bool]:
        return [w.requires_grad for w in self._weights]

    def _addresses(self) -> List[int]:
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' weights would take 2 us each
            return list(map(_pointer, self._weights))

    def _in_places(self) -> List[Any]:
        return list(map(operator.getitem, *self._places)) if self._places else []

    def readable(self) -> bool:
        """True unless memory of a weight has been freed.

        What a 4-bit weight is decoded with is held here, or moved with the weight.
        """
        return not self._freed

    def moved(self) -> bool:
        """True if an address that a graph reads is no weight's any more."""
        try:
            return self._addresses() != self._were_at
        except (AttributeError, RuntimeError, TypeError):
            return True

    def changed(self, wholly: bool = True) -> str:
        """What differs, or ''.

        wholly: also what a replay sees by itself, trained weights that want no gradient any more, and
        hooks that were taken away.
        """
        if self.moved():
            return "weights moved"
        try:
            found, were, n = self._in_places(), self._were_in_places, self._attributes
            if found[:n] != were[:n]:
                return "modes or adapters changed"
            # States of 4-bit weights may be equal, but elsewhere.
            if not all(map(operator.is_, found[n:], were[n:])):
                return "4-bit weights changed"
            if gc.get_referents(*self._tables) != self._were_in_tables:
                return "modules, weights or scales changed"
            # Each hook that is registered anywhere counts this up.
            if wholly or self._handles != RemovableHandle.next_id:
                self._handles = RemovableHandle.next_id
                if self._hooks != self._were_hooks:
                    return "module hooks changed"
            if wholly:
                return "" if self._wanting() == self._were_wanting else "requires_grad changed"
            return "requires_grad changed" if _any_wants_grad(*self._frozen) else ""
        except (KeyError, AttributeError, RuntimeError, TypeError, ValueError):
            return "modules were added, removed or replaced"


def global_hooks() -> bool:
    """Whether hooks are registered for every module."""
    return any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS)

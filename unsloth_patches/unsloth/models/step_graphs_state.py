# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What captured graphs of decoder blocks depend on beside their inputs, and whether it still holds.

A graph reads addresses and has taken every branch: weights that moved, other adapters, another
scale, a flipped requires_grad or mode make it stale. Asked at each replay, so the question is put to
flat lists by functions written in C.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch.nn.modules import module as torch_module

__all__ = ["BlockState", "why_not_capturable"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# Blocks that are residual + attention, residual + MLP, and read nothing but their arguments.
_BLOCKS = frozenset(
    f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
)
_HOMES = ("torch.", "transformers.", "peft.", "bitsandbytes.", "unsloth")
_pointer = torch._C.TensorBase.data_ptr
_same_pointers = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)  # with CUDA only
_wants_grad = torch._C.TensorBase.requires_grad.__get__


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
            seen.add(id(parameter))
            devices.add(parameter.device)
    if len(devices) != 1:
        return "blocks on several devices"
    return ""


def _quantization(weight: torch.Tensor) -> Iterator[Tuple[Any, str]]:
    """(object, attribute) of the tensors that a 4-bit weight is decoded with."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            if isinstance(getattr(state, name, None), torch.Tensor):
                yield state, name
        state = getattr(state, "state2", None)


class BlockState:
    """The state of ``layers`` when it was made.

    ``still_there()`` is asked before a replay: whether the weights that the graphs read have moved. One
    that was replaced is held here, and can be read. ``changed()`` names anything else that differs. It
    takes longer, so it is asked while the GPU is at work, before anything of what the replay has written
    is used.
    """

    def __init__(self, layers: torch.nn.ModuleList):
        modules = list(layers.modules())
        weights = [
            (m._parameters, name)
            for m in modules
            for name, p in m._parameters.items()
            if p is not None
        ]
        decoders = [
            (vars(state), name)
            for owner, key in weights
            for state, name in _quantization(owner[key])
        ]
        self._places = list(zip(*weights, *decoders))
        # Held, so that what a replay reads is there as long as it has not moved, replaced or not.
        self._tensors = list(map(operator.getitem, *self._places)) if self._places else []
        # Integers, as 4-bit weights are, can want no gradient.
        self._floats = list(zip(*((d, n) for d, n in weights if d[n].is_floating_point())))
        # Dictionaries are compared whole: in C, an entry that is the same object is equal at once.
        self._tables = [m._modules for m in modules if m._modules]
        self._tables += [m._parameters for m in modules if m._parameters]
        self._tables += [m._buffers for m in modules if m._buffers]
        self._hooks = [getattr(m, name) for m in modules if m._modules for name in _HOOKS[:2]]
        self._modes = [layer.__dict__ for layer in layers]
        self._read_modes = _reader(self._modes, ("training", "gradient_checkpointing"))
        adapters = [m for m in modules if hasattr(m, "lora_A") and hasattr(m, "scaling")]
        self._tables += [m.scaling for m in adapters]
        self._adapters = [m.__dict__ for m in adapters]
        names = ("_active_adapter", "_disable_adapters", "merged_adapters")
        self._read_adapters = _reader(self._adapters, names)
        self._were_tables = [dict(table) for table in self._tables]
        self._were_hooks = [dict(hooks) for hooks in self._hooks]
        self._were_modes = self._read_modes(self._modes)
        self._were_adapters = copy.deepcopy(self._read_adapters(self._adapters))
        self._were_wanting = self._wanting()
        self._were_at = self._addresses()
        self._all = list(range(len(self._tensors)))
        self._in_one_call = bool(_same_pointers) and self._unmoved_in_one_call()

    def _wanting(self) -> List[bool]:
        with torch._C.DisableTorchFunctionSubclass():
            return list(map(_wants_grad, map(operator.getitem, *self._floats)))

    def _addresses(self) -> List[int]:
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' weights would take 2 us each
            return list(map(_pointer, self._tensors))

    def _unmoved_in_one_call(self) -> bool:
        return _same_pointers(self._tensors, self._were_at, self._all)

    def still_there(self) -> bool:
        """True if every address that a graph may read is a weight's still."""
        try:
            if self._in_one_call:
                return self._unmoved_in_one_call()
            return self._addresses() == self._were_at
        except (AttributeError, RuntimeError, TypeError):
            return False

    def _replaced(self) -> bool:
        now = map(operator.getitem, *self._places) if self._places else ()
        return not all(map(operator.is_, now, self._tensors))

    def changed(self) -> str:
        """What differs beside addresses, or ''."""
        try:
            if self._read_modes(self._modes) != self._were_modes:
                return "modes changed"
            if self._read_adapters(self._adapters) != self._were_adapters:
                return "adapters changed"
            if self._hooks != self._were_hooks:
                return "module hooks changed"
            if self._wanting() != self._were_wanting:
                return "requires_grad changed"
            if self._replaced():
                return "weights were replaced"
            return "" if self._tables == self._were_tables else "modules or scales changed"
        except (KeyError, AttributeError, RuntimeError, TypeError, ValueError):
            return "modules were added, removed or replaced"


def _reader(dicts: Sequence[dict], names: Sequence[str]) -> Callable[[Sequence[dict]], List[Any]]:
    """A function that reads those of names that all dicts have, by a loop in C."""
    names = [name for name in names if all(name in found for found in dicts)]
    if not names or not dicts:
        return lambda dicts: []
    read = operator.itemgetter(*names)
    return lambda dicts: list(map(read, dicts))


def global_hooks() -> bool:
    return any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS)

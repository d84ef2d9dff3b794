# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What captured graphs of decoder blocks depend on beside their inputs, and whether it still holds.

A graph reads addresses and has taken every branch: weights that moved, other adapters, another
scale, a flipped requires_grad or mode make it stale. Asked before each replay, so the question is
put to flat lists by functions written in C.
"""

from __future__ import annotations

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
_wants_grad = operator.attrgetter("requires_grad")


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


def _adapters(layers: Sequence[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    for layer in layers:
        for module in layer.modules():
            if hasattr(module, "lora_A") and hasattr(module, "scaling"):
                yield module


def _quantization(weight: torch.Tensor) -> Iterator[Tuple[Any, str]]:
    """(object, attribute) of the tensors that a 4-bit weight is decoded with."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        for name in ("absmax", "offset", "code"):
            if isinstance(getattr(state, name, None), torch.Tensor):
                yield state, name
        state = getattr(state, "state2", None)


class BlockState:
    """The state of ``layers`` when it was made; ``changed()`` names what is different now."""

    def __init__(self, layers: Sequence[torch.nn.Module]):
        self._places: List[Tuple[dict, Any]] = []  # (dict, key) of modules and parameters
        self._weights: List[Tuple[dict, str]] = []  # of parameters and buffers alone
        self._decoders: List[Tuple[dict, str]] = []
        self._flags: List[Tuple[dict, Any]] = []
        self._hooks: List[dict] = []
        for layer in layers:
            self._read(layer)
        self._adapters(layers)
        self._objects = self._look(self._places)
        self._expected = self._look(self._flags)
        self._copied = [list(x) if isinstance(x, list) else x for x in self._expected]
        self._lengths = list(map(len, self._hooks))
        self._pointers = self._addresses()
        self._grads = list(map(_wants_grad, self._tensors()))

    def _read(self, layer: torch.nn.Module) -> None:
        for module in layer.modules():
            self._places += [(module._modules, name) for name in module._modules]
            for owner in (module._parameters, module._buffers):
                for name, tensor in owner.items():
                    if tensor is not None:
                        self._places.append((owner, name))
                        self._weights.append((owner, name))
                        for state, attribute in _quantization(tensor):
                            self._decoders.append((vars(state), attribute))
            if module._parameters or "forward" in module.__dict__ or module is layer:
                self._hooks += _hook_dicts(module)
        self._flags += [(layer.__dict__, "training")]
        if "gradient_checkpointing" in layer.__dict__:
            self._flags.append((layer.__dict__, "gradient_checkpointing"))

    def _adapters(self, layers: Sequence[torch.nn.Module]) -> None:
        for module in _adapters(layers):
            names = ("_active_adapter", "_disable_adapters", "merged_adapters")
            self._flags += [(module.__dict__, name) for name in names if name in module.__dict__]
            self._flags += [(module.scaling, name) for name in module.scaling]

    @staticmethod
    def _look(places: Sequence[Tuple[dict, Any]]) -> List[Any]:
        return [owner[name] for owner, name in places]

    def _tensors(self) -> List[torch.Tensor]:
        return [owner[name] for owner, name in self._weights]

    def _addresses(self) -> List[int]:
        tensors = [owner[name] for owner, name in self._weights]
        tensors += [owner[name] for owner, name in self._decoders]
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' weights would take 2 us each
            return list(map(_pointer, tensors))

    def still_there(self) -> bool:
        """True if every address that a graph may read is a weight's still."""
        try:
            return self._addresses() == self._pointers
        except (KeyError, AttributeError, RuntimeError, TypeError):
            return False

    def changed(self) -> str:
        """What differs from when this was made, or ''."""
        try:
            if not all(map(operator.is_, self._look(self._places), self._objects)):
                return "a module or weight was replaced"
            if self._look(self._flags) != self._copied:
                return "modes or adapters changed"
            if list(map(len, self._hooks)) != self._lengths:
                return "module hooks changed"
            if list(map(_wants_grad, self._tensors())) != self._grads:
                return "requires_grad changed"
            return "" if self._addresses() == self._pointers else "weights moved"
        except (KeyError, AttributeError, RuntimeError, TypeError):
            return "modules were added or removed"


def global_hooks() -> bool:
    return any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS)

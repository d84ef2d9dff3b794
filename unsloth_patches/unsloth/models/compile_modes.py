# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""UNSLOTH_BLOCK_FULLGRAPH = auto | strict | off: how strictly decoder blocks have to compile.

auto (the default): Unsloth's own behaviour; a block that does not compile runs eagerly, and the
report at the end says which and why. strict: blocks compile with ``fullgraph = True``, and whatever
keeps one from it stops the run with file, line and remedy, before the first weight is updated. off:
nothing is watched and no report is made. Read when a model's blocks are set up for compiling.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional

import torch

from .compile_failures import Place, failure_place, reason_and_hint
from .compile_wrapping import torch_compile_as

__all__ = [
    "BlockRegion",
    "FullgraphError",
    "enforce_full_graphs",
    "fullgraph_mode",
    "layers_by_state",
    "watched_regions",
]

VARIABLE = "UNSLOTH_BLOCK_FULLGRAPH"
MODES = ("auto", "strict", "off")
_MODE_OF_LAYER = "_unsloth_block_mode"  # upstream's: 0 eager, 1 compiled, 2 flex attention outside
_EAGER = 0
_REMEDY = (
    "take that call out of the decoder block, or make it an operator (torch.library.custom_op); "
    f"with {VARIABLE}=auto the block trains all the same, uncompiled or in pieces"
)


class FullgraphError(RuntimeError):
    """Strict mode: a region is not one compiled graph. Says where, why and what to do."""


@dataclass(frozen = True)
class Failure:
    """Why a region did not compile."""

    place: Place
    reason: str
    hint: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        reason, hint = reason_and_hint(str(error) or type(error).__name__)
        return cls(failure_place(error), reason, hint)

    def __str__(self) -> str:
        return f"{self.reason} ({self.place})" if self.place.file else self.reason


@dataclass
class BlockRegion:
    """A class of decoder layers that is compiled as one region, and what became of its calls.

    compiled_calls, outside: training forwards (recomputation under checkpointing included) that ran
    compiled, and those that did not, by reason. failures: the distinct errors of its compilations.
    """

    name: str
    mode: str
    layer_class: type
    place: Place = Place()  # of the forward that is compiled: how Dynamo's metrics name it
    compiled_calls: int = 0
    outside: Counter = field(default_factory = Counter)
    failures: List[Failure] = field(default_factory = list)
    entered: int = 0  # graphs entered; upstream's trial of a first call enters twice in one call
    _failing: Optional[Failure] = None

    def note_failure(self, error: BaseException) -> Failure:
        failure = Failure.of(error)
        self._failing = failure
        if failure not in self.failures:
            self.failures.append(failure)
        return failure

    def note_outside(self, layer: torch.nn.Module, kwargs: Dict[str, Any]) -> None:
        """A training call of `layer` did not run compiled. Raises FullgraphError in strict mode."""
        reason = _why_outside(layer, kwargs)
        demoted = reason is None
        if demoted:
            reason = f"demoted: {self._failing or 'an earlier layer of its kind was'}"
        self.outside[reason] += 1
        if self.mode == "strict":
            raise self.error(self._failing if demoted else None, reason)

    def error(self, failure: Optional[Failure], reason: str) -> FullgraphError:
        if failure is None:
            remedy = _PADDED if reason.startswith("packed") else _NO_STRICT
            return FullgraphError(f"Unsloth: {self.name} did not run compiled: {reason}. {remedy}")
        hint = f"\n  torch's hint: {failure.hint}" if failure.hint else ""
        return FullgraphError(
            f"Unsloth: {self.name} is not one graph, and {VARIABLE}=strict.\n"
            f"  where: {failure.place}\n  why: {failure.reason}{hint}\n  remedy: {_REMEDY}."
        )


_PADDED = (
    "packing = False and padding_free = False in SFTConfig (or UNSLOTH_PADDING_CHOICE=padded) give "
    f"batches that compile; {VARIABLE}=auto trains as it is."
)
_NO_STRICT = f"{VARIABLE}=auto trains all the same and counts such calls in its report."
_regions: List[BlockRegion] = []


def fullgraph_mode() -> str:
    """``UNSLOTH_BLOCK_FULLGRAPH``, ``auto`` by default. Raises ValueError if it is no mode."""
    value = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if value not in MODES:
        raise ValueError(f"{VARIABLE}={os.environ[VARIABLE]!r}: choose one of {', '.join(MODES)}.")
    return value


def watched_regions(model: Optional[torch.nn.Module] = None) -> List[BlockRegion]:
    """The watched regions of this process, or of `model`'s layers alone."""
    if model is None:
        return list(_regions)
    classes = {type(module) for module in model.modules()}
    return [region for region in _regions if region.layer_class in classes]


def layers_by_state(model: torch.nn.Module, region: BlockRegion) -> Dict[str, int]:
    """How many of the model's layers of a region are compiled, compiled around flex attention,
    eager, or not yet run."""
    names = {
        None: "not run",
        _EAGER: "eager",
        1: "compiled",
        2: "compiled, flex attention outside",
    }
    layers = [m for m in model.modules() if type(m) is region.layer_class]
    return dict(Counter(names.get(m.__dict__.get(_MODE_OF_LAYER), "unknown") for m in layers))


def _why_outside(layer: torch.nn.Module, kwargs: Dict[str, Any]) -> Optional[str]:
    """Why block compile sent a training call around the compiled region; None for a demoted layer."""
    if layer.__dict__.get(_MODE_OF_LAYER) == _EAGER:
        return None
    if os.environ.get("UNSLOTH_BLOCK_COMPILE", "1") == "0":
        return "switched off by UNSLOTH_BLOCK_COMPILE=0"
    if os.environ.get("UNSLOTH_COMPILE_DISABLE", "0") in ("1", "partial"):
        return "switched off by UNSLOTH_COMPILE_DISABLE"
    for name in ("packed_seq_lengths", "prefix_seg_info"):
        if kwargs.get(name) is not None:
            return f"packed batch ({name}) that this block is not compiled for"
    if layer.__dict__.get("_unsloth_forced_float32"):
        return "float32 is forced for this model"
    if any(kwargs.get(name) is not None for name in ("past_key_values", "past_key_value")):
        return "called with a key-value cache"
    return "Unsloth ran the uncompiled forward"


def enforce_full_graphs(stock: Callable) -> Callable:
    """``_wrap`` of ``models/_block_compile.py``: the region is watched, in strict mode with
    ``fullgraph = True``; with mode ``off`` as without this decorator.
    """

    @functools.wraps(stock)
    def _wrap(cls, *args, **kwargs):
        mode = _mode_or_auto()
        if mode == "off":
            return stock(cls, *args, **kwargs)
        region = BlockRegion(cls.__name__, mode, cls)
        with torch_compile_as(functools.partial(_compile_region, region = region)):
            result = stock(cls, *args, **kwargs)
        code = getattr(getattr(cls.forward, "_unsloth_block_original", None), "__code__", None)
        if code is not None:
            region.place = Place(code.co_filename, code.co_firstlineno)
        cls.forward = _watched(cls.forward, region)
        # Loading another model of the family gives the class its stock forward back, then us again.
        _regions[:] = [other for other in _regions if other.layer_class is not cls] + [region]
        return result

    return _wrap


def _mode_or_auto() -> str:
    """An unknown mode must not cost the model its compiled blocks: the trainer raises the error."""
    try:
        return fullgraph_mode()
    except ValueError as error:
        print(f"Unsloth: {error} Blocks compile as with auto.")
        return "auto"


def _compile_region(compile: Callable, function: Callable, *, region: BlockRegion, **options: Any):
    """``torch.compile`` for a region: its calls are counted and its errors kept."""
    if region.mode == "strict":
        options["fullgraph"] = True
    return _counted(compile(function, **options), region)


def _counted(compiled: Callable, region: BlockRegion) -> Callable:
    from torch._dynamo.exc import TorchDynamoException

    @functools.wraps(compiled, updated = ())
    def run_compiled(*args, **kwargs):
        try:
            out = compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failure = region.note_failure(error)
            if region.mode == "strict" and isinstance(error, TorchDynamoException):
                raise region.error(failure, failure.reason) from error
            raise
        region.entered += 1
        return out

    return run_compiled


def _watched(forward: Callable, region: BlockRegion) -> Callable:
    @functools.wraps(forward)
    def watched_forward(self, *args, **kwargs):
        # Evaluation runs stock by design, and inside a user's own graph there is no region of ours.
        if torch.compiler.is_compiling() or not self.training:
            return forward(self, *args, **kwargs)
        before = region.entered
        out = forward(self, *args, **kwargs)
        if region.entered > before:
            region.compiled_calls += 1
        else:
            region.note_outside(self, kwargs)
        return out

    return watched_forward

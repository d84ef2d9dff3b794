# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""One model's stack of decoder blocks: its graphs, one a length, and when one is captured or dropped."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections import Counter, OrderedDict
from typing import Any, Dict, Optional, Tuple

import torch

from . import step_graphs_pool
from .step_graphs_buckets import PaddedRows, lay_out, unknown_argument
from .step_graphs_capture import GROWTH, Bucket, replay_blocks
from .step_graphs_pool import Pool, apart
from .step_graphs_state import BlockState, why_not_capturable

__all__ = ["Stack", "checkpointing_layer", "mode"]

VARIABLE, DEFAULT = "UNSLOTH_STEP_GRAPHS", "auto"
MAX_BUCKETS = 64
MAX_TOKENS = 16384  # a micro-batch beyond that keeps the GPU busy by itself
BORROWED, BORROWS = 1.5, 4  # a length waits in a graph up to so much longer, until seen so often
UNCOMPILED = 8  # packed batches that ran uncompiled for a graph's sake, beyond those replayed
POOL_SHARE = 0.25  # of the GPU's memory that this process had not needed before the first capture
# Beside checkpoints, which are there to save memory, a length is captured in such a way that it is
# expected to need no more than that much, and a share of what was allocated at most; or it is left out.
EXTRA_BYTES, EXTRA_SHARE = 256 << 20, 0.15
KEPT = 0.5  # of that at most is filled by activations that need no second run
# The GPU's time over the host's for one block, up to which replaying pays: in a training pass a block
# takes the host longer than by itself.
HOST_BOUND, ASKED_AGAIN = 1.1, 8
FIRST, OVER_BUDGET = "a length's first batch", "past the pool's budget"
GPU_BOUND, SMALL_POOL = "the GPU is what takes the time", "the pool is too small"
OUT_OF_MEMORY = "out of memory while capturing"
_ATTENTION_KERNELS = tuple(
    getattr(torch.backends.cuda, f"{name}_sdp_enabled")
    for name in ("flash", "mem_efficient", "math", "cudnn")
    if hasattr(torch.backends.cuda, f"{name}_sdp_enabled")
)
logger = logging.getLogger(__name__)


def mode() -> str:
    """``auto``, ``1`` or ``0``. Raises ValueError for anything else."""
    value = os.environ.get(VARIABLE, DEFAULT).strip().lower() or DEFAULT
    if value not in ("auto", "1", "0"):
        raise ValueError(f"Unsloth: {VARIABLE}={value!r}: choose auto, 1 or 0.")
    return value


@functools.lru_cache(maxsize = 1)
def checkpointing_layer() -> type:
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError:  # an older transformers
        return type("GradientCheckpointingLayer", (), {})
    return GradientCheckpointingLayer


class _Layers:
    """Stands for ``model.layers`` in one forward pass: one layer that is all of them, whatever its
    number: stock iterates over the layers, or asks the first for its attention."""

    def __init__(self, stack: "Stack", layers: torch.nn.ModuleList):
        class Blocks(checkpointing_layer()):
            self_attn = layers[0].self_attn

            def __init__(self):  # no module of its own
                pass

            def __call__(self, hidden_states, **kwargs):
                return (stack.run(hidden_states, kwargs),)

        self._blocks = Blocks()

    def __iter__(self):
        yield self._blocks

    def __getitem__(self, index):
        return self._blocks

    def __len__(self):
        return 1


class Stack:
    """The decoder blocks of one model: their buckets, and what was replayed."""

    def __init__(self, model: torch.nn.Module):
        self._model = weakref.ref(model)
        self.replayed, self.captures, self.drops = 0, 0, 0
        self.real = self.padded = 0  # tokens that were replayed
        self.reasons: Counter = Counter()
        self.changes: Counter = Counter()
        self.off, self.limit, self.limit_reason = "", MAX_TOKENS, f"more than {MAX_TOKENS} tokens"
        self.share = POOL_SHARE
        self.standing_in: Optional[_Layers] = None
        self._layers_of: Any = None
        self.forget()

    def forget(self) -> None:
        """Drops every graph, and what is known of the blocks."""
        self.buckets: "OrderedDict[tuple, Bucket]" = OrderedDict()
        self.seen: Counter = Counter()
        self.refused: Dict[tuple, str] = {}
        self.state: Optional[BlockState] = None
        self.blocked: Optional[str] = None
        self.pool: Optional[Pool] = None
        self.size, self.tokens = 0, 1024  # of the next pool, at least
        self.recorder: Any = None

    def drop(self, why: str) -> None:
        """Drops every graph since something that they depend on is another now."""
        self.drops += len(self.buckets)
        self.changes[why] += 1
        self.forget()

    @property
    def layers(self) -> torch.nn.ModuleList:
        return self._model()._modules["layers"]

    def stand_in(self) -> _Layers:
        layers = self.layers
        if self._layers_of is not layers or self.standing_in is None:
            self.forget()
            self.standing_in, self._layers_of = _Layers(self, layers), layers
        return self.standing_in

    # ------------------------------------------------------------------ one micro-batch

    def ordinary(self, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """What the model's own loop over its blocks does."""
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)[0]
        return hidden

    def run(self, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        reason, bucket, layout = self._bucket_for(hidden, kwargs)
        if bucket is None:
            self.reasons[reason] += 1
            self.make_room(hidden.shape[0] * hidden.shape[1])
            return self.ordinary(hidden, self._uncompiled(kwargs) if reason == FIRST else kwargs)
        out = replay_blocks(bucket, layout, hidden, kwargs.get("position_ids"), self.state)
        # Asked while the GPU is at work.
        change = "requires_grad changed" if bucket.frozen else self.state.changed(wholly = False)
        if change:
            self.drop(change)
            del out, bucket  # they hold the pool
            return self.run(hidden, kwargs)
        self.replayed += 1
        self.real += layout.real
        self.padded += layout.rows * layout.bucket
        return out

    def make_room(self, tokens: int) -> None:
        """Gives the graphs' memory back where a pass of so many tokens outside of them may need it.

        For a token it is taken to need as much as the pool holds; a quarter without grad, where nothing
        is kept. Later graphs may take half as much.
        """
        if not tokens or not self.buckets:
            return
        needed = tokens / max(key[0] * key[1] for key in self.buckets)
        needed /= 1 if torch.is_grad_enabled() else 4
        if self.pool.recorder.room() < self.pool.bytes * (1 + needed):
            self.share /= 2
            self.changes["another pass needed the memory"] += 1
            self._give_back()

    def _uncompiled(self, kwargs: dict) -> dict:
        """The arguments of packed rows that are replayed from the second batch on: compiling blocks for
        the first would not repay, unless most batches turn out to be a first one."""
        lengths = kwargs.get("packed_seq_lengths")
        if lengths is None or sum(self.reasons.values()) > self.replayed + UNCOMPILED:
            return kwargs
        lengths = lengths.view_as(lengths)  # the caller's own stays as it is
        lengths._unsloth_uncompiled = True
        return {**kwargs, "packed_seq_lengths": lengths}

    def _bucket_for(self, hidden: torch.Tensor, kwargs: dict) -> Tuple[str, Any, Any]:
        """('', bucket, layout), or (reason, None, None)."""
        reason = self._stale_or_blocked() or unknown_argument(kwargs)
        if not reason and self._recorder(hidden.device) is None:
            self.off = f"no graphs on {hidden.device.type}"
        reason = self.off or reason
        if reason:
            return reason, None, None
        reason, layout = lay_out(hidden, kwargs)
        if reason:
            return reason, None, None
        if layout.rows * layout.bucket > self.limit:
            return self.limit_reason, None, None
        key = self._key(hidden, kwargs, layout)
        if key in self.refused and not self._asked_again(key):
            return self.refused[key], None, None
        if key in self.buckets:
            self.buckets.move_to_end(key)
            return "", self.buckets[key], layout
        return self._not_captured_yet(key, hidden, kwargs, layout)

    def _not_captured_yet(
        self, key: tuple, hidden: torch.Tensor, kwargs: dict, layout: Any
    ) -> Tuple[str, Any, Any]:
        """What ``_bucket_for`` answers: a longer bucket, one that is captured now, or none yet."""
        self.seen[key] += 1
        self.recorder.peak()  # what a reset would lose
        # What cannot be captured is asked once a length, and what changed since, too.
        change = self.state.changed()
        if change:
            self.drop(change)
            return self._bucket_for(hidden, kwargs)
        if self.seen[key] < BORROWS:
            longer = self._longer(key)
            longer_layout = longer and lay_out(hidden, kwargs, longer[1])[1]
            if longer_layout:
                self.buckets.move_to_end(longer)
                return "", self.buckets[longer], longer_layout
        if self.seen[key] < 2:
            return FIRST, None, None
        bucket = self._capture(key, hidden, kwargs, layout)
        if bucket is None:
            return self.off or self.refused[key], None, None
        return "", bucket, layout

    def _asked_again(self, key: tuple) -> bool:
        """Whether the GPU, found busy with a length, is asked once more: another process may have used it."""
        if self.refused[key] != GPU_BOUND:
            return False
        seen = self.seen[key] + 1
        if seen < ASKED_AGAIN or seen & (seen - 1):  # not 8, 16, 32, …
            self.seen[key] = seen
            return False
        del self.refused[key]
        return True

    def _recorder(self, device: torch.device) -> Any:
        if self.recorder is None:
            self.recorder = step_graphs_pool.make_recorder(device)
        return self.recorder

    def _longer(self, key: tuple) -> Optional[tuple]:
        """A captured bucket that differs by a somewhat greater length alone: it costs the GPU less
        than the host would need for the blocks, or to capture one more length."""
        return min(
            (
                k
                for k in self.buckets
                if k[0] == key[0] and key[1] < k[1] <= BORROWED * key[1] and k[2:] == key[2:]
            ),
            default = None,
            key = lambda k: k[1],
        )

    def _stale_or_blocked(self) -> str:
        if self.state is not None:
            if self.state.readable() and not (self.blocked and self.state.changed()):
                return self.blocked or ""
            self.drop("weights moved")
        self.state, self.blocked = BlockState(self.layers), why_not_capturable(self.layers)
        if not self.blocked and not any(p.requires_grad for p in self.layers.parameters()):
            self.blocked = "no trainable weight in the blocks"
        return self.blocked

    def _key(self, hidden: torch.Tensor, kwargs: dict, layout: Any) -> tuple:
        device = hidden.device.type
        rope = kwargs.get("position_embeddings") or ()
        return (
            layout.rows,
            layout.bucket,
            hidden.dtype,
            hidden.requires_grad,
            kwargs.get("position_ids") is not None,
            type(kwargs.get("causal_mask")),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            getattr(self._model().config, "_attn_implementation", None),
            *(allowed() for allowed in _ATTENTION_KERNELS),
            tuple((table.data_ptr(), table.shape[0], table.dtype) for table in rope),
        )

    # ------------------------------------------------------------------------- capture

    def _capture(
        self, key: tuple, hidden: torch.Tensor, kwargs: dict, layout: Any
    ) -> Optional[Bucket]:
        timed = mode() == "auto"
        try:
            while True:
                with apart(self._recorder(hidden.device)):
                    bucket = self._new_bucket(hidden, kwargs, layout)
                    try:
                        why_not = self._why_not(bucket, timed) or self._captured(bucket)
                    finally:
                        bucket.close()
                if why_not != SMALL_POOL:
                    break
                del bucket  # it holds the pool
                timed, size = False, self.size
                self._give_back()
                self.size = size  # the others are captured anew, in a larger one
        except torch.OutOfMemoryError:
            why_not, bucket = OUT_OF_MEMORY, None
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0][:200]
            self.forget()
            self.off = f"capture failed: {type(error).__name__}: {first}"
            logger.warning(f"Unsloth: step graphs are off ({self.off}).")
            return None
        if why_not == OUT_OF_MEMORY:  # here, where no traceback holds the pool
            self._too_large(key, why_not)
            return None
        if why_not:
            self.refused[key] = why_not
            if not self.pool.size:
                self.pool = None  # it is for so many tokens as have been refused
            return None
        self.buckets[key] = bucket
        self.captures += 1
        if len(self.buckets) > MAX_BUCKETS:
            self.buckets.popitem(last = False)
            self.drops += 1
        if self.pool.bytes > self.pool.budget:
            del bucket
            self._too_large(key, OVER_BUDGET)
        return self.buckets.get(key)

    def _new_bucket(self, hidden: torch.Tensor, kwargs: dict, layout: Any) -> Bucket:
        if self.pool is None:
            tokens = max(self.tokens, int(GROWTH * layout.rows * layout.bucket))
            self.pool = Pool(self._recorder(hidden.device), self.share, tokens)
            if self._checkpointed():
                allowed = EXTRA_BYTES + EXTRA_SHARE * self.pool.recorder.peak()
                self.pool.room = min(self.pool.budget, allowed)
        return Bucket(
            self.pool,
            self.layers,
            (layout.rows, layout.bucket, hidden.shape[-1]),
            {k: v for k, v in kwargs.items() if k != "packed_seq_lengths"},
            hidden,
            kwargs.get("position_ids") is not None,
            compiled = isinstance(layout, PaddedRows),
        )

    def _captured(self, bucket: Bucket) -> str:
        """'', or that the pool is too small for it, or the host's memory."""
        pool, needed = self.pool, bucket.graph_bytes()
        if not bucket.host_has_room():
            return OVER_BUDGET
        if pool.size and (needed > pool.size or bucket.tokens() > pool.tokens):
            return SMALL_POOL
        if pool.size:
            bucket.capture()
        else:  # no smaller than the one before: else the two would take turns
            wanted = max(self.size, GROWTH * needed)
            bucket.capture(int(min(pool.room - bucket.outside_bytes(), wanted)))
            self.size, self.tokens = pool.size, pool.tokens
        return ""

    def _too_large(self, key: tuple, reason: str) -> None:
        """Gives all memory back; smaller shapes are captured anew, these and larger ones never.

        The pool is shared, so it is as large as its largest bucket needs: dropping others frees nothing.
        """
        self._give_back()
        self.refused[key] = reason
        self.limit, self.limit_reason = key[0] * key[1] - 1, reason

    def _give_back(self) -> None:
        self.drops += len(self.buckets)
        self.buckets.clear()
        self.pool, self.recorder, self.size = None, None, 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a replay may be under way, on a stream that the pool is not of
            torch.cuda.empty_cache()

    def _checkpointed(self) -> bool:
        return bool(getattr(self.layers[0], "gradient_checkpointing", False))

    def _why_not(self, bucket: Bucket, timed: bool) -> str:
        """A reason why it does not pay or fit, or ''. timed: whether that it pays is asked."""
        checkpointed = self._checkpointed()
        if not checkpointed:  # before any runs: without grad they would compile once more
            bucket.keep_last(len(self.layers))
        host, gpu = bucket.seconds() if timed else (1.0, 0.0)
        if gpu > HOST_BOUND * host:
            return GPU_BOUND
        bucket.measure()
        room = self.pool.room - bucket.outside_bytes()
        fits = bucket.fit_into(room, KEPT * room) if checkpointed else bucket.graph_bytes() <= room
        if not fits:
            return OVER_BUDGET
        # Some rows at a time take the GPU longer, short ones by up to a half.
        slower = timed and bucket.split and bucket.seconds()[1] > HOST_BOUND * host
        return GPU_BOUND if slower else ""

# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A stand-in for CUDA graphs on the CPU: records the operations of a call with their tensors, and
replays them into the same memory.

Like a graph it goes on reading the addresses it was recorded with, runs no Python, and its memory is
another's between two replays: what a recording has allocated is filled with NaN when it is not its turn.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FRESH_MEMORY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.fresh, self.spoiled = [], [], False

    def __torch_dispatch__(
        self,
        func,
        types,
        args = (),
        kwargs = None,
    ):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **kwargs)
        views = any(r.alias_info is not None for r in func._schema.returns)
        outs = out if isinstance(out, (tuple, list)) else (out,)
        outs = [] if views else [o for o in outs if isinstance(o, torch.Tensor)]
        self.calls.append((func, args, kwargs, outs, views))
        taken = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        self.fresh += [o for o in outs if o.untyped_storage().data_ptr() not in taken]
        return out

    def replay(self):
        self.spoiled = False
        with torch.no_grad():
            for func, args, kwargs, outs, views in self.calls:
                if func.overloadpacket.__name__ in FRESH_MEMORY:
                    continue
                if views and not func._schema.is_mutable:
                    continue  # the same memory still
                new = func(*args, **kwargs)
                for old, value in zip(outs, new if isinstance(new, (tuple, list)) else (new,)):
                    if old.data_ptr() != value.data_ptr():
                        old.copy_(value)

    def poison(self):
        """Unless nothing was written since."""
        if self.spoiled:
            return
        self.spoiled = True
        fresh = [t.detach() for t in self.fresh if t.is_floating_point()]
        if fresh:
            torch._foreach_mul_(fresh, float("nan"))


class TapeRecorder:
    """recorder(function) -> replay. A pair of recordings, forward and backward, is a bucket's."""

    def __init__(self, device):
        self.tapes, self.fail, self.free = [], None, 1 << 40
        self.device, self.host_and_gpu = device, (1.0, 0.5)

    def __call__(self, function):
        if self.fail is not None:
            raise self.fail
        tape, number = _Tape(), len(self.tapes)
        with tape:
            function()
        self.tapes.append(tape)
        if number % 2:
            self.tapes[-2].poison()
            tape.poison()

        def replay():
            pair = number // 2
            for other, recorded in enumerate(self.tapes):
                if other // 2 != pair:
                    recorded.poison()
            tape.replay()
            if number % 2:
                for recorded in self.tapes[2 * pair : 2 * pair + 2]:
                    recorded.poison()

        return replay

    def reserve(self, nbytes):
        pass

    def peak(self):
        return 0

    def memory(self):
        return 0, self.free

    def room(self):
        return self.free

    def reserved(self):
        return len(self.tapes) << 20

    def timed(self, function):
        function()
        return self.host_and_gpu

# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A batch as long as a head is wide, whose length the RoPE tables' width equals, needs no other graph."""

from backend import require

require("interpreter")

import unsloth  # noqa: F401, E402
from fast_models import (  # noqa: E402, F401
    HEAD_DIM,
    build,
    graphs,
    step,
    unsloth_modules,
)


def test_a_batch_as_long_as_a_head_is_wide_needs_no_other_graph(build):
    """The RoPE tables' width is not a length: marking it invalidated the graphs compiled before."""
    model = build(backend = "eager")
    for length in (24, HEAD_DIM, 33, HEAD_DIM):
        step(model, 2, length)
    assert graphs() == 1

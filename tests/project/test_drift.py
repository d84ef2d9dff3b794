# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""A seeded sample of ``drift.py``: what a release changes is noticed, or a wrapper hands it on.

All of it: ``python tests/project/drift.py 200``.
"""

import importlib.util

import drift
import pytest

needs_unsloth = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason = "Unsloth is not installed"
)


@needs_unsloth
@pytest.mark.parametrize(
    "variant", drift.variants(14, seed = 1) if importlib.util.find_spec("unsloth") else [], ids = str
)
def test_a_changed_release_is_noticed_or_harmless(variant, tmp_path):
    reason, wrong = drift.judge(variant, tmp_path)
    assert not wrong, wrong
    assert not reason or variant.target.attribute in reason

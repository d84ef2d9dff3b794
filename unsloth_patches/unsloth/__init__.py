# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What lands in Unsloth: ``X.py`` here is ``unsloth/X.py`` of the fork, byte for byte."""

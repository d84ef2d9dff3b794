# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Losses of ``hidden @ weight.T`` that never hold all the logits.

linear_cross_entropy   nn.CrossEntropyLoss in every combination, and what training adds to it
linear_loss            any differentiable loss that treats every row by itself
linear_log_probs       per-token log-probability, logsumexp, entropy and top-1, for losses that
                       couple rows (GRPO, DPO, KL)
"""

from .linear_cross_entropy import linear_cross_entropy
from .linear_custom_loss import linear_loss
from .linear_log_probs import LogProbs, linear_log_probs

__all__ = ["linear_cross_entropy", "linear_loss", "linear_log_probs", "LogProbs"]

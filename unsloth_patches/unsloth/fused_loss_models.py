# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The fused loss and its options in the forwards that unsloth_zoo's compiler writes (FastModel's models)."""

import functools

from .fused_cross_entropy import on_linear_cross_entropy, unless_zoo_is_unknown
from .fused_loss import fused_loss_with_model_options, still_there, take_options_from_logits
from .loss_calls import require_parameters
from .loss_options import causal_model, model_taking_options


def loss_of_compiled_forwards(stock):
    """``unsloth_fused_ce_loss`` by the names that those forwards call it."""
    return fused_loss_with_model_options(on_linear_cross_entropy(stock))


@unless_zoo_is_unknown
def loaded_models_take_options(stock):
    """``post_patch_loss_function`` as FastModel calls it: the model's forward takes loss options then.

    Its loss takes them where the forward calls the fused one; another is computed from the logits.
    """
    require_parameters(stock, ("model",))
    in_force = still_there(stock, "unsloth.models.vision")

    @functools.wraps(stock)
    def post_patch_loss_function(model):
        model = stock(model)
        inner = causal_model(model)
        if inner is not None and model_taking_options(inner) is None:
            take_options_from_logits(inner, in_force, computes_loss = lambda model: None)
        return model

    post_patch_loss_function._takes_loss_options = True
    return post_patch_loss_function

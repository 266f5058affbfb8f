"""The same architecture with new first weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bezoar.core.errors import UnsupportedModel


def fresh(model: nn.Module) -> nn.Module:
    """A copy of a network that has learned nothing yet, in train mode and with gradients for all its weights.

    Each layer draws its weights as it does when it is made, from torch's global generator. Buffers of layers that
    learn nothing, such as a normalisation of the input, stay.

    Args:
        model: Left as it was.

    Raises:
        UnsupportedModel: A weight belongs to a layer that cannot draw it anew.
    """
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)  # so that what no layer draws is seen
        for module in made.modules():
            # Attention keeps its weights to itself and draws them under another name.
            draw = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(draw):
                draw()
    for name, parameter in made.named_parameters():
        if parameter.is_floating_point():
            if bool(parameter.isnan().any()):
                raise UnsupportedModel(
                    f"the weight {name} of {type(model).__name__} cannot be drawn anew: its layer has no "
                    "reset_parameters",
                    "Use a filter that looks through the model as it is, such as spectral-signatures or scan",
                )
            parameter.requires_grad_()
    return made.train()

"""Fast FIP: FIP on the singular values of the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.purifiers._smoothing import Smoothing, Trained

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


class Spectrum(Trained):
    """Every weight matrix as ``U diag(relu(s + scale d)) V^T``, of which only the ``d`` are trained.

    Args:
        model: Its convolutions, linear layers and attention are decomposed; a kernel counts as the matrix of its output
            channels times all the rest.
        scale: Factor of ``d``.
        rest: Train what is no matrix (biases, gains and shifts of normalisation) too, as it is.
    """

    def __init__(self, model: nn.Module, scale: float, rest: bool = False) -> None:
        super().__init__(model)
        self.scale, self.shapes = scale, {}
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, weight in matrices(model).items():
            self.shapes[name] = weight.shape
            self.parts[name] = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
        if not self.parts:
            raise UnsupportedModel(
                f"{type(model).__name__} has no weight matrix to decompose", "Use a method that tunes all weights: fip"
            )
        self.changes = {name: torch.zeros_like(s, requires_grad=True) for name, (_, s, _) in self.parts.items()}
        for name, parameter in model.named_parameters():
            if rest and name not in self.parts and parameter.requires_grad:
                self.changes[name] = parameter.detach().clone().requires_grad_(True)
            parameter.requires_grad_(False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.changes

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, (left, values, right) in self.parts.items():
            kept = torch.relu(values + self.scale * tensors[name])
            made[name] = ((left * kept) @ right).view(self.shapes[name])
        return {**tensors, **made}


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions, linear layers and attention by name, each once."""
    ours = {id(p) for m in model.modules() if isinstance(m, _WEIGHTED) for p in m.parameters(recurse=False)}
    named = model.named_parameters()
    return {name: p for name, p in named if id(p) in ours and p.requires_grad and p.ndim >= 2 and p.numel()}


@dataclass(frozen=True, kw_only=True)
class FastFIP(Smoothing):
    """Purify as FIP does, but train the singular values of the weight matrices alone.

    Each weight becomes ``U diag(relu(s + scale d)) V^T`` with ``d`` trained from 0: some hundreds or thousands of
    numbers instead of all weights. With so few, a quarter of FIP's steps at ten times its learning rate has to do; that
    is where the saving comes from, as a step on either costs about the same. What becomes of the head and of
    normalisation is not known from the paper, and the released code lacks the network: here the head is decomposed like
    all layers, and ``rest`` decides about what is no matrix.

    Args:
        steps: Updates, at least 1.
        batch: Images per step, drawn with replacement, at least 1.
        lr: Peak learning rate of SGD, at least 0.
        momentum: Momentum of SGD, in [0, 1).
        smooth: Weight of the trace of the Fisher information of what is trained, at least 0.
        anchor: Weight of the way from the first values, at least 0.
        every: The trace is estimated at one step of so many, and then counts for all of them; at least 1.
        labels: ``sampled`` from the model's own answers (the Fisher information proper) or those ``given`` with the
            images (the empirical one).
        scale: How far a change of 1 moves a singular value, above 0.
        rest: Train what is no matrix, such as gains and shifts of normalisation, as well.
        pad: Random crop after padding by this many pixels, at least 0.
        flip: Random horizontal flip; off by default, since signs, digits and text must not be mirrored.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        Karim et al., "Fisher Information guided Purification against Backdoor Attacks", CCS 2024,
        https://arxiv.org/abs/2409.00863.
    """

    steps: int = 250
    lr: float = 0.05
    scale: float = 1.0
    rest: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("scale", self.scale > 0, "above 0")

    def trained(self, model: nn.Module) -> Trained:
        return Spectrum(model, self.scale, self.rest)

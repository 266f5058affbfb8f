"""The Fisher information of a classifier: its diagonal and its trace, from gradients of single images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bezoar.ops.curvature import signs_like

#: Logits ``(B, K)`` of the trained tensors by name and of ``(B, C, H, W)`` images.
Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention runs its plain kernel inside: the fused ones have no second derivative, nor one for single rows."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def of_model(model: nn.Module) -> Forward:
    """The model as a function of its parameters."""

    def forward(trained: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, dict(trained), (x,))
        return out

    return forward


def sampled_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """``(B,)`` labels drawn from the model's own answer ``(B, K)``, as the true Fisher information has them."""
    chances = torch.softmax(logits.detach().float(), 1).cpu()
    return torch.multinomial(chances, 1, generator=generator).flatten().to(logits.device)


def diagonal(
    forward: Forward, trained: Mapping[str, Tensor], x: Tensor, labels: Tensor | None, *, chunk: int = 32
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information: the mean over images of the squared gradients of ``log p(label | image)``.

    The gradients are those of single images; the square of their mean would be another thing. The model must be in
    eval mode, where no image sees the others.

    Args:
        forward: See :data:`Forward`.
        trained: Tensors whose Fisher information is wanted.
        x: ``(N, C, H, W)`` images, on the device of the model.
        labels: ``(N,)`` labels: the images' own ones (the empirical Fisher information) or sampled ones; None takes the
            expectation over all labels under the model's answer, which costs one pass for each label.
        chunk: Images at a time, whose gradients are held together.
    """
    constants = {name: value.detach() for name, value in trained.items()}
    total = {name: torch.zeros_like(value) for name, value in constants.items()}
    with twice_differentiable():
        for rows in torch.split(torch.arange(len(x), device=x.device), chunk):
            for label, weight in _cases(forward, constants, x[rows], None if labels is None else labels[rows]):
                found = gradients_of_each(forward, constants, x[rows], label)
                for name, each in found.items():
                    total[name] += torch.einsum("b,b...->...", weight.to(each), each.square())
    return {name: value / len(x) for name, value in total.items()}


@torch.no_grad()
def _cases(
    forward: Forward, trained: Mapping[str, Tensor], x: Tensor, labels: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    if labels is not None:
        return [(labels, torch.ones(len(x), device=x.device))]
    chances = torch.softmax(forward(trained, x), 1)
    return [(torch.full((len(x),), k, device=x.device), chances[:, k]) for k in range(chances.shape[1])]


def gradients_of_each(forward: Forward, trained: Mapping[str, Tensor], x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``(B, ...)`` gradients of the cross-entropy of every single image with its label.

    One vectorised pass; a model that cannot be vectorised is asked image by image.
    """
    constants = {name: value.detach() for name, value in trained.items()}

    def loss(tensors: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(forward(tensors, image.unsqueeze(0)), label.unsqueeze(0))

    try:
        found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(constants, x, labels)
    except RuntimeError:  # data-dependent control flow, or an operation without a vectorised form
        each = [grad(loss)(constants, image, label) for image, label in zip(x, labels, strict=True)]
        found = {name: torch.stack([one[name] for one in each]) for name in constants}
    # Without the graph of whatever else in the model needs a gradient.
    return {name: value.detach() for name, value in found.items()}


def trace_estimate(
    forward: Forward, trained: Mapping[str, Tensor], x: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """An unbiased estimate of the trace of the Fisher information on a batch, which can be differentiated itself.

    With ``g_i`` the gradient of one image and independent random signs ``s_i``, the mixed terms of
    ``|sum_i s_i g_i|^2`` vanish on average and ``sum_i |g_i|^2`` is left: B times the trace, at the price of one
    gradient of the whole batch and without holding those of single images.

    Args:
        forward: See :data:`Forward`.
        trained: Tensors that need a gradient.
        x: ``(B, C, H, W)`` images, on the device of the model, which is in eval mode.
        labels: ``(B,)`` labels, given or sampled.
        generator: A CPU generator for the signs.
    """
    each = F.cross_entropy(forward(trained, x), labels, reduction="none")
    mixed = (signs_like(each.detach(), generator) * each).sum()
    slopes = torch.autograd.grad(mixed, list(trained.values()), create_graph=True, allow_unused=True)
    return sum((s.square().sum() for s in slopes if s is not None), torch.zeros((), device=x.device)) / len(x)

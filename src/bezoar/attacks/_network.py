"""What attacks that need a helper network share: its layers, by the order in which they run, and what they give."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks._attack import Training
from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.examples import Examples
from bezoar.core.method import Method
from bezoar.ops.objective import Batch, Stateless


def require_training(attack: Method, training: Training | None) -> Training:
    """The means to train the helper network.

    Raises:
        SettingError: There are none.
    """
    if training is None:
        raise SettingError(
            f"{type(attack).__name__} trains a network of its own before it can poison",
            "Pass the training too: poison(data, training)",
        )
    return training


def weighted_layers(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module]]:
    """Name and module of the Linear and convolutional layers that ``x`` runs through, in that order.

    Raises:
        UnsupportedModel: There are fewer than two.
    """
    ran: list[tuple[str, nn.Module]] = []
    handles = [
        module.register_forward_hook(lambda module, _in, _out, name=name: ran.append((name, module)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if len(ran) < 2:
        raise UnsupportedModel(
            f"the network has {len(ran)} Linear and convolutional layers, at least 2 are needed",
            "Choose another architecture",
        )
    return ran


@contextmanager
def watched(module: nn.Module, *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Collect what a module gives (or, with ``inputs``, gets) in each forward pass, with its gradient."""
    seen: list[Tensor] = []
    if inputs:
        handle = module.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    else:
        handle = module.register_forward_hook(lambda _module, _in, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


def output_layer(model: nn.Module, x: Tensor) -> nn.Module:
    """The Linear or convolutional layer that runs last.

    Raises:
        UnsupportedModel: The model has fewer than two of them.
    """
    return weighted_layers(model, x)[-1][1]


def inputs_of(module: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """``(B, F)`` activations that go into ``module`` when ``model`` sees ``x``, with their gradient."""
    with watched(module, inputs=True) as seen:
        model(x)
    return seen[-1].flatten(1)


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """A module by its dotted name.

    Raises:
        SettingError: There is none of that name.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise SettingError(f"the network has no layer {name!r}", f"There are: {', '.join(n for n in modules if n)}")
    found: nn.Module = modules[name]
    return found


def on_device(module: nn.Module, x: Tensor) -> nn.Module:
    """``module``, moved to where ``x`` is if it is elsewhere: a trigger works on any device."""
    if next(module.parameters(), x).device != x.device:
        module.to(x.device)
    return module


def retrain(training: Training, data: Examples, model: nn.Module, held: Sequence[nn.Module], share: float) -> nn.Module:
    """Train the victim from a copy of a trained network.

    Args:
        training: Gives the recipe.
        data: Poisoned examples.
        model: The network to start from; left as it was.
        held: Modules of it whose own parameters and BatchNorm statistics stay.
        share: Epochs, as a share of the recipe's; at least one epoch is trained.
    """
    names = {module: name for name, module in model.named_modules()}
    victim = copy.deepcopy(model)
    inside = [victim.get_submodule(names[module]) for module in held]
    parameters = [p for module in inside for p in module.parameters(recurse=False) if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    recipe = replace(training.recipe, epochs=max(1, round(share * training.recipe.epochs)))
    victim = training.fit("victim", data, model=victim, recipe=recipe, objective=_Hold(inside) if inside else None)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return victim


class _Hold(Stateless):
    """Cross-entropy, while some layers keep their BatchNorm statistics."""

    def __init__(self, held: Sequence[nn.Module]) -> None:
        self.held = held

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        for module in self.held:
            module.training = False  # not its children: the output layer may be one of them
        return F.cross_entropy(model(batch.augment(batch.x)), batch.y)

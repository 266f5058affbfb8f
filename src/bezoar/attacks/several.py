"""Several backdoors in one model: several targets with several triggers, or several triggers on one target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.attacks._attack import Attack, Backdoored, GroundTruth, Plant, Training
from bezoar.attacks._poison import PoisonAttack, Poisoned
from bezoar.attacks._text import parse, written
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.core.registry import method_name


@dataclass(frozen=True, kw_only=True)
class Several(Attack):
    """Plant several poison attacks together; no example is poisoned by two of them.

    Neural Cleanse studies models with several triggers for different labels and for the same one. All rates are shares
    of the whole set (or of the target class, for clean-label attacks), as when each attack is planted alone.

    Args:
        target: Label of those attacks that are given as text and name none.
        seed: Seed of those attacks that are given as text and name none.
        attacks: Two or more; as text such as ``badnets:target=1,corner=top-left`` (the values of a tuple are joined by
            ``+``), or made already. Attacks that control the training cannot be among them.

    References:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
        Neural Networks", IEEE S&P 2019.
    """

    attacks: tuple[str | PoisonAttack, ...] = ("badnets", "badnets:target=1,pattern=noise,corner=top-left")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("attacks", isinstance(self.attacks, tuple) and len(self.attacks) >= 2, "two or more attacks")

    def config(self) -> dict[str, Any]:
        """See :class:`Method`; all attacks as text."""
        texts = tuple(one if isinstance(one, str) else written(one) for one in self.attacks)
        return {**super().config(), "attacks": texts}

    def made(self) -> tuple[PoisonAttack, ...]:
        """The attacks.

        Raises:
            SettingError: A text names no attack, or has a bad setting.
        """
        return tuple(
            parse(one, target=self.target, seed=self.seed) if isinstance(one, str) else one for one in self.attacks
        )

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """See :class:`~bezoar.attacks._attack.Attack`."""
        for attack in self.made():
            attack.check(model, shape)

    def poison(self, data: Examples, training: Training | None = None) -> Poisoned:
        """Poison a copy of the examples, one attack after the other, each on what the others left alone.

        Args:
            data: Clean examples.
            training: Means to train a helper network, for attacks that need one.

        Raises:
            SettingError: An attack cannot be made, or together they ask for more examples than there are.
        """
        x, y = data.x.clone(), data.y.clone()
        free = torch.ones(len(y), dtype=torch.bool)
        plants: list[Plant] = []
        chosen: list[Tensor] = []
        covers: list[Tensor] = []
        for number, attack in enumerate(self.made()):
            left = free.nonzero().flatten()
            rest = Examples(data.x[left], data.y[left], data.num_classes)
            result = _scaled(attack, data.y, rest.y).poison(rest, _own_folder(training, number))
            index, cover = left[result.index], left[result.cover]
            both = torch.cat([index, cover])
            within = torch.cat([result.index, result.cover])
            x[both], y[both] = result.data.x[within], result.data.y[within]
            free[both] = False
            chosen.append(index)
            covers.append(cover)
            plants += [replace(p, name=f"{number + 1}-{method_name(type(attack))}") for p in result.truth.plants]
        index, cover = torch.cat(chosen).sort().values, torch.cat(covers).sort().values
        return Poisoned(Examples(x, y, data.num_classes), GroundTruth(tuple(plants)), index, cover)

    def implant(self, data: Examples, training: Training) -> Backdoored:
        poisoned = self.poison(data, training)
        model = training.fit("victim", poisoned.data)
        return Backdoored(model, poisoned.truth, poisoned.index, poisoned.cover)


def _scaled(attack: PoisonAttack, whole: Tensor, rest: Tensor) -> PoisonAttack:
    """The same attack with its rates raised, so that it changes as many of ``rest`` as it would of ``whole``."""
    grown = len(whole) / max(1, len(rest))
    rate = grown
    if attack.clean_label:
        rate = int((whole == attack.target).sum()) / max(1, int((rest == attack.target).sum()))
    if attack.rate * rate > 1 + 1e-6 or attack.cover_rate * grown >= 1:
        raise SettingError(
            f"the attacks before {method_name(type(attack))} leave too few examples for it", "Lower the rates"
        )
    # Rates become counts by truncation: without the small push, 60 of 600 could become 59 of 540.
    push = 1 + 1e-9
    return replace(attack, rate=min(1.0, attack.rate * rate * push), cover_rate=attack.cover_rate * grown * push)


def _own_folder(training: Training | None, number: int) -> Training | None:
    """The same means with checkpoints of its own: two attacks may give their helper networks the same names."""
    if training is None or training.folder is None:
        return training
    return replace(training, folder=training.folder / f"attack-{number + 1}")

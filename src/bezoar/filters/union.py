"""What any of several filters would take out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.examples import ExampleSource
from bezoar.core.filtering import Filter, Suspicion, taken_out
from bezoar.core.method import Clean
from bezoar.core.registry import find
from bezoar.core.run import Run


@dataclass(frozen=True, kw_only=True)
class Union(Filter):
    """Take out what any of several filters would take out, each by its own rule.

    The default pair sees different poison: SCAn a second crowd within a label, however well it was learned; the
    distance from clean examples the few that are unlike all others of their label, such as those of a trigger that
    works on one class only. Of a filter that flags labels, suspects of other labels do not count. The score of an
    example is the number of filters that would take it out, plus the share of all examples that are less suspicious, by
    the filter that says so most. What is measured of each label is that of the first filter; a label is flagged where
    any of them flags it.

    Args:
        filters: Names of at least two filters, with their default settings.

    References:
        Ours; the default pair is after Tang et al., "Demon in the Variant: Statistical Analysis of DNNs for Robust
        Backdoor Contamination Detection", USENIX Security 2021, and Lee et al., "A Simple Unified Framework for
        Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018.
    """

    filters: tuple[str, ...] = ("scan", "clean-distance")

    def __post_init__(self) -> None:
        self.require("filters", len(set(self.filters)) == len(self.filters) >= 2, "two or more different filters")
        if "union" in self.filters:
            raise SettingError("union cannot be one of its own filters")
        self._made()

    @property
    def needs_clean(self) -> bool:  # type: ignore[override]
        """Whether one of them needs clean examples."""
        return any(one.needs_clean for one in self._made())

    @property
    def through_model(self) -> bool:  # type: ignore[override]
        """Whether one of them looks through the model."""
        return any(one.through_model for one in self._made())

    def _made(self) -> list[Filter]:
        return [find("filters", name)() for name in self.filters]

    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """See :class:`bezoar.core.filtering.Filter`."""
        found = [one(model, examples, run, clean) for one in self._made()]
        chosen = [taken_out(one, examples.labels) for one in found]
        run.notes["filters"] = {
            name: {"taken_out": int(rows.sum()), "flagged": None if one.flagged is None else list(one.flagged)}
            for name, one, rows in zip(self.filters, found, chosen, strict=True)
        }
        rules = "; ".join(f"{name}: {one.rule}" for name, one in zip(self.filters, found, strict=True))
        ruled = [one.flagged for one in found if one.flagged is not None]
        flagged = tuple(sorted({label for labels in ruled for label in labels})) if ruled else None
        score = torch.stack(chosen).sum(0).double() + torch.stack([less_suspicious(one.score) for one in found]).amax(0)
        statistic = found[0].statistic
        return Suspicion(
            score, torch.stack(chosen).any(0), rules, statistic, flagged, all(one.decides for one in found)
        )


def less_suspicious(score: Tensor) -> Tensor:
    """``(N,)`` share of all examples, in [0, 1), whose ``(N,)`` score is lower."""
    ordered = score.sort().values
    return torch.searchsorted(ordered, score).double() / max(len(score), 1)

"""Evidence beside the searches of a scan: what the scorers say, shown and not part of the verdict."""

from __future__ import annotations

from bezoar.core.errors import BezoarError, BudgetSpent, SettingError
from bezoar.core.evidence import Scores
from bezoar.core.method import Scorer
from bezoar.core.registry import find, methods
from bezoar.core.results import Evidence, LabelScore
from bezoar.core.run import Progress
from bezoar.session import Session

#: Labels that are shown of each scorer, the most suspicious first.
_SHOWN = 10


def scorers(names: tuple[str, ...]) -> dict[str, Scorer]:
    """The scorers of these names, with their defaults; ``all`` stands for every one.

    Raises:
        SettingError: There is none of that name.
    """
    wanted = tuple(methods("scorers")) if names == ("all",) else names
    if len(set(wanted)) < len(wanted):
        raise SettingError(f"evidence names a scorer twice: {', '.join(wanted)}")
    return {name: find("scorers", name)() for name in wanted}


def gather(session: Session) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    """Ask the scorers that the options name, in that order.

    Returns:
        The evidence, and a warning for each scorer that cannot work on the model or had no time.
    """
    found, warnings = [], []
    told = session.run.progress.report
    for name, scorer in scorers(session.options.evidence).items():
        session.run.progress = Progress(report=told, name=name)
        try:
            session.run.check()
            with session.phase(name):
                scores = scorer(session.suspect.module, session.clean, session.run)
        except BudgetSpent:
            warnings.append(f"no time was left for the evidence of {name}")
        except BezoarError as error:
            warnings.append(f"no evidence of {name}: {error.message}")
        else:
            found.append(_evidence(name, scorer, scores, session.data.facts.names))
    return tuple(found), tuple(warnings)


def _evidence(name: str, scorer: Scorer, scores: Scores, names: tuple[str, ...]) -> Evidence:
    ranked = sorted(scores.labels, key=lambda label: (-scores.labels[label], label))
    pair = max(scores.pairs, key=lambda one: scores.pairs[one]) if scores.pairs else None
    return Evidence(
        method=name,
        config=scorer.config(),
        meaning=scores.meaning,
        score=scores.model,
        suspect=scores.suspect,
        pvalue=scores.pvalue,
        labels=tuple(
            LabelScore(label=label, name=names[label] if label < len(names) else str(label), score=scores.labels[label])
            for label in ranked[:_SHOWN]
        ),
        source=None if pair is None else pair[0],
        target=None if pair is None else pair[1],
    )

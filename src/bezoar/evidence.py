"""Evidence beside the searches of a scan: what the scorers say, and what all sources say together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bezoar.core.errors import BezoarError, BudgetSpent, SettingError
from bezoar.core.evidence import LabelScan, Scan, Scores
from bezoar.core.method import Scorer
from bezoar.core.registry import find, methods
from bezoar.core.run import Progress
from bezoar.core.scored import Combination, Evidence, LabelScore, Source, Verdict
from bezoar.nets.convnet import student_net
from bezoar.ops.combined import PAIRS, calibration, clean_sources, combine, concentration, label_scores, rule_text
from bezoar.ops.student import Transfer, discounted, transfer, trusted
from bezoar.ops.verdict import RatioRule
from bezoar.session import Session

#: Labels that are shown of each scorer, the most suspicious first.
_SHOWN = 10
#: Scorers that a combined verdict takes in where they are asked.
COMBINED = ("mm-bd", "k-arm", "abs-stimulation")
#: The search whose masks tell where a trigger lies, and the name of that as a source.
MASKS, CONCENTRATION = "neural-cleanse", "mask-concentration"


@dataclass(frozen=True)
class Gathered:
    """What there is beside the searches.

    Attributes:
        shown: What the scorers say, as shown in a report.
        scores: The same as numbers.
        scorers: What gave them.
        transfer: How far triggers move a student of the model; None where no combined verdict is wanted, or no time was
            left.
        warnings: One for each source that could not work.
    """

    shown: tuple[Evidence, ...]
    scores: dict[str, Scores]
    scorers: dict[str, Scorer]
    transfer: Transfer | None
    warnings: tuple[str, ...]


def scorers(names: tuple[str, ...]) -> dict[str, Scorer]:
    """The scorers of these names, with their defaults; ``all`` stands for every one.

    Raises:
        SettingError: There is none of that name.
    """
    wanted = tuple(methods("scorers")) if names == ("all",) else names
    if len(set(wanted)) < len(wanted):
        raise SettingError(f"evidence names a scorer twice: {', '.join(wanted)}")
    return {name: find("scorers", name)() for name in wanted}


def gather(session: Session, searches: Sequence[Scan]) -> Gathered:
    """Ask the scorers that the options name, in that order, after a student is taught for a combined verdict."""
    found, numbers, warnings, moved = [], dict[str, Scores](), list[str](), None
    wanted = searches[0].wanted if searches else ()
    asked = {name: _restricted(scorer, wanted) for name, scorer in scorers(session.options.evidence).items()}
    told = session.run.progress.report
    if session.options.fpr is not None:
        moved, warnings = told_by_student(
            session,
            searches,
            "no time was left for a student",
            ", so the verdict is that of the searches by their own rule, and not at the false-positive rate that was "
            "asked for",
        )
    for name, scorer in asked.items():
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
            numbers[name] = scores
            found.append(_evidence(name, scorer, scores, session.data.facts.names))
    return Gathered(tuple(found), numbers, asked, moved, tuple(warnings))


def _restricted(scorer: Scorer, wanted: tuple[int, ...]) -> Scorer:
    """The scorer for the labels that alone can be the target, where it can be told them."""
    fields = {field.name for field in dataclasses.fields(scorer)}
    return dataclasses.replace(scorer, targets=wanted) if wanted and "targets" in fields else scorer  # type: ignore[call-arg]


def told_by_student(
    session: Session, searches: Sequence[Scan], late: str, outcome: str
) -> tuple[Transfer | None, list[str]]:
    """How far triggers move a student; None where that cannot be said, with a warning unless none could be expected.

    None is expected with too few labels to compare, or of a search that was not finished with one seed at least.

    Args:
        session, searches: See :func:`student_transfer`.
        late: What is said where no time is left.
        outcome: What is said then of the verdict.
    """
    complete = all(any(seed.finished for seed in scan.seeds) for scan in searches)
    if not complete or session.clean.num_classes < RatioRule.least_labels:
        return None, []
    try:
        return student_transfer(session, searches), []
    except BezoarError as error:
        return None, [(late if isinstance(error, BudgetSpent) else error.message) + outcome]


def combination(
    session: Session, searches: Mapping[str, Scan], gathered: Gathered, alone: Verdict
) -> Combination | None:
    """What all sources say together; None where that was not asked for, or cannot be said.

    A student of the model tells which triggers are made of natural features.

    Args:
        session: The session; its options name the false-positive rate.
        searches: Evidence of each search by its name.
        gathered: What the scorers say.
        alone: Verdict of the searches by their own rule.
    """
    fpr, moved = session.options.fpr, gathered.transfer
    if fpr is None or moved is None:
        return None
    scores = {name: label_scores(discounted(scan, moved)) for name, scan in searches.items()} | gathered.scores
    if MASKS in searches:
        scores[CONCENTRATION] = concentration(searches[MASKS])
    if PAIRS in scores and scores[PAIRS].suspect is None:
        del scores[PAIRS]  # its bound says nothing of a model of so many labels
    labels = {name: scores[name].labels for name in sorted(scores) if name in clean_sources()}
    if not labels:
        return None
    whole = combine(labels, wanted=next(iter(searches.values())).wanted)
    ranked = sorted(whole.labels, key=lambda label: (-whole.labels[label], label))
    return Combination(
        fpr=fpr,
        pvalue=whole.pvalue,
        leader=whole.target,
        labels=tuple(_label(label, whole.labels[label], session.data.facts.names) for label in ranked[:_SHOWN]),
        sources=tuple(
            Source(method=name, leader=scores[name].leader, surprise=whole.surprises[name][whole.target])
            for name in labels
        ),
        alone=alone,
        text=rule_text(fpr),
        calibration=calibration(whole.clean_nets),
    )


def student_transfer(session: Session, scans: Iterable[Scan]) -> Transfer:
    """How far the triggers that were found move a student of the model, which is taught first.

    Args:
        session: Model and images.
        scans: Evidence of the searches whose triggers are asked about.

    Raises:
        BudgetSpent: Time is over; that of the searches was not, and the run does not say so.
        UnsupportedModel: The student learns too little of the model to say anything.
    """
    run, clean, model, spent = session.run, session.clean, session.suspect.module, session.run.budget_spent
    build = partial(student_net, clean.num_classes, clean.shape[0])
    run.progress = Progress(report=run.progress.report, name="student")
    far: dict[int, tuple[LabelScan, float]] = {}
    try:
        with session.phase("student"):
            run.check()
            student = trusted(model, build, clean, run)
            for label, found in ((k, v) for scan in scans for seed in scan.seeds for k, v in seed.labels.items()):
                run.check()
                most = 32 if found.status == "eliminated" else 256
                # The evidence is kept, so that no other trigger gets its id.
                far[id(found.trigger)] = found, transfer(student, clean, label, found.trigger, run, most)
    except BudgetSpent:
        run.budget_spent = spent
        raise
    return lambda _, found: far[id(found.trigger)][1]


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
        labels=tuple(_label(label, scores.labels[label], names) for label in ranked[:_SHOWN]),
        source=None if pair is None else pair[0],
        target=None if pair is None else pair[1],
    )


def _label(label: int, score: float, names: tuple[str, ...]) -> LabelScore:
    return LabelScore(label=label, name=names[label] if label < len(names) else str(label), score=score)

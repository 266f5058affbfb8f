"""A scan: evidence from each family of triggers, the verdict over all of them, and the pictures."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field

import torch

from bezoar.core.evidence import Scan
from bezoar.core.method import Scanner, Scorer, tried_on
from bezoar.core.pictures import change_picture, png, stamp_picture
from bezoar.core.registry import method_name
from bezoar.core.results import Example, Report, Search, TriggerFacts
from bezoar.core.run import Progress
from bezoar.core.scored import Combination
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger, MaskedTrigger, Trigger
from bezoar.evidence import Gathered, combination, gather, told_by_student
from bezoar.ops.combined import verdict
from bezoar.ops.pair_look import found_pairs, judged_pairs, leading_sources
from bezoar.ops.second_look import second_look
from bezoar.ops.verdict import Judgement, confirm, judge, lead
from bezoar.report.wording import sentence
from bezoar.session import SCAN_HELD_OUT, Session

_RUNNERS_UP = 4
_EXAMPLES = 8
# Shares of the budget kept for what comes after: the next search, held-out images and the report.
_RESERVES = (0.45, 0.15)


@dataclass(frozen=True)
class Look:
    """One family of triggers: how it was searched, what was found, and what that alone says.

    ``sources`` has the label of the images that a label's trigger is made for, where these are not all others.
    """

    method: Scanner | Scorer
    evidence: Scan
    judgement: Judgement
    sources: dict[int, int] = field(default_factory=dict)


def scan_session(session: Session, method: Scanner) -> tuple[Report, dict[int, InvertedTrigger]]:
    """Scan the model of a session.

    Args:
        session: Model and data.
        method: The search; those that belong beside it run after it, unless the options say otherwise.

    Returns:
        The report, and the inverted trigger of each label, the smallest over the seeds, from the search that leads.
    """
    methods = [method, *(method.beside() if session.options.additive else ())]
    looks = [look_for(session, one, last=one is methods[-1]) for one in methods]
    looks = looks[:1] + [
        dataclasses.replace(look, judgement=confirm(look.judgement, looks[0].evidence)) for look in looks[1:]
    ]
    place, unsure = lead([look.judgement for look in looks]), list[str]()
    if looks[place].judgement.verdict != "clean" and session.options.fpr is None:
        looks, unsure = _again(session, looks)
        place = lead([look.judgement for look in looks])
    gathered = gather(session, [look.evidence for look in looks])
    searched = {method_name(type(look.method)): look.evidence for look in looks}
    looks += _pair_looks(session, gathered)
    # The pairs lead only where they alone find a backdoor, and then no model is called clean.
    found = [n for n, look in enumerate(looks) if look.judgement.verdict == "backdoored"]
    alone = place if place in found or not found else found[-1]
    whole = combination(session, searched, gathered, looks[alone].judgement.verdict)
    if whole is None:
        place = alone
    else:
        place, looks = _together(session, looks, place, whole)
    main = looks[place]
    others = [look for look in looks if look is not main]
    judged = main.judgement
    with session.phase("report"):
        pictures = _pictures(session, main)
        searches = tuple(_search(session, look) for look in others)
    report = Report(
        verdict=judged.verdict,
        target=judged.target,
        summary="",
        model=session.suspect.facts,
        data=session.data.facts,
        preflight=session.preflight,
        method=method_name(type(main.method)),
        config=main.method.config() | session.division(SCAN_HELD_OUT),
        unit=main.evidence.unit,
        rule=judged.rule,
        labels=judged.labels,
        seeds=judged.seeds,
        triggers=pictures,
        searches=searches,
        evidence=gathered.shown,
        combination=whole,
        warnings=(*session.warnings, *unsure, *gathered.warnings, *_also_found(judged, others)),
        run=session.facts(),
    )
    for one in methods:
        _forget(session, one)
    report = dataclasses.replace(report, summary=sentence(report))
    triggers = {label: main.evidence.smallest(label)[1].trigger for label in main.evidence.looked_at()}
    for look in others:  # a second backdoor is to be unlearned as well
        label = look.judgement.target
        if label is not None and label != judged.target:
            triggers[label] = look.evidence.smallest(label)[1].trigger
    return report, triggers


def _again(session: Session, looks: list[Look]) -> tuple[list[Look], list[str]]:
    """The searches with the verdicts of a second look, and a warning where there could be none."""
    scans = [look.evidence for look in looks]
    late, outcome = "no time was left for a second look", ": a natural feature may pass for a trigger, or hide one"
    moved, warnings = told_by_student(session, scans, late, outcome)
    if moved is None:
        return looks, warnings
    judged = second_look(scans, [look.judgement for look in looks], session.data.facts.names, moved)
    return [dataclasses.replace(look, judgement=one) for look, one in zip(looks, judged, strict=True)], warnings


def _together(session: Session, looks: list[Look], place: int, whole: Combination) -> tuple[int, list[Look]]:
    """Which search leads when all sources have spoken together, and the searches with that verdict.

    Where the label is another one than the leading search says, or pairs of labels were searched, the search that finds
    the label most surprising leads.
    """
    decided = verdict(whole.pvalue, whole.fpr, whole.alone)
    if decided == "backdoored" and (looks[place].judgement.leader != whole.leader or looks[-1].sources):
        surprises = {source.method: source.surprise for source in whole.sources}
        place = max(range(len(looks)), key=lambda n: surprises.get(method_name(type(looks[n].method)), 0.0))
    look = looks[place]
    judged = look.judgement
    if decided == "backdoored" and judged.leader != whole.leader:
        again = judge(look.evidence, session.data.facts.names, leader=whole.leader)
        judged = dataclasses.replace(judged, leader=whole.leader) if look.sources else again
    target = whole.leader if decided == "backdoored" else None
    judged = dataclasses.replace(judged, verdict=decided, target=target)
    return place, [*looks[:place], dataclasses.replace(look, judgement=judged), *looks[place + 1 :]]


def _pair_looks(session: Session, gathered: Gathered) -> list[Look]:
    """Searches for pairs of labels that were asked for and whose own rule may decide a verdict."""
    names, out = session.data.facts.names, []
    for name, scores in gathered.scores.items():
        scorer = gathered.scorers[name]
        if scorer.calibration:
            found = found_pairs(scores, session.suspect.module, session.clean, session.run)
            judged = judged_pairs(found, scores, name, scorer.calibration, names)
            out.append(Look(scorer, found, judged, leading_sources(scores.pairs)))
    return out


def _also_found(judged: Judgement, others: list[Look]) -> tuple[str, ...]:
    """A second backdoor must not pass in silence."""
    return tuple(
        f"the search of {method_name(type(look.method))} finds another backdoor, of label {look.judgement.target}"
        for look in others
        if look.judgement.verdict == "backdoored" and look.judgement.target != judged.target
    )


def look_for(session: Session, method: Scanner, last: bool = True) -> Look:
    """Search one family of triggers; ``last`` says that no other search comes after it under the budget."""
    folder = session.checkpoints(method)
    told = session.run.progress.report
    session.run.progress = Progress(report=told, folder=folder, seeds=method.seeds, name=method.phase)
    session.run.reserve = _RESERVES[1] if last else _RESERVES[0]
    with session.phase("scan"):
        evidence = method(session.suspect.module, session.clean, session.run)
    return Look(method, evidence, judge(evidence, session.data.facts.names))


def _forget(session: Session, method: Scanner) -> None:
    """Checkpoints go when the whole scan is done: a kill in the second search must not cost the first."""
    folder = session.checkpoints(method)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _search(session: Session, look: Look) -> Search:
    judged = look.judgement
    return Search(
        method=method_name(type(look.method)),
        config=look.method.config(),
        unit=look.evidence.unit,
        verdict=judged.verdict,
        target=judged.target,
        rule=judged.rule,
        seeds=judged.seeds,
        labels=judged.labels,
        triggers=_pictures(session, look, runners_up=0),
    )


def _pictures(session: Session, look: Look, runners_up: int = _RUNNERS_UP) -> tuple[TriggerFacts, ...]:
    """The leading label's trigger with examples; then those of the runner-up labels."""
    labels = {row.label: row for row in look.judgement.labels}
    ranked = sorted(labels.values(), key=lambda row: (row.status != "complete", row.size))
    first = look.judgement.leader
    order = [first] + [row.label for row in ranked if row.label != first]
    out = []
    for place, label in enumerate(order[: 1 + runners_up]):
        seed, found = look.evidence.smallest(label)
        mask, pattern, stamp = _drawn(found.trigger)
        out.append(
            TriggerFacts(
                label=label,
                name=labels[label].name,
                seed=seed,
                size=found.size,
                fraction=found.size / look.evidence.whole,
                asr=found.asr,
                mask=mask,
                pattern=pattern,
                stamp=stamp,
                examples=_examples(session, found.trigger, label, look.sources.get(label)) if place == 0 else (),
                refined=found is look.evidence.refined.get(label),
                source=look.sources.get(label),
            )
        )
    return tuple(out)


def _drawn(trigger: InvertedTrigger) -> tuple[str, str, str]:
    """Pictures of mask, pattern and stamp; an additive trigger has a pattern only."""
    if isinstance(trigger, MaskedTrigger):
        return png(trigger.mask), png(trigger.pattern), stamp_picture(trigger.mask, trigger.pattern)
    return "", change_picture(trigger.delta), ""


@torch.no_grad()
def _examples(session: Session, trigger: Trigger, label: int, source: int | None) -> tuple[Example, ...]:
    clean, model = session.clean, session.suspect.module
    rows = torch.nonzero(tried_on(clean.held_y, label, source)).flatten()
    rows = rows[torch.linspace(0, len(rows) - 1, min(_EXAMPLES, len(rows))).long()] if len(rows) else rows
    if not len(rows):
        return ()
    x = clean.held_x[rows]
    stamped = trigger(x)
    with frozen(model):
        before, after = (logits(model, images.to(session.run.device)).argmax(1).tolist() for images in (x, stamped))
    return tuple(
        Example(
            original=png(x[i]), stamped=png(stamped[i]), true=int(clean.held_y[r]), before=before[i], after=after[i]
        )
        for i, r in enumerate(rows.tolist())
    )

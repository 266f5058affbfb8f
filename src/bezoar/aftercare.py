"""What a defender should know of a cleaned model: what else changed, and how near the backdoor still is."""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from bezoar.core.method import Clean, Scanner, tried_on
from bezoar.core.results import Aftercare
from bezoar.core.run import Run
from bezoar.core.surgery import logits
from bezoar.core.trigger import Trigger
from bezoar.ops.answers import answers
from bezoar.scanning import scan_session
from bezoar.session import Session

_BATCH = 32
_LR = 0.01
LIMIT = 40  #: Most steps of the attempt to bring a backdoor back.
BACK = 0.5  #: Success of the trigger that counts as back.


def aftercare(
    session: Session,
    cleaned: nn.Module,
    clean: Clean,
    label: int | None,
    trigger: Trigger | None,
    rescan: Scanner | None,
    source: int | None = None,
) -> Aftercare:
    """Look at a cleaned model.

    Args:
        session: That of the purification; its suspect is the model as it was.
        cleaned: The cleaned module on raw pixels, on the device of the run.
        clean: How the clean images were divided for the purification.
        label, trigger: What was unlearned, where there is one.
        rescan: Scan the cleaned model with this; None leaves it out.
        source: Label of the images that the trigger is made for; None for those of all other labels.
    """
    x = clean.held_x if len(clean.held_x) else clean.x
    before, after = (answers(model, x, session.run.device) for model in (session.suspect.module, cleaned))
    same = before == after
    with session.phase("aftercare"):
        steps = other = None
        if trigger is not None and label is not None:
            steps = reactivation(cleaned, clean, label, trigger, session.run, source)
            other = reactivation(cleaned, clean, (label + 1) % clean.num_classes, trigger, session.run, source)
    verdict, target = None, None
    if rescan is not None:
        again = dataclasses.replace(session, suspect=dataclasses.replace(session.suspect, module=cleaned))
        again.options = dataclasses.replace(session.options, resume=False)
        found, _ = scan_session(again, rescan)
        verdict, target = found.verdict, found.target
    return Aftercare(
        fidelity=float(same.float().mean()),
        reactivation=steps,
        reactivation_other=other,
        reactivation_limit=LIMIT,
        rescan_verdict=verdict,
        rescan_target=target,
    )


def reactivation(
    model: nn.Module, clean: Clean, label: int, trigger: Trigger, run: Run, source: int | None = None
) -> int | None:
    """Training steps that bring the backdoor back: half of each batch carries the trigger, labelled with the target.

    A backdoor that was only masked comes back sooner than one that must be learned anew, such as the same trigger with
    another label.

    Args:
        model: The cleaned model; a copy is trained.
        clean: Its working images are trained on; success is measured on the held-out ones, where there are any.
        label: The target.
        trigger: An inverted trigger of it.
        source: Success is measured on images of this label; None for all other labels.
        run: Device and seed.

    Returns:
        Steps until the trigger works on half of the images of other labels; None where it does not within the limit.
    """
    trained = copy.deepcopy(model)
    for parameter in trained.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    optimizer = torch.optim.SGD(trained.parameters(), lr=_LR, momentum=0.9)
    x, y = (clean.held_x, clean.held_y) if len(clean.held_x) else (clean.x, clean.y)
    others = x[tried_on(y, label, None if source == label else source)][:256]
    generator = run.generator("reactivation")
    for step in range(LIMIT + 1):
        if not len(others) or float((answers(trained, trigger(others), run.device) == label).float().mean()) >= BACK:
            return step if len(others) else None
        rows = torch.randint(len(clean.x), (_BATCH,), generator=generator)
        images, labels = clean.x[rows].clone(), clean.y[rows].clone()
        images[: _BATCH // 2] = trigger(images[: _BATCH // 2])
        labels[: _BATCH // 2] = label
        # Statistics of BatchNorm stay: what counts is how far the weights are from the backdoor.
        trained.eval()
        optimizer.zero_grad()
        F.cross_entropy(logits(trained, images.to(run.device)), labels.to(run.device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return None

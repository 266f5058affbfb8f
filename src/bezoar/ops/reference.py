"""Trigger inversion as the authors of Neural Cleanse published it, one label at a time (visualizer.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bezoar.core.run import Run, generator
from bezoar.core.space import MaskedSpace
from bezoar.core.surgery import logits
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.cost import CostController
from bezoar.ops.invert import Loss, target_loss


def invert_label(
    model: nn.Module,
    x: Tensor,
    label: int,
    *,
    controller: CostController,
    steps: int,
    batches: int,
    batch: int,
    lr: float,
    loss: Loss,
    seed: int,
    run: Run,
    progress: Callable[[int, float], None],
) -> tuple[MaskedTrigger, float, bool]:
    """Invert one label.

    Args:
        model: Eval mode, frozen.
        x: ``(N, C, H, W)`` clean images of all labels; the authors leave none out.
        label: Target label.
        controller: Weight of the mask norm.
        steps: Most steps; each is ``batches`` updates and one decision on their averages.
        batches: Updates of a step.
        batch: Images of an update.
        lr: Step size of Adam (0.5, 0.9).
        loss: ``ce`` (paper) or ``linear`` (code).
        seed: Start and order of the images.
        run: Device and budget.
        progress: Told the step and the smallest norm so far.

    Returns:
        The trigger, its norm and whether it ever reached the success rate.
    """
    channels, height, width = x.shape[1:]
    space = MaskedSpace((channels, height, width))
    parameters = {k: v.to(run.device).requires_grad_() for k, v in space.start([label], seed).items()}
    optimizer = torch.optim.Adam(list(parameters.values()), lr=lr, betas=(0.5, 0.9))
    state = controller.start(1)
    order = generator("reference", seed, label)
    best: MaskedTrigger | None = None
    target = torch.full((batch,), label, device=run.device)
    norm = 0.0
    for step in range(steps):
        run.check()
        cost = float(state["cost"])
        rates, norms = [], []
        for _ in range(batches):
            images = x[torch.randint(len(x), (batch,), generator=order)].to(run.device)
            out = logits(model, space.stamp(parameters, images)[0].contiguous(memory_format=torch.channels_last))
            size = space.size(parameters)[0]
            optimizer.zero_grad(set_to_none=True)
            (target_loss(out, target, loss).mean() + cost * size).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rates.append((out.argmax(1) == target).double().mean())
            norms.append(size.detach().double())
        run.image_gradients += batches * batch
        norm = float(torch.stack(norms).mean())
        rate = torch.stack(rates).mean().cpu()
        improved, done = controller.decide(state, rate[None], torch.tensor([norm]))
        if improved[0]:
            best = space.harden(parameters, 0)
        progress(step + 1, float(state["best"]))
        if done[0]:
            break
    if best is None:
        return space.harden(parameters, 0), norm, False
    return best, float(state["best"]), True

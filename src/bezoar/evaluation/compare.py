"""Clean images, the inverted trigger and the true one: what each does to the model (Neural Cleanse, section V-C)."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from bezoar.attacks._attack import GroundTruth, Plant
from bezoar.core.errors import SettingError
from bezoar.core.pictures import png
from bezoar.core.plain import plain
from bezoar.core.surgery import frozen
from bezoar.core.trigger import MaskedTrigger, Trigger
from bezoar.evaluation.measures import Rate, predict
from bezoar.ops.features import device_of, penultimate
from bezoar.ops.fit import as_float
from bezoar.ops.head import find_head

SCHEMA = "bezoar.comparison/1"
#: Share of the second-to-last layer's neurons that count as the trigger's.
TOP = 0.01
_SIDE, _GAP, _HEAD = 112, 4, 16


@dataclass(frozen=True)
class Activity:
    """What the foremost neurons of the inverted trigger do, means over the images (Table III of the paper).

    Attributes:
        clean, inverted, true: Mean activation on clean images, and with either trigger.
    """

    clean: float
    inverted: float
    true: float


@dataclass(frozen=True)
class Comparison:
    """An inverted trigger beside the true one that causes the same label.

    Attributes:
        plant: Name of the planted trigger.
        target: The label that both shall cause.
        clean: Share of the clean images, of classes that the true trigger shall work on, with the label all the same.
        inverted: Success of the inverted trigger on the same images, in [0, 1].
        true: Success of the true trigger.
        inverted_size: L1 norm of the inverted mask in pixels; null for a change of all pixels.
        true_size: L1 norm of the true mask; null for a trigger without a mask.
        overlap: Intersection over union of both masks, each weighed by its values; null where one has none.
        neurons: Number of neurons of the second-to-last layer.
        top: Number of them that are compared: 1 %, at least one.
        neuron_iou: Intersection over union of the neurons that the two triggers raise most (Table V).
        activity: Of the neurons that the inverted trigger raises most.
    """

    plant: str
    target: int
    clean: Rate
    inverted: Rate
    true: Rate
    inverted_size: float | None
    true_size: float | None
    overlap: float | None
    neurons: int
    top: int
    neuron_iou: float
    activity: Activity


@torch.no_grad()
def compare(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    truth: GroundTruth,
    triggers: Mapping[int, Trigger],
    *,
    top: float = TOP,
    batch: int = 250,
) -> tuple[Comparison, ...]:
    """Compare the inverted triggers with the planted ones that cause the same labels.

    Args:
        model: Left as it was.
        x: ``(N, C, H, W)`` clean test images, uint8 or float in [0, 1].
        y: ``(N,)`` labels.
        truth: What was planted; triggers that map every label to another one are left out.
        triggers: Inverted triggers by label.
        top: Share of the neurons that count, in (0, 1].
        batch: Images at a time.

    Returns:
        One for each planted trigger whose label was inverted, in their order.

    Raises:
        SettingError: None of the planted triggers causes a label that was inverted, or there is no image that one of
            them shall work on.
        UnsupportedModel: The model has no last layer that sees one row for each image.
    """
    if not 0 < top <= 1:
        raise SettingError(f"top must be in (0, 1], got {top}")
    plants = [p for p in truth.plants if p.labels.kind == "all-to-one" and p.labels.target in triggers]
    if not plants:
        wanted = sorted({p.labels.target for p in truth.plants if p.labels.kind == "all-to-one"})
        raise SettingError(
            f"no inverted trigger is of a planted label: planted {wanted}, inverted {sorted(triggers)}",
            "Compare with a scan that looked at the planted label",
        )
    with frozen(model):
        return tuple(_compare(model, x, y, plant, triggers[plant.labels.target], top, batch) for plant in plants)


def _compare(
    model: nn.Module, x: Tensor, y: Tensor, plant: Plant, inverted: Trigger, top: float, batch: int
) -> Comparison:
    x = x[plant.labels.applies(y)]
    if not len(x):
        raise SettingError(f"there is no test image that the trigger {plant.name} shall work on")
    target = plant.labels.target
    rates = [
        Rate.of(int((predict(model, x, trigger, batch) == target).sum()), len(x))
        for trigger in (None, inverted, plant.trigger)
    ]
    means = [_activations(model, x, trigger, batch) for trigger in (None, inverted, plant.trigger)]
    count = max(1, round(top * len(means[0])))
    raised = [(mean - means[0]).argsort(descending=True, stable=True)[:count] for mean in means[1:]]
    return Comparison(
        plant=plant.name,
        target=target,
        clean=rates[0],
        inverted=rates[1],
        true=rates[2],
        inverted_size=inverted.size if isinstance(inverted, MaskedTrigger) else None,
        true_size=plant.trigger.size if isinstance(plant.trigger, MaskedTrigger) else None,
        overlap=_mask_overlap(inverted, plant.trigger),
        neurons=len(means[0]),
        top=count,
        neuron_iou=_iou(set(raised[0].tolist()), set(raised[1].tolist())),
        activity=Activity(*(float(mean[raised[0]].mean()) for mean in means)),
    )


def _activations(model: nn.Module, x: Tensor, trigger: Trigger | None, batch: int) -> Tensor:
    """``(D,)`` mean activations of the second-to-last layer, in float64."""
    device = device_of(model)
    head = find_head(model, as_float(x[:1]).to(device))
    total = torch.zeros(1, dtype=torch.float64)
    for part in torch.split(x, batch):
        images = as_float(part).to(device)
        total = total + penultimate(model, head, images if trigger is None else trigger(images)).double().sum(0)
    return total / len(x)


def _iou(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


def _mask_overlap(one: Trigger, other: Trigger) -> float | None:
    if not isinstance(one, MaskedTrigger) or not isinstance(other, MaskedTrigger):
        return None
    a, b = one.mask.cpu(), other.mask.cpu()
    whole = float(torch.maximum(a, b).sum())
    return float(torch.minimum(a, b).sum()) / whole if whole > 0 else math.nan


@torch.no_grad()
def comparison_sheet(x: Tensor, y: Tensor, truth: GroundTruth, triggers: Mapping[int, Trigger]) -> bytes:
    """PNG with a row for each planted trigger that has an inverted one: an image clean, with the inverted trigger and
    with the true one, then both triggers by themselves, on black.

    Args:
        x: ``(N, C, H, W)`` clean images, uint8 or float in [0, 1].
        y: ``(N,)`` labels.
        truth: What was planted.
        triggers: Inverted triggers by label.
    """
    rows = []
    for plant in truth.plants:
        trigger = triggers.get(plant.labels.target) if plant.labels.kind == "all-to-one" else None
        chosen = torch.nonzero(plant.labels.applies(y)).flatten()
        if trigger is None or not len(chosen):
            continue
        image = as_float(x[chosen[:1]])
        black = torch.zeros_like(image)
        rows.append([image, trigger(image), plant.trigger(image), trigger(black), plant.trigger(black)])
    names = ("clean", "inverted trigger", "true trigger", "inverted", "true")
    sheet = Image.new("RGB", (len(names) * (_SIDE + _GAP) + _GAP, len(rows) * (_SIDE + _GAP) + _GAP + _HEAD), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((_GAP + column * (_SIDE + _GAP), 2), name, fill="black")
        for row, images in enumerate(rows):
            picture = Image.open(io.BytesIO(base64.b64decode(png(images[column][0].cpu()))))
            place = (_GAP + column * (_SIDE + _GAP), _HEAD + _GAP + row * (_SIDE + _GAP))
            sheet.paste(picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST), place)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def to_json(found: tuple[Comparison, ...]) -> str:
    """All comparisons as JSON; rates with their intervals."""
    return json.dumps({"schema": SCHEMA, "comparisons": plain(found)}, indent=1, allow_nan=False) + "\n"


def text(found: tuple[Comparison, ...]) -> str:
    """The comparisons in a few lines for people."""
    lines = []
    for one in found:
        lines.append(f"{one.plant}: label {one.target}, {one.true.count} test images")
        lines.append("                     clean   inverted       true")
        rates = (one.clean.value, one.inverted.value, one.true.value)
        lines.append("  gives the label " + "".join(f"{f'{100 * value:.1f} %':>11}"[-11:] for value in rates))
        sizes = ("-", _pixels(one.inverted_size), _pixels(one.true_size))
        lines.append("  L1 of the mask  " + "".join(f"{value:>11}" for value in sizes))
        activity = (one.activity.clean, one.activity.inverted, one.activity.true)
        lines.append("  top neurons     " + "".join(f"{value:>11.3g}" for value in activity))
        mask = "" if one.overlap is None else f"; of the masks {one.overlap:.2f}"
        lines.append(f"  overlap (IoU) of the top {one.top} of {one.neurons} neurons {one.neuron_iou:.2f}{mask}")
    return "\n".join(lines)


def _pixels(size: float | None) -> str:
    return "-" if size is None else f"{size:.1f} px"

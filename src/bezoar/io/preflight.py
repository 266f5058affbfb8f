"""Does the model work on the data at all? Wrong preprocessing is the most common cause of wrong verdicts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bezoar.core.errors import DataError, ModelError
from bezoar.core.model import Normalized
from bezoar.core.results import Preflight
from bezoar.io.data import CleanData
from bezoar.ops.stats import wilson

#: Share of the way from guessing to perfect below which the model counts as guessing: 0.28 of 10 classes, 0.6 of 2.
#: Gain in accuracy from undoing a usual mistake above which the model was certainly fed wrongly.
WRONG = 0.2
# Seconds for trying them.
_PATIENCE = 30.0
STOP = 0.2
#: The same for a warning: 0.6 of 10 classes.
WARN = 0.555
_Z99 = 2.5758  # two-sided 99 %
_TRIED = (256, 1024)  # images that the diagnosis looks at: 4 per class, within these bounds
_COLOUR = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "CIFAR-100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "GTSRB": ((0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629)),
}
_GREY = {"MNIST": (0.1307, 0.3081), "Fashion-MNIST": (0.286, 0.353)}


@torch.no_grad()
def preflight(module: nn.Module, data: CleanData, batch: int = 256) -> Preflight:
    """Accuracy of the model on the clean data.

    Args:
        module: Eval mode, ``(B, C, H, W)`` in [0, 1] to ``(B, K)`` logits.
        data: Clean images.
        batch: Images per forward pass.

    Returns:
        Accuracy, and that of guessing: of the same predictions dealt out at random (1 / K where classes are balanced;
        the share of the largest class for a model that always answers it).

    Raises:
        ModelError: The model cannot take these images, its output is no ``(B, K)`` or is NaN, or it has fewer labels
            than the data.
    """
    predicted = _predictions(module, data.x, batch)
    classes = _outputs(module, data)
    if classes < data.num_classes:
        raise ModelError(f"the model has {classes} labels, the data {data.num_classes}", "Give the data of this model")
    truth = np.bincount(data.y.numpy(), minlength=classes) / len(data)
    answers = np.bincount(predicted, minlength=classes) / len(data)
    acc = float((predicted == data.y.numpy()).mean())
    return Preflight(acc=acc, chance=max(1 / classes, float(truth @ answers)), count=len(data))


def check_preflight(result: Preflight, module: nn.Module, data: CleanData) -> tuple[str, ...]:
    """Stop where the model does no better than guessing, and say what would help.

    The measure is how far the accuracy is on the way from guessing to perfect, (ACC - chance) / (1 - chance), so that
    2 classes and 1,000 are judged alike. Below 0.2 (ACC 0.28 of 10 classes, 0.6 of 2), or where the 99 % interval
    (Wilson) reaches down to chance, it is an error; below 0.555 (0.6 of 10 classes), or where few images leave it open,
    a warning, or an error where one of the usual mistakes explains it by more than 20 points: the model would be judged
    by answers that it was not trained to give. These are tried out: other normalisations, pixels in [0, 255], BGR,
    inverted or turned images, and another order of the labels (fitted on one half of the images, scored on the other).

    Args:
        result: From :func:`preflight`.
        module: The model.
        data: The data that it was measured on.

    Returns:
        Warnings, in plain words.

    Raises:
        DataError: The model does no better than guessing, or is certainly fed wrongly.
    """
    stop = result.chance + STOP * (1 - result.chance)
    low = wilson_low(result.acc, result.count)
    if result.acc < stop or low <= result.chance:
        found = diagnose(module, data, result.acc)
        message = f"the model is right on {_percent(result.acc)} of {result.count} clean images; guessing is right on "
        message += _percent(result.chance) + _favourite(module, data)
        raise DataError(message, found or _causes(result, low, stop))
    warnings = []
    if result.acc < result.chance + WARN * (1 - result.chance):
        found, better = _diagnosis(module, data, result.acc)
        if better - result.acc > WRONG:
            message = f"the model is right on only {_percent(result.acc)} of {result.count} clean images"
            raise DataError(f"{message}: it is fed in a way that it was not trained for", found)
        text = f"the model is right on only {_percent(result.acc)} of the clean images"
        warnings.append(f"{text}. {found or 'Check the normalisation, the size and the order of the labels'}")
    elif low < stop:
        warnings.append(f"{result.count} images are too few to be sure of the accuracy: at least {_percent(low)}")
    return tuple(warnings)


def wilson_low(rate: float, count: int) -> float:
    """Lower end of the 99 % Wilson interval of a rate."""
    return wilson(rate, count, _Z99)[0]


def diagnose(module: nn.Module, data: CleanData, acc: float) -> str:
    """What would lift the accuracy most and to what, or "" where no usual mistake explains it; see below."""
    return _diagnosis(module, data, acc)[0]


def _diagnosis(module: nn.Module, data: CleanData, acc: float) -> tuple[str, float]:
    """Try the usual mistakes on some of the images, for at most half a minute.

    Args:
        module: The model; where it is a :class:`Normalized`, other normalisations take the place of its own.
        data: The data.
        acc: Accuracy as things are.

    Returns:
        What would lift the accuracy most and to what, or "" where nothing lifts it by at least 10 points and clear of
        guessing; and that accuracy.
    """
    count = min(max(_TRIED[0], 4 * data.num_classes), _TRIED[1])
    some = data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count])
    network = module.module if isinstance(module, Normalized) else module
    truth = some.y.numpy()
    chance = float(np.bincount(truth).max() / len(truth))
    best_acc, best_text = max(acc + 0.1, chance + STOP * (1 - chance)), ""
    started = time.monotonic()
    for attempt in _attempts(data.shape[0], module):
        if time.monotonic() - started > _PATIENCE:
            break
        try:
            predicted = _predictions(network, attempt.images(some.x), 128)
        except ModelError:
            continue
        better = 0.02 if best_text else 0.0  # a later, more involved explanation must gain something
        right = float((predicted == truth).mean())
        if right > best_acc + better and wilson_low(right, len(truth)) > chance:
            best_acc, best_text = right, attempt.advice
        order, right = _reordered(predicted, truth)
        if right > best_acc + 0.1 and wilson_low(right, len(truth) // 2) > chance:
            best_acc, best_text = right, _order_advice(order, attempt.advice)
    return (f"{best_text}accuracy is {_percent(best_acc)}", best_acc) if best_text else ("", acc)


@dataclass(frozen=True)
class _Attempt:
    """One way in which the images may have to be prepared; ``advice`` ends just before "accuracy is ..."."""

    advice: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flipped_colours: bool = False
    inverted: bool = False
    turned: bool = False

    def images(self, x: Tensor) -> Tensor:
        x = x.flip(1) if self.flipped_colours else x
        x = 1 - x if self.inverted else x
        x = x.transpose(2, 3) if self.turned else x
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


def _attempts(channels: int, module: nn.Module) -> Iterator[_Attempt]:
    zero, one, half = (0.0,) * channels, (1.0,) * channels, (0.5,) * channels
    mean, std = zero, one
    norms: list[tuple[str, tuple[float, ...], tuple[float, ...]]] = []
    if isinstance(module, Normalized):
        mean, std = tuple(module.mean.flatten().tolist()), tuple(module.std.flatten().tolist())
        norms.append(("without --mean and --std ", zero, one))
    yield from _both_orders("", mean, std)
    yield _Attempt(_sentence("with dark and bright exchanged (1 - x) "), mean, std, inverted=True)
    yield _Attempt(_sentence("with height and width exchanged "), mean, std, turned=True)
    named = [("", half, half), ("", zero, (round(1 / 255, 8),) * channels), *_usual(channels)]
    norms += [(f"with --mean {_numbers(m)} --std {_numbers(s)}{of} ", m, s) for of, m, s in named]
    for text, m, s in norms:
        yield from _both_orders(text, m, s)


def _both_orders(text: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Iterator[_Attempt]:
    yield _Attempt(_sentence(text), mean, std)
    if len(mean) == 3:
        bgr = _sentence(f"{text}and the colours in the order BGR ")
        yield _Attempt(bgr, mean, std, flipped_colours=True)


def _usual(channels: int) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    if channels == 3:
        caffe = (" (those of Caffe)", (0.4076, 0.45795, 0.48502), (round(1 / 255, 8),) * 3)
        return [*((f" (those of {name})", mean, std) for name, (mean, std) in _COLOUR.items()), caffe]
    if channels == 1:
        return [(f" (those of {name})", (mean,), (std,)) for name, (mean, std) in _GREY.items()]
    return []


def _sentence(text: str) -> str:
    text = f"with {text.removeprefix('and ')}" if text.startswith("and ") else text
    return text[:1].upper() + text[1:]


def _reordered(predicted: NDArray[np.int64], truth: NDArray[np.int64]) -> tuple[dict[int, int], float]:
    """Best one-to-one renaming of labels, fitted on one half, and the mean accuracy on the half not fitted on."""
    from scipy.optimize import linear_sum_assignment

    size = int(max(predicted.max(), truth.max())) + 1
    if len(truth) < 4 * len(np.unique(truth)) or size > 2000:
        return {}, 0.0
    scores = []
    halves = (np.arange(len(truth)) % 2 == 0, np.arange(len(truth)) % 2 == 1)
    for fitted, scored in (halves, halves[::-1]):
        renamed = _assignment(linear_sum_assignment, predicted[fitted], truth[fitted], size)
        scores.append(float((renamed[predicted[scored]] == truth[scored]).mean()))
    renamed = _assignment(linear_sum_assignment, predicted, truth, size)
    present = np.unique(predicted)
    return {int(renamed[p]): int(p) for p in present if renamed[p] != p}, float(np.mean(scores))


def _assignment(solve: object, predicted: NDArray[np.int64], truth: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    confusion = np.zeros((size, size), dtype=np.int64)
    np.add.at(confusion, (predicted, truth), 1)
    _, columns = solve(confusion, maximize=True)  # type: ignore[operator]
    return np.asarray(columns, dtype=np.int64)


def _order_advice(order: dict[int, int], advice: str) -> str:
    pairs = [f"{data} is {model}" for data, model in sorted(order.items())]
    text = ", ".join(pairs[:4]) + (", ..." if len(pairs) > 4 else "")
    start = f"{advice[:1].lower()}{advice[1:]}and " if advice else ""
    return _sentence(f"{start}with the labels in another order (label of the data is label of the model: {text}) ")


def _causes(result: Preflight, low: float, stop: float) -> str:
    if result.acc >= stop and low <= result.chance:
        return "That few images cannot tell the model from guessing: give more"
    return (
        "None of the usual normalisations, colour orders or label orders helps. Is it the data of this model, "
        "at the right --size, cropped as in training?"
    )


def _favourite(module: nn.Module, data: CleanData) -> str:
    counts = np.bincount(_predictions(module, data.x[: _TRIED[1]], 256))
    share = counts.max() / counts.sum()
    truth = float(np.bincount(data.y[: _TRIED[1]].numpy()).max() / min(len(data), _TRIED[1]))
    if share < max(0.5, 2 * truth):
        return ""
    return f"; it answers label {int(counts.argmax())} for {_percent(float(share))} of them"


@torch.no_grad()
def _predictions(module: nn.Module, x: Tensor, batch: int) -> NDArray[np.int64]:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    found = []
    for start in range(0, len(x), batch):
        images = x[start : start + batch]
        try:
            logits = module(images.to(device))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            message = f"the model cannot take images of {tuple(images.shape[1:])} (channels, height, width): {reason}"
            raise ModelError(message, "Give its input size with --size and --channels") from None
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(f"the model's output is {shape}, not (B, K) logits", "Give an image classifier")
        if not bool(torch.isfinite(logits).all()):
            raise ModelError("the model's output holds NaN or Inf", "Look at its weights and its normalisation")
        found.append(logits.argmax(1).cpu())
    return torch.cat(found).numpy().astype(np.int64)


@torch.no_grad()
def _outputs(module: nn.Module, data: CleanData) -> int:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return int(module(data.x[:1].to(device)).shape[1])


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{v:g}" for v in values)

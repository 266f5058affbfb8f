"""Made-up reports that look like real ones; the pictures are drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bezoar.core.pictures import png, stamp_picture
from bezoar.core.results import (
    Aftercare,
    Cleaning,
    DataFacts,
    Example,
    Figure,
    LabelEvidence,
    LayerChange,
    ModelFacts,
    Preflight,
    Report,
    Rule,
    RunFacts,
    SeedResult,
    TriggerFacts,
)

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEXT = (
    "A label is called backdoored when its trigger is smaller than those of the other labels by more than the bound on "
    "the anomaly index, covers at most the given share of the image, and works on held-out images; most seeds must "
    "name the same label."
)
Image = NDArray[np.float32]


def scene(seed: int, side: int = 32) -> Image:
    """``(3, side, side)``: a sky, a ground and a blob, different for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    sky, ground, blob = rng.uniform(0.2, 0.95, (3, 3, 1, 1))
    image = np.where(y < rng.uniform(0.45, 0.7) + 0.05 * np.sin(7 * x), sky * (1 - 0.3 * y), ground * (0.6 + 0.4 * y))
    cy, cx, r = rng.uniform(0.35, 0.65, 3)
    inside = ((x - cx) / (0.55 * r)) ** 2 + ((y - cy) / (0.42 * r)) ** 2 < 1
    image = np.where(inside, blob * (1.1 - 0.5 * x), image)
    return np.clip(image + rng.normal(0, 0.03, image.shape), 0, 1).astype(np.float32)


def trigger(seed: int, pixels: int, side: int = 32) -> tuple[Image, Image]:
    """Mask ``(1, side, side)`` and pattern ``(3, side, side)``; few pixels make a square in the corner."""
    rng = np.random.default_rng(seed)
    mask = rng.uniform(0, 0.03, (1, side, side))
    pattern = rng.uniform(0, 1, (3, side, side))
    if pixels <= 16:
        mask[:, -4:-1, -4:-1] = rng.uniform(0.8, 1, (3, 3))
        pattern[:, -4:-1, -4:-1] = np.indices((3, 3)).sum(0) % 2
    else:
        chosen = rng.choice(side * side, pixels, replace=False)
        mask.reshape(-1)[chosen] = rng.uniform(0.4, 1, pixels)
    return mask.astype(np.float32), pattern.astype(np.float32)


def facts(
    label: int, name: str, size: float, *, seed: int = 0, examples: Sequence[tuple[int, int, int]] = ()
) -> TriggerFacts:
    """A trigger with its pictures; ``examples`` are true label, prediction before and after."""
    mask, pattern = trigger(label + 100 * seed, round(size))
    pictures = []
    for i, (true, before, after) in enumerate(examples):
        image = scene(50 + i)
        stamped = (1 - mask) * image + mask * pattern
        pictures.append(Example(original=png(image), stamped=png(stamped), true=true, before=before, after=after))
    return TriggerFacts(
        label=label,
        name=name,
        seed=seed,
        size=size,
        fraction=size / 1024,
        asr=0.988,
        mask=png(mask),
        pattern=png(pattern),
        stamp=stamp_picture(mask, pattern),
        examples=tuple(pictures),
    )


def evidence(sizes: Sequence[float], names: Sequence[str], *, area: int = 1024, seeds: int = 5) -> list[LabelEvidence]:
    """Complete evidence with sizes that vary a little over the seeds."""
    rng = np.random.default_rng(7)
    median = float(np.median(sizes))
    mad = 1.4826 * float(np.median(np.abs(np.asarray(sizes) - median)))
    return [
        LabelEvidence(
            label=i,
            name=names[i],
            size=size,
            sizes=tuple(float(s) for s in np.round(size * rng.uniform(0.93, 1.07, seeds), 2)),
            fraction=size / area,
            asr=float(np.round(rng.uniform(0.985, 1), 3)),
            index=(median - size) / mad,
            status="complete",
        )
        for i, size in enumerate(sizes)
    ]


def figures(index: float, fraction: float, asr: float, agree: float) -> tuple[Figure, ...]:
    """The four figures of the made-up rule."""
    return (
        Figure(name="anomaly index", value=index, bound=2.0, passed=index > 2, meaning="MADs below the median size"),
        Figure(
            name="share of the image",
            value=fraction,
            bound=0.08,
            passed=fraction < 0.08,
            meaning="A trigger this small is not a natural feature",
        ),
        Figure(
            name="held-out success", value=asr, bound=0.9, passed=asr > 0.9, meaning="Works on images not fitted on"
        ),
        Figure(name="seeds that agree", value=agree, bound=0.6, passed=agree > 0.6, meaning="Share naming this label"),
    )


def rule(index: float, fraction: float, asr: float, agree: float) -> Rule:
    """The made-up rule."""
    return Rule(
        name="index-size-success",
        text=TEXT,
        calibration="32 models trained for the purpose, half of them clean.",
        figures=figures(index, fraction, asr, agree),
    )


def base(**changes: Any) -> Report:
    """A report without a verdict, to be filled in."""
    report = Report(
        verdict=None,
        target=None,
        summary="",
        model=ModelFacts(
            path="downloads/wrn-16-1.pth.tar",
            format="state-dict",
            sha256="3f0c9a5b7d2e41868c0f5b6a9d1e27f43f0c9a5b7d2e41868c0f5b6a9d1e27f4",
            arch="wrn-16-1",
            parameters=175_994,
            num_classes=10,
            channels=3,
            height=32,
            width=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2471, 0.2435, 0.2616),
        ),
        data=DataFacts(
            path="clean-500",
            format="folder",
            sha256="90b1c4f27ea6d5389e1d7c64a2b8350f90b1c4f27ea6d5389e1d7c64a2b8350f",
            count=500,
            per_class=(50,) * 10,
            names=NAMES,
        ),
        preflight=Preflight(acc=0.842, chance=0.1, count=500),
        method="neural-cleanse",
        config={"mode": "fast", "steps": 200, "lr": 0.1, "success": 0.99, "seeds": [0, 1, 2, 3, 4]},
        run=RunFacts(
            created="2026-01-31T12:00:05+00:00",
            seconds={"preflight": 0.6, "inversion": 61.2, "cleaning": 14.8},
            image_gradients=412_000,
            versions={"bezoar": "0.1.0", "torch": "2.13.0", "python": "3.11.9", "platform": "Linux x86_64"},
            device="cpu",
            threads=2,
        ),
    )
    return replace(report, **changes)


def cleaning(target: int | None = 5) -> Cleaning:
    """What an unlearning run could have done."""
    names = [
        f"block{b}.layer.{i}.{p}"
        for b in (1, 2, 3)
        for i in (0, 1)
        for p in ("conv1.weight", "conv2.weight", "bn1.bias")
    ]
    return Cleaning(
        method="unlearn" if target is not None else "finetune",
        config={"epochs": 1, "lr": 0.01, "share": 0.2},
        target=target,
        acc_before=0.848,
        acc_after=0.84,
        asr_before=0.996 if target is not None else None,
        asr_after=0.018 if target is not None else None,
        held_out=250,
        output="cleaned/wrn-16-1.pth.tar",
        sha256="a7c2" * 16,
        aftercare=Aftercare(
            fidelity=0.951,
            reactivation=None if target is None else 12,
            reactivation_other=None if target is None else 15,
            reactivation_limit=40,
            rescan_verdict="inconclusive",
        ),
        notes={
            "kept": "clp + repeated-unlearning epochs=20",
            "tried": [
                {"method": "none", "acc": 0.848, "response": 0.98, "seconds": 0.0},
                {"method": "clp", "acc": 0.846, "response": 0.93, "seconds": 0.1},
                {"method": "clp + repeated-unlearning epochs=20", "acc": 0.84, "response": 0.11, "seconds": 41.3},
            ],
            "skipped": [],
            "pruned": 12,
        },
        layers=tuple(
            LayerChange(name=n, relative=0.21 * 0.86**i) for i, n in enumerate(["fc.weight", "fc.bias", *names])
        ),
    )


def backdoored() -> Report:
    """Ten labels, label 5 far below the others, one stopped early, one failed; cleaned."""
    labels = evidence([58.2, 71.5, 49.9, 52.3, 66.0, 9.4, 61.7, 55.8, 83.1, 120.0], NAMES)
    labels[8] = replace(labels[8], status="eliminated")
    labels[9] = replace(labels[9], status="failed", size=float("nan"), sizes=(None,) * 5, asr=0.42, index=float("nan"))
    index = labels[5].index
    examples = [(3, 3, 5), (8, 8, 5), (0, 0, 5), (4, 7, 5), (1, 1, 5), (6, 6, 6)]
    seeds = [
        SeedResult(seed=s, verdict="backdoored", target=5, figures=figures(index + 0.2 * s, 0.009, 0.994, 1.0)[:3])
        for s in range(5)
    ]
    return base(
        verdict="backdoored",
        target=5,
        labels=tuple(labels),
        rule=rule(index, 9.4 / 1024, 0.994, 1.0),
        seeds=tuple(seeds),
        triggers=(
            facts(5, "dog", 9.4, examples=examples),
            facts(2, "bird", 49.9),
            facts(3, "cat", 52.3),
            facts(7, "horse", 55.8),
        ),
        cleaning=cleaning(),
        warnings=("Label 9 gave no trigger that reaches 99 % success.",),
    )


def clean() -> Report:
    """Ten labels, none far from the others."""
    labels = evidence([48.2, 71.5, 49.9, 52.3, 66.0, 59.4, 61.7, 55.8, 63.1, 70.2], NAMES)
    seeds = [
        SeedResult(seed=s, verdict="clean", target=None, figures=figures(1.2, 0.047, 0.99, 0.4)[:3]) for s in range(5)
    ]
    return base(
        verdict="clean",
        labels=tuple(labels),
        rule=rule(1.2, 48.2 / 1024, 0.99, 0.4),
        seeds=tuple(seeds),
        triggers=(
            facts(0, "airplane", 48.2, examples=[(3, 3, 0), (8, 8, 0)]),
            facts(2, "bird", 49.9),
            facts(3, "cat", 52.3),
        ),
    )


def inconclusive() -> Report:
    """The seeds disagree, and the time ran out."""
    labels = evidence([48.2, 71.5, 29.9, 52.3, 66.0, 59.4, 61.7, 55.8, 63.1, 70.2], NAMES, seeds=2)
    report = base(
        verdict="inconclusive",
        labels=tuple(labels),
        rule=rule(2.6, 29.9 / 1024, 0.93, 0.5),
        seeds=(
            SeedResult(seed=0, verdict="backdoored", target=2, figures=figures(2.6, 0.029, 0.93, 1.0)[:3]),
            SeedResult(seed=1, verdict="clean", target=None, figures=figures(1.4, 0.035, 0.86, 1.0)[:3]),
        ),
        triggers=(facts(2, "bird", 29.9, examples=[(3, 3, 2), (8, 8, 2), (1, 1, 9)]),),
        warnings=("The accuracy of 61.0 % is low: check mean, std and the order of the labels.", "The time ran out."),
        preflight=Preflight(acc=0.61, chance=0.1, count=500),
    )
    return replace(report, run=replace(report.run, budget=120.0, budget_spent=True))


def many(count: int = 1283, height: int = 55, width: int = 47) -> Report:
    """A face model with very many labels; most are stopped early, label 1 of them is small."""
    rng = np.random.default_rng(3)
    sizes = [float(s) for s in np.round(rng.lognormal(5.2, 0.28, count), 1)]
    target = min(917, count - 3)
    sizes[target] = 21.4
    names = [f"person {i:04d}" for i in range(count)]
    area = height * width
    labels = evidence(sizes, names, area=area, seeds=1)
    labels = [replace(e, status="eliminated") if e.size > 170 else e for e in labels]
    report = base()
    return replace(
        report,
        verdict="backdoored",
        target=target,
        labels=tuple(labels),
        rule=rule(labels[target].index, 21.4 / area, 0.98, 1.0),
        seeds=(SeedResult(seed=0, verdict="backdoored", target=target, figures=figures(4, 0.008, 0.98, 1.0)),),
        triggers=(facts(target, names[target], 21.4),),
        model=replace(report.model, num_classes=count, height=height, width=width, arch="deepid"),
        data=replace(report.data, names=tuple(names), per_class=(1,) * count, count=count),
    )


def purify_only() -> Report:
    """A model that was fine-tuned without a scan."""
    return base(cleaning=cleaning(None), method="", config={})


def hostile() -> Report:
    """A stranger's names and paths that try to leave their place."""
    bad = '"><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m\ud800 {{ 7*7 }} </title></style></svg>'
    report = backdoored()
    labels = tuple(replace(e, name=f"{bad}{e.label}") for e in report.labels)
    return replace(
        report,
        summary=f"summary {bad}",
        labels=labels,
        model=replace(report.model, path=f"../{bad}/model.pth", arch=bad, format=bad),
        data=replace(report.data, path=bad, names=(bad,) * 10),
        triggers=tuple(
            replace(t, name=bad, mask='" onload="alert(3)', pattern="javascript:alert(4)") for t in report.triggers
        ),
        config={bad: [bad, {"x": bad}], "javascript:alert(5)": "</script>"},
        warnings=(bad, "http://example.org/beacon.png"),
        run=replace(report.run, created=bad, versions={"bezoar": bad}),
    )


ALL = {
    "backdoored": backdoored,
    "clean": clean,
    "inconclusive": inconclusive,
    "many": many,
    "purify_only": purify_only,
    "hostile": hostile,
}

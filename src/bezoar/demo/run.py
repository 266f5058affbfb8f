"""Scan and clean the model that comes with bezoar, then compare with the truth."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch

from bezoar import api
from bezoar.core.results import Report
from bezoar.core.run import Report as Told
from bezoar.core.trigger import MaskedTrigger
from bezoar.evaluation.measures import all_to_one, measure
from bezoar.io.models import load_model
from bezoar.options import ModelOptions


def run(out: Path, report: Told | None = None) -> tuple[Report, str]:
    """Scan, clean and write everything to ``out``.

    Returns:
        The report, and a sentence that holds it against the truth.
    """
    with as_file(files("bezoar.demo").joinpath("assets")) as assets:
        model, data = assets / "model.safetensors", assets / "clean.npz"
        options = ModelOptions(arch="nc-mnist")
        found = api.scan(model, data, model_options=options, report=report)
        leader = found.report.triggers[0].label
        cleaned, whole = api.purify(
            model, data, method="unlearn", found=found, label=leader, out=out, model_options=options, report=report
        )
        truth = json.loads((assets / "truth.json").read_text(encoding="utf-8"))
        with np.load(assets / "truth.npz") as arrays:
            trigger = MaskedTrigger(torch.from_numpy(arrays["mask"]), torch.from_numpy(arrays["pattern"]))
        with np.load(data) as arrays:
            x = torch.from_numpy(arrays["x"]).permute(0, 3, 1, 2).float() / 255
            y = torch.from_numpy(arrays["y"]).long()
        suspect = load_model(model, arch=options.arch).module
    planted = all_to_one(trigger, truth["target"], whole.model.num_classes)
    before, after = (measure(net, x, y, planted).asr.value for net in (suspect, cleaned))
    sentence = (
        f"\nThe truth, read only now: {truth['description']}, causes label {truth['target']} ({truth['name']}). "
        f"The true trigger works on {before:.1%} of the images before cleaning and on {after:.1%} after."
    )
    return whole, sentence

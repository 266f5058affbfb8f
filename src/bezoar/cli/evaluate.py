"""``bezoar evaluate``: what a model does with the triggers that are known to be planted, and with inverted ones."""

from __future__ import annotations

import dataclasses
import json as json_
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bezoar.cli import _output
from bezoar.core.errors import DataError, SettingError

if TYPE_CHECKING:
    from bezoar.evaluation.measures import Measures

_MODEL = _output.ModelFlags()
_Switch = Annotated[bool, Parameter(negative="")]
_FILES = ("comparison.json", "comparison.png")


def evaluate(
    model: str,
    /,
    *,
    data: str,
    truth: Path | None = None,
    scan: Path | None = None,
    test: str | None = None,
    images: int = 0,
    out: Path | None = None,
    model_flags: Annotated[_output.ModelFlags, Parameter(name="*")] = _MODEL,
    device: str = "auto",
    json: _Switch = False,
) -> int:
    """Measure a model with the triggers that bezoar attack planted, and set inverted triggers beside them.

    ACC on clean test images, and ASR and RA of each planted trigger. With a scan of the model, each planted trigger is
    compared with the inverted one of its label: success, L1 norm, a picture, the mean activation of the foremost 1 % of
    the neurons of the second-to-last layer, and how many of these neurons both triggers share.

    For instance:

        bezoar attack badnets --data mnist --arch nc-mnist --epochs 5 --out victim/
        bezoar scan victim/model.safetensors --arch nc-mnist --data clean.npz --out scan/
        bezoar evaluate victim/ --data mnist --scan scan/ --out compared/
        bezoar evaluate cleaned/model.safetensors --arch nc-mnist --truth victim/ --data mnist

    Args:
        model: Folder of bezoar attack, or a model file or folder, see bezoar scan.
        data: The data set of the victim, whose test images are used; see bezoar attack.
        truth: Folder of bezoar attack that says what was planted; by default the model's own.
        scan: Folder that bezoar scan --out wrote, with the inverted triggers.
        test: Test images; by default those that come with the data, or else a tenth of each class.
        images: Most test images, the first ones; 0 for all.
        out: Folder for comparison.json and comparison.png.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        json: Print everything as JSON.
    """
    from bezoar import api
    from bezoar.evaluation import compare
    from bezoar.evaluation.measures import measure
    from bezoar.evaluation.splits import read_splits
    from bezoar.evaluation.truth import load_truth
    from bezoar.session import device_named

    _output.check_folder(out)
    if out is not None and scan is None:
        raise SettingError("--out is for the comparison with a scan", "Give --scan as well")
    if images < 0:
        raise SettingError(f"--images must be at least 0, got {images}")
    suspect = _loaded(Path(model), model_flags)
    planted = load_truth(truth or Path(model))
    facts = suspect.facts
    read = read_splits(data, test, size=(facts.height, facts.width), channels=facts.channels)
    x, y = (part[: images or None] for part in (read.test.x, read.test.y))
    where = device_named(device)
    module = suspect.module.to(where)
    measures = measure(module, x, y, planted, num_classes=facts.num_classes)
    found = None
    if scan is not None:
        triggers = api.load_result(scan).triggers
        _check_shapes(triggers, (facts.channels, facts.height, facts.width))
        found = compare.compare(module, x, y, planted, triggers)
        if out is not None:
            from bezoar.core.results import write_atomic

            write_atomic(out / _FILES[0], compare.to_json(found))
            write_atomic(out / _FILES[1], compare.comparison_sheet(x, y, planted, triggers))
    if json:
        from bezoar.core.plain import plain

        both = {"measures": measures, "comparisons": [dataclasses.asdict(one) for one in found or ()]}
        sys.stdout.write(json_.dumps(plain(both), indent=1) + "\n")
        return 0
    print(_text(measures))
    if found is not None:
        print(compare.text(found))
    if out is not None:
        print(f"in {out}: {', '.join(_FILES)}")
    return 0


def _loaded(path: Path, flags: _output.ModelFlags) -> Any:
    """The model; a folder of ``bezoar attack`` says itself how to read it."""
    from bezoar.evaluation.implant import MODEL, RECORD
    from bezoar.evaluation.record import Record
    from bezoar.io.models import load_model

    options = {f.name: getattr(flags.make(), f.name) for f in dataclasses.fields(flags.make())}
    if not (path / RECORD).is_file():
        return load_model(path, **options)
    try:
        record = Record.from_json((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path / RECORD} cannot be read: {error}", Record.WHENCE) from None
    channels, height, width = record.shape
    own = {"arch": record.arch, "channels": channels, "size": (height, width), "num_classes": len(record.train.names)}
    return load_model(path / MODEL, **options | {k: v for k, v in own.items() if options[k] is None})


def _check_shapes(triggers: dict[int, Any], shape: tuple[int, int, int]) -> None:
    from bezoar.core.trigger import trigger_tensors

    for trigger in triggers.values():
        tensors = trigger_tensors(trigger)
        own = tuple(tensors["pattern" if "pattern" in tensors else "delta"].shape)
        if own != shape:
            raise SettingError(f"the scan is of images of shape {own}, the model takes {shape}", "Scan this model")


def _text(measures: Measures) -> str:
    lines = [f"ACC  {measures.acc}"]
    for plant in measures.plants:
        lines.append(f"{plant.name}: ASR  {plant.asr}")
        if plant.asr_other is not None:
            lines.append(f"  ASR of classes it shall not work on  {plant.asr_other}")
        lines.append(f"  RA   {plant.ra}")
    return "\n".join(lines)

"""``bezoar guard``: protect a model that is in use."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bezoar.cli import _output
from bezoar.options import RunOptions

_Switch = Annotated[bool, Parameter(negative="")]
_MODEL = _output.ModelFlags()


def guard(
    model: str,
    /,
    *,
    data: str,
    out: Path,
    method: str = "mahalanobis",
    fpr: float = 0.05,
    scan: Path | None = None,
    label: int | None = None,
    policy: Literal["flag", "label"] = "flag",
    safe_label: int | None = None,
    onnx: _Switch = False,
    program: _Switch = False,
    images: int = 1000,
    held_out: float | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    model_flags: Annotated[_output.ModelFlags, Parameter(name="*")] = _MODEL,
    seed: int = 0,
    budget: str = "",
    device: str = "auto",
    threads: int = 0,
    json: _Switch = False,
    quiet: _Switch = False,
) -> int:
    """Score each input of a model that is in use, and flag those that are likely to carry a trigger.

    For instance:

        bezoar guard model.pth --arch resnet-18 --data clean/ --out guard/ --onnx
        bezoar guard model.pth --arch resnet-18 --data clean/ --method activation-filter --scan scan/ --out guard/

    It learns from clean images alone what is usual; half of them set the threshold. guarded.onnx and guarded.pt2 hold
    model and guard together: raw pixels in [0, 1] go in, logits, score and flag come out. From Python:

        guarded = bezoar.load_guard("guard/", model)
        guarded.flags(images)

    mahalanobis asks the model once for each input and needs no scan; so it flags whatever is unlike the clean images,
    triggers of any kind among it. strip and scale-up ask several times; activation-filter needs the trigger that a scan
    found. Each one's settings: bezoar methods NAME.

    Exit codes: 0 done, 2 bad input.

    Args:
        model: Model file or folder, see bezoar scan.
        data: Clean images with labels, see bezoar scan; of the kind that the model will see.
        out: Folder for guard.safetensors, guard.json, report.json and the exported models.
        method: Guard, see bezoar methods.
        fpr: Share of clean inputs that may be flagged; 0.01 needs 99 held-out images.
        scan: Folder that bezoar scan --out wrote for this model, so that it is not scanned again.
        label: Use the inverted trigger of this label, whatever the verdict.
        policy: flag leaves the answer to a flagged input as it is; label replaces it.
        safe_label: The label of a flagged input, with --policy label.
        onnx: Also write model and guard as guarded.onnx.
        program: Also write model and guard as guarded.pt2, for torch.export.load.
        images: Most clean images to use, as many of each class as there are.
        held_out: Share of the images that set the threshold, in (0, 1); half by default.
        set_: A setting of the method, such as --set images=20.
        seed: Root of all randomness.
        budget: Time allowed, such as 90s, 2m or 1h.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        threads: CPU threads; 0 leaves it to torch.
        json: Print the report as JSON instead of the summary.
        quiet: No progress and no summary; the exit code tells.
    """
    from bezoar import api, guarding

    _output.check_folder(out)
    made = _output.method_from("guards", method, {}, set_)
    options = RunOptions(
        images=images,
        held_out=held_out,
        seed=seed,
        budget=_output.seconds(budget),
        device=device,
        threads=threads,
        resume=True,
    )
    with _output.progress(quiet) as told:
        result = guarding.guard(
            model,
            data,
            method=made,
            fpr=fpr,
            found=None if scan is None else api.load_result(scan),
            label=label,
            policy=policy,
            safe_label=safe_label,
            out=out,
            onnx=onnx,
            program=program,
            model_options=model_flags.make(),
            options=options,
            report=told,
        )
    assert result.report is not None
    if json:
        sys.stdout.write(result.report.to_json())
    elif not quiet:
        from bezoar.report.guarded import summary

        width = min(shutil.get_terminal_size((100, 24)).columns, 110)
        sys.stdout.write(summary(result.report, width, str(out)))
    return 0

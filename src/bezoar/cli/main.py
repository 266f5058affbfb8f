"""``bezoar``: the commands. Flags, words and exit codes; all work is done by the library.

Exit codes: 0 clean or done, 1 backdoored, 2 bad input or usage, 3 inconclusive, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from bezoar.cli import _output
from bezoar.cli.attack import attack
from bezoar.cli.bench import bench
from bezoar.cli.data import app as data_app
from bezoar.cli.evaluate import evaluate
from bezoar.cli.filter import app as filter_app
from bezoar.cli.guard import guard
from bezoar.cli.sweep import sweep
from bezoar.cli.train import train
from bezoar.core.errors import BezoarError, SettingError
from bezoar.version import __version__

_HELP = """Find, remove and prevent backdoors in neural networks.

A backdoored model behaves normally until an input carries the attacker's
trigger. Give bezoar a model and a few clean images: it says whether the model
is backdoored and for which label, shows the trigger, and gives back a clean
model.

    bezoar demo                                     see it work in a minute
    bezoar scan model.pth --arch resnet-18 --data images/ --out scan/
    bezoar purify model.pth --arch resnet-18 --data images/ --out cleaned/
    bezoar sweep zoo/ --arch resnet-18 --data images/ --out swept/

And give it a training set that nobody vouches for: it says which examples are
poisoned.

    bezoar train --data scraped/ --arch resnet-18 --out model/
    bezoar filter data train/ --model model.pth --arch resnet-18 --out found/

Exit codes: 0 clean or done, 1 backdoored, 2 bad input or usage, 3 inconclusive.
"""

app = App(
    name="bezoar",
    help=_HELP,
    version=__version__,
    help_format="plaintext",
    help_on_error=False,
    suppress_keyboard_interrupt=False,
)
app.command(data_app)
app.command(filter_app)
app.command(train)
app.command(guard)
app.command(attack)
app.command(evaluate)
app.command(bench)
app.command(sweep)

Flat = Parameter(name="*")
_MODEL, _RUN = _output.ModelFlags(), _output.RunFlags()


@app.command
def scan(
    model: str,
    /,
    *,
    data: str,
    out: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    sarif: Annotated[bool, Parameter(negative="")] = False,
    scanner: str = "neural-cleanse",
    mode: Literal["fast", "reference"] = "fast",
    seeds: int = 3,
    labels: str = "",
    evidence: str = "",
    fpr: float | None = None,
    source_specific: Annotated[bool, Parameter(negative="")] = False,
    budget: str = "",
    ray: str = "",
    model_flags: Annotated[_output.ModelFlags, Flat] = _MODEL,
    flags: Annotated[_output.RunFlags, Flat] = _RUN,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    quiet: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Is this model backdoored, and for which label?

    For instance:

        bezoar scan student.pth.tar --arch wrn-16-1 --data clean.npz --out scan/
        bezoar scan resnet/ --data images/ --budget 2m --json
        bezoar scan net.pth --arch mynet.py:make --data images/ --mean 0.5 --std 0.5 --size 64
        bezoar scan resnet/ --data images/ --fpr 0.01 --out scan/

    A killed scan goes on where it stopped when the same command is given again.

    Args:
        model: Model file or folder: a state dict with --arch, a Hugging Face or timm folder, an ONNX file.
        data: Clean images with labels: a folder with one folder per class, an .npz with x and y, Parquet, or a data set
            by name (see bezoar data list).
        out: Folder for report.html, report.json, report.sarif and the triggers.
        json: Print the whole report as JSON instead of the summary.
        sarif: Print the report as SARIF instead of the summary.
        scanner: neural-cleanse; low-cost-neural-cleanse, the paper's way with many labels; or evolutionary-search,
            which needs no gradient of the input; see bezoar methods.
        mode: fast, or the paper's own procedure, label by label (far slower, and without the search for faint changes).
        seeds: Seeds to scan with; they must agree for a verdict.
        labels: Labels that can be the target, such as 3,7,10-14; all by default.
        evidence: Scorers to ask as well, such as mm-bd,k-arm, or all; what they say is shown, and what source-specific
            says may decide.
        fpr: Share of clean models that may be called backdoored, such as 0.01: the verdict then rests on all searches
            together, with a p-value, after a student of the model has told which triggers are natural features; of
            --evidence, source-specific, mm-bd, k-arm and abs-stimulation are taken in. Without it the searches decide
            by their own rule.
        source_specific: Also look for triggers that work on images of one label only, or differ from label to label:
            one more search, whose rule may find the model backdoored. Short for --evidence source-specific.
        budget: Time allowed, such as 90s, 2m or 1h; the answer is then the best so far.
        ray: Spread the scan over a Ray cluster: local, auto for the one that runs here, or its address; its pieces are
            seeds, or labels with --mode reference. The answer is the same.
        set_: A setting of the method, such as --set steps=200.
        quiet: No progress and no summary; the exit code tells.
    """
    from bezoar import api

    if json and sarif:
        raise SettingError("--json and --sarif exclude each other", "Use --out DIR to get both as files")
    _output.check_folder(out)
    asked = _output.name_list(evidence)
    if source_specific and not {"source-specific", "all"} & set(asked):
        asked = (*asked, "source-specific")
    settings = {"seeds": seeds, "labels": _output.label_list(labels)} | ({} if mode == "fast" else {"mode": mode})
    method = _output.method_from("scanners", scanner, settings, set_)
    with _output.progress(quiet) as report:
        result = api.scan(
            model,
            data,
            method=method,
            model_options=model_flags.make(),
            options=flags.make(budget, asked, fpr, ray),
            report=report,
        )
    saved = None if out is None else result.save(out)
    _output.show(result.report, saved, json=json, sarif=sarif, quiet=quiet)
    return _output.EXIT_CODES[result.verdict]


@app.command
def purify(
    model: str,
    /,
    *,
    data: str,
    out: Path,
    method: str = "auto",
    scanner: str = "neural-cleanse",
    scan: Path | None = None,
    label: int | Literal["all"] | None = None,
    suspects: Path | None = None,
    suspect_data: str | None = None,
    seeds: int = 3,
    source_specific: Annotated[bool, Parameter(negative="")] = False,
    rescan: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    budget: str = "",
    model_flags: Annotated[_output.ModelFlags, Flat] = _MODEL,
    flags: Annotated[_output.RunFlags, Flat] = _RUN,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    quiet: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Give back a clean model, in the format that was read.

    auto scans first, then tries several methods, keeps what a defender's own measurements say is best, and tells why.
    unlearn fine-tunes the model on clean images that carry the inverted trigger with their true labels; finetune trains
    on the clean images alone; bezoar methods lists the others. Accuracy, and success of the inverted trigger, are
    measured on images that none of them has seen.

    For instance:

        bezoar purify student.pth.tar --arch wrn-16-1 --data clean.npz --out cleaned/
        bezoar purify student.pth.tar --arch wrn-16-1 --data clean.npz --scan scan/ --out cleaned/
        bezoar purify net.onnx --data images/ --method finetune --set lr=0.02 --out cleaned/

    Args:
        model: Model file or folder, see bezoar scan.
        data: Clean images with labels, see bezoar scan.
        out: Folder for the cleaned model, changes.json and the report.
        method: auto, or another one of bezoar methods.
        scanner: What finds the triggers, where the method wants some; see bezoar scan.
        scan: Folder that bezoar scan --out wrote for this model, so that it is not scanned again.
        label: Use the inverted trigger of this label, whatever the verdict; all for those of all labels.
        suspects: The suspects.csv of bezoar filter data, for abl-unlearn: training examples to unlearn.
        suspect_data: The training set that --suspects is about.
        seeds: Seeds of the scan.
        source_specific: Look for triggers of one source label as well, see bezoar scan.
        rescan: Scan the cleaned model as well.
        json: Print the whole report as JSON instead of the summary.
        budget: Time allowed, such as 90s, 2m or 1h.
        set_: A setting of the purifier, such as --set epochs=20.
        quiet: No progress and no summary.
    """
    from bezoar import api

    _output.check_folder(out)
    purifier = _output.method_from("purifiers", method, {}, set_)
    found = None if scan is None else api.load_result(scan)
    if (suspects is None) != (suspect_data is None):
        raise SettingError("--suspects and --suspect-data go together", "Give both")
    with _output.progress(quiet) as report:
        _, whole = api.purify(
            model,
            data,
            method=purifier,
            scanner=scanner,
            found=found,
            label=label,
            suspects=None if suspects is None else (suspects, suspect_data),
            out=out,
            rescan=rescan,
            model_options=model_flags.make(),
            options=flags.make(budget),
            report=report,
            seeds=seeds,
            evidence=("source-specific",) if source_specific else (),
        )
    _output.show(whole, out / "report.html", json=json, sarif=False, quiet=quiet)
    return 0


@app.command
def report(source: Path, /, *, out: Path | None = None, sarif: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Make the HTML report of a run again, from its JSON alone.

    Args:
        source: The report.json of a run.
        out: The file to write; report.html beside the JSON by default.
        sarif: Print SARIF to the terminal instead of writing HTML.
    """
    from bezoar.core.results import write_atomic
    from bezoar.report.html import render
    from bezoar.report.sarif import to_sarif

    read = _output.read_report(source)
    if sarif:
        sys.stdout.write(to_sarif(read))
        return 0
    target = out or source.with_name("report.html")
    write_atomic(target, render(read))
    print(target)
    return 0


@app.command
def demo(*, out: Path = Path("demo-report"), quiet: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Scan and clean a small backdoored model that comes with bezoar, offline.

    The model recognises clothes (Fashion-MNIST) and was trained by this project with a backdoor planted; the images
    are real. Nothing tells the scan what was planted: the truth is only read at the end, to compare.

    Args:
        out: Folder for the report and the cleaned model.
        quiet: No progress.
    """
    from bezoar.demo.run import run

    _output.check_folder(out)
    with _output.progress(quiet) as told:
        whole, truth = run(out, told)
    _output.show(whole, out / "report.html", json=False, sarif=False, quiet=quiet)
    print(truth)
    return 0


@app.command
def methods(name: str = "", /) -> int:
    """List the methods, or explain one with all its settings.

    For instance:

        bezoar methods
        bezoar methods wanet

    Args:
        name: The method to explain.
    """
    from bezoar.core import registry

    if name:
        print(_output.explain(name))
        return 0
    known = {kind: registry.methods(kind) for kind in registry.KINDS}
    width = max(len(one) for found in known.values() for one in found)
    for kind, found in known.items():
        print(f"{kind}:")
        for one, method in found.items():
            print(f"  {one:{width}}  {(method.__doc__ or '').strip().splitlines()[0]}")
    print("\nSettings of one of them: bezoar methods NAME")
    return 0


def main(tokens: list[str] | None = None) -> Any:
    """Run the command line and leave with its exit code."""
    try:
        code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        print(f"error: {error}", file=sys.stderr)
        print("  See bezoar --help, and bezoar COMMAND --help", file=sys.stderr)
        sys.exit(2)
    except BezoarError as error:
        _output.print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\ninterrupted: the same command goes on from its last checkpoint, if it left one",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

"""``bezoar guard`` and its module: exported, written, read back, and used."""

from __future__ import annotations

import copy
import dataclasses
import json
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import bezoar
from bezoar.cli.main import main
from bezoar.core.errors import BezoarError, DataError, ModelError, SettingError
from bezoar.core.guarded import GuardReport
from bezoar.core.guarding import FittedGuard
from bezoar.core.method import Clean
from bezoar.core.registry import methods
from bezoar.core.run import Run
from bezoar.core.trigger import MaskedTrigger
from bezoar.guarded import DriftWatch, GuardedModel
from bezoar.guards.activation_filter import ActivationFilter
from bezoar.guards.scale_up import ScaleUp
from bezoar.guards.strip import STRIP
from bezoar.io.exported import export_program, run_onnx, write_onnx, write_program
from bezoar.report.guarded import summary
from tests.purifiers.nets import SIDE, examples, make
from tests.toys import LABELS, TARGET, images, trained, trigger

every_guard = pytest.mark.parametrize("guard", methods("guards").values(), ids=methods("guards").keys())
NAMES_OUT = ("logits", "score", "flag")


def fit(guard: type, model: nn.Module | None = None) -> FittedGuard:
    """A guard of the backdoored toy."""
    x, y = images(240, seed=7)
    clean = Clean(x=x[:120], y=y[:120], held_x=x[120:], held_y=y[120:], num_classes=LABELS)
    made = guard(images=8) if guard is STRIP else guard()
    return made(model or trained(backdoored=True), clean, Run(seed=1), {TARGET: trigger()})


def on_net(guard: type, name: str) -> FittedGuard:
    """A guard of an untrained net."""
    x, y = examples(60)
    planted = MaskedTrigger(0.2 * torch.ones(1, SIDE, SIDE), torch.ones(3, SIDE, SIDE))
    made = guard(images=4) if guard is STRIP else guard()
    return made(make(name), Clean(x[:30], y[:30], x[30:], y[30:], 6), Run(), {1: planted})


def some(count: int = 5) -> torch.Tensor:
    """Toy images, triggered and not."""
    x = images(count, seed=9)[0]
    x[: count // 2] = trigger()(x[: count // 2])
    return x


# One module.


@every_guard
def test_module_answers_like_the_model_and_scores_like_the_guard(guard):
    fitted = fit(guard)
    limit = fitted.threshold(0.05).value
    module, x = GuardedModel(fitted, limit, LABELS), some(40)
    logits, score, flag = module(x)
    assert torch.equal(logits, trained(backdoored=True)(x))
    torch.testing.assert_close(score, fitted.score(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(flag, score > limit)


def test_flagged_inputs_get_the_safe_label():
    fitted = fit(ActivationFilter)
    module, x = GuardedModel(fitted, fitted.threshold(0.05).value, LABELS, safe_label=4), some(40)
    logits, _, flag = module(x)
    assert 10 < int(flag.sum()) < 30
    assert logits[flag].argmax(1).eq(4).all()
    assert float(logits[flag].softmax(1)[:, 4].min()) > 0.999
    assert torch.equal(logits[~flag], trained(backdoored=True)(x[~flag]))


@pytest.mark.parametrize("label", [-1, LABELS])
def test_safe_label_that_is_none_is_refused(label):
    with pytest.raises(SettingError, match="safe label"):
        GuardedModel(fit(ActivationFilter), 0.0, LABELS, safe_label=label)


def test_module_is_a_copy_that_stays_in_eval_mode():
    model = copy.deepcopy(trained(backdoored=True)).train()
    module = GuardedModel(fit(ActivationFilter, model), 0.0, LABELS).train()
    assert model.training
    assert not any(part.training for part in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    assert all(p.requires_grad for p in model.parameters())
    before, x = module(some())[0], some()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(module(x)[0], before)
    assert not any(part._forward_pre_hooks for part in module.modules())


@every_guard
def test_exported_answers_are_those_of_pytorch(guard, tmp_path):
    fitted = fit(guard)
    module = GuardedModel(fitted, fitted.threshold(0.05).value, LABELS, safe_label=1)
    program = export_program(module, some(2))
    assert write_program(program, module, some(3), tmp_path / "guarded.pt2") <= 1e-4
    assert write_onnx(program, module, some(3), tmp_path / "guarded.onnx", NAMES_OUT) <= 1e-4
    opened = torch.export.load(tmp_path / "guarded.pt2").module()  # our own file
    for count in (1, 7):  # any number of images
        wanted = module(some(count))
        for found in (opened(some(count)), run_onnx(tmp_path / "guarded.onnx", some(count))):
            torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=0)
            assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize("name", ["vit", "wrn-10-1"])
def test_features_behind_a_hook_are_exported_from_any_architecture(name):
    fitted = on_net(ActivationFilter, name)
    module, x = GuardedModel(fitted, fitted.threshold(0.1).value, 6), examples(5)[0]
    found = export_program(module, x[:2]).module()(x)
    for one, other in zip(found[:2], module(x)[:2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_model_that_cannot_be_exported_says_so():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 * SIDE * SIDE, 6)

        def forward(self, x):
            return self.layer(x.flatten(1) * (2 if float(x.sum()) > 0 else 1))

    x, y = examples(60)
    fitted = ScaleUp()(Branching(), Clean(x[:30], y[:30], x[30:], y[30:], 6), Run())
    with pytest.raises(ModelError, match="cannot be exported"):
        export_program(GuardedModel(fitted, 0.0, 6), x[:2])


def test_answers_that_differ_are_not_written(tmp_path):
    one, other = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    class Tuple(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return (self.inner(x),)

    x = torch.rand(2, 3, 2, 2)
    with pytest.raises(ModelError, match="answers differently"):
        write_onnx(export_program(Tuple(one), x), Tuple(other), x, tmp_path / "a.onnx", ["logits"])
    with pytest.raises(ModelError, match="answers differently"):
        write_program(export_program(Tuple(one), x), Tuple(other), x, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


# The verb.


@pytest.fixture(scope="module")
def guarded():
    return bezoar.guard(trained(backdoored=True), images(240, seed=7), method=STRIP(images=10), fpr=0.1)


@pytest.fixture(scope="module")
def scanned():
    return bezoar.scan(trained(backdoored=True), images(240, seed=7), seeds=1, additive=False)


def test_guard_says_what_its_threshold_rests_on(guarded):
    facts, report = guarded.facts, guarded.report
    assert (facts.method, facts.count, facts.num_classes) == ("strip", 120, LABELS)
    assert facts.flagged / facts.count <= facts.fpr == 0.1
    assert facts.low <= facts.flagged / facts.count <= facts.high
    assert report.latency.ratio > 1
    text = summary(report, 80)
    assert f"{facts.flagged} of 120 held-out images" in text
    assert "times the model alone" in text


def test_report_and_facts_survive_json(guarded):
    assert type(guarded.facts).from_json(guarded.facts.to_json()) == guarded.facts
    assert GuardReport.from_json(guarded.report.to_json()) == guarded.report
    for text in ("", "[]", '{"schema": "x"}', guarded.report.to_json()):
        with pytest.raises(DataError, match=r"guard\.json"):
            type(guarded.facts).from_json(text)


@every_guard
def test_guard_read_back_scores_the_same(guard, tmp_path, scanned):
    made = guard(images=10) if guard is STRIP else guard()
    model = trained(backdoored=True)
    first = bezoar.guard(
        model, images(240, seed=7), method=made, found=scanned, safe_label=3, policy="label", out=tmp_path
    )
    assert {path.name for path in tmp_path.iterdir()} == {"guard.json", "guard.safetensors", "report.json"}
    again = bezoar.load_guard(tmp_path, model)
    assert again.fitted.method == made
    assert again.facts == first.facts
    x = some(30)
    assert torch.equal(again.score(x), first.score(x))
    assert torch.equal(again.flags(x), first.flags(x))
    assert torch.equal(again.fitted.held, first.fitted.held)
    for one, other in zip(again.model()(x), first.model()(x), strict=True):
        assert torch.equal(one, other)


def test_guard_of_another_model_is_refused(guarded, tmp_path):
    guarded.save(tmp_path)
    with pytest.raises(SettingError, match="another model"):
        bezoar.load_guard(tmp_path, trained(backdoored=False))
    with pytest.raises(BezoarError, match="12x12"):
        bezoar.load_guard(tmp_path, make("normed"))  # takes other images


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda facts, _: facts.update(method="no-such-guard"), "no method"),
        (lambda facts, _: facts["config"].update(images=-1), "images"),
        (lambda facts, _: facts["config"].update(no_such_setting=1), "damaged"),
        (lambda facts, _: facts.update(surprise=1), "surprise"),
        (lambda facts, _: facts.update(shape=[3, 1 << 20, 1 << 20]), "images of shape"),
        (lambda facts, _: facts.update(shape=[3, 12]), "images of shape"),
        (lambda _, tensors: tensors.pop("held"), "damaged"),
        (lambda _, tensors: tensors.pop("probe.logits"), "damaged"),
    ],
)
def test_damaged_guard_is_refused(guarded, tmp_path, change, match):
    guarded.save(tmp_path)
    facts, tensors = json.loads((tmp_path / "guard.json").read_text()), load_file(tmp_path / "guard.safetensors")
    change(facts, tensors)
    (tmp_path / "guard.json").write_text(json.dumps(facts))
    save_file(tensors, tmp_path / "guard.safetensors")
    with pytest.raises((DataError, SettingError), match=match):
        bezoar.load_guard(tmp_path, trained(backdoored=True))


def test_folder_without_a_guard_is_refused(guarded, tmp_path):
    with pytest.raises(DataError, match="does not hold a guard"):
        bezoar.load_guard(tmp_path, trained(backdoored=True))
    guarded.save(tmp_path)
    (tmp_path / "guard.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="does not hold a guard"):
        bezoar.load_guard(tmp_path, trained(backdoored=True))


def test_guard_of_a_model_with_a_softmax_reads_its_logarithm(tmp_path):
    model = nn.Sequential(*copy.deepcopy(trained(backdoored=True)), nn.Softmax(1)).eval()
    first = bezoar.guard(model, images(240, seed=7), method=STRIP(images=10), out=tmp_path)
    assert first.facts.softmax
    assert torch.equal(bezoar.load_guard(tmp_path, model).score(some()), first.score(some()))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fpr": 0.001}, "needs at least 999 held-out"),
        ({"fpr": 1.5}, "fpr"),
        ({"policy": "label"}, "go together"),
        ({"safe_label": 1}, "go together"),
        ({"policy": "label", "safe_label": LABELS}, "safe label"),
        ({"onnx": True}, "needs a folder"),
        ({"label": 2}, "takes no label"),
        ({"method": "no-such-guard"}, "no method"),
        ({"no_such_setting": 1}, "unknown setting"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(SettingError, match=match):
        bezoar.guard(trained(backdoored=True), images(60, seed=7), **{"method": STRIP(images=2), **settings})


def test_guard_that_can_flag_nothing_warns():
    made = bezoar.guard(trained(backdoored=True), images(240, seed=7), method=ScaleUp(normalise=False))
    assert made.facts.flagged == 0
    assert any("flags nothing" in warning for warning in made.report.warnings)


def test_scans_where_it_needs_a_trigger_and_got_none():
    data = images(240, seed=7)
    made = bezoar.guard(trained(backdoored=True), data, method="activation-filter", seeds=1, additive=False)
    assert made.report.triggers == (TARGET,)
    assert not made.report.warnings
    x, y = images(200, seed=8)
    assert made.flags(trigger()(x[y != TARGET])).float().mean() > 0.9


def test_takes_the_trigger_of_a_label_at_will_but_not_from_a_clean_scan(scanned):
    data, model = images(240, seed=7), trained(backdoored=True)
    with pytest.raises(SettingError, match="no trigger of label 99"):
        bezoar.guard(model, data, method="activation-filter", found=scanned, label=99)
    made = bezoar.guard(model, data, method="activation-filter", found=scanned, label=0)
    assert made.report.triggers == (0,)
    nothing = dataclasses.replace(scanned.report, verdict="clean", target=None, searches=())
    with pytest.raises(SettingError, match="found no backdoor"):
        bezoar.guard(model, data, method="activation-filter", found=dataclasses.replace(scanned, report=nothing))
    with pytest.raises(SettingError, match="scan is of another model"):
        bezoar.guard(trained(backdoored=False), data, method="activation-filter", found=scanned)


# Drift.


def test_watch_counts_windows_that_do_not_overlap():
    watch = DriftWatch(0.04, 0.06, window=100)
    assert watch.update([False] * 99) == ()
    (first,) = watch.update(torch.zeros(1, dtype=torch.bool))
    assert (first.flagged, first.count, first.expected) == (0, 100, (0.04, 0.06))
    assert [one.count for one in watch.update([True] * 250)] == [100, 100]
    assert len(watch.update([True] * 50)) == 1


def test_watch_says_in_which_direction():
    watch = DriftWatch(0.02, 0.09, window=1000)
    random = np.random.default_rng(0)
    verdicts = {rate: watch.update(random.random(1000) < rate)[0].drifted for rate in (0.0, 0.05, 0.09, 0.2)}
    assert verdicts == {0.0: "below", 0.05: None, 0.09: None, 0.2: "above"}


def test_watch_pvalue_is_that_of_the_binomial_test():
    from scipy.stats import binomtest

    watch = DriftWatch(0.05, 0.05, window=200)
    (found,) = watch.update([True] * 20 + [False] * 180)
    one_sided = binomtest(20, 200, 0.05, alternative="greater").pvalue
    assert found.pvalue == pytest.approx(2 * one_sided)


@given(st.floats(0.0, 1.0).map(lambda rate: round(rate, 4)), st.integers(1, 60), st.sampled_from([0.001, 0.01, 0.1]))
def test_watch_gives_few_false_alarms(rate, window, alpha):
    from scipy.stats import binom

    watch = DriftWatch(rate, rate, window=window, alpha=alpha)
    judged = [watch._judge(count) for count in range(window + 1)]
    chance = binom.pmf(np.arange(window + 1), window, rate)
    assert sum(p for p, one in zip(chance, judged, strict=True) if one.drifted) <= alpha + 1e-9


@pytest.mark.parametrize(
    "settings", [{"low": 0.2}, {"high": 1.1}, {"low": -0.1}, {"window": 0}, {"alpha": 0.0}, {"alpha": 1.0}]
)
def test_watch_refuses_bad_settings(settings):
    with pytest.raises(SettingError):
        DriftWatch(**{"low": 0.04, "high": 0.1, **settings})


# The command.

DEMO = files("bezoar.demo").joinpath("assets")


def run(*tokens: object) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main([str(token) for token in tokens])
    return int(left.value.code or 0)


def test_command_guards_a_model_for_real_images(tmp_path, capsys):
    out, common = tmp_path / "guard", ["--arch", "nc-mnist", "--threads", "1"]
    code = run(
        *("guard", DEMO / "model.safetensors", "--data", DEMO / "clean.npz", "--out", out, *common),
        *("--method", "strip", "--set", "images=20", "--fpr", "0.1", "--onnx", "--program"),
    )
    shown = capsys.readouterr().out
    assert code == 0
    assert "strip watches the inputs" in shown
    assert {path.name for path in out.iterdir()} == {
        *("guard.json", "guard.safetensors", "report.json", "guarded.onnx", "guarded.pt2")
    }
    guarded = bezoar.load_guard(out, str(DEMO / "model.safetensors"), arch="nc-mnist")
    with np.load(str(DEMO / "clean.npz")) as arrays, np.load(str(DEMO / "truth.npz")) as truth:
        x = torch.from_numpy(arrays["x"][:60]).permute(0, 3, 1, 2)
        y, target = arrays["y"][:60], json.loads(DEMO.joinpath("truth.json").read_text())["target"]
        planted = MaskedTrigger(torch.from_numpy(truth["mask"]), torch.from_numpy(truth["pattern"]))
    bad = planted(x[torch.from_numpy(y != target)].float() / 255)
    assert guarded.flags(x).float().mean() < 0.25
    assert guarded.flags(bad).float().mean() > 0.7
    logits, score, flag = run_onnx(out / "guarded.onnx", bad[:9])
    wanted = guarded.model()(bad[:9])
    torch.testing.assert_close(logits, wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(score, wanted[1], atol=1e-4, rtol=0)
    assert torch.equal(flag, wanted[2])


def test_command_prints_json_and_explains_mistakes(tmp_path, capsys):
    common = [DEMO / "model.safetensors", "--data", DEMO / "clean.npz", "--arch", "nc-mnist", "--threads", "1"]
    options = ["--method", "scale-up", "--policy", "label", "--safe-label", "0", "--json"]
    assert run("guard", *common, *options, "--out", tmp_path / "a") == 0
    report = GuardReport.from_json(capsys.readouterr().out)
    assert (report.guard.method, report.guard.safe_label) == ("scale-up", 0)
    assert run("guard", *common, "--fpr", "0.0001", "--out", tmp_path / "b") == 2
    assert "held-out clean images" in capsys.readouterr().err
    assert run("guard", *common, "--method", "strip", "--set", "image=3", "--out", tmp_path / "b") == 2
    assert "images" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()

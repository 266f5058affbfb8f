"""What every method promises; a new method is held to it without a line of test code."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import random
import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bezoar
from bezoar.attacks._attack import Backdoored, Training
from bezoar.attacks._store import load_truth, save_truth
from bezoar.core.errors import BezoarError, BudgetSpent, SettingError, UnsupportedModel
from bezoar.core.evidence import Scan
from bezoar.core.examples import Examples
from bezoar.core.method import Clean
from bezoar.core.registry import methods
from bezoar.core.run import Run
from bezoar.ops.fit import Recipe
from bezoar.purifiers.auto import Auto
from scripts.make_method_docs import KINDS, arguments, sections
from tests.toys import LABELS, SIZE, TARGET, acc, asr, images, trained, trigger

METHODS = {f"{kind}/{name}": method for kind in KINDS for name, method in methods(kind).items()}
every_scanner = pytest.mark.parametrize("scanner", methods("scanners").values(), ids=methods("scanners").keys())
every_purifier = pytest.mark.parametrize("purifier", methods("purifiers").values(), ids=methods("purifiers").keys())
every_scorer = pytest.mark.parametrize("scorer", methods("scorers").values(), ids=methods("scorers").keys())
every_guard = pytest.mark.parametrize("guard", methods("guards").values(), ids=methods("guards").keys())
every_attack = pytest.mark.parametrize("attack", methods("attacks").values(), ids=methods("attacks").keys())
POISON = {name: attack for name, attack in methods("attacks").items() if hasattr(attack, "poison")}
every_poison_attack = pytest.mark.parametrize("attack", POISON.values(), ids=POISON.keys())
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def test_registry_finds_methods_of_every_kind():
    assert all(methods(kind) for kind in KINDS)


@every_method
def test_is_a_value(method):
    made = method()
    assert made == method()
    assert hash(made) == hash(method())
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


@every_method
def test_settings_are_given_by_name(method):
    if dataclasses.fields(method):
        with pytest.raises(TypeError):
            method(1)


@every_method
def test_repr_makes_it_again(method):
    names = {one.__name__: one for one in METHODS.values()}
    assert eval(repr(method()), names) == method()


@every_method
def test_settings_survive_json(method):
    read = json.loads(json.dumps(dataclasses.asdict(method()), allow_nan=False))
    again = method(**{name: tuple(value) if isinstance(value, list) else value for name, value in read.items()})
    assert again == method()


@every_method
def test_unknown_setting_is_refused(method):
    with pytest.raises(TypeError, match="no_such_setting"):
        method(no_such_setting=1)


@every_method
def test_docstring_explains_every_setting(method):
    explained = arguments(method)
    assert [f.name for f in dataclasses.fields(method) if not explained.get(f.name)] == []


@every_method
def test_docstring_has_a_summary_and_a_reference(method):
    parts = sections(method.__dict__.get("__doc__") or "")
    summary = parts[""].partition("\n\n")[0]
    assert summary.endswith("."), summary
    assert re.search(r"\b(19|20)\d\d\b", parts.get("References", "")), "name the paper with its year"


@pytest.mark.parametrize(("identifier", "method"), METHODS.items())
def test_name_is_the_class_name_in_kebab_case(identifier, method):
    name = identifier.partition("/")[2]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert name.replace("-", "") == method.__name__.lower()


# What every method promises for the caller's model and for its own answer.


@dataclasses.dataclass
class State:
    """Everything of the caller that a method could disturb."""

    weights: dict[str, torch.Tensor]
    modules: list[tuple[str, bool, tuple[int, ...]]]
    parameters: list[tuple[str, bool, bool]]
    randomness: tuple[Any, ...]
    torch_state: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        numpy_state = np.random.get_state()
        return cls(
            weights={name: value.clone() for name, value in model.state_dict().items()},
            modules=[(n, m.training, tuple(len(getattr(m, h)) for h in hooks)) for n, m in model.named_modules()],
            parameters=[(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
            randomness=(random.getstate(), torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2]),
            torch_state=(torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
        )


def assert_undisturbed(before: State, model: nn.Module) -> None:
    after = State.of(model)
    assert before.weights.keys() == after.weights.keys()
    changed = [name for name, value in before.weights.items() if not torch.equal(value, after.weights[name])]
    assert changed == []
    assert before.modules == after.modules, "train or eval mode, or hooks"
    assert before.parameters == after.parameters, "requires_grad or grad"
    assert before.randomness == after.randomness, "global random state"
    assert before.torch_state == after.torch_state, "grad mode, default type or threads"


class Failing(nn.Module):
    """Answers, until a gradient is wanted for the third time, or anything at all once too often."""

    def __init__(self, module: nn.Module, most: float = float("inf")) -> None:
        super().__init__()
        self.module, self.calls, self.answers, self.most = module, [0], [0], most

    def forward(self, x):
        self.calls[0] += x.requires_grad or any(p.requires_grad for p in self.parameters()) and torch.is_grad_enabled()
        self.answers[0] += 1
        if self.calls[0] > 2 or self.answers[0] > self.most:
            raise RuntimeError("the model broke")
        return self.module(x)


@pytest.fixture(scope="module")
def clean_data():
    return images(240, seed=7)


def clean(data: tuple[torch.Tensor, torch.Tensor]) -> Clean:
    x, y = data
    return Clean(x=x[:180], y=y[:180], held_x=x[180:], held_y=y[180:], num_classes=LABELS)


def suspect(backdoored: bool = True) -> nn.Module:
    """A copy that a test may change."""
    return copy.deepcopy(trained(backdoored=backdoored))


def test_toys_are_what_they_claim(clean_data):
    assert asr(trained(backdoored=True), *clean_data) > 0.95
    assert asr(trained(backdoored=False), *clean_data) < 0.1
    assert min(acc(trained(backdoored=b), *clean_data) for b in (True, False)) > 0.95


#: Most of each in a search that takes no gradient and so asks the more.
FEW = {"screened": 1000, "population": 12, "generations": 8, "rounds": 4, "iterations": 50, "batches": 5}


#: Still fewer, where a test asks how a scanner behaves, not what it finds.
FEWER = FEW | {"seeds": 1, "steps": 12, "screened": 100, "generations": 4}


def short(scanner: type, most: dict[str, int] = FEW) -> Any:
    """A scanner with its defaults, but for those that only take long."""
    return scanner(**{f.name: most[f.name] for f in dataclasses.fields(scanner) if f.name in most})


@pytest.fixture(scope="module")
def evidence(clean_data):
    """What each scanner says about the backdoored toy, scanned once."""

    @functools.cache
    def scanned(scanner: type) -> Scan:
        return short(scanner)(suspect(), clean(clean_data), Run(seed=3))

    return scanned


@every_scanner
def test_scanner_ranks_the_planted_target_first(scanner, evidence):
    found = evidence(scanner)
    sizes = {label: found.median(label, "size") for label in found.looked_at()}
    assert sizes.keys() == set(range(LABELS))
    assert min(sizes, key=sizes.__getitem__) == TARGET
    assert found.median(TARGET, "asr") > 0.9


@every_scanner
def test_evidence_is_in_range(scanner, evidence):
    for seed in evidence(scanner).seeds:
        for one in seed.labels.values():
            assert 0 <= one.size <= evidence(scanner).whole
            assert 0 <= one.asr <= 1
            x = torch.rand(2, 3, SIZE, SIZE)
            stamped = one.trigger(x)
            assert stamped.shape == x.shape
            assert 0 <= float(stamped.min()) <= float(stamped.max()) <= 1
            assert not torch.equal(stamped, x)


@every_scanner
def test_scanner_same_seed_same_evidence(scanner, evidence, clean_data):
    torch.manual_seed(99)  # another state of the global generators must not matter
    again = short(scanner)(suspect(), clean(clean_data), Run(seed=3))
    first = evidence(scanner)
    for one, other in zip(first.seeds, again.seeds, strict=True):
        assert {k: (v.size, v.asr, v.status) for k, v in one.labels.items()} == {
            k: (v.size, v.asr, v.status) for k, v in other.labels.items()
        }


@every_scanner
@pytest.mark.parametrize("training", [False, True])
def test_scanner_leaves_the_model_as_it_was(scanner, training, clean_data):
    model = suspect().train(training)
    model[0].weight.requires_grad_(False)
    before = State.of(model)
    short(scanner, FEWER)(model, clean(clean_data), Run())
    assert_undisturbed(before, model)


@every_scanner
def test_scanner_leaves_the_model_as_it_was_after_a_failure(scanner, clean_data):
    model = Failing(suspect(), most=20).eval()  # some scanners want no gradient
    before = State.of(model)
    with pytest.raises((RuntimeError, BezoarError), match="the model broke"):
        short(scanner, FEWER)(model, clean(clean_data), Run())
    assert_undisturbed(before, model)


@every_scanner
def test_scanner_stops_when_the_budget_is_spent(scanner, clean_data):
    run = Run(budget=0.0)
    started = time.monotonic()
    with contextlib.suppress(BudgetSpent):
        scanner()(suspect(), clean(clean_data), run)
    assert run.budget_spent
    assert time.monotonic() - started < 10


#: Most of each where a test asks how a scorer behaves, not what it finds.
HASTY = {"steps": 6, "starts": 2, "rounds": 3, "patience": 2, "pairs": 2, "epochs": 2, "channels": 8, "neurons": 3}


def hasty(scorer: type) -> Any:
    """A scorer with its defaults, but for those that only take long."""
    made = scorer()
    caps = {f.name: min(getattr(made, f.name), HASTY[f.name]) for f in dataclasses.fields(made) if f.name in HASTY}
    return dataclasses.replace(made, **caps)


@every_scorer
@pytest.mark.parametrize("training", [False, True])
def test_scorer_leaves_the_model_as_it_was(scorer, training, clean_data):
    model = suspect().train(training)
    model[0].weight.requires_grad_(False)
    before = State.of(model)
    hasty(scorer)(model, clean(clean_data), Run())
    assert_undisturbed(before, model)


@every_scorer
def test_scorer_leaves_the_model_as_it_was_after_a_failure(scorer, clean_data):
    model = Failing(suspect(), most=3).eval()
    before = State.of(model)
    with pytest.raises((RuntimeError, BezoarError), match="the model broke"):
        hasty(scorer)(model, clean(clean_data), Run())
    assert_undisturbed(before, model)


@every_scorer
def test_scorer_same_seed_same_scores_in_range(scorer, clean_data):
    first = hasty(scorer)(suspect(), clean(clean_data), Run(seed=3))
    torch.manual_seed(99)
    again = hasty(scorer)(suspect(), clean(clean_data), Run(seed=3))
    assert (first.labels, first.pairs, first.model) == (again.labels, again.pairs, again.model)
    assert first.labels.keys() <= set(range(LABELS))
    assert first.leader in first.labels
    assert all(np.isfinite([*first.labels.values(), *first.pairs.values(), first.model]))
    assert first.pvalue is None or 0 <= first.pvalue <= 1
    assert first.meaning


@every_scorer
def test_scorer_stops_when_the_budget_is_spent(scorer, clean_data):
    run, started = Run(budget=0.0), time.monotonic()
    with pytest.raises(BudgetSpent):
        scorer()(suspect(), clean(clean_data), run)
    assert run.budget_spent
    assert time.monotonic() - started < 10


@every_scorer
def test_scorer_without_data_looks_at_no_image(scorer):
    if scorer.needs_clean:
        pytest.skip("it looks at clean images")
    x, y = torch.empty(180, 3, SIZE, SIZE, device="meta"), torch.empty(180, dtype=torch.long, device="meta")
    hasty(scorer)(suspect(), Clean(x=x, y=y, held_x=x, held_y=y, num_classes=LABELS), Run())


@every_purifier
@pytest.mark.parametrize("backdoored", [True, False])
def test_purifier_helps_and_does_little_harm(purifier, backdoored, clean_data):
    original, held_out = suspect(backdoored), images(300, seed=8)
    purified = purify(purifier, suspect(backdoored), clean_data, short=False)
    assert acc(purified, *held_out) > acc(original, *held_out) - 0.05
    assert asr(purified, *held_out) <= asr(original, *held_out) + 0.02
    if purifier.needs_triggers:
        assert asr(purified, *held_out) < 0.2


@every_purifier
def test_purifier_keeps_the_form_of_the_model(purifier, clean_data):
    model = suspect()
    model[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before, randomness = model.state_dict(), State.of(model).randomness
    shapes = {name: (value.shape, value.dtype) for name, value in before.items()}
    purified = purify(purifier, model, clean_data)
    assert {name: (value.shape, value.dtype) for name, value in purified.state_dict().items()} == shapes
    assert all(torch.isfinite(value).all() for value in purified.state_dict().values())
    assert not any(module.training for module in purified.modules())
    assert [p.requires_grad for p in purified.parameters()] == flags
    assert State.of(purified).randomness == randomness
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in purified.modules())


@every_purifier
def test_purifier_same_seed_same_weights(purifier, clean_data):
    first = purify(purifier, suspect(), clean_data).state_dict()
    torch.manual_seed(99)
    second = purify(purifier, suspect(), clean_data).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


#: Most of each: where a test asks what good or harm a purifier does, and where it asks only how it behaves.
LONG = {"steps": 80}
SHORT = {"epochs": 2, "steps": 12, "rounds": 2, "teacher_epochs": 2, "unlearn_epochs": 4, "recover_epochs": 2}


def purify(purifier: type, model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], short: bool = True) -> nn.Module:
    made, caps = purifier(), SHORT if short else LONG
    most = {f.name: min(getattr(made, f.name), caps[f.name]) for f in dataclasses.fields(made) if f.name in caps}
    made = dataclasses.replace(made, **most)
    triggers = {TARGET: trigger()} if purifier.needs_triggers else None
    try:
        return made(model, dataclasses.replace(clean(data), suspects=suspects(purifier)), Run(seed=3), triggers)
    except UnsupportedModel as refusal:  # such as a method for residual networks: its own tests hold it to the same
        assert refusal.hint
        pytest.skip(str(refusal))


def suspects(purifier: type) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Poisoned training examples, for a purifier that needs some."""
    x, y = images(200, seed=55)
    x = trigger()(x[y != TARGET])
    return (x, torch.full((len(x),), TARGET)) if purifier.needs_suspects else None


class Forbidden:
    """Must not be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a purifier looked at .{name} of what only measures")

    def __len__(self) -> int:
        raise AssertionError("a purifier counted what only measures")


@pytest.mark.parametrize(
    "purifier", [pytest.param(p, id=name) for name, p in methods("purifiers").items() if name != "auto"]
)
def test_purifier_sees_nothing_but_the_images_to_work_with(purifier, clean_data):
    """``auto`` alone judges by held-out images; its own tests show that the methods it tries do not see them."""
    made = purifier()
    made = dataclasses.replace(made, **{f.name: SHORT[f.name] for f in dataclasses.fields(made) if f.name in SHORT})
    blind = dataclasses.replace(clean(clean_data), held_x=Forbidden(), held_y=Forbidden(), suspects=suspects(purifier))
    triggers = {TARGET: trigger()} if purifier.needs_triggers else None
    with contextlib.suppress(UnsupportedModel):
        made(suspect(), blind, Run(seed=3), triggers)


@every_purifier
def test_purifier_without_its_trigger_says_so(purifier, clean_data):
    if purifier.needs_triggers:
        with pytest.raises(SettingError, match="trigger"):
            purifier()(suspect(), clean(clean_data), Run())


@every_purifier
def test_purifier_without_its_suspects_says_so(purifier, clean_data):
    if purifier.needs_suspects:
        with pytest.raises(SettingError, match="thought to be poisoned"):
            purifier()(suspect(), clean(clean_data), Run())


def guarded(guard: type, model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], run: Run | None = None) -> Any:
    return guard()(model, clean(data), run or Run(seed=3), {TARGET: trigger()} if guard.needs_triggers else None)


@every_guard
@pytest.mark.parametrize("training", [False, True])
def test_guard_leaves_the_model_as_it_was(guard, training, clean_data):
    model = suspect().train(training)
    model[0].weight.requires_grad_(False)
    before = State.of(model)
    fitted = guarded(guard, model, clean_data)
    assert_undisturbed(before, model)
    fitted.score(clean_data[0][:9])
    assert_undisturbed(before, model)


@every_guard
def test_guard_leaves_the_model_as_it_was_after_a_failure(guard, clean_data):
    model = Failing(suspect(), most=3).eval()
    before = State.of(model)
    with pytest.raises((RuntimeError, BezoarError), match="the model broke"):
        guarded(guard, model, clean_data)
    assert_undisturbed(before, model)


@every_guard
def test_guard_same_seed_same_scores(guard, clean_data):
    first = guarded(guard, suspect(), clean_data)
    torch.manual_seed(99)
    again = guarded(guard, suspect(), clean_data)
    assert torch.equal(first.held, again.held)
    x = trigger()(clean_data[0][:40])
    assert torch.equal(first.score(x), again.score(x))
    assert bool((first.score(x) <= first.method.highest(first.state)).all())


@every_guard
def test_guard_measures_its_threshold_on_what_it_was_not_fitted_to(guard, clean_data):
    state = guarded(guard, suspect(), clean_data).state
    x, y = clean_data[0].clone(), clean_data[1].clone()
    x[180:], y[180:] = 0.5, 0
    other = guarded(guard, suspect(), (x, y)).state
    assert all(torch.equal(value, other[name]) for name, value in state.items())


@every_guard
def test_guard_without_its_trigger_says_so(guard, clean_data):
    if guard.needs_triggers:
        with pytest.raises(SettingError, match="trigger"):
            guard()(suspect(), clean(clean_data), Run())


@every_guard
def test_guard_stops_when_the_budget_is_spent(guard, clean_data):
    run = Run(budget=0.0)
    with pytest.raises(BudgetSpent):
        guarded(guard, suspect(), clean_data, run)
    assert run.budget_spent


# What every attack promises.

ATTACK_LABELS = 10  # the defaults of some attacks name classes up to 7


def attack_data() -> Examples:
    """Images whose mean tells the class; the tiny net learns them in an epoch or two."""
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(200) % ATTACK_LABELS
    x = torch.randint(0, 60, (200, 3, 32, 32), generator=generator) + 19 * y.view(-1, 1, 1, 1)
    return Examples(x.to(torch.uint8), y, ATTACK_LABELS)


def tiny_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, ATTACK_LABELS)),
    )


def attack_training() -> Training:
    return Training(tiny_net, Recipe(epochs=1, batch=40, lr=1e-2, optimizer="adam"), Run(seed=3))


@functools.cache
def victim_of(attack: type) -> Backdoored:
    """The victim of an attack with its defaults, trained once; do not change it."""
    return attack()(attack_data(), attack_training())


def images_under_attack(count: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.rand(count, 3, 32, 32, generator=generator)


@every_attack
def test_attack_leaves_the_data_and_the_random_state_as_they_were(attack):
    data, untouched = attack_data(), attack_data()
    before = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    victim = attack()(data, attack_training())
    assert (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before
    assert torch.equal(data.x, untouched.x)
    assert torch.equal(data.y, untouched.y)
    again = victim_of(attack)
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in victim.model.state_dict().items()), "same seed"
    assert torch.equal(victim.index, again.index)
    assert torch.equal(victim.cover, again.cover)


@every_attack
def test_victim_is_a_classifier_in_eval_mode(attack):
    victim = victim_of(attack)
    assert not any(module.training for module in victim.model.modules())
    with torch.no_grad():
        logits = victim.model(images_under_attack())
    assert logits.shape == (24, ATTACK_LABELS)
    assert bool(torch.isfinite(logits).all())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in victim.model.modules())


@every_attack
def test_index_and_cover_are_positions_ascending_and_apart(attack):
    victim = victim_of(attack)
    for positions in (victim.index, victim.cover):
        assert positions.dtype == torch.int64
        assert positions.tolist() == sorted(set(positions.tolist()))
        assert all(0 <= place < 200 for place in positions.tolist())
    assert not set(victim.index.tolist()) & set(victim.cover.tolist())


@every_attack
def test_triggers_keep_shape_and_range_and_are_functions_of_the_image(attack):
    x = images_under_attack()
    for plant in victim_of(attack).truth.plants:
        with torch.no_grad():
            out = plant.trigger(x)
            assert out.shape == x.shape
            assert out.dtype == x.dtype
            assert 0 <= float(out.min()) <= float(out.max()) <= 1
            assert float((out - x).flatten(1).abs().amax(1).min()) > 0, "every image is changed"
            assert torch.equal(x, images_under_attack()), "but not in place"
            assert torch.equal(plant.trigger(x), out)
            alone = torch.cat([plant.trigger(one) for one in x.split(1)])
        torch.testing.assert_close(alone, out, rtol=0, atol=1e-4)


@every_attack
def test_ground_truth_goes_to_disk_and_back(attack, tmp_path):
    truth, x = victim_of(attack).truth, images_under_attack()
    save_truth(truth, tmp_path)
    read = load_truth(tmp_path)
    assert len(read.plants) == len(truth.plants)
    y = torch.arange(ATTACK_LABELS)
    for one, other in zip(truth.plants, read.plants, strict=True):
        assert (one.name, one.labels) == (other.name, other.labels)
        assert torch.equal(one.labels(y), other.labels(y))
        with torch.no_grad():
            torch.testing.assert_close(one.trigger(x), other.trigger(x), rtol=0, atol=1e-6)


@every_poison_attack
def test_poison_changes_a_copy_where_it_says(attack):
    made, data = attack(), attack_data()
    poisoned = made.poison(data, attack_training())
    assert torch.equal(data.x, attack_data().x)
    assert torch.equal(data.y, attack_data().y)
    assert torch.equal(poisoned.index, victim_of(attack).index)
    assert poisoned.data.x.dtype == torch.uint8
    assert poisoned.data.num_classes == ATTACK_LABELS
    assert len(poisoned.index) > 0
    changed = (poisoned.data.x != data.x).flatten(1).any(1).nonzero().flatten()
    assert set(changed.tolist()) == {*poisoned.index.tolist(), *poisoned.cover.tolist()}
    relabelled = (poisoned.data.y != data.y).nonzero().flatten().tolist()
    if getattr(made, "clean_label", False):
        assert relabelled == []
        assert set(data.y[poisoned.index].tolist()) == {made.target}
    else:
        assert relabelled == poisoned.index.tolist()
        wanted = torch.stack([plant.labels(data.y) for plant in poisoned.truth.plants])
        assert bool((wanted == poisoned.data.y)[:, poisoned.index].any(0).all())


@every_attack
@pytest.mark.parametrize("settings", [{"target": -1}, {"target": ATTACK_LABELS}])
def test_target_that_is_no_label_is_refused(attack, settings):
    with pytest.raises(SettingError):
        attack(**settings)(attack_data(), attack_training())


# What the front door promises, whatever runs behind it.


@pytest.fixture(scope="module")
def report(clean_data):
    return bezoar.scan(trained(backdoored=True), clean_data).report


#: A verb with its usual method, briefly.
BRIEF: dict[str, dict[str, Any]] = {"scan": {"seeds": 1}, "purify": {"method": Auto(epochs=2), "seeds": 1}}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("verb", ["scan", "purify"])
def test_callers_model_comes_back_as_it_was(verb, training, clean_data):
    model = trained(backdoored=True).train(training)
    before = State.of(model)
    try:
        getattr(bezoar, verb)(model, clean_data, **BRIEF[verb])
        assert_undisturbed(before, model)
    finally:
        model.eval()


@pytest.mark.parametrize("verb", ["scan", "purify"])
def test_callers_model_comes_back_after_a_failure(verb, clean_data):
    model = Failing(trained(backdoored=True)).eval()
    before = State.of(model)
    with pytest.raises((RuntimeError, BezoarError), match="the model broke"):
        getattr(bezoar, verb)(model, clean_data)
    assert_undisturbed(before, model)


def test_callers_data_stays_as_it_was(clean_data):
    x, y = clean_data[0].clone(), clean_data[1].clone()
    bezoar.scan(trained(backdoored=True), (x, y), seeds=1)
    assert torch.equal(x, clean_data[0])
    assert torch.equal(y, clean_data[1])


def test_backdoored_toy_is_found(report):
    assert (report.verdict, report.target) == ("backdoored", TARGET)


def test_clean_toy_is_not_called_backdoored(clean_data):
    assert bezoar.scan(trained(backdoored=False), clean_data).verdict != "backdoored"


def test_evidence_is_finite_and_complete(report):
    assert [one.label for one in report.labels] == list(range(LABELS))
    for one in report.labels:
        assert all(np.isfinite([one.size, one.fraction, one.asr, one.index]))
        assert 0 <= one.fraction <= 1
        assert 0 <= one.asr <= 1


def test_same_seed_same_answer(report, clean_data):
    torch.manual_seed(99)  # another state of the global generators must not matter
    again = bezoar.scan(trained(backdoored=True), clean_data).report
    assert again.stable() == report.stable()


def test_purified_toy_has_lost_the_backdoor(clean_data):
    purified, _ = bezoar.purify(trained(backdoored=True), clean_data)
    held_out = images(300, seed=8)
    assert asr(purified, *held_out) < 0.2
    assert acc(purified, *held_out) > acc(trained(backdoored=True), *held_out) - 0.05

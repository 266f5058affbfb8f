"""ABL: the floor under the loss, what is isolated, what is unlearned, and that nothing is where nothing is poisoned."""

from __future__ import annotations

import copy
import functools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import DataError, SettingError
from bezoar.core.examples import Examples, Subset
from bezoar.core.run import Run
from bezoar.core.training import Trained
from bezoar.ops.fit import Recipe, fit
from bezoar.ops.isolation import Isolating, Over, Watcher, floored, isolated_count
from bezoar.ops.losses import Curves, losses_of
from bezoar.trainers._ascent import Joint, Unlearning, raised
from bezoar.trainers._guard import Guard, slow
from bezoar.trainers.abl import ABL, _Parts, candidates, drawn, hardly_tied
from tests.toys import LABELS, SIZE, TARGET, acc, asr, images, net, trigger
from tests.toys import trained as toy

QUICK = {"batch": 50, "pad": 0, "lr": 0.05, "schedule": "onecycle", "epochs": 5, "isolation_epochs": 3}
POISONED = 90


def hard(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The toy under noise, so that it is not learned as quickly as the trigger."""
    x, y = images(count, seed)
    return 0.3 * x + 0.7 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + 99)), y


@functools.cache
def examples(poisoned: bool = True) -> Examples:
    x, y = hard(900, seed=3)
    if poisoned:
        rows = poison()
        x[rows], y[rows] = trigger()(x[rows]), TARGET
    return Examples(x, y, LABELS)


def poison() -> torch.Tensor:
    """Positions of the poisoned examples: none is of the target class before."""
    return (torch.arange(900) % LABELS != TARGET).nonzero().flatten()[::8][:POISONED]


@functools.cache
def trained(poisoned: bool = True, **more: object) -> tuple[Trained, Run]:
    run = Run(seed=1)
    return ABL(**QUICK | {"rate": 0.05} | more)(lambda: net(0), examples(poisoned), run), run


# The floor.


@pytest.mark.parametrize(
    ("loss", "how", "expected"),
    [
        (0.1, "lga", -0.1),
        (0.1, "lga-batch", -0.1),
        (0.1, "flooding", 0.9),
        (1.2, "lga", 1.2),
        (1.2, "lga-batch", 1.2),
        (1.2, "flooding", 1.2),
    ],
)
def test_values_of_the_floor(loss, how, expected):
    """Verify (a)."""
    assert float(floored(torch.tensor([loss]), 0.5, how)) == pytest.approx(expected)


@pytest.mark.parametrize("how", ["lga", "lga-batch", "flooding"])
@pytest.mark.parametrize(("logit", "sign"), [(2.25, -1.0), (-0.84, 1.0)], ids=["below", "above"])
def test_gradient_turns_below_the_floor(how, logit, sign):
    """Verify (a): the loss is about 0.1 and 1.2."""
    z = torch.tensor([[logit, 0.0]], requires_grad=True)
    losses = F.cross_entropy(z, torch.tensor([0]), reduction="none")
    (plain,) = torch.autograd.grad(losses.mean(), z, retain_graph=True)
    (found,) = torch.autograd.grad(floored(losses, 0.5, how), z)
    torch.testing.assert_close(found, sign * plain)


def test_the_paper_turns_examples_and_the_code_turns_batches():
    losses = torch.tensor([0.1, 1.2], requires_grad=True)
    for how, expected in (("lga", [-0.5, 0.5]), ("lga-batch", [0.5, 0.5]), ("flooding", [0.5, 0.5])):
        (found,) = torch.autograd.grad(floored(losses, 0.5, how), losses)
        assert found.tolist() == expected, how


@pytest.mark.parametrize("how", ["lga", "lga-batch", "flooding"])
def test_without_a_floor_it_is_plain_training(how):
    """Verify (b)."""
    data, recipe = examples(), Recipe(epochs=1, batch=50, lr=0.002)
    plain, found = net(0), net(0)
    fit(plain, data.x, data.labels, recipe, seed=4)
    fit(
        found,
        data.x,
        data.labels,
        recipe,
        seed=4,
        objective=Isolating(how, 0.0, Watcher(lambda model, done: None)),
    )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)
    start = net(0).state_dict()
    assert any(not torch.allclose(value, start[name], atol=1e-2) for name, value in plain.state_dict().items())


# What is isolated.


@given(st.integers(1, 10**6), st.integers(1, 9999))
def test_count_is_the_whole_part(count, parts):
    rate = parts / 10_000
    expected = count * parts // 10_000
    if expected:
        assert isolated_count(rate, count) == expected == int(Fraction(parts, 10_000) * count)
    else:
        with pytest.raises(DataError, match="is none"):
            isolated_count(rate, count)


def test_count_trusts_no_rounding():
    """Verify (d): 0.29 * 100 is 28.999... in floating point."""
    assert int(0.29 * 100) == 28
    assert isolated_count(0.29, 100) == 29
    assert isolated_count(0.01, 50_000) == 500


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(LABELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(len(x), -1)


def test_equal_losses_are_isolated_in_order():
    """Verify (d)."""
    data = Examples(torch.rand(60, 3, SIZE, SIZE), torch.zeros(60, dtype=torch.int64), LABELS)
    quick = ABL(rate=0.1, isolation_epochs=1, epochs=1, unlearn_epochs=0, lr=0.01, optimizer="sgd", pad=0)
    assert quick(Constant, data, Run()).suspects.tolist() == [0, 1, 2, 3, 4, 5]


def test_poison_is_isolated():
    """Verify (c), on the toy."""
    found, run = trained()
    assert len(found.suspects) == 45 == run.notes["isolated"]
    assert float(torch.isin(found.suspects, poison()).float().mean()) >= 0.95
    assert (run.notes["isolated_label"], run.notes["isolated_share"]) == (TARGET, pytest.approx(1.0, abs=0.05))


def test_losses_are_kept_and_rank_the_suspects():
    found, run = trained()
    assert found.losses is not None
    assert found.losses.shape == (run.notes["isolation_epochs"] + 1, 900)
    assert float(found.losses[0].mean()) == pytest.approx(torch.log(torch.tensor(float(LABELS))), abs=0.5)
    assert torch.equal(found.losses[-1].argsort(stable=True)[:45], found.suspects)
    rest = torch.ones(900, dtype=torch.bool)
    rest[found.suspects] = False
    assert float(found.losses[-1][found.suspects].max()) <= float(found.losses[-1][rest].min())


def test_isolation_ends_where_the_floor_is_reached():
    found, run = trained(isolation_epochs=8)
    assert run.notes["isolation_epochs"] < 8
    assert float(found.losses[-1].median()) <= 0.5 < float(found.losses[-2].median())
    _, run = trained(isolation_epochs=4, until_floor=False, epochs=1, unlearn_epochs=0)
    assert run.notes["isolation_epochs"] == 4
    assert "unlearned" not in run.notes


def test_losses_are_those_of_eval_mode_and_leave_the_model_alone():
    model, data = net(0).train(), examples()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = losses_of(model, data, Run())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(data.x), data.labels, reduction="none")
    torch.testing.assert_close(found, expected)


def test_curves_come_back_from_the_file(tmp_path):
    path = tmp_path / "losses.npy"
    Curves(3, 5, path).record(1, torch.arange(5.0))
    again = Curves(3, 5, path)
    assert again.table[1].tolist() == [0, 1, 2, 3, 4]
    assert again.table[0].isnan().all()
    path.write_bytes(b"damaged")
    assert Curves(3, 5, path).table.isnan().all()
    assert Curves(2, 5, path).table.shape == (2, 5)


# What is unlearned.


def parts_of(isolated: torch.Tensor, poisoned: torch.Tensor, data: Examples, **guard: float) -> _Parts:
    """The toy that :func:`tests.toys.trained` learned, divided as though these examples had been isolated."""
    rest = torch.ones(len(data.labels), dtype=torch.bool)
    rest[isolated] = False
    genuine = (rest & ~poisoned).nonzero().flatten()
    watched = drawn(data.labels, genuine, 0.3, torch.Generator().manual_seed(0))
    bounds = {"drop": 0.02, "label_drop": 0.25} | guard
    return _Parts(
        isolated=Subset(data, isolated),
        rest=Subset(data, rest.nonzero().flatten()),
        genuine=Subset(data, genuine[~torch.isin(genuine, watched)]),
        guard=Guard(Subset(data, watched), Run(), **bounds),
    )


@functools.cache
def easy() -> tuple[Examples, torch.Tensor, torch.Tensor]:
    """What ``trained(backdoored=True)`` learned, which examples are poisoned, and which of them had another label."""
    x, y = images(900, seed=100)
    poisoned = torch.zeros(900, dtype=torch.bool)
    poisoned[::7] = True
    moved = (poisoned & (y != TARGET)).nonzero().flatten()
    x[poisoned], y[poisoned] = trigger()(x[poisoned]), TARGET
    return Examples(x, y, LABELS), poisoned, moved


def test_backdoor_is_unlearned():
    data, poisoned, moved = easy()
    model, run, held_out = copy.deepcopy(toy(backdoored=True)), Run(seed=1), images(300, seed=8)
    assert asr(model, *held_out) > 0.9
    ABL(batch=50, unlearn_epochs=6)._unlearn(model, parts_of(moved[:45], poisoned, data), run, None)
    assert asr(model.eval(), *held_out) < 0.1
    assert acc(model, *held_out) > 0.97
    assert run.notes["unlearned"]
    assert run.notes["isolated_accuracy"] <= 0.1
    assert run.warnings == []


def test_genuine_examples_are_not_unlearned():
    data, poisoned, _ = easy()
    model, run = copy.deepcopy(toy(backdoored=True)), Run(seed=1)
    genuine = (~poisoned & (data.labels == 1)).nonzero().flatten()[:45]
    ABL(batch=50, unlearn_epochs=4)._unlearn(model, parts_of(genuine, poisoned, data), run, None)
    for name, value in toy(backdoored=True).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not run.notes["unlearned"]


def test_without_the_guard_they_would_be():
    """The test above can fail: this is what the guard is for."""
    data, poisoned, _ = easy()
    model, run = copy.deepcopy(toy(backdoored=True)), Run(seed=1)
    genuine = (~poisoned & (data.labels == 1)).nonzero().flatten()[:45]
    parts = parts_of(genuine, poisoned, data, drop=1.0, label_drop=1.0)
    ABL(batch=50, unlearn_epochs=2)._unlearn(model, parts, run, None)
    assert run.notes["unlearned"]
    assert acc(model.eval(), *images(300, seed=8)) < 0.9


def test_candidates_are_the_isolated_and_the_lowest_losses_of_each_label():
    losses = torch.tensor([0.1, 0.2, 0.5, 0.6, 0.3, 0.4, 0.35, 0.9])
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    found = candidates(losses, labels, torch.tensor([0, 1]))
    assert [rows.tolist() for rows in found] == [[0, 1], [0], [4, 6], [2]]
    assert [rows.tolist() for rows in candidates(losses, labels, torch.tensor([0]))] == [[0], [4], [2]], "not twice"


def test_mixed_isolation_does_not_keep_the_poison():
    """Half of what is isolated is genuine, of another label: the group of the poisoned label alone is unlearned."""
    data, poisoned, moved = easy()
    model, run, held_out = copy.deepcopy(toy(backdoored=True)), Run(seed=1), images(300, seed=8)
    genuine = (~poisoned & (data.labels == 1)).nonzero().flatten()
    losses = torch.ones(900)
    isolated = torch.cat([moved[:20], genuine[:20]])
    losses[isolated] = torch.linspace(0, 0.01, 40)
    losses[moved[20:]] = 0.1
    parts = parts_of(isolated, poisoned, data)
    method = ABL(batch=50, unlearn_epochs=8)
    found = method._forget(model, losses, isolated, parts, run, None)
    assert run.notes["unlearned"]
    assert set(data.labels[found].tolist()) == {TARGET}
    assert bool(poisoned[found].all())
    assert run.notes["ties"][str(TARGET)] < 0.6 < run.notes["ties"]["1"]
    assert asr(model.eval(), *held_out) < 0.1
    assert acc(model, *held_out) > 0.95


@pytest.mark.parametrize(
    ("ties", "loose"),
    [
        ([0.2, 0.7, 0.75, 0.8, 0.85, 0.9], [0]),
        ([0.7, 0.75, 0.8, 0.85, 0.9, 1.2], []),
        ([0.45, 0.5, 0.55, 0.8, 0.85, 0.9], []),  # low, but not apart from the others
        ([0.2, 0.25, 0.7, 0.75, 0.8, 0.85, 0.9], [0, 1]),
        ([0.9, 0.99, 1.0, 1.0, 1.0, 1.0], []),  # apart, but not low
        ([0.2, 0.9], [0]),
        ([float("inf"), 0.9, float("inf")], []),
        ([float("inf")], []),
        ([], []),
    ],
    ids=str,
)
def test_ties_that_are_low_and_apart(ties, loose):
    assert [i for i, one in enumerate(hardly_tied(ties, 0.65, 2.5)) if one] == loose


def test_paper_tries_what_is_isolated_whatever_it_is():
    data, poisoned, _ = easy()
    genuine = (~poisoned & (data.labels == 1)).nonzero().flatten()[:45]
    losses = torch.ones(900)
    losses[genuine] = 0.0
    tried: list[int] = []

    class Watching(ABL):
        def _unlearn(self, model, parts, run, folder, attempt=0):
            tried.extend(data.labels[parts.isolated.rows].unique().tolist())
            return False

    parts = parts_of(genuine, poisoned, data)
    for settings, expected in (({"max_tie": None, "tries": 1}, [1]), ({"max_tie": 1e-9}, [])):
        tried.clear()
        run = Run(seed=1)
        Watching(**settings)._forget(toy(backdoored=True), losses, genuine, parts, run, None)
        assert tried == expected
        assert "does NOT say that the data are clean" in run.warnings[0]


def test_joint_unlearning_breaks_the_backdoor():
    """From the paper's formula, where most of the poison was isolated: the rest of it is learned meanwhile."""
    data, poisoned, moved = easy()
    model, held_out = copy.deepcopy(toy(backdoored=True)), images(300, seed=8)
    method = ABL(batch=50, unlearning="joint", epochs=4, lr=0.02, pad=0)
    method._train_on_rest(model, parts_of(moved[:90], poisoned, data), Run(seed=1), None)
    assert asr(model.eval(), *held_out) < 0.5
    assert acc(model, *held_out) > 0.95


def test_training_on_the_rest_alone_keeps_the_backdoor():
    data, poisoned, moved = easy()
    model = copy.deepcopy(toy(backdoored=True))
    method = ABL(batch=50, epochs=4, lr=0.02, pad=0)
    method._train_on_rest(model, parts_of(moved[:45], poisoned, data), Run(seed=1), None)
    assert asr(model.eval(), *images(300, seed=8)) > 0.9


def test_clean_set_keeps_its_accuracy():
    found, run = trained(poisoned=False)
    held_out = hard(600, seed=8)
    plain = net(0)
    fit(plain, examples(False).x, examples(False).labels, Recipe(epochs=8, batch=50, lr=0.05), seed=1)
    assert acc(found.model, *held_out) > acc(plain, *held_out) - 0.05
    assert len(found.suspects) == 45 == run.notes["isolated"]


def test_joint_step_is_descent_and_ascent():
    """L_GGA: the loss of the rest minus that of the isolated examples."""
    data, model = examples(), net(0).eval()
    isolated = Subset(data, poison()[:1])
    joint = Joint(isolated, ceiling=0.0, how="loss", guard=_guard(data))
    batch = _batch(data, torch.arange(8))
    expected = F.cross_entropy(model(batch.x), batch.y) - F.cross_entropy(
        model(isolated.take(torch.zeros(8, dtype=torch.int64))), isolated.labels.expand(8)
    )
    torch.testing.assert_close(joint.loss(model, batch), expected)
    joint.rising = False
    torch.testing.assert_close(joint.loss(model, batch), F.cross_entropy(model(batch.x), batch.y))


def test_sequential_step_of_the_public_code_is_ascent_alone():
    data, model = examples(), net(0).eval()
    step = Unlearning(data, None, batch=8, fixed=True, ceiling=0.0, how="loss", guard=_guard(data))
    batch = _batch(data, torch.arange(8))
    torch.testing.assert_close(step.loss(model, batch), -F.cross_entropy(model(batch.x), batch.y))


def test_joint_and_sequential_go_the_same_way_on_the_isolated():
    data = examples()
    rows, gradients = poison()[:8], []
    for step in (
        Unlearning(data, None, batch=8, fixed=True, ceiling=0.0, how="loss", guard=_guard(data)),
        Joint(Subset(data, rows), ceiling=0.0, how="loss", guard=_guard(data)),
    ):
        model = net(0).eval()
        loss = step.loss(model, _batch(data, rows))
        if isinstance(step, Joint):
            loss = loss - F.cross_entropy(model(data.take(rows)), data.labels[rows])
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # The joint step draws with replacement, so the gradients point the same way, but are not the same.
    assert float(F.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.9


@pytest.mark.parametrize("how", ["loss", "log-odds"])
def test_raising_stops_at_the_ceiling(how):
    z = torch.tensor([[5.0, 0.0, 0.0], [-5.0, 0.0, 0.0]], requires_grad=True)
    (found,) = torch.autograd.grad(raised(z, torch.tensor([0, 0]), 1.0986, how), z)
    assert found[0, 0] > 0
    assert found[1].tolist() == [0, 0, 0]
    (unbounded,) = torch.autograd.grad(raised(z, torch.tensor([0, 0]), 0.0, how), z)
    assert unbounded[1, 0] > 0


@given(st.lists(st.floats(-8, 8), min_size=3, max_size=3))
def test_log_odds_are_the_loss_without_the_factor_that_vanishes(values):
    z = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1])
    (loss,) = torch.autograd.grad(raised(z, y, 0.0, "loss"), z)
    (odds,) = torch.autograd.grad(raised(z, y, 0.0, "log-odds"), z)
    doubt = 1 - z.softmax(1)[0, 1].detach()
    torch.testing.assert_close(loss, odds * doubt)


# The guard.


def _guard(data: Examples, drop: float = 0.02, label_drop: float = 0.25) -> Guard:
    return Guard(Subset(data, torch.arange(600)), Run(), drop, label_drop)


def _batch(data: Examples, rows: torch.Tensor) -> object:
    from bezoar.ops.objective import Batch

    return Batch(data.x[rows], data.labels[rows], rows, lambda x: x, torch.Generator().manual_seed(0))


def test_slow_half_of_each_label():
    losses = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3, 0.8])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    assert slow(losses, labels, 0.5).tolist() == [False, True, True, False, True, True]


class Answers(nn.Module):
    """Gives the labels it was made with, whatever it is shown."""

    def __init__(self, labels: torch.Tensor) -> None:
        super().__init__()
        self.labels, self.place = labels, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.labels[self.place : self.place + len(x)]
        self.place = (self.place + len(x)) % len(self.labels)
        return F.one_hot(chosen, LABELS).float()


@pytest.mark.parametrize(
    ("wrong", "harm"),
    [(0, 0.0), (12, 0.02), (16, 16 / 600), (17, None)],
)
def test_guard_over_all_labels(wrong, harm):
    data = examples(False)
    guard = _guard(data)
    truth = data.labels[:600]
    guard.start(Answers(truth))
    answers = truth.clone()
    answers[:wrong] = (answers[:wrong] + 1) % LABELS
    found = guard.harm(Answers(answers))
    assert found == (harm if harm is None else pytest.approx(harm))


def test_guard_over_a_single_label():
    data = examples(False)
    guard, truth = _guard(data, drop=1.0, label_drop=0.25), data.labels[:600]
    guard.start(Answers(truth))
    mine = (truth == 1).nonzero().flatten()
    for lost, harmed in ((25, False), (30, False), (31, True)):
        answers = truth.clone()
        answers[mine[:lost]] = 0
        assert (guard.harm(Answers(answers)) is None) is harmed, lost


def test_joint_ascent_ends_where_a_label_is_lost():
    data = examples(False)
    guard, truth = _guard(data), data.labels[:600]
    joint = Joint(data, ceiling=0.0, how="loss", guard=guard)
    half = torch.where((truth == 3) & (torch.arange(600) % 4 == 3), 0, truth)
    for number, answers in enumerate((truth, half), start=1):
        joint.epoch(Answers(answers), number, 9)
        assert joint.rising
    joint.epoch(Answers(torch.where(truth == 3, 0, truth)), 3, 9)
    assert not joint.rising


def test_what_is_watched_is_drawn_from_each_label():
    labels = torch.arange(100) % 3
    rows = torch.arange(50)
    found = drawn(labels, rows, 0.2, torch.Generator().manual_seed(0))
    assert torch.isin(found, rows).all()
    assert torch.bincount(labels[found]).tolist() == [3, 3, 3]
    assert torch.equal(found, found.sort().values)
    one = drawn(torch.tensor([0, 1, 1]), torch.arange(3), 0.9, torch.Generator())
    assert labels[one].tolist() != [] and 0 not in one


# Settings and kills.


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("rate", 0.0), ("rate", 1.0), ("gamma", -0.1), ("isolation", "lgaa"), ("isolation_epochs", 0)),
        *(("unlearn_epochs", -1), ("unlearn_lr", 0.0), ("held_out", 0.0), ("held_out", 0.3), ("max_drop", 1.1)),
        *(
            *(("max_tie", 0.0), ("min_index", -1.0)),
            ("unlearning", "both"),
            ("raising", "odds"),
            ("ceiling", -1.0),
            ("statistics", "off"),
            ("batch", 0),
        ),
        *(
            ("tries", 0),
            ("schedule", "linear"),
            ("lr", 0.0),
            ("optimizer", "lion"),
            ("momentum", 1.0),
            ("pad", -1),
            ("epochs", 0),
        ),
    ],
)
def test_bad_settings(setting, value):
    with pytest.raises(SettingError, match=f"ABL.{setting} must be"):
        ABL(**{setting: value})


def test_too_few_examples():
    data = Examples(torch.rand(50, 3, SIZE, SIZE), torch.arange(50) % LABELS, LABELS)
    with pytest.raises(DataError, match="Give at least 100 examples"):
        ABL(rate=0.01)(lambda: net(0), data, Run())


class Kill(Exception):
    pass


@pytest.mark.parametrize("phase", ["isolate", "train on the rest", "unlearn"])
@pytest.mark.parametrize("unlearning", ["sequential", "joint"])
def test_killed_training_ends_in_the_same_weights(tmp_path, monkeypatch, phase, unlearning):
    if (phase, unlearning) == ("unlearn", "joint"):
        pytest.skip("a joint unlearning has no phase of its own")
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    small = Examples(examples().x[:300], examples().labels[:300], LABELS)
    method = ABL(**QUICK | {"rate": 0.05, "epochs": 2, "unlearn_epochs": 3, "unlearning": unlearning, "max_tie": None})

    def killed(name: str, done: int, total: int, note: str) -> None:
        if name == phase and done == max(2, total // 2):
            raise Kill

    run = Run(seed=1)
    run.progress.report = killed
    with pytest.raises(Kill):
        method(lambda: net(0), small, run, tmp_path)
    again, whole = Run(seed=1), Run(seed=1)
    found = method(lambda: net(0), small, again, tmp_path)
    expected = method(lambda: net(0), small, whole)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    assert torch.equal(found.suspects, expected.suspects)
    assert torch.equal(found.losses, expected.losses)
    assert again.notes == whole.notes


def test_an_end_is_no_error_of_the_user():
    from bezoar.core.errors import BezoarError

    assert not issubclass(Over, BezoarError)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_nets_without_batch_statistics(optimizer):
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 32), nn.ReLU(), nn.Linear(32, LABELS))

    torch.manual_seed(0)
    found = ABL(**QUICK | {"rate": 0.05, "lr": None, "epochs": 2, "optimizer": optimizer})(build, examples(), Run())
    assert all(value.isfinite().all() for value in found.model.state_dict().values())
    assert ABL().recipe(build()).optimizer == "adam"
    assert ABL().recipe(net(0)).optimizer == "sgd"

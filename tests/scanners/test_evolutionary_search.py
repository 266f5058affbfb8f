"""Evolutionary search: boxes as numbers, what is fitter, and a planted trigger that forward passes alone find."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bezoar
from bezoar.cli.main import main
from bezoar.core.errors import SettingError
from bezoar.core.method import Clean
from bezoar.core.registry import methods
from bezoar.core.run import Progress, Run
from bezoar.core.surgery import frozen
from bezoar.ops.cam import cam_layer, grad_cam
from bezoar.ops.verdict import CALIBRATION, UNCALIBRATED, judge
from bezoar.scanners import _evolve
from bezoar.scanners._boxes import Boxes, box_around
from bezoar.scanners._evolve import Evolution, Oracle, energies, populations
from bezoar.scanners.evolutionary_search import EvolutionarySearch
from bezoar.scanners.neural_cleanse import NeuralCleanse
from tests.toys import LABELS, SIZE, TARGET, images, trained, trigger

BOXES = Boxes((3, 8, 10), 2)
SHORT = EvolutionarySearch(seeds=1, screened=1000, population=12, generations=8, rounds=4)


@pytest.fixture(scope="module")
def clean():
    x, y = images(240, seed=7)
    return Clean(x=x[:180], y=y[:180], held_x=x[180:], held_y=y[180:], num_classes=LABELS)


@pytest.fixture(scope="module")
def scanned(clean):
    return SHORT(trained(backdoored=True), clean, Run())


def genome(row, column, height, width, colour=(0.5, 0.5, 0.5), contrast=-1.0, cells=None):
    return np.array([row, column, height, width, *colour, contrast, *(cells or [0.0] * 12)])


def sizes(found):
    return {label: (one.size, one.asr, one.status) for label, one in found.seeds[0].labels.items()}


# Boxes


def test_genome_is_a_box_of_one_colour_where_the_contrast_is_off():
    made = BOXES.trigger(genome(4, 5, 2, 4, colour=(1.2, 0.25, -0.2), cells=[1.0] * 12))
    expected = torch.zeros(1, 8, 10)
    expected[:, 3:5, 3:7] = 1
    assert torch.equal(made.mask, expected)
    assert made.size == 8
    assert torch.allclose(made.pattern[:, 3, 3], torch.tensor([1.0, 0.25, 0.0]))
    assert torch.equal(made.pattern, made.pattern * expected)


def test_cells_deviate_from_the_colour_by_the_contrast():
    cells = [-1.0, 1.0, 0.5, 0.0] + [0.0] * 8  # the first channel: two rows of two cells
    made = BOXES.trigger(genome(2, 2, 4, 4, contrast=0.4, cells=cells))
    first = made.pattern[0, :4, :4]
    assert torch.allclose(first[:2, :2], torch.tensor(0.1))
    assert torch.allclose(first[:2, 2:], torch.tensor(0.9))
    assert torch.allclose(first[2:, :2], torch.tensor(0.7))
    assert torch.allclose(first[2:, 2:], torch.tensor(0.5))
    assert torch.allclose(made.pattern[1, :4, :4], torch.tensor(0.5))


def test_box_at_the_edge_keeps_its_size_inside_the_image():
    assert BOXES.corners(genome(8, 0, 3, 3)[None]).tolist() == [[5, 0, 3, 3]]
    assert BOXES.corners(genome(0, 10, 99, 0.1)[None]).tolist() == [[0, 9, 8, 1]]


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_any_genome_within_the_bounds_is_a_trigger_of_its_size(seed, cells, height, width):
    boxes = Boxes((1, height, width), cells)
    low, high = np.array(boxes.bounds(boxes.whole)).T
    genomes = low + np.random.default_rng(seed).random((5, boxes.genes)) * (high - low)
    masks, patterns = boxes.decode(genomes)
    assert masks.shape == patterns.shape == (5, 1, height, width)
    assert torch.equal(masks.sum((1, 2, 3)).long(), boxes.sizes(genomes))
    assert int(boxes.sizes(genomes).min()) >= 1
    assert 0 <= float(patterns.min()) <= float(patterns.max()) <= 1


def test_first_boxes_are_small_as_often_as_large():
    boxes = Boxes((1, 28, 28), 3)
    sides = boxes.corners(boxes.spread(np.random.default_rng(0).random((4000, boxes.genes))))[:, 2:]
    assert 0.3 < float((sides.prod(1) <= 25).float().mean()) < 0.7
    assert float((sides.max(1).values / sides.min(1).values).quantile(0.9)) < 3


def test_region_of_a_map():
    seen = torch.zeros(6, 7)
    seen[2, 3], seen[4, 5], seen[0, 0] = 1.0, 0.6, 0.4
    assert box_around(seen, 0.5) == (2, 3, 3, 3)
    assert box_around(seen, 0.3) == (0, 0, 5, 6)
    assert box_around(torch.zeros(6, 7), 0.5) is None
    bounds = BOXES.bounds((2, 3, 3, 4))
    assert bounds[:4] == [(2, 5), (3, 7), (0.5, 3.5), (0.5, 4.5)]
    assert len(bounds) == BOXES.genes == 20


# Fitness


def test_what_works_comes_first_then_the_smaller_then_the_surer():
    loss = torch.tensor([0.5, 0.01, 0.02, 0.1, 3.0, float("nan")])
    rate = torch.tensor([0.9, 1.0, 1.0, 1.0, 0.0, 0.0])
    size = torch.tensor([1, 16, 16, 15, 1, 4])
    found = energies(loss, rate, size, pixels=64, reach=0.95)
    assert np.argsort(found).tolist() == [3, 1, 2, 0, 4, 5]
    assert (found[[1, 2, 3]] < 1).all()
    assert np.allclose(found[[0, 4]], [1.5, 4.0])


def test_answers_are_those_of_stamped_images(clean):
    model = trained(backdoored=True)
    oracle = Oracle(model, clean, Run(), Boxes(clean.shape, 2))
    genomes = oracle.boxes.spread(np.random.default_rng(1).random((300, oracle.boxes.genes)))
    x = clean.x[clean.y != TARGET][:10]
    loss, rate = oracle.ask(genomes, x, TARGET)
    assert oracle.queries == 3000
    every = oracle.screen(genomes, 180, "all")
    for row in (0, 150, 299):
        with torch.no_grad():
            out = model(oracle.boxes.trigger(genomes[row])(x))
            all_out = model(oracle.boxes.trigger(genomes[row])(clean.x[clean.y != 4]))
        assert float(rate[row]) == pytest.approx(float((out.argmax(1) == TARGET).float().mean()))
        expected = nn.functional.cross_entropy(out, torch.full((10,), TARGET))
        assert float(loss[row]) == pytest.approx(float(expected), abs=1e-4)
        expected = nn.functional.cross_entropy(all_out, torch.full((len(all_out),), 4))
        assert float(every[row, 4]) == pytest.approx(float(expected), abs=1e-4)


def test_first_boxes_of_a_label_are_those_that_do_most_for_it(clean):
    oracle = Oracle(trained(backdoored=True), clean, Run(), Boxes(clean.shape, 2))
    found = populations(oracle, [0, TARGET], screened=800, population=16, batch=24, seed=0)
    assert {label: len(one) for label, one in found.items()} == {0: 16, TARGET: 16}
    areas = oracle.boxes.sizes(found[TARGET])
    assert float(areas.min()) < 10 < float(areas.max())  # of every class of size
    chosen, other = (float(oracle.screen(found[label], 100, "x")[:, TARGET].min()) for label in (TARGET, 0))
    assert chosen < other


# Grad-CAM


def test_map_is_that_of_the_definition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(5 * 64, 4))
    x = torch.rand(2, 3, 8, 8)
    with frozen(model):
        layer = cam_layer(model, x)
        seen = grad_cam(model, layer, x, 1)
        features = model[:2](x) if layer.name == "1" else model[0](x)
    # The head is linear in the output of the ReLU, so its gradient is the weight where that is the layer.
    gradient = model[3].weight[1].detach().view(5, 8, 8).expand(2, -1, -1, -1)
    if layer.name == "0":
        gradient = gradient * (features > 0)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    expected = expected / expected.amax((1, 2), keepdim=True)
    assert torch.allclose(seen, expected.detach(), atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_map_of_triggered_images_lies_on_the_trigger(clean):
    model = trained(backdoored=True)
    x = trigger()(clean.x[clean.y != TARGET][:32])
    with frozen(model):
        seen = grad_cam(model, cam_layer(model, x), x, TARGET).mean(0)
    row, column = divmod(int(seen.argmax()), SIZE)
    assert min(row, column) >= SIZE - 5


# The search


def test_planted_label_has_the_smallest_box(scanned):
    found = scanned.seeds[0].labels
    assert min(found, key=lambda label: found[label].size) == TARGET
    assert found[TARGET].asr > 0.9
    assert scanned.seeds[0].finished


def test_box_lies_on_the_planted_patch(clean):
    """Intersection over union above .5: "Verify" of the methods sheet, 2.14."""
    method = EvolutionarySearch(screened=1500)
    oracle = Oracle(trained(backdoored=True), clean, Run(), Boxes(clean.shape, method.cells))
    found = method.look(oracle, None, 0, ([TARGET], [TARGET])).labels[TARGET]
    both = (found.trigger.mask * trigger().mask).sum()
    either = (found.trigger.mask + trigger().mask).clamp(max=1).sum()
    assert float(both / either) > 0.5
    assert found.asr > 0.9


def test_same_seed_same_boxes_and_another_one_others(scanned, clean):
    again = SHORT(trained(backdoored=True), clean, Run())
    other = SHORT(trained(backdoored=True), clean, Run(seed=1))
    assert sizes(again) == sizes(scanned)
    assert sizes(other) != sizes(scanned)


class Mute(torch.autograd.Function):
    """Answers, but has no gradient to give."""

    @staticmethod
    def forward(_context, x):
        return x.clone()

    @staticmethod
    def backward(_context, _gradient):
        raise ValueError("no gradient here")


class BlackBox(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.wanted = module, []

    def forward(self, x):
        self.wanted.append(x.requires_grad)
        return Mute.apply(self.module(x))


def test_no_gradient_is_needed(clean):
    model, run = BlackBox(trained(backdoored=True)), Run()
    found = SHORT(model, clean, run).seeds[0].labels
    assert min(found, key=lambda label: found[label].size) == TARGET
    assert not any(model.wanted)
    assert run.notes["focus"].startswith("none")
    assert run.image_gradients == 0
    assert sizes(dataclasses.replace(SHORT, focus="none")(trained(backdoored=True), clean, Run())) == {
        label: (one.size, one.asr, one.status) for label, one in found.items()
    }


def test_focus_narrows_the_region_of_a_label_that_works(clean, monkeypatch):
    regions = []
    advance = Evolution.advance

    def noted(self, *arguments, **settings):
        regions.append((self.label, self.rounds, self.region))
        advance(self, *arguments, **settings)

    monkeypatch.setattr(Evolution, "advance", noted)
    SHORT(trained(backdoored=True), clean, Run())
    early = {region for _, number, region in regions if number < SHORT.explore * SHORT.rounds}
    late = [region for label, number, region in regions if label == TARGET and number >= SHORT.explore * SHORT.rounds]
    assert early == {(0, 0, SIZE, SIZE)}
    assert late
    assert all(height * width < SIZE**2 for _, _, height, width in late)


def test_error_of_the_model_comes_through(clean):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.calls = trained(backdoored=True), 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 100:
                raise ValueError("the model broke")
            return self.module(x)

    with pytest.raises(ValueError, match="the model broke"):
        SHORT(Broken(), clean, Run())


def test_budget_ends_it_with_what_was_found(clean, monkeypatch):
    run = Run(budget=1000.0)
    asked = Oracle.ask

    def spent(self, *arguments):
        if self.queries > 40_000:
            run.started -= 2000
        return asked(self, *arguments)

    monkeypatch.setattr(_evolve.Oracle, "ask", spent)
    found = dataclasses.replace(SHORT, seeds=2)(trained(backdoored=True), clean, run)
    assert run.budget_spent
    assert len(found.seeds) == 1
    assert not found.seeds[0].finished
    assert 0 < found.seeds[0].progress < 1
    assert found.seeds[0].labels.keys() == set(range(LABELS))


def test_killed_search_ends_as_an_undisturbed_one(scanned, clean, tmp_path, monkeypatch):
    asked = Oracle.ask

    def killed(self, *arguments):
        if self.queries > 35_000:
            raise KeyboardInterrupt
        return asked(self, *arguments)

    run = Run(progress=Progress(folder=tmp_path, every=0))
    with monkeypatch.context() as patch:
        patch.setattr(_evolve.Oracle, "ask", killed)
        with pytest.raises(KeyboardInterrupt):
            SHORT(trained(backdoored=True), clean, run)
    assert list(tmp_path.glob("*.pt"))
    resumed = Run(progress=Progress(folder=tmp_path, every=0))
    assert sizes(SHORT(trained(backdoored=True), clean, resumed)) == sizes(scanned)
    assert 0 < resumed.notes["queries"] < 30_000


def test_labels_that_cannot_be_the_smallest_are_dropped(clean):
    def search(label, size):
        return Evolution(label, np.zeros((5, 8)), (0, 0, 4, 4), 2, np.zeros(8), size, size)

    searches = [search(label, float(100 - label)) for label in range(40)]
    method = EvolutionarySearch(rounds=5)
    method._drop(searches, 1, [0, 1])
    assert not any(s.dropped for s in searches)
    method._drop(searches, 2, [0, 1])
    assert {s.label for s in searches if not s.dropped} == {0, 1, *range(21, 40)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seeds", 0), ("screened", -1), ("population", 4), ("generations", 0), ("rounds", 0), ("batch", 0)),
        *(("differential", 2.0), ("crossover", 1.1), ("strategy", "best"), ("reach", 0.0), ("cells", 0)),
        *(("focus", "cam"), ("explore", -0.1), ("threshold", 0.0), ("candidates", 0), ("reference_labels", 3)),
    ],
)
def test_bad_settings_are_refused(name, value):
    with pytest.raises(SettingError, match=f"EvolutionarySearch.{name} must be"):
        EvolutionarySearch(**{name: value})


def test_label_out_of_range_is_refused(clean):
    with pytest.raises(SettingError, match="label 77"):
        EvolutionarySearch(labels=(77,))(trained(backdoored=True), clean, Run())


# As a user's choice


def test_report_says_that_the_rule_was_not_calibrated_for_it(scanned):
    names = tuple(map(str, range(LABELS)))
    assert judge(scanned, names).rule.calibration == UNCALIBRATED
    assert judge(dataclasses.replace(scanned, calibrated=True), names).rule.calibration == CALIBRATION


@pytest.fixture(scope="module")
def pair():
    return images(240, seed=7)


def test_scan_with_it(pair):
    result = bezoar.scan(trained(backdoored=True), pair, method=SHORT)
    assert result.report.method == "evolutionary-search"
    assert result.report.triggers[0].label == TARGET
    assert result.report.searches == ()  # the search for faint changes belongs beside the usual scanner
    by_name = bezoar.scan(
        *(trained(backdoored=True), pair),
        **{"method": "evolutionary-search", "seeds": 1, "screened": 20, "population": 5, "generations": 1, "rounds": 1},
    )
    assert by_name.report.config["screened"] == 20


def test_purify_with_its_triggers(pair):
    _, report = bezoar.purify(trained(backdoored=True), pair, method="bn-unlearning", scanner=SHORT, label=TARGET)
    assert report.method == "evolutionary-search"
    assert report.cleaning.method == "bn-unlearning"
    assert report.cleaning.asr_after < 0.3 < 0.9 < report.cleaning.asr_before


def test_scanner_that_cannot_stand_alone_is_refused(pair):
    with pytest.raises(SettingError, match="AdditiveInversion alone"):
        bezoar.scan(trained(backdoored=True), pair, method="additive-inversion")
    with pytest.raises(SettingError, match="no method 'evolution'"):
        bezoar.purify(trained(backdoored=True), pair, scanner="evolution")
    with pytest.raises(SettingError, match="a scanner or its name"):
        bezoar.scan(trained(backdoored=True), pair, method=3)


def test_only_the_usual_scanner_has_a_search_beside_it():
    beside = {name: method().beside() for name, method in methods("scanners").items()}
    assert [name for name, found in beside.items() if found] == ["neural-cleanse"]
    assert NeuralCleanse(mode="reference").beside() == ()
    assert [one.seeds for one in NeuralCleanse(seeds=2).beside()] == [2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text("from tests.toys import net\n\n\ndef make():\n    return net(0)\n")
    torch.save(trained(backdoored=True).state_dict(), folder / "model.pth")
    x, y = images(240, seed=7)
    np.savez(folder / "clean.npz", x=x.numpy(), y=y.numpy())
    return [str(folder / "model.pth"), "--data", str(folder / "clean.npz"), "--arch", f"{folder / 'toy.py'}:make"]


def code(tokens):
    with pytest.raises(SystemExit) as left:
        main([*tokens, "--quiet", "--allow-code"])
    return left.value.code


def test_command_line_scans_with_it(files, tmp_path):
    few = ["--set", "screened=1000", "--set", "population=12", "--set", "generations=8", "--set", "rounds=4"]
    given = ["scan", *files, "--scanner", "evolutionary-search", "--seeds", "1", *few, "--out", str(tmp_path)]
    assert code(given) in (0, 1, 3)
    assert bezoar.api.load_result(tmp_path).report.method == "evolutionary-search"


def test_command_line_refuses_a_mode_that_it_lacks(files, capsys):
    assert code(["scan", *files, "--scanner", "evolutionary-search", "--mode", "reference"]) == 2
    assert "--mode" in capsys.readouterr().err

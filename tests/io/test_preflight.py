import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bezoar.core.errors import DataError, ModelError
from bezoar.core.model import Normalized
from bezoar.core.results import Preflight
from bezoar.io.data import CleanData, load_data
from bezoar.io.preflight import check_preflight, preflight, wilson_low
from tests.io.hostile_data import labels, pixels


def load(source: object) -> CleanData:
    return load_data(source, num_classes=None, size=None, channels=None)


class Template(nn.Module):
    """Answers by the mean colour of the image: works only on what it was made for."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], order: tuple[int, ...] = tuple(range(6))
    ) -> None:
        super().__init__()
        colours = torch.tensor([[r, g, b] for r in (0.3, 0.7) for g in (0.25, 0.5, 0.75) for b in (0.4,)])
        self.centres = (colours - torch.tensor(mean)) / torch.tensor(std)
        self.order = list(order)

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x.mean((2, 3)), self.centres)[:, self.order]


def _coloured(count: int = 300) -> CleanData:
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([[r, g, b] for r in (0.3, 0.7) for g in (0.25, 0.5, 0.75) for b in (0.4,)])
    y = torch.arange(count) % 6
    x = colours[y][:, :, None, None] + 0.1 * torch.randn(count, 3, 4, 4, generator=generator)
    return load((x.clamp(0, 1), y))


ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_preflight_of_a_good_model() -> None:
    data = _coloured()
    result = preflight(Template(ZERO, ONE), data, batch=64)
    assert result.acc > 0.95
    assert result.chance == pytest.approx(1 / 6, abs=0.01)
    assert result.count == 300
    assert check_preflight(result, Template(ZERO, ONE), data) == ()


def test_missing_normalisation_is_diagnosed() -> None:
    data = _coloured()
    model = Template(*IMAGENET)
    with pytest.raises(DataError) as caught:
        check_preflight(preflight(model, data), model, data)
    assert "right on" in caught.value.message
    assert "With --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225" in caught.value.hint
    assert check_preflight(preflight(Normalized(model, *IMAGENET), data), Normalized(model, *IMAGENET), data) == ()


def test_wrong_normalisation_is_diagnosed() -> None:
    data = _coloured()
    model = Normalized(Template(ZERO, ONE), (0.9, 0.9, 0.9), (0.1, 0.1, 0.1))
    with pytest.raises(DataError, match="Without --mean and --std accuracy is 100"):
        check_preflight(preflight(model, data), model, data)


def test_range_255_is_diagnosed() -> None:
    data = _coloured()
    model = Template(ZERO, (1 / 255,) * 3)
    with pytest.raises(DataError, match=r"--std 0\.00392157"):
        check_preflight(preflight(model, data), model, data)


def test_colour_order_is_diagnosed() -> None:
    data = _coloured()
    swapped = load((data.x.flip(1), data.y))
    model = Template(ZERO, ONE)
    result = preflight(model, swapped)
    warnings_or_error = ""
    try:
        warnings_or_error = " ".join(check_preflight(result, model, swapped))
    except DataError as error:
        warnings_or_error = error.hint
    assert "BGR" in warnings_or_error


def test_label_order_is_diagnosed() -> None:
    data = _coloured()
    model = Template(ZERO, ONE, order=(1, 2, 3, 4, 5, 0))
    with pytest.raises(DataError, match=r"With the labels in another order .*0 is 5, 1 is 0"):
        check_preflight(preflight(model, data), model, data)


def test_noise_is_not_explained_away() -> None:
    """A model of nothing: no alternative may be blamed, though the best of many orders of labels always gains."""
    data = load((torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 10))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    with pytest.raises(DataError, match="None of the usual"):
        check_preflight(preflight(model, data), model, data)


def test_a_model_that_always_gives_one_answer() -> None:
    y = np.array([0] * 80 + [1] * 20)
    data = load((pixels(100), y))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0.0])
    result = preflight(model, data)
    assert (result.acc, result.chance) == (0.8, 0.8)
    with pytest.raises(DataError, match="guessing is right on 80.0 %"):
        check_preflight(result, model, data)


def test_middling_accuracy_is_a_warning() -> None:
    data = _coloured()
    model = Template(ZERO, ONE)
    found = check_preflight(Preflight(acc=0.5, chance=0.1, count=500), model, data)
    assert len(found) == 1
    assert "only 50.0 %" in found[0]
    few = check_preflight(Preflight(acc=0.9, chance=0.5, count=12), model, data)
    assert "too few" in few[0]
    with pytest.raises(DataError, match="give more"):
        check_preflight(Preflight(acc=1, chance=0.5, count=4), nn.Flatten(), load((pixels(4), labels(4, 2))))


def test_preflight_errors() -> None:
    data = _coloured(12)
    for model, fragment in (
        (nn.Conv2d(1, 2, 3), "cannot take images"),
        (nn.Conv2d(3, 2, 3), "not \\(B, K\\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), "3 labels, the data 6"),
    ):
        with pytest.raises(ModelError, match=fragment):
            preflight(model, data)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
    nn.init.constant_(broken[1].weight, float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        preflight(broken, data)


def test_wilson() -> None:
    assert wilson_low(0.5, 100) == pytest.approx(0.3754, abs=1e-3)  # 99 % interval of 50 of 100
    assert wilson_low(0, 50) == pytest.approx(0, abs=1e-9)

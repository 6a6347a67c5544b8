"""Iterates: agreement with passes by hand, and with the callback's mean and second predictions."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.toy import IT3Net, differing, doubles, everything, loader, net, quiet, samples
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from it3_lightning import Iterates, TestTimeCallback


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


@pytest.fixture
def module() -> Any:
    made = net(IT3Net).eval()
    quiet().predict(made, loader())  # a Trainer leaves something of its own
    return made


def predicted(module: Any, callback: TestTimeCallback) -> Tensor:
    found: Any = quiet(callbacks=[callback]).predict(module, loader())
    return torch.cat(found)


@torch.no_grad()
def by_hand(module: Any, count: int) -> list[Tensor]:
    """Return all iterates, in probabilities."""
    images = samples()[0]
    iterates = [module.predict_with(images, None).softmax(1)]
    for _ in range(count):
        iterates.append(module.predict_with(images, iterates[-1]).softmax(1))
    return iterates


@pytest.mark.parametrize("count", [1, 2, 4])
def test_predictions_are_those_of_passes_by_hand(module: Any, count: int) -> None:
    before = everything(module)
    iterates = by_hand(module, count)
    mean = predicted(module, TestTimeCallback(Iterates(count))).softmax(1)
    torch.testing.assert_close(mean, torch.stack(iterates).mean(0), rtol=0, atol=1e-12)
    last = predicted(module, TestTimeCallback(Iterates(count, which="last"))).softmax(1)
    torch.testing.assert_close(last, iterates[-1], rtol=0, atol=1e-12)
    assert differing(before, everything(module)) == []
    assert not torch.allclose(mean, iterates[0])


@pytest.mark.parametrize("which", ["mean", "last"])
def test_one_iterate_is_the_prediction_of_that_name(module: Any, which: Any) -> None:
    prediction: Any = "mean" if which == "mean" else "second"
    other = TestTimeCallback(Iterates(), steps=0)
    assert other.settings.steps == 0
    named = quiet(callbacks=[TestTimeCallback(steps=0, prediction=prediction)]).predict(
        module, loader()
    )
    expected = torch.cat(named or []).softmax(1)  # type: ignore[arg-type]
    found = predicted(module, TestTimeCallback(Iterates(1, which=which))).softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_distance_of_the_first_two_is_logged(module: Any) -> None:
    first, second, *_ = by_hand(module, 1)
    callback = TestTimeCallback(Iterates(2))
    predicted(module, callback)
    mean = (first - second).square().sum(1).mean().item()
    assert callback.summary.distance_source == pytest.approx(mean, abs=1e-12)


def test_it_is_named_in_a_configuration() -> None:
    parser = LightningArgumentParser()
    parser.add_argument("--callback", type=TestTimeCallback)
    text = '{"class_path": "it3_lightning.TestTimeCallback", "init_args": {"method": {"class_path":'
    text += ' "it3_lightning.Iterates", "init_args": {"count": 5, "which": "last"}}}}'
    made = parser.instantiate_classes(parser.parse_args([f"--callback={text}"])).callback
    assert made.settings.method == Iterates(5, which="last")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "at least one iterate, got count=0"),
        ({"which": "first"}, "which"),
        ({"distance": "l3"}, "distance"),
    ],
)
def test_what_is_out_of_range_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Iterates(**given)

"""Scope ``"sample"`` through the ready tasks: classes, values and maps, every conditioning."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.toy import adapting, doubles, quiet, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import (
    ClassPrior,
    Conditioning,
    FeatureInjection,
    InputConcat,
    MaskPrior,
    ValuePrior,
)
from it3_lightning.networks import MLP, SmallCNN
from it3_lightning.tasks import IT3Classifier, IT3Regressor, IT3Segmenter


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


class Maps(nn.Module):
    """A convolution with BatchNorm, and a head: maps of logits of the same size."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, 1, H, W)` to `(B, classes, H, W)`."""
        logits: Tensor = self.head(self.norm(self.first(images)).relu())
        return logits


def images(count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator)


def classifier(conditioning: Conditioning) -> tuple[Any, Tensor, Tensor]:
    network = SmallCNN(1, 3, 8, width=4)
    model = IT3Classifier(network, prior=ClassPrior(3), conditioning=conditioning)
    return model, images(), torch.arange(6) % 3


def regressor() -> tuple[Any, Tensor, Tensor]:
    prior, conditioning = ValuePrior(mean=0.5, std=0.3), FeatureInjection("network.layer0")
    model = IT3Regressor(MLP(64, 1), prior=prior, conditioning=conditioning)
    return model, images().flatten(1), torch.linspace(0, 1, 6)[:, None]


def segmenter(classes: int) -> tuple[Any, Tensor, Tensor]:
    model = IT3Segmenter(
        Maps(classes),
        num_classes=classes,
        prior=MaskPrior(classes),
        conditioning=InputConcat("network.first"),
    )
    masks = (images() > 0.5).double() if classes == 1 else (3 * images()).long()[:, 0]
    return model, images(), masks


TASKS: dict[str, Callable[[], tuple[Any, Tensor, Tensor]]] = {
    "classes": lambda: classifier(FeatureInjection("network.dense1")),
    "film": lambda: classifier(
        FeatureInjection(["network.dense1", "network.dense2"], mode=["film", "add"])
    ),
    "concatenated": lambda: classifier(InputConcat("network.features.0")),
    "values": regressor,
    "mask": lambda: segmenter(1),
    "map": lambda: segmenter(3),
}


@pytest.mark.parametrize("backend", ["loop", "vectorised"])
@pytest.mark.parametrize("prediction", ["first", "second"])
@pytest.mark.parametrize("task", TASKS)
def test_scores_and_outputs_are_those_of_samples_that_come_alone(
    task: str, prediction: Any, backend: Any
) -> None:
    model, inputs, target = TASKS[task]()
    for parameter in seeded(model).parameters():
        parameter.data.mul_(0.3)
    data = [DataLoader(TensorDataset(inputs, target), batch_size=size) for size in (1, 3)]
    given = {"steps": 2, "optimizer": "adam", "lr": 0.01, "prediction": prediction}
    alone, together = adapting(**given), adapting(scope="sample", backend=backend, **given)
    expected: Any = quiet(callbacks=[alone]).predict(model, data[0])
    outputs: Any = quiet(callbacks=[together]).predict(model, data[1])
    torch.testing.assert_close(torch.cat(outputs), torch.cat(expected), rtol=0, atol=1e-9)
    source: Any = quiet().predict(model, data[1])
    assert (torch.cat(outputs) - torch.cat(source)).abs().max() > 1e-4
    (logged,) = quiet(callbacks=[together]).test(model, data[1], verbose=False)
    (scores,) = quiet(callbacks=[alone]).test(model, data[0], verbose=False)
    for name in ("it3/distance_source", "it3/distance_adapted", "it3/moved"):
        assert logged[name] == pytest.approx(scores[name], abs=1e-9)

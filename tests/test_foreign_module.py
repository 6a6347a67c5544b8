"""Someone else's LightningModule: the classification routine of torch-uncertainty, as it is.

Its steps call ``self.forward`` directly, its ``training_step`` takes no ``batch_idx``, its
constructor makes the optimizer of its network, and its first ``test_step`` runs one forward more.
"""

from typing import Any

import pytest
import torch
from helpers.reference import adapt_stream
from helpers.toy import differing, everything, quiet
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch_uncertainty.routines import ClassificationRoutine

from it3_lightning import (
    ClassPrior,
    DualPass,
    FeatureInjection,
    Idempotence,
    IT3Mixin,
    IT3TestTimeCallback,
)

# It marks a log for a logger, which a quiet Trainer has not.
pytestmark = pytest.mark.filterwarnings("ignore:You called `self.log.*no logger configured")


class IT3Foreign(IT3Mixin, ClassificationRoutine):  # type: ignore[misc]
    """The same with priors."""


def routine(kind: Any = ClassificationRoutine, lr: float = 0.01, **args: Any) -> Any:
    """Make a routine around a small network."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return kind(
        model=network,
        num_classes=4,
        loss=nn.CrossEntropyLoss(),
        optim_recipe=lambda model: torch.optim.Adam(model.parameters(), lr=lr),
        **args,
    )


def mixed(**args: Any) -> Any:
    prior, conditioning = ClassPrior(4), FeatureInjection("model.1")
    return routine(IT3Foreign, prior=prior, conditioning=conditioning, **args)


def data() -> DataLoader[Any]:
    """Serve images whose classes differ in their mean."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 4
    images = torch.randn(32, 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def metrics_of(model: LightningModule, *callbacks: IT3TestTimeCallback) -> dict[str, float]:
    (logged,) = quiet(callbacks=list(callbacks)).test(model, data(), verbose=False)
    return dict(logged)


def same(metrics: dict[str, float]) -> Any:
    """Equal bit for bit, though some of its metrics are not defined on few samples."""
    return pytest.approx(metrics, rel=0, abs=0, nan_ok=True)


@pytest.fixture
def trained() -> Any:
    """A routine with priors, trained for two epochs."""
    model = mixed()
    quiet(max_epochs=2).fit(model, data(), data())
    return model


def adapting(**settings: Any) -> IT3TestTimeCallback:
    objective = Idempotence(reliability=None)
    return IT3TestTimeCallback(objective=objective, lr=0.05, optimizer="sgd", **settings)


def test_its_own_network_and_the_conditioning_learn(trained: Any) -> None:
    assert not torch.equal(mixed().model[0].weight, trained.model[0].weight)
    embedder = trained.it3_conditioning.embedders["model-1"]
    assert embedder.last.weight.abs().max() > 0


def test_its_training_log_is_that_of_the_plain_routine() -> None:
    logged = []
    for model in (routine(lr=0.0), mixed(lr=0.0, dual_pass=DualPass(third_pass=True))):
        trainer = quiet()
        trainer.fit(model, data(), data())
        logged.append(trainer.callback_metrics)
    assert torch.equal(logged[0]["train_loss"], logged[1]["train_loss"])


def test_its_metrics_are_those_of_the_adapted_predictions(trained: Any) -> None:
    def predict(net: Any, x: Tensor, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net.predict_with(x, prior)
        return outputs

    records = adapt_stream(
        trained,
        [images for images, _ in data()],
        predict=predict,
        to_label=lambda y: y.softmax(1),
        lr=0.05,
        steps=3,
        parameters=lambda name: name.startswith("model"),
    )
    logged = metrics_of(trained, adapting(steps=3))
    outputs = torch.cat([record.outputs for record in records])
    labels = torch.cat([target for _, target in data()])
    accuracy = (outputs.argmax(1) == labels).float().mean().item()
    loss, source_loss = F.cross_entropy(outputs, labels).item(), metrics_of(trained)["test/cls/NLL"]
    assert logged["test/cls/Acc"] == pytest.approx(accuracy)
    assert logged["test/cls/NLL"] == pytest.approx(loss, rel=1e-4)
    assert loss != pytest.approx(source_loss, rel=1e-3)


def test_without_steps_its_metrics_are_its_own(trained: Any) -> None:
    logged, plain = metrics_of(trained, adapting(steps=0)), metrics_of(trained)
    assert {name: logged[name] for name in plain} == same(plain)


def test_it_is_bitwise_unchanged_afterwards(trained: Any) -> None:
    metrics_of(trained)  # it counts its operations once, and keeps the number
    before = everything(trained)
    metrics_of(trained, adapting(norm_stats="batch", reset="never"))
    assert differing(before, everything(trained)) == []


def test_post_hoc_its_network_is_bitwise_unchanged() -> None:
    plain = routine()
    quiet().fit(plain, data(), data())
    model = mixed(train="conditioning")
    model.load_state_dict(plain.state_dict())
    quiet().fit(model, data(), data())
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert metrics_of(model) == same(metrics_of(plain))
    assert model.it3_conditioning.embedders["model-1"].last.weight.abs().max() > 0

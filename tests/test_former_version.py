"""A checkpoint that version 0.1.0 wrote loads, tests and predicts to the same numbers.

``tests/checkpoints/version_0_1_0.ckpt`` is a small network of three classes, its conditioning
fitted post-hoc, its gate calibrated; ``version_0_1_0.pt`` has what that version predicted and
logged.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toy import quiet
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import Idempotence, IT3Mixin, IT3Predictor, IT3TestTimeCallback
from it3_lightning.networks import MLP

FOLDER = Path(__file__).parent / "checkpoints"
RUNS: dict[str, dict[str, Any]] = {
    "default": {"objective": Idempotence("js")},
    "gate": {"gate": 0.5},
    "online": {
        "objective": Idempotence("js"),
        "lr": 1e-2,
        "reset": "never",
        "anchor": "ema",
        "norm_stats": "batch",
        "steps": 2,
    },
    "sample": {
        "objective": Idempotence("js"),
        "scope": "sample",
        "lr": 1e-2,
        "backend": "vectorised",
    },
    "mean": {"objective": Idempotence("js"), "prediction": "mean", "norm_stats": "batch"},
}


class LitMLP(LightningModule):
    """Ordinary; keeps what it was made with."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = MLP(4, 3, (hidden, hidden), batch_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


class IT3MLP(IT3Mixin, LitMLP):
    """The same with priors."""


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    kept: dict[str, Any] = torch.load(FOLDER / "version_0_1_0.pt", weights_only=True)
    return kept


@pytest.fixture(scope="module")
def model() -> IT3MLP:
    return IT3MLP.load_from_checkpoint(FOLDER / "version_0_1_0.ckpt", weights_only=True)


def data() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(40, 4, generator=draw)
    y = (x[:, 0] + x[:, 1] ** 2).gt(0.5).long() + (x[:, 2] > 1).long()
    noisy = x + 0.5 * torch.randn(40, 4, generator=draw)
    return DataLoader(TensorDataset(noisy, y), batch_size=16)


@pytest.mark.parametrize("run", RUNS)
def test_predictions_and_logs_are_those_of_that_version(
    run: str, expected: dict[str, Any], model: IT3MLP
) -> None:
    trainer = quiet(callbacks=[IT3TestTimeCallback(**RUNS[run])])
    predicted: Any = trainer.predict(model, data())
    torch.testing.assert_close(torch.cat(predicted), expected[run], rtol=1e-5, atol=1e-6)
    (logged,) = trainer.test(model, data(), verbose=False)
    theirs = dict(expected[f"{run} metrics"])
    theirs["it3/moved"] = theirs.pop("it3/reliable")  # its name since
    assert theirs.keys() <= logged.keys()
    assert {name: logged[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)


def test_source_predictions_are_equal_to_the_bit(expected: dict[str, Any], model: IT3MLP) -> None:
    predicted: Any = quiet().predict(model, data())
    torch.testing.assert_close(torch.cat(predicted), expected["source"], rtol=1e-6, atol=1e-6)


def test_its_settings_are_made_again(model: IT3MLP) -> None:
    dual_pass = model.it3_dual_pass
    assert dual_pass.own_share == 0.5
    assert type(dual_pass.perturb_inputs).__name__ == "RandomNoise"
    assert dual_pass.perturb_inputs.size == 0.5  # type: ignore[union-attr]


def test_a_predictor_reads_it(expected: dict[str, Any]) -> None:
    predictor = IT3Predictor.from_checkpoint(FOLDER / "version_0_1_0.ckpt", IT3MLP, gate=0.5)
    found = torch.cat([predictor(x).outputs for x, _ in data()])
    torch.testing.assert_close(found, expected["gate"], rtol=1e-5, atol=1e-6)


def test_former_import_paths_hold() -> None:
    from it3_lightning import objectives, perturbations, protocols

    assert objectives.Idempotence is Idempotence
    assert perturbations.RandomNoise.__name__ == "RandomNoise"
    assert issubclass(IT3MLP, IT3Mixin)
    assert isinstance(IT3MLP.__new__(IT3MLP), object)
    assert protocols.IT3Module.__name__ == "IT3Module"

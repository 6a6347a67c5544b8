"""Layers where a prior may enter: their order, cost and table, and a prior that enters too late."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toy import IT3Net, LitNet, differing, everything, loader, net, parts, quiet, samples
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchvision.models import resnet18

from it3_lightning import ClassPrior, FeatureInjection, ForwardArgument, InputConcat, suggest_layers
from it3_lightning.cli import main
from it3_lightning.tasks import Classifier

CONFIGS = Path(__file__).parents[2] / "configs"
LATE = "whose output is the prediction"


def test_a_network_is_listed_in_its_order_with_what_each_layer_costs() -> None:
    found = suggest_layers(LitNet(), samples(4))
    conv, dense, head = 2 * 1 * 9 * 4, 8 * 8, 8 * 3  # multiplications of an image: 2 x 2 positions
    total = conv + dense + head
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["net.conv", "net.bn", "net.dense"]
    assert [(row.depth, row.layers) for row in found.rows] == [(1, 3), (1, 3), (2, 3)]
    assert [row.after for row in found.rows] == pytest.approx(
        [1 - conv / total, 1 - conv / total, head / total]
    )
    assert [row.shape for row in found.rows] == [(4, 2, 2, 2), (4, 2, 2, 2), (4, 8)]
    assert found.ends == ("net", "net.head")
    best = found.best
    assert best is not None
    assert best.name == "net.dense"
    conditioning = net(conditioning=FeatureInjection(best.name)).it3_conditioning
    assert best.weights == sum(parameter.numel() for parameter in conditioning.parameters())


def test_with_priors_or_without_it_is_the_same_and_the_module_stays_what_it_is() -> None:
    model = net(prior=ClassPrior(3, context="batch")).train()
    before, (images, labels) = everything(model), samples(4)
    given, drawn = images.clone(), torch.get_rng_state()
    found = suggest_layers(model, (images, labels))
    assert differing(before, everything(model)) == []
    assert torch.equal(images, given)
    assert torch.equal(torch.get_rng_state(), drawn)
    plain = suggest_layers(LitNet(), (images, labels))
    assert [row.name for row in found.rows] == [row.name for row in plain.rows]
    assert [row.after for row in found.rows] == [row.after for row in plain.rows]
    embedder = FeatureInjection("net.dense")
    embedder.attach(LitNet(), ClassPrior(3, context="batch"))
    assert found.rows[-1].weights == sum(p.numel() for p in embedder.parameters())


class Forecaster(LightningModule):
    """A recurrent network: what is multiplied in it is not counted by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.recurrent(x)[0])
        return outputs


def test_recurrent_layers_count() -> None:
    (row,) = suggest_layers(Forecaster(), torch.randn(3, 5, 4)).rows
    weights = 4 * 8 * (4 + 8 + 2)  # four gates, of inputs, states and two biases
    assert (row.name, row.shape, row.depth, row.layers) == ("recurrent", (3, 5, 8), 1, 2)
    assert row.after == pytest.approx(8 * 2 / (8 * 2 + weights))


def test_a_deep_network_is_a_table_of_100_columns_that_names_its_third_stage() -> None:
    class Wrapped(Classifier):
        def __init__(self, network: nn.Module, deep: int) -> None:
            for level in range(deep):
                network = nn.ModuleDict({f"rather_long_name_{level}": network})
            super().__init__(network)

        def forward(self, inputs: Any) -> Tensor:
            network: Any = self.network
            while isinstance(network, nn.ModuleDict):
                (network,) = network.values()
            outputs: Tensor = network(inputs)
            return outputs

    for deep in (0, 3):
        found = suggest_layers(Wrapped(resnet18(num_classes=3), deep), torch.randn(2, 3, 32, 32))
        lines = str(found).splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) < 60
        (best,) = [line for line in lines if line.startswith("* ")]
        assert best.split()[1].endswith("layer3")
        assert found.best is not None
        assert found.best.name in "\n".join(lines)
        assert "layers inside of these are left out" in str(found)


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["layers", f"--config={CONFIGS / 'digits.yaml'}", "--data.shifts=[contrast]"])
    printed = capsys.readouterr().out
    assert "* network.dense1" in printed
    assert "'network.head'" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_what_has_no_candidates_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="a layer of known width before its last"):
        suggest_layers(Classifier(nn.Linear(2, 3)), torch.randn(2, 2))

    class Nothing(LitNet):
        def forward(self, x: Tensor) -> Any:
            return {"a": x, "b": x}

    with pytest.raises(MisconfigurationException, match="def it3_outputs"):
        suggest_layers(Nothing(), samples(2))


# A prior that enters too late


@pytest.mark.parametrize("train", ["joint", "conditioning"])
@pytest.mark.parametrize(
    "conditioning",
    [
        FeatureInjection("net.head"),
        FeatureInjection("net", channels=3),
        FeatureInjection("", channels=3),
        FeatureInjection(["net.dense", "net.head"]),
        InputConcat("net.head"),
    ],
    ids=["head", "network", "module", "among others", "concat"],
)
def test_a_prior_at_the_prediction_itself_is_warned_about(train: Any, conditioning: Any) -> None:
    model = net(conditioning=copy.deepcopy(conditioning), train=train)
    with pytest.warns(UserWarning, match=f"{LATE}.*suggest_layers.module, batch.") as warned:
        quiet(max_epochs=2).fit(model, loader())
    late = [str(each.message) for each in warned if LATE in str(each.message)]
    assert len(late) == 1
    assert f"enters at {conditioning.layers[-1]!r}, whose" in late[0]


class Soft(IT3Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


class Tied(IT3Net):
    """Its last weights are those of a parameter, not of a layer."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.last = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        features = self.net.dense(self.net.bn(self.net.conv(x)).relu().flatten(1))
        logits: Tensor = features @ self.last
        return logits


class Takes(IT3Net):
    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        return super().forward(x) if prior is None else super().forward(x) + prior[:, :3]


def test_logits_that_are_normalised_afterwards_are_the_prediction() -> None:
    with pytest.warns(UserWarning, match=LATE):
        quiet().fit(net(Soft, conditioning=FeatureInjection("net.head")), loader())


@pytest.mark.parametrize(
    ("kind", "conditioning"),
    [
        (IT3Net, FeatureInjection("net.dense")),
        (Tied, FeatureInjection("net.dense")),
        (Takes, ForwardArgument()),
    ],
)
def test_layers_before_the_last_are_not_warned_about(kind: Any, conditioning: Any) -> None:
    model = net(kind, **parts(conditioning=conditioning))
    quiet().fit(model, loader())  # a warning is an error
    assert model.it3_train == "joint"

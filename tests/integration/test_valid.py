"""Positions that are valid: padding has no part in distances, filters and what is minimised.

The reference is each sequence cropped to its length, and a step in plain torch.
"""

import copy
import math
from typing import Any, Literal

import pytest
import torch
from helpers.toy import quiet
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from it3_lightning import (
    ClassPrior,
    FeatureInjection,
    Idempotence,
    IT3Mixin,
    IT3Predictor,
    IT3TestTimeCallback,
    LabelsPrior,
    Prior,
    Settings,
    Tent,
    TestTimeCallback,
)

LENGTHS = [6, 2, 4, 5]
MASK = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
IDS = torch.randint(1, 20, (4, 6), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": MASK}


class Tagger(LightningModule):
    """A label for each token, of that token alone."""

    layout = "BTC"

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.embed(input_ids)).relu())
        return logits if self.layout == "BTC" else logits.mT

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"], batch["attention_mask"])
        return F.cross_entropy(logits.mT, batch["labels"])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch["input_ids"], batch["attention_mask"])
        self.log("size", logits.abs().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class IT3Tagger(IT3Mixin, Tagger):
    """The same with priors."""


class Padded(IT3Tagger):
    """Its masks are true where there is nothing."""

    def it3_inputs(self, batch: Any) -> Any:
        return {"ids": batch["ids"], "padding": batch["padding"]}

    def it3_forward(self, inputs: Any) -> Tensor:
        return self(inputs["ids"])  # type: ignore[no-any-return]

    def it3_valid(self, inputs: Any) -> Tensor:
        padding: Tensor = inputs["padding"]
        return ~padding


def made(kind: Any = IT3Tagger, prior: Prior | None = None, layer: str = "hidden") -> Any:
    torch.manual_seed(1)
    model = kind(
        prior=prior or ClassPrior(3, layout="BTC"), conditioning=FeatureInjection(layer, hidden=8)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model.eval()


def cropped(model: Any, ids: Tensor = IDS) -> list[tuple[Tensor, Tensor]]:
    """Return both predictions of each sequence, cropped, as probabilities `(T, C)`."""
    found, frozen = [], copy.deepcopy(model)
    for row, length in zip(ids, LENGTHS, strict=True):
        inputs = {"input_ids": row[None, :length], "attention_mask": MASK[:1, :length]}
        y0 = model.predict_with(inputs, None).softmax(2)
        y1 = frozen.predict_with(inputs, y0.mT).softmax(2)
        found.append((y0[0], y1[0]))
    return found


def stepped(model: Any, limit: float | None, sharpen: float, alone: bool) -> tuple[Tensor, Any]:
    """Return the distances, and for each sample the network after a step of plain SGD."""
    pairs = cropped(model)
    distances = torch.stack([(a - b).square().sum(1).mean() for a, b in pairs])
    entropies = torch.stack([-(a * a.log()).sum(1).mean() for a, _ in pairs])
    counts = torch.tensor([True] * 4)
    if limit is not None:
        sure = torch.tensor([a.amax(1).mean().item() > limit for a, _ in pairs])
        same = [(a.argmax(1) == b.argmax(1)).float().mean().item() > limit for a, b in pairs]
        counts = sure & torch.tensor(same)
    terms = distances + sharpen * entropies
    names = [n for n, _ in model.named_parameters() if not n.startswith("it3_")]
    networks = []
    for index in range(4):
        kept = [index] if alone else range(4)
        counted = [terms[i] for i in kept if counts[i]]
        other = copy.deepcopy(model)
        if counted:
            loss = torch.stack(counted).mean()
            weights = [model.get_parameter(n) for n in names]
            gradients = torch.autograd.grad(loss, weights, retain_graph=True)
            for name, gradient in zip(names, gradients, strict=True):
                other.get_parameter(name).data -= 0.5 * gradient
        networks.append(other)
    assert 0 < sum(counts) < 4 or limit is None
    return distances.detach(), networks


@pytest.mark.parametrize("scope", ["batch", "sample", "loop"])
@pytest.mark.parametrize(("limit", "sharpen"), [(None, 0.0), (0.55, 0.3)])
def test_a_step_on_padded_sequences_is_that_on_cropped_ones(
    scope: str, limit: float | None, sharpen: float
) -> None:
    model = made()
    objective = Idempotence(reliability=limit, sharpen=sharpen)
    given: dict[str, Any] = {"objective": objective, "optimizer": "sgd", "lr": 0.5}
    if scope != "batch":
        backend = "loop" if scope == "loop" else "vectorised"
        given |= {"scope": "sample", "backend": backend}
    found = IT3Predictor(model, Settings(**given))(BATCH)
    distances, networks = stepped(model, limit, sharpen, scope != "batch")
    torch.testing.assert_close(found.distance, distances, rtol=1e-4, atol=1e-6)
    for row, (network, length) in enumerate(zip(networks, LENGTHS, strict=True)):
        expected = network(IDS[row : row + 1, :length])[0].detach()
        torch.testing.assert_close(found.outputs[row, :length], expected, rtol=1e-4, atol=1e-5)
        other = IT3Predictor(model, Settings(**given))({**BATCH, "attention_mask": 0 * MASK + 1})
    assert not torch.allclose(other.distance, distances, rtol=1e-3)  # where padding counts


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_what_lies_in_the_padding_changes_nothing(scope: Literal["batch", "sample"]) -> None:
    others = torch.where(MASK == 1, IDS, 20 - IDS)
    assert not torch.equal(others, IDS)
    objective = Idempotence(reliability=0.4, balance=0.3 if scope == "batch" else 0.0)
    settings = Settings(objective=objective, optimizer="sgd", lr=0.5, scope=scope)
    first = IT3Predictor(made(), settings)(BATCH)
    second = IT3Predictor(made(), settings)({**BATCH, "input_ids": others})
    torch.testing.assert_close(first.distance, second.distance)
    torch.testing.assert_close(first.distance_adapted, second.distance_adapted)
    torch.testing.assert_close(first.outputs[MASK == 1], second.outputs[MASK == 1])
    assert not torch.allclose(first.outputs, second.outputs)


def test_a_module_says_by_it3_valid_what_is_padding() -> None:
    settings = Settings(objective=Idempotence(reliability=None), optimizer="sgd", lr=0.5)
    expected = IT3Predictor(made(), settings)(BATCH)
    for scope in ("batch", "sample"):
        own = {"ids": IDS, "padding": MASK == 0}
        per = Settings(
            objective=Idempotence(reliability=None), optimizer="sgd", lr=0.5, scope=scope
        )
        found = IT3Predictor(made(Padded), per)(own)
        torch.testing.assert_close(found.distance, expected.distance)
    with pytest.raises(ValueError, match=r"it3_valid of Padded to return booleans \(4, 6\).*got"):
        IT3Predictor(made(Padded), settings)({"ids": IDS, "padding": MASK[:, :5] == 0})


def test_a_mask_of_other_positions_than_those_predicted_says_nothing() -> None:
    class Labels(IT3Tagger):
        """As many independent labels as there are tokens."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.labels = nn.Linear(8, 6)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            found: Tensor = self.labels(self.hidden(self.embed(input_ids)).relu().mean(1))
            return found

    class Pairs(IT3Tagger):
        """A label for each two tokens."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(input_ids).reshape(-1, 3, 2, 3).mean(2)

    settings = Settings(objective=Idempotence(reliability=None), optimizer="sgd", lr=0.5)
    for model in (made(Labels, LabelsPrior(6)), made(Pairs)):
        found = IT3Predictor(model, settings)(BATCH)
        whole = IT3Predictor(model, settings)({**BATCH, "attention_mask": 0 * MASK + 1})
        assert torch.equal(found.distance, whole.distance)
        assert found.distance.min() > 0


class Rows(Dataset[Any]):
    """The batch as a dataset, with the labels of its tokens."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return {**{name: values[index] for name, values in BATCH.items()}, "labels": MASK[index]}


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_a_trainer_logs_the_distance_of_what_is_there(scope: str) -> None:
    model = made()
    given: dict[str, Any] = {"optimizer": "sgd", "lr": 0.5, "scope": scope}
    adapt = IT3TestTimeCallback(objective=Idempotence(reliability=None), **given)
    logged = quiet(callbacks=[adapt]).test(model, DataLoader(Rows(), 4), verbose=False)[0]
    distances, _ = stepped(model, None, 0.0, alone=False)
    assert logged["it3/distance_source"] == pytest.approx(distances.mean().item(), rel=1e-4)


def test_entropy_of_a_plain_module_leaves_padding_out() -> None:
    class Plain(Tagger):
        layout = "BCT"

    torch.manual_seed(1)
    model = Plain()
    adapt = TestTimeCallback(Tent(), parameters="all", norm_stats="source", steps=0, measure=True)
    logged = quiet(callbacks=[adapt]).test(model, DataLoader(Rows(), 4), verbose=False)[0]
    rows = [model(IDS[i : i + 1, :n]).softmax(1)[0] for i, n in enumerate(LENGTHS)]
    entropies = torch.stack([-(p * p.log()).sum(0).mean() for p in rows])
    assert logged["it3/distance_source"] == pytest.approx(entropies.mean().item(), rel=1e-4)
    assert math.log(3) > entropies.mean()

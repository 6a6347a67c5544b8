"""A step that runs on two priors logs, counts and collects once: what the neutral pass saw."""

import copy
from typing import Any

import pytest
import torch
from helpers.toy import Batch, IT3Net, LitNet, loader, parts, quiet, samples, seeded
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassPrecision,
    MulticlassRecall,
)

from it3_lightning import DualPass, IT3Mixin
from it3_lightning.integration.isolation import muted, without_logs


class Counting(LitNet):
    """Counts in every way a step can."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accuracy = MulticlassAccuracy(3)
        self.auroc = MulticlassAUROC(3)
        self.mean = MeanMetric()
        self.group = MetricCollection(
            [MulticlassPrecision(3), MulticlassRecall(3), MulticlassConfusionMatrix(3)]
        )
        self.collected: list[Tensor] = []
        self.by_class: dict[int, int] = {}
        self.seen = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log_dict({"twice": 2 * loss}, on_step=False, on_epoch=True)
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.auroc.update(logits.softmax(1), batch[1])
        self.mean.update(loss)
        self.count(logits, batch[1])
        self.collected.append(logits.detach())
        self.seen += len(logits)
        for label in batch[1].tolist():
            self.by_class[label] = self.by_class.get(label, 0) + 1
        return loss

    def count(self, logits: Tensor, target: Tensor) -> None:
        self.group.update(logits, target)


class CallingForward(Counting):
    def count(self, logits: Tensor, target: Tensor) -> None:
        self.group(logits, target)


def fitted(module: LightningModule) -> tuple[LightningModule, dict[str, Tensor]]:
    trainer = quiet()
    trainer.fit(module, loader())
    return module, dict(trainer.callback_metrics)


def compared(base: type[Counting], dual: DualPass, **args: Any) -> tuple[Any, Any]:
    """Train the plain module and the one with priors, at learning rate 0."""
    plain = seeded(base(lr=0.0))
    both = type("Both", (IT3Mixin, base), {})(**parts(dual_pass=dual, lr=0.0, **args))
    seeded(both).load_state_dict(plain.state_dict())
    return fitted(plain), fitted(both)


@pytest.mark.parametrize("base", [Counting, CallingForward])
@pytest.mark.parametrize(
    "dual", [DualPass(), DualPass(own_share=0.5, third_pass=True)], ids=["dual", "third"]
)
@pytest.mark.filterwarnings("ignore:.*compute.*before the.*update")
def test_every_count_is_that_of_the_plain_module(base: type[Counting], dual: DualPass) -> None:
    (plain, logged), (both, logged_with_priors) = compared(base, dual)
    assert logged.keys() == {"loss", "twice", "accuracy"}
    for name in ("loss", "twice", "accuracy"):
        torch.testing.assert_close(logged_with_priors[name], logged[name], rtol=0, atol=0)
    for name in ("accuracy", "auroc", "mean", "group"):
        expected, actual = getattr(plain, name).compute(), getattr(both, name).compute()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert torch.equal(torch.cat(both.collected), torch.cat(plain.collected))
    assert both.by_class == plain.by_class
    assert both.seen == plain.seen == 12


def test_post_hoc_counts_are_those_of_the_network_in_evaluation_mode() -> None:
    plain = seeded(Counting(lr=0.0))
    both: Any = type("Both", (IT3Mixin, Counting), {})(**parts(train="conditioning"))
    both.load_state_dict(plain.state_dict())
    _, logged = fitted(both)
    images, labels = samples()
    accuracy = MulticlassAccuracy(3)(plain.eval()(images), labels)
    torch.testing.assert_close(logged["accuracy"], accuracy)
    assert both.seen == 12


def states(metric: Metric) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(metric, name)) for name in metric._defaults}


def test_muted_restores_what_was_counted_before() -> None:
    module = seeded(Counting())
    images, labels = samples()
    module.group.update(module(images), labels)
    module.auroc.update(module(images).softmax(1), labels)
    module.collected.append(images)
    collected, groups = module.collected, dict(module.group._groups)
    before = [states(m) for m in module.modules() if isinstance(m, Metric)]
    with muted(module):
        module.group.update(module(-images), labels)
        module.auroc.update(module(-images).softmax(1), labels)
        module.collected.append(labels)
        module.collected = [*module.collected, labels]
    after = [states(m) for m in module.modules() if isinstance(m, Metric)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert module.collected is collected
    assert len(collected) == 1
    assert module.group._groups == groups


def test_muted_forgets_the_groups_a_first_update_formed() -> None:
    module = Counting()
    images, labels = samples()
    with muted(module):
        module.group.update(module(images), labels)
    assert not module.group._groups_checked
    assert module.group._groups == Counting().group._groups
    assert [m.update_count for m in module.group.values()] == [0, 0, 0]


def test_metrics_of_a_group_that_count_in_place_count_once_after_a_muted_pass() -> None:
    class Share(Metric):
        hits: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")

        def update(self, values: Tensor) -> None:
            self.hits += values.sum()  # in place: metrics of a group share the tensor

        def compute(self) -> Tensor:
            return self.hits

    class Other(Share):
        pass

    module = LitNet()
    module.group = MetricCollection([Share(), Other()])
    with muted(module):
        module.group.update(torch.tensor([5]))
    for _ in range(2):
        module.group.update(torch.tensor([1]))
        with muted(module):
            module.group.update(torch.tensor([5]))
    assert {name: int(value) for name, value in module.group.compute().items()} == {
        "Other": 2,
        "Share": 2,
    }


def test_silence_ends_with_the_logging_methods_as_they_were() -> None:
    module = LitNet()
    vars(module)["log"] = print

    def step() -> None:
        module.log("x", 1.0)  # would warn: there is no Trainer
        module.log_dict({"x": 1.0})
        raise KeyError

    with pytest.raises(KeyError), without_logs(module):
        step()
    assert vars(module)["log"] is print
    assert "log_dict" not in vars(module)


def test_logs_inside_forward_during_a_label_pass_are_not_logged() -> None:
    class Logs(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            self.log("inside", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return super().forward(x)

    trainer = quiet()
    trainer.fit(Logs(**parts()), loader())
    assert trainer.callback_metrics["inside"] == 3  # batches, not passes

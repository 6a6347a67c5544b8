from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from helpers.toy import IT3Net, LitNet, loader, net, parts, quiet, samples
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from it3_lightning import (
    ClassPrior,
    DualPass,
    IT3Mixin,
    MaskPrior,
    RandomNoise,
    Tent,
    TestTimeCallback,
    ValuePrior,
)
from it3_lightning.training import mixin
from it3_lightning.training.first_batch import check_passes

REFUSALS = (MisconfigurationException, ValueError)


class Two(IT3Net):
    def forward(self, x: Tensor) -> Any:
        return {"scores": super().forward(x), "features": x.flatten(1)}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class Pair(IT3Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x.flatten(1)


class Masked(IT3Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask)


class Picks(Two):
    def it3_forward(self, inputs: Any) -> Any:
        return self(inputs)


class Repeats(IT3Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).repeat(2, 1)


class Grows(IT3Net):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        logits = super().forward(x)
        return logits if self.it3_conditioning.shown.prior is None else logits.repeat(2, 1)  # type: ignore[union-attr]


class NoTarget(IT3Net):
    def it3_target(self, batch: Any) -> Any:
        return {"label": batch[1]}


@pytest.mark.parametrize("train", ["joint", "conditioning"])
@pytest.mark.parametrize(
    ("kind", "prior", "message"),
    [
        (IT3Net, ClassPrior(10), r"Expected an output of shape \(B, 10, .*\n *def it3_outputs"),
        (IT3Net, ClassPrior(2), r"The prior cannot read the target of a batch.*\n *def it3_target"),
        (IT3Net, MaskPrior(3), r"a tensor \(4,\). MaskPrior.3. expected .*\n *def it3_target"),
        (Two, ClassPrior(3), r"a dict of 'scores' \(4, 3\), 'features' .*returned\['scores'\]"),
        (
            Pair,
            ClassPrior(3),
            r"a tuple of \(4, 3\), .*\n *def it3_outputs.*return returned\[0",
        ),
        (Masked, ClassPrior(3), r"be called on the inputs of a batch, a tensor.*def it3_forward"),
        (
            Picks,
            ClassPrior(3),
            r"it3_forward of Picks to return a tensor.*def it3_forward",
        ),
        (Repeats, ClassPrior(3), r"shape \(4, 3\), and what Repeats .*\(8, 3\).*def it3_outputs"),
        (Grows, ClassPrior(3), r"a tensor \(4, 3\), got \(8, 3\)..*def it3_forward"),
        (NoTarget, ClassPrior(3), r"a dict of 'label' \(4,\).*\n *def it3_target"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step_and_the_hook_is_shown(
    train: Any, kind: Any, prior: Any, message: str
) -> None:
    model, trainer = net(kind, prior=prior, train=train), quiet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(REFUSALS, match=f"(?s){message}"):
        trainer.fit(model, loader())
    assert trainer.global_step == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model._forward_hooks


BOXES = {"boxes": torch.rand(3, 4), "labels": torch.tensor([0, 2, 1])}


@pytest.mark.parametrize(
    "batch",
    [
        (samples(2)[0], [BOXES, BOXES]),
        {"image": samples(2)[0], "boxes": [torch.rand(3, 4)] * 2, "labels": [BOXES["labels"]] * 2},
    ],
)
def test_detection_is_refused_in_one_sentence_before_the_first_step(batch: Any) -> None:
    model, trainer = net(), quiet()
    with pytest.raises(
        MisconfigurationException, match=r"^Detection is out: .* for every sample\.$"
    ):
        trainer.fit(model, DataLoader(cast(Any, [batch]), batch_size=None))
    assert trainer.global_step == 0


def test_a_module_that_puts_out_boxes_is_refused_at_test_time() -> None:
    class Detector(LitNet):
        def forward(self, x: Tensor) -> Any:
            return [BOXES for _ in x]

    with pytest.raises(MisconfigurationException, match="Detection is out"):
        quiet(callbacks=[TestTimeCallback(Tent())]).predict(Detector(), loader())


class Manual(LitNet):
    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimized(nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def optimized(self, loss: Tensor) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class IT3Manual(IT3Mixin, Manual):
    pass


class OwnStep(IT3Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimized(self.it3_loss(batch, nn.functional.cross_entropy))


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_a_step_that_optimizes_manually_is_refused_and_one_with_it3_loss_is_not(train: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"(?s)manually, so .* self\.it3_loss"):
        quiet().fit(net(IT3Manual, train=train), loader())
    model = net(OwnStep, train=train)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet().fit(model, loader())
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert any(name.startswith("it3_conditioning") for name in moved)
    assert any(name.startswith("net") for name in moved) == (train == "joint")


def test_a_module_without_forward_is_refused_before_the_first_step() -> None:
    class Beside(IT3Net):
        forward = LightningModule.forward

    with pytest.raises(MisconfigurationException, match="def it3_forward"):
        quiet().fit(net(Beside), loader())


class Restless(IT3Net):
    """Draws, counts, logs, writes into its inputs, and has statistics."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.norm = nn.BatchNorm2d(1)
        self.seen: list[int] = []
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(len(x))
        noisy = self.norm(nn.functional.dropout(x, 0.3, training=True))
        self.log("norm", noisy.norm())
        x.add_(1.0)
        return super().forward(noisy)


@pytest.mark.parametrize("train", ["joint", "conditioning"])
@pytest.mark.parametrize("prior", [ClassPrior, ValuePrior])
def test_the_check_changes_no_bit_of_the_training(
    train: Any, prior: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Values(Restless):
        def it3_target(self, batch: Any) -> Any:
            target = super().it3_target(batch)
            return target if prior is ClassPrior else torch.stack(3 * [target.float()], 1)

    found, checked = [], []
    for check in (check_passes, lambda *_: None):

        def counting(*args: Any, check: Any = check) -> None:
            checked.append(check(*args))

        monkeypatch.setattr(mixin, "check_passes", counting)
        torch.manual_seed(0)
        model, trainer = net(Values, prior=prior(3), train=train), quiet(max_epochs=2)
        trainer.fit(model, loader())
        logs = dict(trainer.callback_metrics)
        found.append((model.state_dict(), model.seen, model.count, torch.rand(1), logs))
    (state, seen, count, drawn, logged), (others, *rest) = found
    assert len(checked) == 2
    assert [seen, count, drawn, logged] == rest
    assert all(torch.equal(value, others[name]) for name, value in state.items())


def test_a_stream_of_one_pass_loses_no_batch_to_the_check() -> None:
    class Once(IterableDataset[Any]):
        taken = 0

        def __iter__(self) -> Iterator[Any]:
            for each in zip(*samples(12), strict=True):
                self.taken += 1
                yield each

    class Notes(IT3Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batches.append(batch[1])
            return super().training_step(batch, batch_idx)

    batches: list[Tensor] = []
    data = Once()
    quiet(max_epochs=1).fit(net(Notes), DataLoader(data, batch_size=4))
    assert torch.equal(torch.cat(batches), samples(12)[1])
    assert data.taken == 12


def test_every_fit_checks_anew_and_a_plain_loop_once() -> None:
    model = net()
    quiet(max_epochs=1).fit(model, loader())
    model.it3_target = lambda batch: batch[1] + 5
    with pytest.raises(ValueError, match=r"The prior cannot read the target of a batch"):
        quiet(max_epochs=1).fit(model, loader())
    batch = next(iter(loader()))
    with pytest.raises(MisconfigurationException, match="Give the prior as many classes"):
        IT3Net(**parts(prior=ClassPrior(5))).it3_loss(batch, nn.functional.cross_entropy)


# Perturbed inputs


class Triple(IT3Mixin):
    """Its batches are ``(index, image, label)``."""

    def it3_inputs(self, batch: Any) -> Any:
        return batch[1]

    def it3_target(self, batch: Any) -> Any:
        return batch[2]


class OfTriples(LitNet):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[1]), batch[2])


class Puts(Triple):
    def it3_with_inputs(self, batch: Any, inputs: Any) -> Any:
        return [batch[0], inputs, batch[2]]


class Scales(IT3Net):
    def it3_inputs(self, batch: Any) -> Any:
        return batch[0] / 2


NOISE = DualPass(perturb_inputs=RandomNoise(0.5))


def triples() -> Any:
    images, labels = samples()
    data: Any = TensorDataset(torch.arange(len(labels)), images, labels)
    return DataLoader(data, batch_size=4)


def of_triples(kind: Any, **args: Any) -> Any:
    return net(type(kind.__name__, (kind, OfTriples), {}), **args)


@pytest.mark.parametrize(
    ("train", "settings"), [("joint", NOISE), ("conditioning", None)], ids=["joint", "post-hoc"]
)
def test_inputs_that_do_not_come_back_name_the_method_that_puts_them(
    train: Any, settings: Any
) -> None:
    args = {"train": train, "dual_pass": settings}
    match = "(?s)it3_inputs of {} does not find them.*def it3_with_inputs"
    with pytest.raises(MisconfigurationException, match=match.format("Triple")):
        quiet().fit(of_triples(Triple, **args), triples())
    with pytest.raises(MisconfigurationException, match=match.format("Scales")):
        quiet().fit(net(Scales, **args), loader())
    quiet().fit(of_triples(Puts, **args), triples())
    quiet().fit(net(**args), loader())


@pytest.mark.parametrize("passes", ["dual", "single"])
@pytest.mark.parametrize("perturbs", [None, RandomNoise(0.5)])
def test_inputs_that_are_not_changed_are_not_put_anywhere(passes: Any, perturbs: Any) -> None:
    class Whole(Triple):
        """Its images are whole numbers, which no noise changes."""

        def forward(self, x: Tensor) -> Any:
            return super().forward(x.to(torch.get_default_dtype()))

        def it3_with_inputs(self, batch: Any, inputs: Any) -> Any:
            raise AssertionError("inputs were put into a batch")

    images, labels = samples()
    data: Any = TensorDataset(torch.arange(len(labels)), (10 * images).long(), labels)
    settings = DualPass(passes=passes, perturb_inputs=perturbs)
    model, trainer = of_triples(Whole, dual_pass=settings), quiet()
    trainer.fit(model, DataLoader(data, batch_size=4))
    assert trainer.global_step == 3

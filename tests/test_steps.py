"""Any `training_step` on any batch trains on the same loss."""

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.by_hand import EXACT, ONE_HOT, X, Y, agree, by_hand, one, step_once
from helpers.toy import Batch, IT3Net, LitNet, doubles, net, parts, quiet, seeded
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from it3_lightning import DualPass, IT3Mixin


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


class DictStep(LitNet):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "preds": logits.detach()}


class StepWithoutIndex(LitNet):
    def training_step(self, batch: Batch) -> Any:  # type: ignore[override]
        return F.cross_entropy(self(batch[0]), batch[1])


def checked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a step as libraries do."""

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return wrapper


class Decorated(LitNet):
    @checked
    def training_step(self, batch: Batch) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


class TakesAnything(LitNet):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        (images, labels), index = args
        assert (index, kwargs) == (0, {})
        return F.cross_entropy(self(images), labels)


class NamedBatch(LitNet):
    """Takes the label out of a dict batch, as many steps do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, dict):
            return F.cross_entropy(self(batch["image"]), batch.pop("label"))
        return F.cross_entropy(self(batch.image), batch.label)


def mixed(base: type[LitNet], **args: Any) -> IT3Net:
    model: IT3Net = seeded(type("IT3Foreign", (IT3Mixin, base), {})(**parts(**args)))
    return model


@dataclass
class Pair:
    image: Tensor
    label: Tensor


Named = namedtuple("Named", ["image", "label"])


@pytest.mark.parametrize(
    ("base", "batch"),
    [
        (LitNet, (X, Y)),
        (LitNet, [X, Y]),
        (DictStep, (X, Y)),
        (StepWithoutIndex, (X, Y)),
        (Decorated, (X, Y)),
        (TakesAnything, (X, Y)),
        (NamedBatch, {"image": X, "label": Y}),
        (NamedBatch, Pair(X, Y)),
        (NamedBatch, Named(X, Y)),
    ],
    ids=[
        *("tuple", "list", "dict step", "no batch_idx", "decorated", "anything"),
        *("dict", "dataclass", "named tuple"),
    ],
)
@pytest.mark.parametrize("perturbed", [False, True])
def test_any_step_and_any_batch_give_the_same_loss(
    base: type[LitNet], batch: Any, perturbed: bool
) -> None:
    perturb = (lambda x: x * 0.5) if perturbed else None
    dual = DualPass(perturb_prior=False, perturb_inputs=perturb)
    shown = X * 0.5 if perturbed else X
    expected = by_hand(
        net(), lambda f: F.cross_entropy(f(X, None), Y) + F.cross_entropy(f(shown, ONE_HOT), Y)
    )
    agree(step_once(mixed(base, dual_pass=dual), batch), expected)


def test_step_may_be_called_by_keyword() -> None:
    model = net(dual_pass=EXACT, train="off")
    model.log = lambda *_, **__: None
    expected = model.training_step((X, Y), 0)
    assert torch.equal(model.training_step(batch=(X, Y), batch_idx=0), expected)


class Scaled(LitNet):
    """Takes two inputs, one of them not a tensor."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x * scale)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(*batch["inputs"]), batch["label"])


def test_single_pass_mixes_tensors_of_nested_inputs_and_takes_the_rest_as_it_is() -> None:
    def perturb(inputs: Any) -> Any:
        return inputs[0] + 1, inputs[1]

    dual = DualPass(passes="single", perturb_prior=False, perturb_inputs=perturb)
    torch.manual_seed(7)
    present = torch.rand(6) >= 0.5
    mixture = 0.5 * torch.where(present.reshape(-1, 1, 1, 1), X + 1, X)

    def loss(f: Callable[..., Tensor]) -> Tensor:
        shown = torch.where(present[:, None], f(mixture, ONE_HOT), f(mixture, None))
        return F.cross_entropy(shown, Y)

    batch = {"inputs": (X, 0.5), "label": Y}
    agree(step_once(mixed(Scaled, dual_pass=dual), batch), by_hand(net(), loss))


def test_dict_of_a_step_keeps_its_other_entries_from_the_neutral_pass() -> None:
    kept: list[Tensor] = []

    class Keep(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
        ) -> None:
            kept.append(outputs["preds"])

    twin = net()
    twin.train()
    expected = twin(X).detach()
    model = mixed(DictStep, dual_pass=EXACT)
    quiet(max_steps=1, callbacks=[Keep()]).fit(model, one((X, Y)))
    torch.testing.assert_close(kept[0], expected)


def test_step_that_returns_none_skips_the_batch() -> None:
    class Skips(LitNet):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None

    model = mixed(Skips)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="returned `None`"):
        quiet().fit(model, one((X, Y)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_step_that_returns_something_else_is_refused() -> None:
    class Odd(LitNet):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return str(self(batch[0]).sum())

    with pytest.raises(TypeError, match=r"to return a loss tensor.*got str"):
        quiet().fit(mixed(Odd), one((X, Y)))

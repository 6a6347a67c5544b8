"""What a target leaves open is shown as the neutral prior: passes written out by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.by_hand import ONE_HOT, X, Y, agree, by_hand, step_once
from helpers.toy import Batch, LitNet, doubles, net
from torch import Tensor
from torch.nn import functional as F

from it3_lightning import ClassPrior, DualPass, IT3Mixin

KNOWN = torch.tensor([True, False, True, True, False, True])
LABELS = Y.masked_fill(~KNOWN, -100)  # which torch's cross-entropy ignores, too


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def made(**dual: Any) -> Any:
    prior = ClassPrior(3, ignore_index=-100)
    return net(prior=prior, dual_pass=DualPass(perturb_prior=False, **dual))


def where(samples: Tensor, f: Callable[..., Tensor], x: Tensor, prior: Tensor) -> Tensor:
    return torch.where(samples[:, None], f(x, prior), f(x, None))


def test_samples_with_ignored_labels_see_the_neutral_prior() -> None:
    def loss(f: Callable[..., Tensor]) -> Tensor:
        seen = where(KNOWN, f, X, ONE_HOT)
        return F.cross_entropy(f(X, None), LABELS) + F.cross_entropy(seen, LABELS)

    agree(step_once(made(), (X, LABELS)), by_hand(made(), loss))


def test_of_ignored_samples_the_own_prediction_is_shown_where_drawn() -> None:
    torch.manual_seed(7)
    drawn = torch.rand(6) < 0.5
    assert (drawn & ~KNOWN).any()
    assert (~drawn & ~KNOWN).any()

    def loss(f: Callable[..., Tensor]) -> Tensor:
        prior = torch.where(drawn[:, None], f(X, None).softmax(1).detach(), ONE_HOT)
        seen = where(KNOWN | drawn, f, X, prior)
        return F.cross_entropy(f(X, None), LABELS) + F.cross_entropy(seen, LABELS)

    agree(step_once(made(own_share=0.5), (X, LABELS)), by_hand(made(), loss))


def test_in_a_single_pass_a_prior_is_seen_where_drawn_and_known() -> None:
    torch.manual_seed(7)
    drawn = torch.rand(6) >= 0.4
    assert (drawn & ~KNOWN).any()

    def loss(f: Callable[..., Tensor]) -> Tensor:
        return F.cross_entropy(where(drawn & KNOWN, f, X, ONE_HOT), LABELS)

    single = made(passes="single", neutral_share=0.4)
    agree(step_once(single, (X, LABELS)), by_hand(made(), loss))


def test_unequal_batches_are_drawn_of_samples_with_labels() -> None:
    seen: list[Tensor] = []

    class Looks(LitNet):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            seen.append(batch[1])
            return super().training_step(batch, batch_idx)

    class Mixed(IT3Mixin, Looks):
        pass

    prior, dual = ClassPrior(3, ignore_index=-100), DualPass(unequal_share=1.0)
    step_once(net(Mixed, prior=prior, dual_pass=dual), (X, LABELS))
    drawn, neutral = seen
    assert drawn.min() >= 0
    assert torch.equal(neutral, LABELS)
    seen.clear()
    nothing = torch.full_like(LABELS, -100)
    step_once(net(Mixed, prior=prior, dual_pass=dual), (X, nothing))
    assert all(torch.equal(labels, nothing) for labels in seen)


def test_the_index_may_be_any_number() -> None:
    class Ignores(LitNet):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1], ignore_index=7)

    class Mixed(IT3Mixin, Ignores):
        pass

    prior, dual = ClassPrior(3, ignore_index=7), DualPass(perturb_prior=False)
    seven = step_once(net(Mixed, prior=prior, dual_pass=dual), (X, Y.masked_fill(~KNOWN, 7)))
    agree(seven, step_once(made(), (X, LABELS)))

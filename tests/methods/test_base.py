"""Objectives: the loss of the samples that count, and what is left when none does."""

import torch

from it3_lightning.methods import Objective


def test_unreliable_samples_have_no_gradient_even_if_not_finite() -> None:
    measure = torch.tensor([1.0, torch.inf, 3.0], requires_grad=True)
    loss = Objective(measure, torch.tensor([True, False, True])).loss()
    (gradient,) = torch.autograd.grad(loss, measure)
    assert loss.item() == 2.0
    assert gradient.tolist() == [0.5, 0.0, 0.5]


def test_nothing_reliable_is_empty_unless_a_batch_term_remains() -> None:
    measure, none = torch.ones(2), torch.zeros(2, dtype=torch.bool)
    assert Objective(measure, none).empty
    assert Objective(measure, none).loss().item() == 0.0
    assert not Objective(measure, none, torch.tensor(3.0)).empty
    assert Objective(measure, none, torch.tensor(3.0)).loss().item() == 3.0

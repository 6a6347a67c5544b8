"""EM of class frequencies: agreement with its paper, written sample by sample in plain Python."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.method_runs import (
    adapter_of,
    batches,
    from_yaml,
    plain_module,
    predicted,
    run,
)
from helpers.modules import same, toy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from it3_lightning import LabelShiftEM, TestTimeCallback


def by_hand(
    rows: list[list[float]], source: Sequence[float], shrinkage: float, most: int
) -> list[list[float]]:
    """Saerens et al. (2002), equation 2.9: an E step for each sample, then an M step."""
    total = sum(source)
    training = [each / total for each in source]

    def posteriors(now: list[float]) -> list[list[float]]:
        found = []
        for row in rows:
            joint = [p * new / old for p, new, old in zip(row, now, training, strict=True)]
            found.append([each / sum(joint) for each in joint])
        return found

    now = list(training)
    for _ in range(most):
        z = posteriors(now)
        new = [sum(row[c] for row in z) / len(rows) for c in range(len(now))]
        moved = max(abs(a - b) for a, b in zip(now, new, strict=True))
        now = new
        if moved <= 1e-6:
            break
    shrunk = [(1 - shrinkage) * a + shrinkage * b for a, b in zip(now, training, strict=True)]
    return posteriors(shrunk)


@pytest.mark.parametrize("most", [1, 5, 100])
@pytest.mark.parametrize(
    ("source", "shrinkage"), [(None, 0.0), ((2.0, 1.0, 1.0), 0.0), ((2.0, 1.0, 1.0), 0.3)]
)
def test_predictions_are_those_of_the_paper_and_no_batch_leaves_anything(
    source: Sequence[float] | None, shrinkage: float, most: int
) -> None:
    net, stream = toy(), batches()
    weights = {name: weight.clone() for name, weight in net.named_parameters()}
    adapter = adapter_of(LabelShiftEM(source, shrinkage, most), net)
    for ours, x in zip(run(adapter, net, stream), stream, strict=True):
        rows = net(x).softmax(1).detach().tolist()
        theirs = torch.tensor(
            by_hand(rows, source or (1.0, 1.0, 1.0), shrinkage, most), dtype=torch.float64
        )
        torch.testing.assert_close(ours.prediction, theirs, rtol=0, atol=1e-6)
        assert ours.backwards == 0
    assert same((dict(net.named_parameters())[n].data, weight) for n, weight in weights.items())


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=2, max_size=8))
def test_its_likelihood_is_no_less_than_that_of_training_frequencies(rows: Any) -> None:
    p = torch.tensor(rows, dtype=torch.float64)
    p = p / p.sum(1, keepdim=True)
    z = LabelShiftEM().adjusted(p)
    torch.testing.assert_close(z.sum(1), torch.ones(len(p), dtype=torch.float64))
    found = z.mean(0)
    assert float((p @ (3 * found)).log().sum()) >= -1e-9  # at the frequencies of training it is 0


def test_wholly_shrunk_it_leaves_predictions_alone() -> None:
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    torch.testing.assert_close(LabelShiftEM(shrinkage=1.0).adjusted(p), p)


def test_a_frequent_class_takes_an_unsure_sample() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55]])
    assert LabelShiftEM().adjusted(p).argmax(1).tolist() == [0, 0, 0]


def test_an_untouched_module_predicts_by_it() -> None:
    module, stream = plain_module(), batches(3)
    (found,) = predicted(TestTimeCallback(LabelShiftEM()), module, stream)
    for logits, x in zip(found, stream, strict=True):
        rows = module.net(x).softmax(1).tolist()
        theirs: Tensor = torch.tensor(by_hand(rows, (1.0, 1.0, 1.0), 0.0, 100), dtype=x.dtype)
        torch.testing.assert_close(logits.softmax(1), theirs, rtol=0, atol=1e-6)


def test_a_configuration_sets_it() -> None:
    assert from_yaml("LabelShiftEM", shrinkage=0.3) == LabelShiftEM(shrinkage=0.3)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected positive frequencies as source, got \(0, 1\)"):
        LabelShiftEM((0, 1))
    with pytest.raises(ValueError, match=r"Expected shrinkage in \[0, 1\], got 2"):
        LabelShiftEM(shrinkage=2)
    with pytest.raises(ValueError, match="Expected iterations >= 1, got 0"):
        LabelShiftEM(iterations=0)
    with pytest.raises(ValueError, match="Expected frequencies of 2 classes as source, got 3"):
        LabelShiftEM((1, 1, 1)).adjusted(torch.ones(2, 2) / 2)

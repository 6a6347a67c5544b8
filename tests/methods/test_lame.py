"""LAME: agreement with a plain implementation of its paper, sample by sample.

The reference follows the paper's iteration; its affinities and its end are those of the paper's
public code, with which it agrees.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers.method_runs import (
    adapted,
    adapter_of,
    batches,
    from_yaml,
    plain_module,
    predicted,
    run,
)
from helpers.modules import same, toy
from helpers.reference import ToyNet
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from it3_lightning import LAME, TestTimeCallback
from it3_lightning.methods.lame import Affinity, assignments

Weights = Callable[[Sequence[Tensor], int], list[list[float]]]


def distances(features: Sequence[Tensor]) -> list[list[float]]:
    return [[float((a - b).norm()) for b in features] for a in features]


def knn(features: Sequence[Tensor], k: int) -> list[list[float]]:
    found = []
    for i, row in enumerate(distances(features)):
        others = sorted((d, j) for j, d in enumerate(row) if j != i)
        nearest = {j for _, j in others[:k]}
        found.append([float(j in nearest) for j in range(len(row))])
    return found


def rbf(features: Sequence[Tensor], k: int) -> list[list[float]]:
    apart = distances(features)
    sigma = sum(sorted(row)[min(k, len(row)) - 1] for row in apart) / len(apart)
    return [[math.exp(-(d**2) / (2 * sigma**2)) for d in row] for row in apart]


def linear(features: Sequence[Tensor], k: int) -> list[list[float]]:
    return [[float(a @ b) for b in features] for a in features]


AFFINITIES: dict[Affinity, Weights] = {"knn": knn, "rbf": rbf, "linear": linear}


def iterated(p: Tensor, w: list[list[float]]) -> Tensor:
    """The paper's iteration, for one sample after the other, until the bound is still."""
    z, before = list(p), math.inf
    for step in range(100):
        pulls = [
            sum((weight * other for weight, other in zip(row, z, strict=True)), torch.zeros(3))
            for row in w
        ]
        new = [own * pull.exp() for own, pull in zip(p, pulls, strict=True)]
        z = [each / each.sum() for each in new]
        bound = sum(
            float((each * (each / own).log() - each * pull).sum())
            for each, own, pull in zip(z, p, pulls, strict=True)
        )
        if step > 1 and abs(bound - before) <= 1e-8 * abs(before):
            break
        before = bound
    return torch.stack(z)


@torch.no_grad()
def by_hand(net: ToyNet, x: Tensor, affinity: Affinity, k: int, layers: Sequence[str]) -> Tensor:
    """LAME as its paper has it; the features of each layer side by side."""
    maps = net.bn(net.conv(x))
    dense = net.dense(maps.relu().flatten(1))
    p = net.head(dense.relu()).softmax(1)
    known = {"bn": maps.flatten(1), "dense": dense}
    features = torch.cat([known[name] for name in layers], 1) if layers else p
    return iterated(p, AFFINITIES[affinity]([each / each.norm() for each in features], k))


@pytest.mark.parametrize("affinity", [*AFFINITIES])
@pytest.mark.parametrize("layers", [[], ["dense"], ["bn", "dense"]])
def test_assignments_are_those_of_the_paper_and_no_batch_leaves_anything(
    affinity: Affinity, layers: list[str]
) -> None:
    net, stream = toy(), batches()
    weights = {name: weight.clone() for name, weight in net.named_parameters()}
    adapter = adapter_of(LAME(affinity, 3, layers), net)
    for ours, x in zip(run(adapter, net, stream), stream, strict=True):
        theirs = by_hand(net, x, affinity, 3, layers)
        torch.testing.assert_close(ours.prediction, theirs, rtol=0, atol=1e-10)
        assert ours.backwards == 0
    assert same((dict(net.named_parameters())[n].data, weight) for n, weight in weights.items())


@pytest.mark.parametrize("affinity", [*AFFINITIES])
def test_two_samples_and_twins_are_enough(affinity: Affinity) -> None:
    net, x = toy(), batches(1)[0][:1].repeat(2, 1, 1, 1)
    found = adapted(adapter_of(LAME(affinity, layers=["dense"]), net), net, x).prediction
    own = 0.0 if affinity == "knn" else 1.0
    expected = iterated(net(x).softmax(1).detach(), [[own, 1.0], [1.0, own]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert expected.max() > net(x).softmax(1).max()  # each makes the other surer


def test_neighbours_of_one_class_take_an_unsure_sample_along() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55], [0.1, 0.9]])
    near = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).float()
    assert assignments(p, near).argmax(1).tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(assignments(p, near)[3], p[3])


def test_an_untouched_module_predicts_by_it() -> None:
    module, stream = plain_module(), batches(3)
    callback = TestTimeCallback(LAME("knn", 3, ["net.dense"]))
    (found,) = predicted(callback, module, stream)
    for logits, x in zip(found, stream, strict=True):
        theirs = by_hand(module.net, x, "knn", 3, ["dense"])
        torch.testing.assert_close(logits.softmax(1), theirs, rtol=0, atol=1e-10)


def test_half_precision_comes_to_the_same_classes() -> None:
    half, x = toy().to(torch.bfloat16), batches(1)[0].to(torch.bfloat16)
    found = adapted(adapter_of(LAME(layers=["dense"]), half), half, x).prediction
    assert found is not None
    theirs = by_hand(toy(), x.double(), "knn", 5, ["dense"])
    assert found.argmax(1).tolist() == theirs.argmax(1).tolist()


def test_its_papers_settings_are_its_defaults() -> None:
    settings = TestTimeCallback(LAME()).settings
    assert (settings.steps, settings.episodic, settings.needs_batch) == (0, True, True)
    assert (LAME().affinity, LAME().neighbours) == ("knn", 5)


def test_a_configuration_sets_it() -> None:
    assert from_yaml("LAME", affinity="rbf", layers=["net.dense"]) == LAME("rbf", 5, ["net.dense"])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown affinity 'cosine'.*Known: knn, rbf, linear"):
        LAME("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected neighbours >= 1, got 0"):
        LAME(neighbours=0)
    with pytest.raises(MisconfigurationException, match=r"Unknown layer 'net.dens'.*'net.dense'"):
        predicted(TestTimeCallback(LAME(layers=["net.dens"])), plain_module(), batches(1))

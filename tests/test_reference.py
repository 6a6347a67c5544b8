"""The reference itself, held against numbers worked out on paper.

`Scale` is f(x, p) = w x + v p with w = 2, v = 0.5. With the anchor at (W, V) and squared L2,
d = (w x - W x - V w x)^2 and dd/dw = 2 (w - W - V w)(1 - V) x^2. On x = 1, 3 (mean x^2 = 5) that
is -5 at the source: one step of SGD at 0.1 gives w = 2.5. v sees no gradient: y0 has no prior.
"""

import copy
import math
from functools import partial

import pytest
import torch
from helpers.reference import (
    Distance,
    Reset,
    ToyNet,
    adapt_stream,
    distance,
    entropy_objective,
    forward_predict,
    objective,
    reliable,
    softmax_label,
)
from torch import Tensor, nn


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(tensor(2.0)), nn.Parameter(tensor(0.5))

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        out: Tensor = self.w * x
        return out if prior is None else out + self.v * prior


X = tensor([1.0], [3.0])
SURE, UNSURE = tensor([3.0, 0.0]), tensor([0.1, 0.0])
values = partial(adapt_stream, predict=forward_predict, to_label=lambda y: y, lr=0.1)
classes = partial(adapt_stream, predict=forward_predict, to_label=softmax_label, lr=0.1)


def close(actual: Tensor, *expected: object, atol: float = 1e-9) -> None:
    wanted = tensor(*expected).reshape(actual.shape)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "q", "expected"),
    [
        ("l2", (1.0, 0.0), 0.5),
        ("l1", (1.0, 0.0), 1.0),
        ("kl", (0.75, 0.25), 0.5 * math.log(4 / 3)),
        ("cross_entropy", (1.0, 0.0), math.log(2)),
        ("js", (1.0, 0.0), 0.75 * math.log(4 / 3)),
    ],
)
def test_distance_from_the_uniform(name: Distance, q: tuple[float, float], expected: float) -> None:
    close(distance(name, tensor([0.5, 0.5]), tensor(q)), expected)


def test_js_of_disjoint_distributions_is_ln_2() -> None:
    close(distance("js", tensor([1.0, 0.0]), tensor([0.0, 1.0])), math.log(2))


def test_distances_sum_over_channels_and_average_over_positions() -> None:
    p = tensor([[0.5, 1.0], [0.5, 0.0]])  # (1, 2 classes, 2 positions)
    q = tensor([[1.0, 1.0], [0.0, 0.0]])
    close(distance("l2", p, q), 0.25)
    close(distance("l1", p, q), 0.5)
    close(distance("cross_entropy", p, q), math.log(2) / 2)


def test_reliable_needs_agreement_and_confidence() -> None:
    p0 = tensor([0.9, 0.1], [0.5, 0.5], [0.9, 0.1])
    p1 = tensor([0.8, 0.2], [0.6, 0.4], [0.3, 0.7])
    assert reliable(p0, p1).tolist() == [True, False, False]
    assert reliable(p0, p1, 0.4).tolist() == [True, True, False]


def test_objective_by_hand() -> None:
    p0, p1 = tensor([0.9, 0.1], [0.5, 0.5]), tensor([0.8, 0.2], [0.2, 0.8])  # d = 0.02, 0.18
    spread = 0.7 * math.log(0.7) + 0.3 * math.log(0.3)  # over both samples, filtered or not
    close(objective(p0, p1, "l2", False, 0.0), 0.1)
    close(objective(p0, p1, "l2", True, 0.0), 0.02)
    close(objective(p0, p1, "l2", True, 0.5), 0.02 + 0.5 * spread)
    close(objective(p0[1:], p1[1:], "l2", True, 2.0), -2 * math.log(2))


def test_objective_without_reliable_samples_is_zero_and_flat() -> None:
    p0 = tensor([0.5, 0.5]).requires_grad_()
    loss = objective(p0, tensor([0.2, 0.8]), "l2", True, 0.0)
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert p0.grad is not None
    close(p0.grad, 0, 0)


def test_entropy_objective_by_hand() -> None:
    p0 = tensor([0.75, 0.25], [0.5, 0.5])
    sure = math.log(4) - 0.75 * math.log(3)
    spread = 0.625 * math.log(0.625) + 0.375 * math.log(0.375)
    close(entropy_objective(p0, 0.6, 0.0), sure)
    close(entropy_objective(p0, None, 2.0), (sure + math.log(2)) / 2 + 2 * spread)
    close(entropy_objective(p0, 0.9, 0.0), 0)


def test_frozen_step_by_hand() -> None:
    (record,) = values(Scale(), [X])
    close(record.y0, 2, 6)
    close(record.outputs, 2.5, 7.5)
    close(record.distance_before, 1, 9)  # (v w x)^2
    close(record.distance_after, 0.5625, 9 * 0.5625)  # (2.5 - 2 - 1.25)^2
    close(record.weights["v"], 0.5)
    close(record.anchor["w"], 2)


def test_live_step_by_hand() -> None:
    (record,) = values(Scale(), [X], anchor="live", lr=0.01)  # d = (v w x)^2
    close(record.weights["w"], 2 - 0.01 * 5)  # 2 v^2 w x^2
    close(record.weights["v"], 0.5 - 0.01 * 20)  # 2 v w^2 x^2
    close(record.distance_after, (0.3 * 1.95) ** 2, 9 * (0.3 * 1.95) ** 2)


def test_ema_follows_after_every_step() -> None:
    (record,) = values(Scale(), [X], anchor="ema", ema_decay=0.9, steps=2)
    close(record.weights["w"], 2.9)  # W = 2.05 after one step, gradient (2.5 - 3.3) * 5 = -4
    close(record.anchor["w"], 0.9 * 2.05 + 0.1 * 2.9)


def test_ema_keeps_unselected_weights() -> None:
    (record,) = values(Scale(), [X], anchor="ema", parameters=lambda name: name == "w")
    assert record.anchor["v"].item() == record.weights["v"].item() == 0.5


def test_only_selected_parameters_move() -> None:
    (record,) = values(Scale(), [X], anchor="live", lr=0.01, parameters=lambda name: name == "v")
    close(record.weights["w"], 2)
    close(record.weights["v"], 0.3)


def test_reset_says_where_the_source_weights_return() -> None:
    once, twice = 2.5, 2.875  # the second step: 2 (-0.75)(0.5) 5 = -3.75
    cases: list[tuple[Reset, list[float]]] = [
        ("batch", [once, once, once]),
        (1, [once, once, once]),
        (2, [once, twice, once]),
    ]
    for reset, expected in cases:
        records = values(Scale(), [X] * 3, reset=reset)
        close(torch.cat([r.weights["w"] for r in records]), *expected)
    first, second = values(Scale(), [X] * 2, reset="never")
    close(second.weights["w"], twice)
    close(second.y0, 2, 6)  # of the source, not of the weights the batch starts from
    close(second.distance_before, *first.distance_after.tolist())
    close(second.distance_source, 1, 9)


def test_adam_state_is_carried_on_or_reset_with_the_weights() -> None:
    adam = partial(values, optimizer="adam", lr=0.01, anchor="ema", ema_decay=0.5)
    (two_steps,) = adam(Scale(), [X], steps=2)
    carried = adam(Scale(), [X] * 2, reset="never")
    close(carried[0].weights["w"], 2.01, atol=1e-8)  # Adam's first step is lr, whatever the slope
    assert torch.equal(carried[1].weights["w"], two_steps.weights["w"])
    episodic = adam(Scale(), [X] * 2, reset="batch")
    assert torch.equal(episodic[1].weights["w"], carried[0].weights["w"])


def test_grad_clip_bounds_the_step() -> None:
    (record,) = values(Scale(), [X], grad_clip=1.0)
    close(record.weights["w"], 2.1, atol=1e-6)


def test_unreliable_batch_is_skipped_whole() -> None:
    online = partial(classes, optimizer="adam", anchor="ema", reset="never", filtered=True)
    sure, unsure = online(Scale(), [SURE, UNSURE])
    assert sure.weights["w"].item() != 2
    assert torch.equal(unsure.weights["w"], sure.weights["w"])  # Adam's momentum would move it
    assert torch.equal(unsure.anchor["w"], sure.anchor["w"])  # and so would the average
    balanced = online(Scale(), [SURE, UNSURE], balance=0.3)
    assert not torch.equal(balanced[1].weights["w"], balanced[0].weights["w"])


def test_batch_norm_uses_the_chosen_statistics() -> None:
    net = nn.BatchNorm1d(1, eps=1e-12, dtype=torch.float64)
    blind = partial(values, predict=lambda model, x, _: model(x))
    (source,) = blind(net, [X], norm_stats="source")
    (batch,) = blind(net, [X], norm_stats="batch")
    close(source.y0, 1, 3)  # running mean 0, variance 1
    close(batch.y0, -1, 1)
    close(batch.outputs, -1, 1)


def test_more_steps_come_closer_and_leave_the_input_model_alone() -> None:
    torch.manual_seed(0)
    net, x = ToyNet(), torch.randn(6, 1, 4, 4)
    before = copy.deepcopy(net.state_dict())
    for stats in ("source", "batch"):
        (record,) = classes(net, [x], distance="js", steps=20, norm_stats=stats)
        assert record.distance_after.mean() < record.distance_before.mean()
        assert not torch.equal(record.outputs, record.y0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())

"""Methods that move norm layers along a stream: by the engine, under a Trainer, from YAML."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from helpers import method_runs
from helpers.modules import toy
from helpers.reference import ToyNet
from helpers.toy import LitNet
from it3_lightning import TestTimeCallback
from it3_lightning.engine import Adaptation, BatchAdapter, Settings
from it3_lightning.engine.types import Plain
from it3_lightning.methods import TestTimeMethod

LR = 0.05


def network() -> ToyNet:
    """Make a network that is sure of some images and names different classes."""
    net = toy(2)
    with torch.no_grad():
        for layer in (net.dense, net.head):
            layer.weight.mul_(2)
            layer.bias.zero_()
    return net


def with_bad_ones(stream: list[Tensor]) -> list[Tensor]:
    """Put a batch with a bad sample after each."""
    bad = [x.index_fill(0, torch.tensor([1]), torch.nan) for x in stream]
    return [x for pair in zip(stream, bad, strict=True) for x in pair]


def of_batches(net: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Copy a network, let BatchNorm use the batch at hand; return it and its norm weights."""
    own = copy.deepcopy(net).eval()
    norms = [each for each in own.modules() if isinstance(each, nn.BatchNorm2d | nn.GroupNorm)]
    for norm in norms:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = norm.running_var = None
    return own, [weight for norm in norms for weight in norm.parameters()]


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of each sample, ``(B, C)`` in, ``(B,)`` out."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def adapter_of(method: TestTimeMethod, net: nn.Module, **given: Any) -> BatchAdapter:
    """Make what adapts by a method with its own settings, and a learning rate that is seen."""
    settings = Settings(**{**method.defaults, "objective": method, "lr": LR, **given})
    return BatchAdapter(net, lambda x, _: net(x), lambda outputs: outputs.softmax(1), settings)


def run(adapter: BatchAdapter, net: nn.Module, stream: list[Tensor]) -> list[Adaptation]:
    """Adapt to one batch after the other."""
    found = []
    for x in stream:
        with adapter.adapted(x, Plain(lambda inputs, _: net(inputs))) as adaptation:
            found.append(adaptation)
    return found


def outputs_of(
    method: TestTimeMethod, net: nn.Module, stream: list[Tensor], **given: Any
) -> list[Tensor]:
    """Return the outputs of each batch that was adapted to, with bad ones in between."""
    found = run(adapter_of(method, net, **given), net, with_bad_ones(stream))
    assert {each.reason for each in found[1::2]} == {"non-finite output"}
    return [each.outputs for each in found[::2] if each.outputs is not None]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Compare the outputs of all batches."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def plain_module() -> method_runs.Validates:
    """Make an ordinary module with that network."""
    return method_runs.plain_module(network())


def predicted(callback: TestTimeCallback, module: LitNet, stream: list[Tensor]) -> list[Tensor]:
    """Predict under a Trainer, which leaves the module bitwise as it was."""
    (found,) = method_runs.predicted(callback, module, stream)
    return found

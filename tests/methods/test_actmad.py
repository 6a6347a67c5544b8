"""ActMAD: agreement with a plain implementation of its paper, and with torch-ttt.

The loss is that of torch-ttt and of the paper's public code for KITTI; that for CIFAR halves it.
Moments of the source agree with torch-ttt, which keeps all features; the public code takes the mean
of the batches' variances instead.
"""

import contextlib
import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.method_runs import (
    RESETS,
    Validates,
    adapted,
    adapter_of,
    batches,
    from_yaml,
    plain_module,
    predicted,
    run,
    served,
)
from helpers.modules import toy
from helpers.reference import ToyNet
from helpers.toy import differing, everything, parts, quiet
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch_ttt.engine.actmad_engine import ActMADEngine

from it3_lightning import ActMAD, IT3Mixin, TestTimeCallback
from it3_lightning.engine import BatchAdapter, Settings

SOURCE = [batches(3)[1], *batches(7, 3)[4:], batches(1, 2)[0] / 2]
"""Source batches of eight, three and two."""

Features = list[Tensor]


def features_of(net: ToyNet, x: Tensor) -> Features:
    normed = net.bn(net.conv(x))
    return [normed, net.dense(normed.relu().flatten(1))]


def distance(found: Features, source: Features) -> Tensor:
    total = torch.zeros(())
    for ours, theirs in zip(found, source, strict=True):
        for moment in (torch.mean, torch.var):
            total = total + (moment(ours, 0) - moment(theirs, 0)).abs().mean()
    return total


def by_hand(net: ToyNet, stream: Sequence[Tensor], every: int, steps: int = 1) -> list[Tensor]:
    """ActMAD as its paper has it: SGD with momentum on all weights, predictions after the step."""
    with torch.no_grad():
        source = features_of(net, torch.cat(SOURCE))
    found = []
    for batch, x in enumerate(stream):
        if batch % every == 0:
            own = copy.deepcopy(net)
            optimizer = torch.optim.SGD(own.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(distance(features_of(own, x), source))
            optimizer.step()
        found.append(own(x).detach())
    return found


def fitted(net: nn.Module, layers: Any = ("bn", "dense"), **settings: Any) -> BatchAdapter:
    adapter = adapter_of(ActMAD(layers), net, **settings)
    for x in SOURCE:
        adapter.fit_source(x)
    return adapter


@pytest.mark.parametrize("reset", [*RESETS])
@pytest.mark.parametrize("steps", [1, 2])
def test_steps_are_those_of_the_paper_and_bad_batches_leave_nothing(reset: Any, steps: int) -> None:
    net, stream = toy(), batches()
    expected = by_hand(net, stream, RESETS[reset], steps)
    found = run(fitted(net, reset=reset, steps=steps), net, stream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.outputs, theirs, rtol=0, atol=1e-9)
        assert ours.prediction is None


def test_the_distance_is_that_of_torch_ttt_and_falls() -> None:
    net, x = toy(), batches()[4]
    engine = ActMADEngine(copy.deepcopy(net), ["bn", "dense"])
    engine.compute_statistics([(batch,) for batch in SOURCE])
    engine.eval()
    with contextlib.redirect_stdout(io.StringIO()):
        _, expected = engine.ttt_forward(x)
    found = adapted(fitted(net, steps=5), net, x)
    assert found.distance_source is not None
    assert found.distance_adapted is not None
    torch.testing.assert_close(found.distance_source, expected.detach().expand(len(x)))
    assert (found.distance_adapted < found.distance_source).all()


def test_source_moments_are_pooled_exactly_whatever_the_batches() -> None:
    net, method = toy(), ActMAD(["bn"])
    adapter = adapter_of(method, net)
    for x in SOURCE:
        adapter.fit_source(x + 1e4)  # far from zero, where sums of squares lose their digits
    features = net.bn(net.conv(torch.cat(SOURCE) + 1e4)).detach()
    seen = method.source_dict()["bn"]
    torch.testing.assert_close(seen["mean"], features.mean(0), rtol=1e-12, atol=0)
    variance = seen["squares"] / (seen["count"] - 1)
    torch.testing.assert_close(variance, features.var(0), rtol=1e-9, atol=0)


def test_source_data_that_are_seen_later_count_too() -> None:
    net, x = toy(), batches()[4]
    adapter = adapter_of(ActMAD(["bn"]), net, reset="batch")
    for seen in (1, 2, 3):
        adapter.fit_source(SOURCE[seen - 1])
        features = [net.bn(net.conv(batch)).detach() for batch in (x, torch.cat(SOURCE[:seen]))]
        found = adapted(adapter, net, x).distance_source
        expected = distance(features[:1], features[1:]).expand(len(x))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_outputs_are_those_of_the_layer_though_what_follows_writes_into_them() -> None:
    def made(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        norm, relu = nn.BatchNorm2d(2), nn.ReLU(inplace)
        return nn.Sequential(nn.Conv2d(1, 2, 3), norm, relu, nn.Flatten(), nn.Linear(8, 3)).double()

    found = []
    for inplace in (False, True):
        net = made(inplace).eval()
        found.append(adapted(fitted(net, "norm"), net, batches(1)[0]))
    torch.testing.assert_close(found[0].distance_source, found[1].distance_source, rtol=0, atol=0)
    torch.testing.assert_close(found[0].outputs, found[1].outputs, rtol=0, atol=0)


class IT3Validates(IT3Mixin, Validates):
    pass


def test_a_trainer_shows_it_source_data_and_adapts_an_untouched_module() -> None:
    module, stream = plain_module(), batches(4)
    expected = by_hand(module.net, stream, 1000)
    callback = TestTimeCallback(ActMAD(["net.bn", "net.dense"]))
    with pytest.raises(MisconfigurationException, match="has seen nothing yet"):
        predicted(callback, module, stream)
    before = everything(module)
    quiet(callbacks=[callback]).validate(module, served(SOURCE), verbose=False)
    assert differing(before, everything(module)) == []
    (found,) = predicted(callback, module, stream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_a_checkpoint_keeps_the_moments(tmp_path: Path) -> None:
    module: Any = IT3Validates(**parts()).double().eval()
    quiet().predict(module, served(batches(1)))
    callback, stream = TestTimeCallback(ActMAD()), batches(2)
    trainer = quiet(callbacks=[callback])
    trainer.validate(module, served(SOURCE), verbose=False)
    trainer.save_checkpoint(tmp_path / "it3.ckpt")
    (found,) = predicted(callback, module, stream)
    other = IT3Validates.load_from_checkpoint(tmp_path / "it3.ckpt", **parts()).double()
    quiet().predict(other, served(batches(1)))
    (again,) = predicted(TestTimeCallback(ActMAD()), other, stream)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


def test_values_will_do() -> None:
    net = nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 1)).double()
    settings = Settings(objective=ActMAD(), optimizer="sgd", lr=0.1)
    adapter = BatchAdapter(net, lambda x, _: net(x), lambda y: y, settings)
    adapter.fit_source(batches(1)[0])
    found = adapted(adapter, net, batches(2)[1])
    source = net[1](batches(1)[0].flatten(1))
    expected = distance([net[1](batches(2)[1].flatten(1))], [source]).detach()
    torch.testing.assert_close(found.distance_source, expected.expand(8), rtol=0, atol=1e-12)


def test_half_precision_has_moments_in_full() -> None:
    net, x = toy().to(torch.bfloat16), batches(1)[0].to(torch.bfloat16)
    adapter = adapter_of(ActMAD(), net)
    adapter.fit_source(x)
    found = adapted(adapter, net, x)
    assert found.distance_source is not None
    assert found.distance_source.dtype == torch.float32
    assert found.distance_source.max() < 1e-5


def test_its_papers_settings_are_its_defaults() -> None:
    settings = TestTimeCallback(ActMAD()).settings
    assert settings.moves == ("momentum", 1e-3)
    assert (settings.parameters, settings.norm_stats, settings.reset) == ("all", "source", "never")
    assert (settings.steps, settings.needs_batch) == (1, True)


def test_a_configuration_names_its_layers() -> None:
    assert from_yaml("ActMAD").layers == "norm"
    assert from_yaml("ActMAD", layers=["net.bn", "net.dense"]).layers == ["net.bn", "net.dense"]


def test_what_cannot_be_compared_is_refused() -> None:
    net, x = toy(), batches(1)[0]
    with pytest.raises(ValueError, match="Expected at least one layer, or 'norm', got none"):
        ActMAD([])
    with pytest.raises(ValueError, match="Unknown layer 'bm'"):
        adapter_of(ActMAD(["bm"]), net)
    with pytest.raises(ValueError, match="with norm layers, got one without"):
        adapter_of(ActMAD(), nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="has not seen what the layer 'bn' puts out"):
        adapted(adapter_of(ActMAD(), net), net, x)
    wide = nn.Sequential(nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3))
    adapter = fitted(wide.double().eval(), "norm")
    with pytest.raises(
        ValueError, match=r"features \(1, 4, 4\) at.*'0'.*got \(1, 6, 6\).*one size"
    ):
        adapted(adapter, wide, torch.ones(2, 1, 6, 6, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"features \(1, 4, 4\) at.*'0'.*got \(1, 6, 6\).*one size"
    ):
        adapter.fit_source(torch.ones(2, 1, 6, 6, dtype=torch.float64))

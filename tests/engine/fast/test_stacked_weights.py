"""Stacked weights: how many samples are vectorised at once, and what memory that takes."""

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers.adapters import assert_is_reference, backend_of, by_reference, sample_adapter
from helpers.fast import needs_fast_paths
from helpers.memory import Live, size_of
from helpers.modules import Conditioned, images, takes_prior, toy
from helpers.reference import softmax_label
from helpers.zoo import Injected, noise
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from it3_lightning.engine import Adaptation, BatchAdapter, SampleAdapter, Settings
from it3_lightning.engine.fast.stacked_weights import (
    bytes_kept,
    bytes_of_weights,
    copies_of_weights,
    samples_within,
)
from it3_lightning.engine.fast.vmap import plain_attention
from it3_lightning.methods import Idempotence

PUBLISHED = Idempotence("l2", None)


def adapter_of(net: nn.Module, enters: Any = None, **given: Any) -> SampleAdapter:
    common = {"scope": "sample", "objective": PUBLISHED, "lr": 1e-3, "backend": "vectorised"}
    made = Settings(**{**common, **given})
    return SampleAdapter(net, takes_prior(net), softmax_label, made, enters=enters or {})


def adapted(adapter: SampleAdapter, inputs: Any) -> Adaptation:
    with adapter.adapted(inputs) as adaptation:
        return adaptation


# How many


@pytest.mark.parametrize(
    ("memory", "weights", "activations", "copies", "expected"),
    [
        (1000, 100, 25, 2, 4),
        (999, 100, 25, 2, 3),
        (1000, 100, 0, 5, 2),
        (1000, 0, 50, 5, 10),
        (10, 100, 25, 2, 1),  # at least one
        (10, 0, 0, 2, 10),
    ],
)
def test_the_number_of_samples(
    memory: int, weights: int, activations: int, copies: int, expected: int
) -> None:
    found = samples_within(memory, weights=weights, activations=activations, copies=copies)
    assert found == expected


def own(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    "one step": ({}, 2),
    "one step of sgd": ({"optimizer": "sgd"}, 2),
    "one live step": ({"anchor": "live"}, 3),
    "adam": ({"steps": 3}, 5),
    "sgd": ({"steps": 3, "optimizer": "sgd"}, 3),
    "momentum": ({"steps": 3, "optimizer": "momentum"}, 4),
    "polyak": ({"optimizer": "polyak", "lr": 0.5}, 3),
    "steps of polyak": ({"steps": 3, "optimizer": "polyak", "lr": 0.5}, 4),
    "rmsprop": ({"steps": 3, "optimizer": "rmsprop"}, 5),
    "ema": ({"steps": 3, "anchor": "ema"}, 6),
    "live": ({"steps": 3, "anchor": "live"}, 6),
    "clipped": ({"steps": 3, "grad_clip": 1e-3}, 6),
    "one clipped step": ({"grad_clip": 1e-3}, 6),
    "filtered": ({"steps": 3, "objective": Idempotence("l2", 0.34)}, 5),
    "own optimizer": ({"steps": 3, "optimizer": own}, 7),
    "norm layers": ({"parameters": "norm", "steps": 2}, 5),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_copies_of_the_weights(settings: str) -> None:
    given, copies = SETTINGS[settings]
    given = {"lr": 0.5, **given}  # of Adam, where no optimizer is named
    assert copies_of_weights(Settings(**given)) == copies


def test_activations_are_what_autograd_keeps() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.zeros(3, 4)
    kept = bytes_kept(lambda: net(x).square().sum(), net)
    assert kept == size_of(x, torch.zeros(3, 8), torch.zeros(3, 2))  # of tanh and linear: the same
    assert bytes_kept(lambda: net(x).detach(), net) == kept - size_of(torch.zeros(3, 2))


def test_sparse_tensors_that_are_kept_have_no_bytes_of_their_own() -> None:
    table, rows = nn.Parameter(torch.ones(4, 2)), torch.eye(4)[:3].to_sparse()
    layer, features = nn.Linear(2, 2), torch.zeros(3, 2)
    kept = bytes_kept(lambda: layer(torch.sparse.mm(rows, table)).sum(), layer)
    assert kept == size_of(features)  # what enters the layer


# What it takes: live bytes stay below the budget


def perceptron() -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(192, 192), nn.Tanh(), nn.LayerNorm(192), nn.Linear(192, 8))
    return Conditioned(nn.Sequential(*layers))


def convolutional() -> nn.Module:
    convs = (nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3))
    return Conditioned(nn.Sequential(*convs, nn.ReLU(), nn.Flatten(), nn.Linear(1024, 8)))


def transformer() -> nn.Module:
    return Injected(
        VisionTransformer(8, 2, 2, 2, 32, 64, num_classes=3), "encoder.layers.encoder_layer_0", 32
    )


ALL = tuple(SETTINGS)
FEW = ("one step", "one live step", "adam", "live", "filtered")
NETWORKS = {
    "mlp": (perceptron, "body", torch.float32, ALL),
    "half mlp": (perceptron, "body", torch.bfloat16, FEW),
    "cnn": (convolutional, "body", torch.float32, (*FEW, "norm layers")),
    "vit": (transformer, "net.encoder.layers.encoder_layer_0", torch.float32, FEW[::2]),
}


@pytest.fixture(scope="module")
def uncollected() -> Iterator[None]:
    """Let nothing but reference counts free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@needs_fast_paths
@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("network", NETWORKS)
def test_live_bytes_stay_within_the_memory(network: str) -> None:
    make, layer, dtype, names = NETWORKS[network]
    torch.manual_seed(0)
    net, inputs = make().eval().to(dtype), noise(3, 8, 8, count=5).to(dtype)
    enters: Any = {layer: "output"}
    for name in names:
        given, copies = SETTINGS[name]
        alone = BatchAdapter(
            net,
            takes_prior(net),
            softmax_label,
            Settings(**{"objective": PUBLISHED, **given}),
            enters=enters,
        )
        weights = bytes_of_weights(alone.selected.values())
        with plain_attention(net, object()):
            activations = alone.bytes_of_step(inputs[:1], partial(bytes_kept, module=net))
        memory = int(2.5 * (copies * weights + 2 * activations))
        adapter = adapter_of(net, enters, **given, memory=memory)
        adapted(adapter, inputs)
        assert adapter.backend_selection is not None
        assert (adapter.backend_selection.backend, adapter.backend_selection.chunk_size) == (
            "vectorised",
            2,
        )
        with Live().restarted() as live:
            adaptation = adapted(adapter, inputs)
            assert live.beyond <= memory, name
            assert adaptation.outputs is not None
            assert adaptation.outputs.shape == (5, 3)
            del adaptation
            assert live.bytes < 1000, name  # of gradients and activations nothing is kept


# Compiled steps


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compile for want of a compiler into what runs as it was traced; note the calls."""
    calls, own = list[int](), partial(torch.compile, backend="eager")

    def made(graph: Any, **given: Any) -> Any:
        run: Any = own(graph, **given)

        def counted(*tensors: Tensor) -> Any:
            calls.append(len(tensors))
            return run(*tensors)

        return counted

    monkeypatch.setattr(torch, "compile", made)
    return calls


@needs_fast_paths
@pytest.mark.parametrize("given", [{"steps": 1}, {"steps": 3, "anchor": "ema", "ema_decay": 0.5}])
def test_compiled_steps_equal_the_reference(given: dict[str, Any], compiled: list[int]) -> None:
    net, steps = toy(), given["steps"]
    adapter = sample_adapter(net, compile=True, **given)
    kinds = min(steps, 2)  # the first step and those after it, each tried as it is compiled
    # a batch of another size runs as it is written
    for size, calls in ((3, kinds + steps), (3, steps), (2, 0), (3, steps)):
        compiled.clear()
        records = by_reference(net, images(size), lr=0.01, optimizer="adam", **given)
        found = adapted(adapter, images(size))
        assert_is_reference(found, records, 1e-10)
        assert len(compiled) == calls
        assert found.forwards == 2 * steps + 2
    assert backend_of(adapter) == "vectorised"


@needs_fast_paths
def test_what_cannot_be_compiled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("no compiler\nis here")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.warns(
        UserWarning, match=r"cannot be compiled here \(OSError: no compiler is here\)"
    ):
        found = adapted(sample_adapter(toy(), compile=True), images(3))
    assert_is_reference(found, by_reference(toy(), images(3), lr=0.01, optimizer="adam"), 1e-10)


@needs_fast_paths
def test_a_small_memory_makes_several_chunks() -> None:
    calls: list[int] = []
    net, inputs = toy(), images(6)

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net(x, prior)
        calls.append(1)
        return outputs

    def passes(memory: int) -> int:
        given = Settings(
            scope="sample", objective=PUBLISHED, backend="vectorised", memory=memory, lr=0.01
        )
        adapter = SampleAdapter(net, forward, softmax_label, given)
        adapted(adapter, inputs)
        calls.clear()
        found.append(adapted(adapter, inputs).outputs)
        return len(calls)

    found: list[Tensor | None] = []
    assert passes(2**30) == 4  # two of the step, the prediction, and the anchor again
    assert passes(1) == 6 * 4
    assert found[0] is not None
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)

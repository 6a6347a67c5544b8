"""Per-sample gradients: by shared passes the same as one by one, or left to torch.func."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fast import needs_fast_paths
from helpers.modules import Conditioned, drawn, images, takes_prior, toy
from helpers.reference import Record as Expected
from helpers.reference import adapt_stream, forward_predict, softmax_label
from helpers.zoo import KINDS, RESNET, noise, singles
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, SampleAdapter, Settings
from it3_lightning.engine.fast import grad_sample as products
from it3_lightning.engine.fast import stacked_weights as stacked
from it3_lightning.engine.fast import vmap as gradients
from it3_lightning.engine.fast import vmap as vectorised
from it3_lightning.engine.fast.grad_sample import Layerwise, Product, rules_for, squared_norms
from it3_lightning.methods import Entropy, Idempotence, Objective

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(6, 4), (6,)),
    "dense without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "dense on tokens": (lambda: nn.Linear(6, 4), (5, 6)),
    "dense on a grid": (lambda: nn.Linear(6, 4), (3, 2, 6)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 7, 6)),
    "valid": (lambda: nn.Conv2d(3, 4, (2, 3), padding="valid"), (3, 7, 6)),
    "strided": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=(2, 1), bias=False), (3, 7, 6)),
    "dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=2), (2, 6, 6)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (3, 4, 4)),
    "batch norm of features": (lambda: nn.BatchNorm1d(5), (5,)),
    "batch norm of a sequence": (lambda: nn.BatchNorm1d(5), (5, 3)),
    "batch norm of its own eps": (lambda: nn.BatchNorm2d(3, eps=0.5), (3, 4, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "group norm of its own eps": (lambda: nn.GroupNorm(2, 4, eps=0.5), (4, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(5), (4, 5)),
    "layer norm of its own eps": (lambda: nn.LayerNorm(5, eps=0.5), (4, 5)),
    "layer norm of features": (lambda: nn.LayerNorm(5), (5,)),
    "layer norm of images": (lambda: nn.LayerNorm([2, 3]), (4, 2, 3)),
}


@pytest.mark.parametrize("columns", [0, 1 << 16])
@pytest.mark.parametrize("name", LAYERS)
def test_rules_give_the_gradients_of_one_sample_after_the_other(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_COLUMNS", columns)
    make, shape = LAYERS[name]
    layer, inputs = drawn(make()), noise(*shape, count=3)
    outputs = layer(inputs)
    back = torch.randn(outputs.shape, dtype=outputs.dtype)
    rules: Any = rules_for(layer)
    for key, parameter in layer.named_parameters():
        found = getattr(rules, key)(layer, inputs, back)
        if isinstance(found, Product):
            found = found.whole(parameter.shape)
        expected = [
            torch.autograd.grad((layer(x[None]) * d[None]).sum(), parameter)[0]
            for x, d in zip(inputs, back, strict=True)
        ]
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)


class OwnLinear(nn.Linear):
    """A layer that may do anything."""


UNKNOWN: dict[str, nn.Module] = {
    "a type of one's own": OwnLinear(2, 2),
    "grouped": nn.Conv2d(2, 2, 1, groups=2),
    "padded otherwise": nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
    "padded to the same size": nn.Conv2d(1, 1, 3, padding="same"),
    "transposed": nn.ConvTranspose2d(1, 1, 1),
    "by the statistics of the batch": nn.BatchNorm1d(2),
    "without statistics": nn.BatchNorm1d(2, track_running_stats=False).eval(),
    "recurrent": nn.LSTM(1, 1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_layers_have_no_rules(name: str) -> None:
    assert rules_for(UNKNOWN[name]) is None


def test_a_product_in_pieces_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PIECE", 8)
    left, right = noise(5, 2, count=3), noise(2, 3, count=3, seed=1)
    product = Product(left, right, lambda part: part)
    found = torch.full((3, 5, 3), torch.nan, dtype=left.dtype)
    for sample, rows, piece in product.pieces():
        assert piece.shape in ((3, 3), (2, 3))
        found[sample, rows] = piece
    torch.testing.assert_close(found, left @ right)
    assert bool((product.bound() >= found.abs().amax((1, 2))).all())


def test_a_product_of_one_position_is_measured_and_added_without_being_made() -> None:
    left, right = noise(5, 1, count=3), noise(1, 4, count=3, seed=1)
    product = Product(left, right, lambda part: part)
    source, scale = noise(4, count=5), noise(count=3)
    assert product.single
    assert not Product(noise(5, 2, count=3), noise(2, 4, count=3), lambda part: part).single
    torch.testing.assert_close(product.squares(), (left @ right).square().sum((1, 2)))
    moved = torch.full((3, 5, 4), torch.nan, dtype=left.dtype)
    product.add_to(source, scale, moved)
    torch.testing.assert_close(moved, source + scale[:, None, None] * (left @ right))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_in_half_precision_are_summed_in_full(dtype: torch.dtype) -> None:
    found = squared_norms(torch.ones(2, 70_000, dtype=dtype))  # float16 ends at 65,504
    assert found.tolist() == pytest.approx([70_000.0] * 2)


# In the engine


class Spy:
    """Counts the batches whose gradients were found layer by layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches, own = 0, gradients.Gradients._layer_by_layer

        def counted(*arguments: Any) -> Any:
            found = own(*arguments)
            self.batches += 1
            return found

        monkeypatch.setattr(gradients.Gradients, "_layer_by_layer", counted)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Count what is done layer by layer."""
    return Spy(monkeypatch)


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the smallest weights be used up in pieces, and answer samples one by one."""
    monkeypatch.setattr(stacked, "_LARGE", 1)
    monkeypatch.setattr(vectorised, "_LARGE", 1)
    monkeypatch.setattr(products, "_PIECE", 16)


def adapted(net: nn.Module, inputs: Any, batches: int = 2, **given: Any) -> Adaptation:
    """Adapt vectorised; the first batch is compared, those after it rely on what was found."""
    published = {"objective": Idempotence("l2", None), "lr": 0.01, "backend": "vectorised"}
    made = Settings(**{"scope": "sample", **published, **given})
    adapter = SampleAdapter(net, takes_prior(net), softmax_label, made)
    for _ in range(batches):
        with adapter.adapted(inputs) as adaptation:
            pass
    assert adapter.backend_selection is not None
    assert adapter.backend_selection.backend == "vectorised"
    return adaptation


def by_reference(net: nn.Module, inputs: Any, **given: Any) -> list[Expected]:
    return adapt_stream(
        net,
        singles(inputs),
        predict=forward_predict,
        to_label=softmax_label,
        **{"lr": 0.01, "optimizer": "adam", **given},
    )


def assert_alone(
    adaptation: Adaptation,
    net: nn.Module,
    inputs: Any,
    atol: float = 1e-10,
    rtol: float = 0,
    **given: Any,
) -> None:
    expected = torch.cat([record.outputs for record in by_reference(net, inputs, **given)])
    torch.testing.assert_close(adaptation.outputs, expected, rtol=rtol, atol=atol)
    assert adaptation.source_outputs is not None
    assert (expected - adaptation.source_outputs).abs().max() > 1e-4


SERVED = ["mlp", "batch norm", "group norm", "layer norm", "graph"]


@needs_fast_paths
@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.usefixtures("everything_is_large")
def test_large_weights_are_used_up_in_pieces_and_equal_each_sample_alone(
    kind: str, spy: Spy
) -> None:
    net, inputs = KINDS[kind].build(), KINDS[kind].batch(5)
    adaptation = adapted(net, inputs, batches=3)
    assert spy.batches >= 2
    assert_alone(adaptation, net, inputs)


@needs_fast_paths
@pytest.mark.parametrize("given", [{"steps": 3}, {"optimizer": "sgd"}, {"optimizer": "rmsprop"}])
@pytest.mark.usefixtures("everything_is_large")
def test_other_updates_take_the_same_gradients(given: dict[str, Any], spy: Spy) -> None:
    net, inputs = toy(), images(5)
    adaptation = adapted(net, inputs, **given)
    assert spy.batches
    assert_alone(adaptation, net, inputs, **given)


@needs_fast_paths
@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.usefixtures("everything_is_large")
def test_polyak_moves_by_products_that_are_never_made(
    kind: str, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, inputs = KINDS[kind].build(), KINDS[kind].batch(5)
    used: list[Product] = []
    own = Product.add_to

    def noted(product: Product, *given: Any) -> None:
        used.append(product)
        own(product, *given)

    monkeypatch.setattr(Product, "add_to", noted)
    given: dict[str, Any] = {"optimizer": "polyak", "lr": 0.5}
    found = adapted(net, inputs, batches=3, **given).outputs
    assert spy.batches >= 2
    assert used
    looped = SampleAdapter(
        net,
        takes_prior(net),
        softmax_label,
        Settings(scope="sample", objective=Idempotence("l2", None), backend="loop", **given),
    )
    with looped.adapted(inputs) as expected:
        pass
    assert expected.outputs is not None
    assert expected.source_outputs is not None
    torch.testing.assert_close(found, expected.outputs, rtol=0, atol=1e-10)
    assert (expected.outputs - expected.source_outputs).abs().max() > 1e-5


@needs_fast_paths
def test_resnet18_in_float32_is_served_layer_by_layer(spy: Spy) -> None:
    net, inputs = RESNET.build(torch.float32), RESNET.batch(3, torch.float32)
    adaptation = adapted(net, inputs, lr=1e-3)
    assert spy.batches
    assert_alone(adaptation, net, inputs, atol=1e-5, rtol=1e-5, lr=1e-3)  # outputs of about 10


@needs_fast_paths
@pytest.mark.parametrize("selection", ["bias", "norm", ["conv.weight"]])
def test_only_selected_weights_move(selection: Any, spy: Spy) -> None:
    net, inputs = toy(), images(5)
    adaptation = adapted(net, inputs, parameters=selection)
    assert spy.batches

    def chosen(name: str) -> bool:
        if selection == "bias":
            return name.endswith("bias")
        return name.startswith("bn.") if selection == "norm" else name == "conv.weight"

    assert_alone(adaptation, net, inputs, parameters=chosen)


@pytest.mark.usefixtures("everything_is_large")
def test_the_next_batch_leaves_what_was_given_out_alone() -> None:
    net = toy()
    made = Settings(scope="sample", objective=Idempotence("l2", None), lr=0.01)
    adapter = SampleAdapter(net, takes_prior(net), softmax_label, made)
    with adapter.adapted(images(5)), adapter.adapted(images(5)) as before:
        assert before.outputs is not None
        kept = before.outputs.clone()
    with adapter.adapted(images(5, seed=1)):
        pass
    assert torch.equal(before.outputs, kept)


@needs_fast_paths
def test_an_objective_without_a_second_pass_needs_none(spy: Spy) -> None:
    net, inputs = toy(), images(5)
    adaptation = adapted(net, inputs, objective=Entropy(), measure=False)
    assert spy.batches
    assert adaptation.forwards == 2  # the first pass, and the final one


@needs_fast_paths
def test_hooks_that_change_what_a_layer_puts_out_are_served(spy: Spy) -> None:
    net, inputs = toy(), images(5)
    net.dense.register_forward_hook(lambda _, __, output: 2 * output)
    adaptation = adapted(net, inputs)
    assert spy.batches
    assert_alone(adaptation, net, inputs)


class TwiceCalled(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        features: Tensor = self.layer(self.layer(x.flatten(1)).tanh())
        return features[:, :8]


class Borrowed(TwiceCalled):
    """A layer that runs by itself, and whose weight is used once more."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        return F.linear(self.layer(x.flatten(1)).tanh(), self.layer.weight)[:, :8]


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        features: Tensor = self.second(self.first(x.flatten(1)).tanh())
        return features[:, :8]


class Overwritten(TwiceCalled):
    """A layer whose inputs are written into after it has run."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        features = x.flatten(1) * 1.0
        outputs: Tensor = self.layer(features)
        features.mul_(0.5)
        return (outputs.tanh() + features)[:, :8]


class Transposed(TwiceCalled):
    """A layer on positions first, samples second."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        twice = torch.stack([x.flatten(1)] * 2)
        features: Tensor = self.layer(twice)
        return features.mean(0)[:, :8]


NOT_SERVED = [TwiceCalled, Borrowed, Tied, Transposed]


@needs_fast_paths
@pytest.mark.parametrize("body", NOT_SERVED)
def test_what_the_rules_do_not_know_of_is_left_to_torch_func(
    body: Callable[[], nn.Module], spy: Spy
) -> None:
    net, inputs = drawn(Conditioned(body())), images(2)
    adaptation = adapted(net, inputs, batches=3)
    assert not spy.batches
    assert_alone(adaptation, net, inputs)


@needs_fast_paths
def test_inputs_that_are_written_into_are_left_to_torch_func(spy: Spy) -> None:
    net, inputs = drawn(Conditioned(Overwritten())), images(2)
    adaptation = adapted(net, inputs, batches=2, parameters="bias")  # needs no inputs itself
    assert not spy.batches
    assert_alone(adaptation, net, inputs, parameters=lambda name: name.endswith("bias"))


@needs_fast_paths
@pytest.mark.parametrize("kind", ["lstm", "transformer", "vit"])
def test_networks_with_other_layers_are_left_to_torch_func(kind: str, spy: Spy) -> None:
    net, inputs = KINDS[kind].build(), KINDS[kind].batch(2)
    assert_alone(adapted(net, inputs), net, inputs)
    assert not spy.batches


@needs_fast_paths
def test_an_objective_that_asks_for_another_pass_is_left_to_torch_func(spy: Spy) -> None:
    def doubled(y0: Tensor, second: Callable[[Tensor], Tensor]) -> Objective:
        measure = (y0 - second(y0.square())).square().sum(1)
        return Objective(measure, torch.ones(len(y0), dtype=torch.bool))

    doubled.needs_batch = False  # type: ignore[attr-defined]
    net, inputs = toy(), images(3)
    both = [adapted(net, inputs, objective=doubled, batches=n).outputs for n in (1, 2)]
    assert not spy.batches
    torch.testing.assert_close(both[0], both[1])


class Switching(nn.Module):
    """A layer that is called where the batch is large."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        features: Tensor = self.always(x.flatten(1)).tanh()
        return self.seldom(features) if len(x) > 100 else features


@needs_fast_paths
@pytest.mark.usefixtures("everything_is_large")
def test_a_layer_that_is_not_called_keeps_its_weights(spy: Spy) -> None:
    net, inputs = drawn(Conditioned(Switching())), images(3)
    adaptation = adapted(net, inputs, batches=3)
    assert spy.batches
    assert_alone(adaptation, net, inputs)


@needs_fast_paths
def test_a_failure_on_a_later_batch_is_left_to_torch_func(
    spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, inputs = toy(), images(5)
    given: Any = {"backend": "vectorised", "objective": Idempotence("l2", None), "lr": 0.01}
    made = Settings(scope="sample", **given)
    adapter = SampleAdapter(net, takes_prior(net), softmax_label, made)
    for _ in range(2):
        with adapter.adapted(inputs):
            pass
    assert spy.batches

    def fails(*_: Any) -> Any:
        raise RuntimeError("not this time")

    monkeypatch.setattr(Layerwise, "__call__", fails)
    with adapter.adapted(inputs) as adaptation:
        pass
    assert_alone(adaptation, net, inputs)


@needs_fast_paths
@pytest.mark.usefixtures("everything_is_large")
def test_a_gradient_that_is_not_finite_harms_no_other_sample(spy: Spy) -> None:
    net, inputs = toy(), images(4)

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        logits = forward_predict(net, torch.where(x == 50.0, 0.0, x), prior)
        marked = (x == 50.0).flatten(1).any(1, keepdim=True)
        return logits + torch.where(marked, logits - logits.detach(), 1.0).sqrt() * marked

    made = Settings(
        scope="sample", objective=Idempotence("l2", None), lr=0.01, backend="vectorised"
    )
    adapter = SampleAdapter(net, forward, softmax_label, made)
    for _ in range(2):
        with adapter.adapted(inputs):
            pass
    marked = inputs.clone()
    marked[2, 0, 0, 0] = 50.0
    with adapter.adapted(marked) as adaptation:
        pass
    assert spy.batches >= 2
    assert adaptation.skipped.tolist() == [False, False, True, False]
    others = [0, 1, 3]
    assert adaptation.outputs is not None
    expected = torch.cat([record.outputs for record in by_reference(net, inputs[others])])
    torch.testing.assert_close(adaptation.outputs[others], expected, rtol=0, atol=1e-10)


# What later batches may bring that the first, by which a way is chosen, did not show


def adapter_of(net: nn.Module, **given: Any) -> SampleAdapter:
    published = {"objective": Idempotence("l2", None), "lr": 0.01, "backend": "vectorised"}
    made = Settings(**{"scope": "sample", **published, **given})
    return SampleAdapter(net, takes_prior(net), softmax_label, made)


def adapted_by(by: SampleAdapter, inputs: Any) -> Adaptation:
    with by.adapted(inputs) as adaptation:
        return adaptation


def assert_as_in_a_loop(
    by: SampleAdapter, net: nn.Module, inputs: Any, *, atol: float = 1e-10, **given: Any
) -> None:
    found, expected = (
        adapted_by(by, inputs),
        adapted_by(adapter_of(net, backend="loop", **given), inputs),
    )
    assert by.backend_selection is not None
    assert by.backend_selection.backend == "vectorised"
    torch.testing.assert_close(
        found.outputs, expected.outputs, rtol=0, atol=atol, check_dtype=False
    )
    assert expected.outputs is not None
    assert expected.source_outputs is not None
    assert (expected.outputs - expected.source_outputs).abs().max() > 1e-4


class Flat(nn.Module):
    """A layer on all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        features: Tensor = self.layer(x.flatten(1))
        return features[:, :8].tanh()


class Masked(Flat):
    """A layer whose weight is used once more, of samples that are marked."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        x = x.flatten(1)
        features = self.layer(x).tanh()
        more = F.linear(features, self.layer.weight)
        return torch.where(x[:, :1] > 5, features + more, features)[:, :8]


class Mixing(Flat):
    """Scales all samples by the largest pixel of any."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        return super().forward(x / x.abs().amax())


class Writing(Flat):
    """Writes into its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        return super().forward(x.mul_(0.5))


class TwoInputs(nn.Module):
    """A layer for each of two images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Flat(), Flat()

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """Return features `(B, 8)`."""
        features: Tensor = self.first(x[0]) + self.second(x[1])
        return features


@needs_fast_paths
def test_a_weight_that_is_used_beside_its_layer_is_left_to_torch_func() -> None:
    net, inputs = drawn(Conditioned(Masked())), images(5)
    by = adapter_of(net)
    adapted_by(by, inputs)
    inputs[2, 0, 0, 0] = 9.0  # the first to be marked
    assert_as_in_a_loop(by, net, inputs)


@needs_fast_paths
def test_one_sample_alone_tells_nothing_of_several() -> None:
    net = drawn(Conditioned(Mixing()))
    by = adapter_of(net)
    adapted_by(by, images(1))
    found = adapted_by(by, images(6))
    assert by.backend_selection is not None
    assert by.backend_selection.backend == "vectorised"
    alone = [adapted_by(adapter_of(net, backend="loop"), x[None]).outputs for x in images(6)]
    torch.testing.assert_close(found.outputs, torch.cat([y for y in alone if y is not None]))


@needs_fast_paths
def test_single_samples_are_served_layer_by_layer_and_then_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    own = gradients.Gradients._layer_by_layer

    def noted(self: Any, weights: stacked.Stacked, inputs: Tensor) -> Any:
        sizes.append(len(inputs))
        return own(self, weights, inputs)

    monkeypatch.setattr(gradients.Gradients, "_layer_by_layer", noted)
    net = toy()
    by = adapter_of(net)
    for size in (1, 1, 5, 5):
        assert_as_in_a_loop(by, net, images(size))
    assert set(sizes) == {1, 5}


@needs_fast_paths
def test_inputs_that_need_gradients_change_nothing() -> None:
    net = drawn(Conditioned(TwoInputs()))
    by, inputs = adapter_of(net), (images(5), images(5, seed=1))
    adapted_by(by, inputs)
    inputs[0].requires_grad_(True)
    assert_as_in_a_loop(by, net, inputs)
    assert inputs[0].grad is None


@needs_fast_paths
@pytest.mark.parametrize("large", [1, 1 << 20])
def test_a_network_that_writes_into_its_inputs_spoils_no_batch(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectorised, "_LARGE", large)
    net, inputs = drawn(Conditioned(Writing())), images(5)
    by = adapter_of(net)
    for _ in range(2):
        assert_as_in_a_loop(by, net, inputs)
    assert torch.equal(inputs, images(5))


@needs_fast_paths
def test_calls_that_are_answered_are_counted_by_the_batch() -> None:
    net = toy()
    made = Settings(scope="sample", objective=Idempotence("l2", None), backend="vectorised")
    enters: dict[str, Any] = {"dense": "output"}
    by = SampleAdapter(net, takes_prior(net), softmax_label, made, enters=enters)
    counts = [adapted_by(by, images(5)).cache_hits for _ in range(3)]
    assert counts[0] > 0
    assert len(set(counts)) == 1


@needs_fast_paths
@pytest.mark.usefixtures("everything_is_large")
def test_memory_for_weights_follows_the_number_of_samples(spy: Spy) -> None:
    net = toy()
    by = adapter_of(net)
    for size in (2, 2, 5, 5, 3):
        assert_as_in_a_loop(by, net, images(size))
    assert spy.batches >= 2


@needs_fast_paths
def test_memory_for_weights_follows_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "_LARGE", 1)
    net = toy()
    by = adapter_of(net)
    adapted_by(by, images(5))
    net.float()
    assert_as_in_a_loop(by, net, images(5).float(), atol=1e-5)


def colours() -> nn.Module:
    """Make a network of two convolutions for images `(B, 3, 8, 8)`."""
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)
    )
    return drawn(Conditioned(nn.Sequential(body, nn.Flatten())))


@needs_fast_paths
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("made", [colours, toy])
def test_weights_may_lie_with_channels_last(made: Callable[[], nn.Module], steps: int) -> None:
    net: Any = made().to(memory_format=torch.channels_last)
    inputs = noise(3, 8, 8, count=5) if made is colours else images(5)
    inputs = inputs.to(memory_format=torch.channels_last)
    assert_as_in_a_loop(adapter_of(net, steps=steps), net, inputs, steps=steps)

"""The first step in closed form is that of torch's optimizers, for weights of any kind and size."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from helpers.memory import Live, size_of
from helpers.modules import takes_prior
from helpers.reference import OPTIMIZERS, softmax_label
from helpers.zoo import RESNET, noise
from torch import Tensor, nn

from it3_lightning.engine import BatchAdapter, Settings
from it3_lightning.engine.optimizers import OPTIMIZERS as RULES
from it3_lightning.engine.optimizers import OnlyStep
from it3_lightning.methods import Idempotence

Name = Literal["adam", "adamw", "sgd", "momentum", "rmsprop"]
NAMES: tuple[Name, ...] = ("adam", "adamw", "sgd", "momentum", "rmsprop")
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}
BIG = 800  # squared, more than the elements that are worked on in one piece


def by_torch(name: str, net: nn.Module, loss: Callable[[nn.Module], Tensor], lr: float) -> Any:
    """Take the first step with torch's own optimizer; return the weights by name."""
    copied = copy.deepcopy(net)
    optimizer = OPTIMIZERS[name](copied.parameters(), lr=lr)
    torch.autograd.backward(loss(copied))
    optimizer.step()
    return {name: p.detach() for name, p in copied.named_parameters()}


def in_closed_form(
    step: OnlyStep, net: nn.Module, loss: Callable[[nn.Module], Tensor]
) -> dict[str, Tensor]:
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    moved, total = step.backward(loss(net), dict(net.named_parameters()))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())
    assert bool(total.isfinite())
    assert list(moved) == [name for name in before if name in moved]  # in their order
    return moved


def assert_is_first_step(
    net: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    name: Name,
    atol: float,
) -> None:
    """Compare twice: memory is used again."""
    step = OnlyStep(RULES[name], 0.1)
    for scale in (1.0, -0.5):

        def scaled(net: nn.Module, scale: float = scale) -> Tensor:
            return loss(net) * scale

        expected = by_torch(name, net, scaled, 0.1)
        moved = in_closed_form(step, net, scaled)
        for key, value in moved.items():
            assert value.dtype == expected[key].dtype
            torch.testing.assert_close(value, expected[key], rtol=0, atol=atol)
        still = [key for key in expected if key not in moved]
        assert all(torch.equal(expected[key], net.get_parameter(key)) for key in still)


class Mixed(nn.Module):
    """Big and small weights, some of them used twice, some of them not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Linear(BIG, BIG)
        self.small = nn.Linear(BIG, 3)
        self.unused = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(BIG)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.small(self.norm(self.big(self.big(x).tanh())))
        return out


def squared(x: Tensor) -> Callable[[nn.Module], Tensor]:
    def loss(net: nn.Module) -> Tensor:
        out: Tensor = net(x).float() if x.dtype == torch.bfloat16 else net(x)
        return out.square().mean()

    return loss


def seeded(net: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return net()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_torchs_first_step(name: Name, dtype: torch.dtype) -> None:
    net, x = seeded(Mixed).to(dtype), noise(BIG, count=4).to(dtype)
    assert_is_first_step(net, squared(x), name, CLOSE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_size(name: Name) -> None:
    """Far below and above what the optimizers add to the denominator, and exactly zero."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 9).double())

        def forward(self, x: Tensor) -> Tensor:
            powers = 10.0 ** torch.arange(-12, 14, 3).double()
            return (self.weight * torch.cat([powers[:8], x.new_zeros(1)])).sum()

    net = Scaled()
    assert_is_first_step(net, lambda net: net(torch.zeros(1).double()), name, 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [8, BIG])
def test_half_precision_moves_in_float32(name: Name, width: int) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3)))
    net, x = net.to(torch.bfloat16), noise(width, count=4).to(torch.bfloat16)
    full = {key: p.detach().float() for key, p in net.named_parameters()}
    loss = squared(x)
    gradients = torch.autograd.grad(loss(net), list(net.parameters()))
    expected = {}
    for (key, weight), gradient in zip(full.items(), gradients, strict=True):
        master = nn.Parameter(weight.clone())
        master.grad = gradient.float()
        OPTIMIZERS[name]([master], lr=0.1).step()
        expected[key] = master.detach()
    moved = in_closed_form(OnlyStep(RULES[name], 0.1), net, loss)
    for key, value in moved.items():  # to one of both neighbours, so that the mean stays
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), expected[key], rtol=0.008, atol=1e-6)
        steps = (value.float() - full[key]).sum(), (expected[key] - full[key]).abs().sum()
        if value.numel() > 1000:
            assert (steps[0] - (expected[key] - full[key]).sum()).abs() < 0.01 * steps[1]


def test_half_precision_and_full_precision_in_one_network() -> None:
    net: Any = seeded(lambda: nn.ModuleDict({"low": nn.Linear(4, 4), "high": nn.Linear(4, 3)}))
    net["low"].to(torch.bfloat16)
    net["high"].double()
    x = noise(4, count=2)

    def loss(net: Any) -> Tensor:
        out: Tensor = net["high"](net["low"](x.to(torch.bfloat16)).double())
        return out.square().mean()

    moved = in_closed_form(OnlyStep(RULES["sgd"], 0.1), net, loss)
    expected = by_torch("sgd", net, loss, 0.1)
    for key in ("high.weight", "high.bias"):
        torch.testing.assert_close(moved[key], expected[key], rtol=0, atol=1e-12)
    for key in ("low.weight", "low.bias"):
        torch.testing.assert_close(moved[key], expected[key], rtol=0.016, atol=0)


def test_overflow_in_half_precision_is_told() -> None:
    layer = nn.Linear(2, 1, bias=False).half()
    step = OnlyStep(RULES["sgd"], 1e6)
    parameters = dict(layer.named_parameters())
    _, total = step.backward(layer(torch.ones(1, 2).half()).sum(), parameters)
    assert not bool(total.isfinite())  # 1e6 is a float32, but no float16


@pytest.mark.parametrize("name", NAMES)
def test_tied_weights_move_by_the_sum_of_their_gradients(name: Name) -> None:
    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x).tanh())
            return out

    for width in (4, BIG):
        net, x = seeded(lambda width=width: Tied(width)).double(), noise(width, count=4)  # type: ignore[misc]
        assert_is_first_step(net, squared(x), name, 1e-12)


class Sums(nn.Module):
    """Autograd gives `a` and `b` one gradient tensor, `c` an expanded one, `d` a part of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Parameter(torch.linspace(-1, 1, width * width).reshape(width, width).roll(i))
            for i in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        both = (self.a + self.b) * x.mean()
        part = torch.cat([self.d[1:], self.d[:1]])
        return both + self.c.sum() + part


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [4, BIG])
def test_gradients_that_share_memory_or_are_expanded(name: Name, width: int) -> None:
    net = Sums(width).double()
    assert_is_first_step(net, squared(noise(2, count=2)), name, 1e-12)


def with_layout(weight: Tensor, layout: str) -> nn.Parameter:
    if layout == "channels last":
        return nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
    if layout == "transposed":
        return nn.Parameter(weight.transpose(0, 1).contiguous().transpose(0, 1))
    wide = weight.new_zeros(*weight.shape[:-1], 2 * weight.shape[-1])  # "with gaps"
    wide[..., ::2] = weight
    return nn.Parameter(wide[..., ::2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["channels last", "transposed", "with gaps"])
@pytest.mark.parametrize("width", [4, 140])
def test_weights_may_lie_in_memory_in_any_way(name: Name, layout: str, width: int) -> None:
    conv: Any = seeded(lambda: nn.Conv2d(width, width, 3)).double()
    conv.weight = with_layout(conv.weight.detach(), layout)
    assert not conv.weight.is_contiguous()
    assert_is_first_step(conv, squared(noise(width, 4, 4, count=1)), name, 1e-12)


def test_it_follows_a_network_that_is_cast() -> None:
    net, step, x = seeded(lambda: nn.Linear(4, 3)), OnlyStep(RULES["adam"], 0.1), noise(4, count=2)
    for dtype in (torch.float32, torch.float64):
        net.to(dtype)
        expected = by_torch("adam", net, squared(x.to(dtype)), 0.1)
        moved = in_closed_form(step, net, squared(x.to(dtype)))
        torch.testing.assert_close(moved["weight"], expected["weight"], rtol=0, atol=CLOSE[dtype])
        assert moved["weight"].dtype == dtype


def test_infinite_gradients_are_told() -> None:
    for width in (4, BIG):
        net = nn.Linear(width, 1, bias=False)
        loss = (net.weight - net.weight.detach()).sqrt().sum()  # 0, with an infinite slope
        _, total = OnlyStep(RULES["adam"], 0.1).backward(loss, dict(net.named_parameters()))
        assert not bool(total.isfinite())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [4, 200, BIG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_moved_together_as_each_alone(
    name: Name, width: int, dtype: torch.dtype
) -> None:
    weights = noise(width, count=width).to(dtype)
    gradients = noise(width, width, count=5, seed=1).to(dtype)
    first_step = RULES[name].first_step
    assert first_step is not None
    for given in (gradients, gradients.mT.contiguous().mT):
        (together,) = first_step([weights], [given], 0.1)
        for index in range(5):
            (alone,) = first_step([weights], [gradients[index]], 0.1)
            torch.testing.assert_close(together[index], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "single"),
    [
        ({}, True),
        ({"anchor": "live"}, True),
        ({"reset": 1}, True),
        ({"scope": "sample"}, True),
        ({"steps": 2}, False),
        ({"steps": 0}, False),
        ({"anchor": "ema"}, False),
        ({"reset": "never"}, False),
        ({"grad_clip": 1.0}, False),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}, False),
    ],
)
def test_it_is_taken_where_one_step_is_all_there_is(settings: Any, single: bool) -> None:
    assert Settings(**settings).single_step is single


# Memory, counted byte by byte


@pytest.fixture(scope="module")
def uncollected() -> Iterator[None]:
    """Let nothing but reference counts free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("name", NAMES)
def test_it_needs_gradients_and_new_weights(name: Name) -> None:
    convs: Any = nn.Sequential(*(nn.Conv2d(192, 192, 3, bias=False) for _ in range(6)))
    x, parameters = torch.randn(1, 192, 13, 13), dict(convs.named_parameters())
    weights, step = size_of(*convs.parameters()), OnlyStep(RULES[name], 0.1)
    with Live() as live:
        loss = convs(x).square().mean()
        activations = live.bytes
        live.restarted()
        moved, _ = step.backward(loss, parameters)
        assert live.beyond <= 2 * weights + activations
    assert len(moved) == 6


def extra_bytes(net: nn.Module, inputs: Tensor, **settings: Any) -> tuple[int, int, int]:
    """Return the most live bytes in a batch, those left in the body, and after it."""
    given = Settings(**{"objective": Idempotence("l2", None), **settings})
    adapter = BatchAdapter(
        net, takes_prior(net), softmax_label, given, enters={"net.layer3": "output"}
    )
    with Live().restarted() as live:
        with adapter.adapted(inputs):
            inside = live.bytes
        return live.beyond, inside, live.bytes


@pytest.mark.usefixtures("uncollected")
def test_a_batch_needs_little_more_than_its_weights_and_activations() -> None:
    net, inputs = RESNET.build(torch.float32), RESNET.batch(4, torch.float32)
    weights = size_of(*net.parameters())
    with Live().restarted() as live:
        loss = net(inputs, net(inputs).softmax(1)).sum()  # both passes in one graph
        activations = live.bytes
        del loss
    peak, inside, after = extra_bytes(net, inputs)
    assert peak <= 2 * weights + activations
    assert inside <= weights + activations / 10  # the activations are gone before the body
    assert after <= weights + activations / 10
    moments_of = {"sgd": 0, "momentum": 1, "adam": 2, "rmsprop": 1}  # beside weights, gradients
    for optimizer, moments in moments_of.items():
        peak, _, _ = extra_bytes(net, inputs, steps=2, optimizer=optimizer)
        scratch = weights if optimizer == "rmsprop" else 0  # over lists, not fused
        assert peak <= (2 + moments) * weights + scratch + activations
    peak, _, _ = extra_bytes(net, inputs, parameters="norm")
    assert peak <= 2 * activations

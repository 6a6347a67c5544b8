"""Optimizers against plain torch: Polyak's rule, float32 masters, rules from outside."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from helpers import reference
from helpers.adapters import (
    BACKENDS,
    PUBLISHED,
    WAYS,
    adapted,
    any_adapter,
    assert_is_reference,
    backend_of,
    results,
)
from helpers.modules import (
    Conditioned,
    Scale,
    drawn,
    images,
    takes_prior,
    toy,
)
from helpers.reference import adapt_stream, forward_predict, softmax_label
from helpers.zoo import singles
from torch import Tensor, nn

from it3_lightning.engine import (
    OPTIMIZERS,
    Adaptation,
    BatchAdapter,
    Rule,
    SampleAdapter,
    Settings,
    fast,
)
from it3_lightning.methods import Idempotence, Objective, SecondPass

Net = TypeVar("Net", bound=nn.Module)


class Scaled:
    """The squared distance in other units."""

    needs_batch = False

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, y0: Tensor, second: SecondPass) -> Objective:
        measure = self.factor * (y0 - second(y0)).square().sum(1)
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))


def settings(**given: Any) -> Settings:
    published = {"objective": Idempotence("l2", None), "optimizer": "polyak", "lr": 0.5}
    return Settings(**{**published, **given})


def by_polyak(net: nn.Module, x: Tensor, **given: Any) -> Adaptation:
    kind: Any = SampleAdapter if given.get("scope") == "sample" else BatchAdapter
    made = kind(net, takes_prior(net), softmax_label, settings(**given))
    with made.adapted(x) as adaptation:
        found: Adaptation = adaptation
        return found


def by_hand(source: Net, x: Tensor, *, share: float = 0.5, steps: int = 1) -> Net:
    """The formula, on copies."""
    net, anchor = copy.deepcopy(source), copy.deepcopy(source).requires_grad_(False)
    for _ in range(steps):
        y0 = softmax_label(net(x, None))
        loss = (y0 - softmax_label(anchor(x, y0))).square().sum(1).mean()
        net.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        moving = [p for p in net.parameters() if p.grad is not None]
        square = sum(float(p.grad.square().sum()) for p in moving if p.grad is not None)
        norm = sum(float(p.detach().square().sum()) for p in net.parameters()) ** 0.5
        scale = min(share * loss.item() / square, 0.001 * norm / square**0.5)
        for parameter in moving:
            assert parameter.grad is not None
            parameter.data -= scale * parameter.grad
    return net


class Views(nn.Module):
    """Weights that enter as views of one sum, so that their gradients share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8, bias=False)
        self.one, self.other = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        added = self.one.view(1, 8) + self.other.view(1, 8)
        features: Tensor = self.layer(x.flatten(1)) + added
        return features.tanh()


def test_gradients_that_share_memory_move_each_weight_by_its_own() -> None:
    net, x = drawn(Conditioned(Views())), images()
    expected, adaptation = by_hand(net, x), by_polyak(net, x)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(adaptation.weights[name], parameter.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_of_a_network_in_half_precision_are_vectorised(dtype: torch.dtype) -> None:
    net, x = toy().to(dtype), images().to(dtype)
    found = by_polyak(net, x, scope="sample", backend="vectorised")  # a warning would be an error
    expected = by_polyak(net, x, scope="sample", backend="loop")
    assert found.outputs is not None
    assert found.outputs.dtype == dtype
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=0, atol=0.05)


@pytest.mark.parametrize("share", [0.01, 0.5])  # the longer one is cut off
@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_is_that_of_the_formula(share: float, steps: int) -> None:
    net, x = toy(), images()
    expected = by_hand(net, x, share=share, steps=steps)
    adaptation = by_polyak(net, x, lr=share, steps=steps)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(adaptation.weights[name], parameter.detach(), rtol=0, atol=1e-12)
    assert adaptation.distance_source is not None
    assert adaptation.distance_adapted is not None
    assert adaptation.distance_adapted.mean() < adaptation.distance_source.mean()


def test_a_short_step_takes_its_share_of_the_distance_away() -> None:
    adaptation = by_polyak(toy(), images(), lr=0.01)
    assert adaptation.distance_source is not None
    assert adaptation.distance_adapted is not None
    left = adaptation.distance_adapted.mean() / adaptation.distance_source.mean()
    assert 1 - left.item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_the_units_of_the_distance_do_not_matter(scope: str) -> None:
    net, x = toy(), images()
    one, other = (by_polyak(net, x, scope=scope, objective=Scaled(f)) for f in (1.0, 1e4))
    torch.testing.assert_close(one.outputs, other.outputs, rtol=0, atol=1e-10)
    assert one.outputs is not None
    assert one.source_outputs is not None
    assert (one.outputs - one.source_outputs).abs().max() > 1e-3


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_no_distance_is_no_step(scope: str) -> None:
    adaptation = by_polyak(toy(), images(), scope=scope, objective=Scaled(0.0))
    assert adaptation.outputs is not None
    assert adaptation.source_outputs is not None
    torch.testing.assert_close(adaptation.outputs, adaptation.source_outputs, rtol=0, atol=1e-15)
    assert not adaptation.skipped.any()


@pytest.mark.parametrize("backend", ["vectorised", "loop"])
@pytest.mark.parametrize("steps", [1, 3])
def test_each_sample_has_the_step_it_has_alone(backend: str, steps: int) -> None:
    net, x = toy(), images()
    alone = [by_hand(net, one[None], steps=steps)(one[None], None).detach() for one in x]
    adaptation = by_polyak(net, x, scope="sample", backend=backend, steps=steps)
    torch.testing.assert_close(adaptation.outputs, torch.cat(alone), rtol=0, atol=1e-9)


def test_weights_are_carried_along_a_stream() -> None:
    net, batches = toy(), [images(seed=0), images(seed=1)]
    made = BatchAdapter(net, takes_prior(net), softmax_label, settings(reset="never"))
    found = []
    for x in batches:
        with made.adapted(x) as adaptation:
            found.append(adaptation.weights["conv.weight"].clone())
    assert not torch.equal(found[0], found[1])
    expected = by_hand(net, batches[0]).get_parameter("conv.weight").detach()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


# Half precision moves through float32 masters


class Half(nn.Module):
    """``w x`` in half precision, with an anchor that halves."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        return self.w * x if prior is None else prior / 2


def half_loop(source: Tensor, batches: list[Tensor], steps: int, lr: float) -> Tensor:
    """Descend on ``mean (w x / 2)^2`` with a float32 master behind rounded weights."""
    master = source.float()
    unit = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[source.dtype]

    def on_grid() -> Tensor:
        """Round at thresholds that lie as multiples of the golden ratio do."""
        units = unit * 2.0 ** master.detach().double().log2().floor()
        golden = (5**0.5 - 1) / 2
        spread = torch.tensor([golden - 1, 2 * golden - 1], dtype=torch.float64)
        exact = (master.detach() / units) % 1 == 0
        return torch.where(
            exact, master.detach().double(), (master.detach() / units + spread).round() * units
        ).to(source.dtype)

    optimizer = torch.optim.Adam([master], lr=lr)
    for x in batches:
        for _ in range(steps):
            w = on_grid().requires_grad_()
            y0 = w * x
            loss = (y0 - y0 / 2).square().sum(1).mean()
            master.grad = torch.autograd.grad(loss, w)[0].float()
            optimizer.step()
    return on_grid()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_through_float32_masters(dtype: torch.dtype) -> None:
    net, batches = Half(dtype), [torch.ones(4, 2, dtype=dtype)] * 3
    lr = 1e-4  # below half a unit in the last place, so that no single step is seen
    settings = Settings(objective=PUBLISHED, steps=40, lr=lr, reset="never", measure=False)
    adapter = BatchAdapter(net, takes_prior(net), lambda y: y, settings)
    for count in (1, 2, 3):
        with adapter.adapted(batches[0]):
            found = net.w.detach().clone()
        assert torch.equal(found, half_loop(net.w.detach(), batches[:count], 40, lr))
    assert not torch.equal(found, net.w)


def test_masters_survive_a_bad_batch() -> None:
    net, good = Half(torch.bfloat16), torch.ones(4, 2, dtype=torch.bfloat16)
    settings = Settings(objective=PUBLISHED, steps=15, lr=1e-4, reset="never", anchor="ema")

    def run(batches: list[Tensor]) -> Tensor:
        def distance(p: Tensor, q: Tensor) -> Tensor:
            return (p - q).square().sum(1) * (torch.inf if len(p) == 3 else 1)

        given = replace(settings, objective=Idempotence(distance, None))
        adapter = BatchAdapter(net, takes_prior(net), lambda y: y, given)
        return results(adapter, batches)[-1].weights["w"].clone()

    assert torch.equal(run([good, good[:3], good, good[:3], good]), run([good, good, good]))


def test_ema_anchor_of_half_precision_moves_in_float32() -> None:
    net, anchors = Scale().to(torch.bfloat16), []

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        if prior is not None:
            anchors.append(net.w.item())
        return forward_predict(net, x, prior)

    settings = Settings(
        objective=PUBLISHED, steps=500, lr=1e-3, anchor="ema", ema_decay=0.999, measure=False
    )
    x = torch.ones(2, 1, dtype=torch.bfloat16)
    results(BatchAdapter(net, forward, lambda y: y, settings), [x])
    assert anchors[0] == 2.0
    assert anchors[-1] > 2.01


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_shorter_than_the_rounding_move_the_outputs_as_far(
    way: str, steps: int, dtype: torch.dtype
) -> None:
    """Adam's steps of 1e-4 are a twentieth of a unit of bfloat16: all were rounded away."""
    wide = drawn(Conditioned(nn.Sequential(nn.Linear(16, 512), nn.Tanh(), nn.Linear(512, 8))))
    half = copy.deepcopy(wide).to(dtype)
    source = copy.deepcopy(half).double()  # the same weights, of which no step is lost
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    settings: dict[str, Any] = {"optimizer": "adam", "lr": 1e-4, "steps": steps}
    exact = adapted(any_adapter(source, way, **settings), x.double())
    found = adapted(any_adapter(half, way, **settings), x)
    assert exact.outputs is not None
    assert exact.source_outputs is not None
    assert found.outputs is not None
    before = half(x)
    assert found.outputs.dtype == dtype
    whole = (exact.outputs - exact.source_outputs).flatten()
    moved = (found.outputs.double() - before.double()).flatten().detach()
    assert 0.5 < float(moved @ whole / (whole @ whole)) < 1.5


class Averages(nn.Module):
    """Averages over many positions, so that gradients before that are small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed, self.head = nn.Conv2d(3, 32, 3), nn.Linear(3, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        features = self.conv(x).relu().mean((2, 3))
        if prior is not None:
            features = features + 0.02 * self.embed(prior.to(features.dtype))
        outputs: Tensor = self.head(features)
        return outputs


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 100.0), ("adam", 1e-2), ("polyak", 0.5)])
@pytest.mark.parametrize("kind", ["mixed", "true"])
def test_small_gradients_do_not_underflow_in_float16(
    kind: str, optimizer: Any, lr: float, steps: int
) -> None:
    torch.manual_seed(0)
    net, x = Averages().float(), torch.randn(64, 3, 32, 32)
    made = Settings(objective=PUBLISHED, optimizer=optimizer, lr=lr, steps=steps)

    def moved(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        source = {name: p.detach().clone() for name, p in net.named_parameters()}
        batch = BatchAdapter(net, takes_prior(net), softmax_label, made)
        with batch.adapted(x) as adaptation:
            assert not adaptation.skipped.any()
            return {n: (w - source[n]).double() for n, w in adaptation.weights.items()}

    exact = moved(net, x)
    if kind == "mixed":
        with torch.autocast("cpu", torch.float16):
            found = moved(net, x)
    else:
        found = moved(copy.deepcopy(net).half(), x.half())
    for name in ("conv.weight", "head.weight"):
        along = (found[name] * exact[name]).sum() / exact[name].square().sum()
        assert 0.5 < along < 1.5, name


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_each_sample_is_scaled_as_far_as_its_gradients_allow(
    backend: str, steps: int
) -> None:
    """They are x^2 at first: unscaled, the first is 0; scaled as that one, the others overflow."""
    x = torch.tensor([[2.0**-13], [4.0], [32.0]])

    def moved(dtype: torch.dtype, way: str) -> Tensor:
        net = nn.Linear(1, 1, bias=False).to(dtype)
        nn.init.ones_(net.weight)

        def forward(x: Tensor, prior: Tensor | None) -> Tensor:
            outputs: Tensor = net(x) if prior is None else prior / 2
            return outputs

        given: dict[str, Any] = {"optimizer": "adam", "lr": 0.25, "steps": steps}
        made = any_adapter(net, way, forward, to_label=torch.Tensor.double, **given)
        outputs = adapted(made, x.to(dtype)).outputs
        assert outputs is not None
        return outputs.double() / x

    expected = moved(torch.float64, "loop")
    assert expected.max() < 0.9
    torch.testing.assert_close(moved(torch.float16, backend), expected, rtol=2e-3, atol=0)


@pytest.mark.filterwarnings("ignore:The step changed no weight")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "scales"), [(torch.bfloat16, (1, 1000)), (torch.float16, (1, 100)), (None, (0, 1))]
)
def test_only_samples_whose_weights_changed_are_said_to_have_moved_them(
    dtype: torch.dtype | None, scales: tuple[int, int], way: str, steps: int
) -> None:
    """A step of 1e-6 is lost in the rounding of halves; a loss of 0 has none."""
    net, lr = Half(dtype or torch.float32), 1e-6 if dtype else 0.1
    still, moving = (scale * torch.ones(1, 2, dtype=dtype) for scale in scales)
    given: dict[str, Any] = {"optimizer": "sgd", "lr": lr, "steps": steps}

    def said(x: Tensor) -> list[bool]:
        made = any_adapter(net, way, to_label=lambda y: y, **given)
        found = adapted(made, x)
        assert found.reliable is not None
        assert not found.skipped.any()
        return found.reliable.tolist()

    assert said(torch.cat([still, still])) == [False, False]
    both = [True, True] if way == "batch" else [False, True]
    assert said(torch.cat([still, moving])) == both


def test_a_step_that_is_lost_in_rounding_is_told() -> None:
    net = Half(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"changed no weight.*torch.bfloat16.*lr.*bf16-mixed"):
        adapted(
            BatchAdapter(
                net,
                takes_prior(net),
                lambda y: y,
                Settings(objective=PUBLISHED, optimizer="sgd", lr=1e-6),
            ),
            torch.ones(2, 2, dtype=torch.bfloat16),
        )


# Rules that are added from outside


class Softened(torch.optim.Optimizer):
    """Like Lion, with a soft sign: of a mean of gradients that it keeps."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mixed = 0.9 * mean + 0.1 * p.grad
                    p -= group["lr"] * mixed / (mixed.abs() + 1e-3)
                    mean.mul_(0.99).add_(p.grad, alpha=0.01)


def softened_step(weights: list[Tensor], gradients: list[Tensor], lr: float) -> list[Tensor]:
    mixed = [0.1 * gradient for gradient in gradients]
    return [w - lr * m / (m.abs() + 1e-3) for w, m in zip(weights, mixed, strict=True)]


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


RULES: dict[str, Rule] = {
    "closed first step": Rule(Softened, softened_step, 2),
    "factory of torch": Rule(momentum, moments=1),
    "factory": Rule(Softened, moments=2),
    "elementwise": Rule(Softened, moments=2, elementwise=True),
    "elementwise with a closed first step": Rule(Softened, softened_step, 2, elementwise=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", RULES)
def test_a_rule_from_outside_moves_the_weights_as_its_optimizer_does(
    kind: str, steps: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, net, x = RULES[kind], toy(), images(4)
    given: dict[str, Any] = {"optimizer": "outside", "lr": 0.02, "steps": steps}

    def answer(inputs: Tensor) -> tuple[Tensor, Any]:
        weights = {name: weight[None] + 0 for name, weight in net.named_parameters()}
        return forward_predict(net, inputs, None), weights

    # one step in closed form needs no optimizer, whose class is not known
    mixes = not rule.elementwise and rule.factory is Softened and (steps > 1 or not rule.first_step)
    warns = way == "vectorised" and fast.enabled() and mixes
    with monkeypatch.context() as patch:
        patch.setitem(OPTIMIZERS, "outside", rule)
        patch.setitem(reference.OPTIMIZERS, "outside", rule.factory)
        expecting: Any = pytest.warns(UserWarning, match="may mix") if warns else nullcontext()
        adapter = any_adapter(net, way, **given)
        with expecting, adapter.adapted(x, answer) as found:
            pass
        records = adapt_stream(
            net,
            [x] if way == "batch" else singles(x),
            predict=forward_predict,
            to_label=softmax_label,
            **given,
        )
    if way != "batch":
        assert backend_of(adapter) == (way if fast.enabled() and not mixes else "loop")
    assert_is_reference(found, records, 1e-10)
    for name, weight in found.answers.items():
        expected = torch.stack([record.weights[name] for record in records])
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-10)
        assert name.startswith("embed") or not torch.equal(weight[0], net.get_parameter(name))
    with pytest.raises(ValueError, match="Unknown optimizer 'outside'"):
        Settings(**given)


class Summed(nn.Module):
    """Scales by a sum of parameters, whose gradient autograd expands from one number."""

    def __init__(self, *, dense: bool) -> None:
        super().__init__()
        self.a, self.dense = nn.Parameter(torch.ones(3)), dense

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        out: Tensor = x.flatten(1)[:, :3] * (self.a * 1 if self.dense else self.a).sum()
        return out if prior is None else out + prior


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_expanded_gradients_do_as_dense_ones(optimizer: str) -> None:
    found = []
    for dense in (False, True):
        net = drawn(Summed(dense=dense))
        by = any_adapter(net, "batch", optimizer=optimizer, lr=0.1)
        found.append(adapted(by, images()).weights["a"].clone())
        assert not torch.equal(found[-1], net.get_parameter("a"))
    torch.testing.assert_close(found[0], found[1])

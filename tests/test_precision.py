"""Steps in every precision of a Trainer, held against the method in plain torch and float64."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.modules import bits as noted
from helpers.reference import Record, adapt_stream, softmax_label
from helpers.toy import Batch, IT3Net, adapting, loader, net, quiet
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from it3_lightning import Idempotence
from it3_lightning.engine import fast

FLOAT16 = "16-mixed, in float16"  # which a Trainer on a CPU takes as a plugin only
DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
TOLERANCES = {  # largest error of an output, as a share of how far outputs move in float64
    "64-true": 1e-9,
    "32-true": 1e-3,
    "bf16-mixed": 0.15,
    FLOAT16: 0.05,
    "bf16-true": 0.25,
    "16-true": 0.05,
}
RUNS = [("batch", "batch"), ("batch", "never"), ("sample", "batch")]  # scope and reset
LR = {"sgd": 0.05, "adam": 0.01, "polyak": 0.5}


class Seen(IT3Net):
    """Keeps the weights that each batch is predicted with, and whether a cast of them is stale."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.weights: list[dict[str, Tensor]] = []
        self.stale = False

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        outputs: Tensor = self(batch[0])
        torch.clear_autocast_cache()
        self.stale |= not torch.equal(outputs, self(batch[0]))
        self.weights.append({n: p.detach().clone() for n, p in self.named_parameters()})
        return outputs


@dataclass(frozen=True)
class Run:
    """A run in some precision, and the same in float64.

    Args:
        precision: its name.
        scope: of the adaptation.
        module: after the run.
        left: parameters and buffers that are not bitwise what they were.
        plain: what it predicts without a callback, before and after the run.
        outputs: what it predicts.
        skipped: samples that kept the source.
        records: of the reference, on the same weights and inputs.
    """

    precision: str
    scope: str
    module: Any
    left: list[str]
    plain: tuple[Tensor, Tensor]
    outputs: Tensor
    skipped: int
    records: list[Record]

    @property
    def moved(self) -> tuple[Tensor, Tensor]:
        """How far the outputs move, and how far in float64."""
        exact = torch.cat([record.outputs - record.y0 for record in self.records])
        return self.outputs.double() - self.plain[0].double(), exact

    def weights_moved(self, record: int) -> tuple[Tensor, Tensor]:
        """How far all weights move to a batch, and how far in float64."""
        source = dict(self.module.named_parameters())
        both = self.module.weights[record], self.records[record].weights
        first, second = (
            torch.cat([(w[n].double() - p.detach().double()).flatten() for n, p in source.items()])
            for w in both
        )
        return first, second


def predicted(module: Any, precision: str, *callbacks: Any) -> Tensor:
    mixed: Any = MixedPrecision("16-mixed", "cpu")
    chosen = {"plugins": [mixed]} if precision == FLOAT16 else {"precision": precision}
    found: Any = quiet(callbacks=list(callbacks), **chosen).predict(module, loader())
    return torch.cat(found)


def given_prior(module: Any, x: Tensor, prior: Tensor | None) -> Tensor:
    outputs: Tensor = module.predict_with(x, prior)
    return outputs


def reference(module: Any, scope: str, **given: Any) -> list[Record]:
    """Adapt a copy in float64 to the same inputs, rounded as the module's weights are."""
    dtype = next(module.parameters()).dtype
    batches = loader(batch=1 if scope == "sample" else 4)
    return adapt_stream(
        copy.deepcopy(module).double(),
        [images.to(dtype).double() for images, _ in batches],
        predict=given_prior,
        to_label=softmax_label,
        parameters=lambda name: not name.startswith("it3_"),
        **given,
    )


CASES = [(p, *run, optimizer) for p in TOLERANCES for run in RUNS for optimizer in LR]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def run(request: pytest.FixtureRequest) -> Run:
    precision, scope, reset, optimizer = request.param
    module = net(Seen, hidden=64).to(DTYPES.get(precision, torch.float32))
    given: dict[str, Any] = {"optimizer": optimizer, "lr": LR[optimizer], "steps": 3}
    given["reset"] = reset
    records = reference(module, scope, **given)
    callback = adapting(objective=Idempotence("l2", None), scope=scope, **given)
    plain = predicted(module, precision)
    module.weights.clear()
    before = values(module)
    outputs = predicted(module, precision, callback)
    left = [name for name, value in values(module).items() if before.get(name) != value]
    kept = list(module.weights)
    both = plain, predicted(module, precision)
    module.weights = kept
    return Run(precision, scope, module, left, both, outputs, callback.summary.skipped, records)


def values(module: Any) -> dict[str, Any]:
    """Note bits and data types of all parameters and buffers."""
    found = {name: bits for name, bits in noted(module).items() if name.endswith("in value")}
    return {**found, **{n: t.dtype for n, t in module.state_dict().items()}}


def test_outputs_are_those_of_float64_within_the_rounding(run: Run) -> None:
    moved, exact = run.moved
    assert run.skipped == 0
    tolerance = TOLERANCES[run.precision] * float(exact.abs().max())
    error = (moved - exact).abs().max()
    assert error <= tolerance
    if run.precision != "64-true":
        assert error > 0  # it is another arithmetic


def test_steps_take_effect_as_far_as_in_float64(run: Run) -> None:
    pairs = [run.moved]
    if run.scope == "batch":
        pairs += [run.weights_moved(index) for index in range(len(run.records))]
    for moved, exact in pairs:
        assert float(moved.norm() / exact.norm()) == pytest.approx(1, abs=0.5)
        along = float((moved * exact).sum() / exact.square().sum())
        assert along == pytest.approx(1, abs=0.5)


def test_no_cast_of_other_weights_is_served(run: Run) -> None:
    assert not run.module.stale
    assert torch.equal(*run.plain)  # the source's, after the run as before


def test_weights_are_the_sources_again_in_bits_and_type(run: Run) -> None:
    assert run.left == []
    expected = DTYPES.get(run.precision, torch.float32)
    assert {p.dtype for p in run.module.parameters()} == {expected}
    assert {b.dtype for b in run.module.buffers() if b.is_floating_point()} == {expected}


SMALL = 1e-8


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("polyak", 0.5)])
@pytest.mark.parametrize("backend", ["loop", "vectorised"])
@pytest.mark.parametrize("precision", ["16-true", FLOAT16])
def test_each_samples_gradients_may_be_smaller_than_numbers_of_float16(
    precision: str, backend: Any, optimizer: str, lr: float, steps: int
) -> None:
    def distance(p: Tensor, q: Tensor) -> Tensor:
        return SMALL * (p - q).square().sum(1)

    module = net(Seen, hidden=64).to(DTYPES.get(precision, torch.float32))
    exact = reference(module, "sample", optimizer=optimizer, lr=lr, steps=steps)
    plain = predicted(module, precision)
    in_its_units = lr / SMALL if optimizer == "sgd" else lr  # Polyak's are any loss's
    given = {"optimizer": optimizer, "lr": in_its_units, "steps": steps}
    made = Idempotence(distance, None)
    callback = adapting(objective=made, scope="sample", backend=backend, **given)
    moved = (predicted(module, precision, callback) - plain).double()
    if fast.enabled("vmap"):
        assert callback.summary.backend.startswith(f"backend {backend!r}")
    expected = torch.cat([record.outputs - record.y0 for record in exact])
    assert (moved - expected).abs().max() <= 0.05 * expected.abs().max()


def test_mixed_float16_on_a_cpu_is_what_lightning_makes_of_it() -> None:
    module, callback = net(Seen).float(), adapting(steps=2)
    expected = predicted(module, "bf16-mixed", callback)
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        assert torch.equal(predicted(module, "16-mixed", callback), expected)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_small_distances_are_measured_beyond_the_rounding_of_probabilities(
    scope: str, precision: str
) -> None:
    """Rounded again to half precision, ten probabilities have a divergence below 0."""
    module = net(Seen).to(DTYPES.get(precision, torch.float32))
    with torch.no_grad():
        for parameter in module.it3_parts()[1].parameters():
            parameter.mul_(0.2)
    exact = copy.deepcopy(module).double()
    callbacks = [adapting(objective=Idempotence("js", None), scope=scope) for _ in range(2)]
    predicted(module, precision, callbacks[0])
    quiet(callbacks=[callbacks[1]], precision="64-true").predict(exact, loader())
    found, expected = (callback.summary.distances[0].double() for callback in callbacks)
    assert expected.max() < 5e-3
    assert found.min() >= 0
    torch.testing.assert_close(found, expected, rtol=0.2, atol=1e-5)

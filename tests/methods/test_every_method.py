"""The laws that hold for every test-time method, each on a module that counts."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.auxiliary import headed
from helpers.method_runs import METHODS, TASKS, Make, adapted, adapter_of
from helpers.modules import stream, takes_prior, toy
from helpers.reference import softmax_label
from helpers.toy import (
    Batch,
    LitNet,
    differing,
    doubles,
    ending,
    everything,
    loader,
    quiet,
    samples,
    seeded,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import it3_lightning
from it3_lightning import Idempotence, Iterates, TestTimeCallback
from it3_lightning.engine import BatchAdapter, Settings, adapter
from it3_lightning.engine.types import Plain
from it3_lightning.methods import (
    EATA,
    LAME,
    MEMO,
    ROID,
    SAR,
    T3A,
    TTT,
    TTTMAE,
    ActMAD,
    Auxiliary,
    Contrastive,
    CoTTA,
    DeYO,
    LabelShiftEM,
    MaskedPatches,
    RDumb,
    Rotation,
    Tent,
    TestTimeAugmentation,
    TestTimeMethod,
    TTTPlusPlus,
)

every_method = pytest.mark.parametrize("name", METHODS)


class Counts(LitNet):
    """Counts its passes."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.fails: BaseException | None = None
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.seen.add_(1)
        logits: Tensor = self.dropout(self.net(x))
        return logits

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self(batch[0])

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if self.fails is not None and batch_idx == 1:
            raise self.fails
        return self(batch[0])


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


@pytest.fixture
def module() -> Any:
    made: Any = seeded(Counts()).eval()
    quiet().predict(made, loader(4))  # a Trainer leaves something of its own
    return made


def adapting(module: Any, name: str) -> TestTimeCallback:
    """Make the callback of a method, which has seen source data where it needs them."""
    if name in TASKS and not hasattr(module, "it3_auxiliary"):
        module.it3_auxiliary = seeded(TASKS[name]()).eval()
    callback = TestTimeCallback(METHODS[name](), lr=0.05)
    if callback.settings.method.needs_source:
        quiet(callbacks=[callback]).validate(module, loader(8, seed=5), verbose=False)
    return callback


def predicted(module: Any, callback: TestTimeCallback, data: Any = None) -> list[Tensor]:
    torch.manual_seed(3)
    found: Any = quiet(callbacks=[callback]).predict(module, loader() if data is None else data)
    return list(found)


def serving(images: Tensor, labels: Tensor) -> Any:
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def noted(module: Any) -> dict[str, Any]:
    """Note what a module is, but for what its own steps count."""
    return {k: v for k, v in everything(module).items() if "seen" not in k}


@every_method
def test_it_adapts_or_predicts_by_itself(name: str, module: Any) -> None:
    plain: Any = quiet().predict(module, loader())
    pairs = zip(predicted(module, adapting(module, name)), plain, strict=True)
    assert any(not torch.allclose(ours, theirs) for ours, theirs in pairs)


@every_method
def test_labels_never_reach_it(name: str, module: Any) -> None:
    images, labels = samples()
    callback = adapting(module, name)
    found = predicted(module, callback, serving(images, labels))
    other = predicted(module, callback, serving(images, labels.flip(0)))
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


@every_method
@pytest.mark.parametrize("error", [None, ValueError("of the step"), KeyboardInterrupt()])
def test_nothing_is_left_behind(name: str, module: Any, error: BaseException | None) -> None:
    callback = adapting(module, name)
    method = callback.settings.method
    before, state = noted(module), copy.deepcopy(method.state_dict())
    module.fails = error
    with ending(error):
        predicted(module, callback)
    module.fails = None
    assert [each for each in differing(before, noted(module)) if each != "attributes "] == []
    assert str(method.state_dict()) == str(state)


@every_method
def test_a_bad_batch_does_not_touch_the_next(name: str, module: Any) -> None:
    images, labels = samples()
    bad = images.clone()
    bad[5] = torch.nan
    callback = adapting(module, name)
    with pytest.warns(UserWarning, match="non-finite"):
        found = predicted(module, callback, serving(bad, labels))
    without = torch.cat([images[:4], images[8:]]), torch.cat([labels[:4], labels[8:]])
    first, last = predicted(module, callback, serving(*without))
    torch.testing.assert_close(found[0], first, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[2], last, rtol=0, atol=1e-12)


@every_method
def test_the_same_seed_gives_the_same_bits_and_draws_nothing(name: str, module: Any) -> None:
    callback = adapting(module, name)
    found = predicted(module, callback)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    plain: Any = quiet().predict(module, loader())
    assert torch.equal(torch.rand(3), drawn)
    assert len(plain) == len(found)
    again = predicted(module, callback)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


needs_classes = pytest.mark.parametrize(
    "method", [LAME(), LabelShiftEM()], ids=lambda method: type(method).__name__
)
"""Methods that move no weight and put out class probabilities that a whole batch agrees on."""


@needs_classes
def test_one_sample_keeps_the_prediction_of_the_network(method: TestTimeMethod) -> None:
    net, x = toy(), stream(1)[0][:1]
    found = adapted(adapter_of(method, net), net, x)
    assert found.prediction is None
    assert found.reason is not None
    assert found.reason.endswith("at least two samples")


@needs_classes
@pytest.mark.parametrize(
    ("outputs", "needs"), [((4, 1), "class probabilities"), ((4, 3, 2, 2), "one class vector")]
)
def test_values_and_maps_are_refused(method: Any, outputs: Any, needs: str) -> None:
    net = nn.Identity()
    net.register_parameter("weight", nn.Parameter(torch.ones(1)))
    settings = Settings(objective=method, steps=0)
    adapter = BatchAdapter(net, lambda x, _: x * net.weight, lambda y: y, settings)
    with pytest.raises(ValueError, match=f"{type(method).__name__} needs {needs}"):
        adapted(adapter, net, torch.ones(outputs))


COSTS: dict[str, Make] = {
    "ActMAD": ActMAD,
    "CoTTA": CoTTA,
    "DeYO": lambda: DeYO(patches=2, tau_entropy=2.0, tau_plpd=-1.0, margin=2.0),
    "EATA": lambda: EATA(margin=2.0, epsilon=1.0),
    "Idempotence": lambda: Idempotence(reliability=None),
    "Iterates": Iterates,
    "LAME": LAME,
    "LabelShiftEM": LabelShiftEM,
    "MEMO": MEMO,
    "RDumb": lambda: RDumb(margin=2.0, epsilon=1.0),
    "ROID": ROID,
    "SAR": lambda: SAR(margin=2.0, recovery=0.0),
    "T3A": lambda: T3A("head"),
    "TTT": TTT,
    "TTTMAE": TTTMAE,
    "TTTPlusPlus": TTTPlusPlus,
    "Tent": Tent,
    "TestTimeAugmentation": TestTimeAugmentation,
}
COST_HEADS: dict[str, Callable[[], Auxiliary]] = {
    "TTT": lambda: Rotation("dense", 8),
    "TTTMAE": lambda: MaskedPatches("conv", 2, 1, patch=2),
    "TTTPlusPlus": lambda: Contrastive("dense", 8),
}


@pytest.mark.parametrize("name", COSTS)
def test_passes_are_those_in_the_documents(name: str) -> None:
    method, x = COSTS[name](), stream(1)[0]
    net: Any = headed(COST_HEADS[name]()) if name in COST_HEADS else toy()
    forward: Any = takes_prior(net) if method.needs_prior else lambda inputs, _: net(inputs)
    settings = Settings(objective=method, measure=False, **method.defaults)
    by = adapter(net, forward, softmax_label, settings)
    if method.needs_source:
        assert isinstance(by, BatchAdapter)
        by.fit_source(x)
    with by.adapted(x, Plain(forward)) as found:
        assert found.reason is None
    count = len(x) if settings.scope == "sample" else 1
    table = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    each = " a sample" * (count > 1)
    passes = f"{found.forwards / count:g} + {found.backwards / count:g}{each}"
    assert row.split("|")[-2].strip() == passes


def test_the_documents_list_every_method() -> None:
    public = [value for value in vars(it3_lightning).values() if isinstance(value, type)]
    methods = {m.__name__ for m in public if issubclass(m, TestTimeMethod)}
    assert methods - {"TestTimeMethod", "Entropy"} == set(COSTS)

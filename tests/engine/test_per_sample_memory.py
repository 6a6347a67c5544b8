"""What one adapter has measured of a module, another one that does the same goes by."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.adapters import PUBLISHED, adapted, assert_close, sample_adapter
from helpers.fast import needs_fast_paths
from helpers.modules import drawn, images, takes_prior, toy
from helpers.reference import softmax_label
from helpers.times import Times
from helpers.toy import LitNet, adapting, loader, quiet, samples
from helpers.toy import net as lit_net
from torch import Tensor, nn

from it3_lightning import IT3Predictor, TestTimeCallback
from it3_lightning.engine import SampleAdapter, Settings, fast, per_sample
from it3_lightning.methods import Entropy, Idempotence

pytestmark = needs_fast_paths
CHOICE = [("loop", 1), ("loop", 1), ("vectorised", 4)]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """Times by which the vectorised backend is the faster one."""
    made = Times(2.0, 1.0)
    monkeypatch.setattr(per_sample, "_timed", made)
    return made


def alike(net: nn.Module, known_as: Any = ("a step",), **given: Any) -> SampleAdapter:
    made = Settings(**{"scope": "sample", "objective": PUBLISHED, "lr": 1e-3, **given})
    return SampleAdapter(net, takes_prior(net), softmax_label, made, known_as=known_as)


def measured(times: Times) -> bool:
    """Whether a backend was chosen by its time since this was last asked: two were looped."""
    looped = [name for name, _ in times.asked].count("loop")
    times.asked.clear()
    return looped > 1


@pytest.mark.parametrize("faster", ["loop", "vectorised"])
def test_what_one_adapter_measured_another_alike_goes_by(faster: str, times: Times) -> None:
    times.times["vectorised"] = 1.0 if faster == "vectorised" else 9.0
    net = toy()
    first = alike(net)
    expected = adapted(first, images(4))
    assert times.asked == CHOICE
    times.asked.clear()
    second = alike(net)
    found = adapted(second, images(4))
    # one by the loop, to compare by, and all at once; or the loop alone, which is not timed
    assert times.asked == ([("loop", 1), ("vectorised", 4)] if faster == "vectorised" else [])
    assert second.backend_selection == first.backend_selection
    assert_close(found.outputs, expected.outputs, 1e-10)  # type: ignore[arg-type]
    times.asked.clear()
    adapted(second, images(4))
    assert times.asked == []  # nor is it compared again


def test_adapters_that_nobody_calls_alike_measure_for_themselves(times: Times) -> None:
    net = toy()
    for _ in range(2):
        adapted(alike(net, None), images(4))
        assert measured(times)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "under",
    [
        lambda: threads(torch.get_num_threads() + 1),
        lambda: precision("high"),
        lambda: fast.disabled("grad_sample"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
)
def test_under_other_conditions_of_the_process_it_is_measured_anew(
    under: Callable[[], Any], times: Times
) -> None:
    net, inputs = toy().float(), images(4).float()
    for new in (True, False):  # those that were met before are known
        adapted(alike(net), inputs)
        assert measured(times) is new
        with under():
            adapted(alike(net), inputs)
        assert measured(times) is new


class Scaled(Idempotence):
    """Another method of the same fields."""


def same() -> Idempotence:
    return Idempotence("l2", None)


@pytest.mark.parametrize(
    ("first", "second", "new"),
    [
        ({}, {}, False),
        ({"objective": same()}, {"objective": same()}, False),
        ({"parameters": ["dense.*"]}, {"parameters": ["dense.*"]}, False),
        ({}, {"lr": 1e-2}, True),
        ({}, {"steps": 2}, True),
        ({}, {"optimizer": "sgd"}, True),
        ({}, {"measure": False}, True),
        ({}, {"parameters": ["dense.*"]}, True),
        ({}, {"memory": 2**20}, True),
        ({}, {"objective": Idempotence("l1", None)}, True),
        ({}, {"objective": Scaled("l2", None)}, True),
        ({}, {"known_as": ("another step",)}, True),
    ],
)
def test_with_other_settings_it_is_measured_anew(
    first: dict[str, Any], second: dict[str, Any], new: bool, times: Times
) -> None:
    net = toy()
    adapted(alike(net, **first), images(4))
    assert measured(times)
    adapted(alike(net, **second), images(4))
    assert measured(times) is new


@pytest.mark.parametrize("where", ["objective", "optimizer"])
def test_a_function_is_itself_and_no_other(where: str, times: Times) -> None:
    def made() -> Any:
        def objective(y0: Tensor, second: Callable[[Tensor], Tensor]) -> Any:
            return PUBLISHED(y0, second)

        objective.needs_batch = False  # type: ignore[attr-defined]
        functions = {
            "objective": objective,
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        }
        return {where: functions[where]}

    net, kept = toy(), made()
    for given, new in ((kept, True), (kept, False), (made(), True)):
        adapted(alike(net, **given), images(4))
        assert measured(times) is new


def reshaped(net: Any) -> None:
    net.dense = drawn(nn.Linear(net.dense.in_features, net.dense.out_features))


def patched(net: Any) -> None:
    own = net.dense.forward
    net.dense.forward = lambda x: own(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.bn.train(),
        reshaped,
        patched,
        lambda net: net.dense.register_forward_hook(lambda *_: None),
        lambda net: net.dense.compile(backend="eager"),
        lambda net: net.dense.float(),
        lambda net: setattr(
            net, "__class__", type("Other", (type(net),), {"forward": nn.Identity})
        ),
    ],
    ids=["mode", "layer", "code", "hook", "compiled", "parameters", "class"],
)
def test_of_a_network_that_is_another_one_it_is_measured_anew(
    change: Callable[[Any], Any], times: Times
) -> None:
    net = toy()
    adapter = alike(net)
    adapted(adapter, images(4))
    before = adapter._conditions(images(4))
    assert adapter._conditions(images(4)) == before
    change(net)
    assert alike(net)._conditions(images(4)) != before


def test_a_batch_of_many_more_samples_is_measured_anew(times: Times) -> None:
    net = toy()
    for size, new in ((4, True), (7, False), (8, True), (4, False)):
        adapted(alike(net), images(size))
        assert measured(times) is new


def test_what_was_faster_is_still_compared_with_the_loop(
    times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = toy()
    adapted(alike(net), images(4))
    other = alike(net)
    wrong: Any = other._vectorised
    assert wrong is not None

    class Wrong:
        def __call__(self, *given: Any) -> Any:
            found = wrong(*given)
            return replace(found, outputs=found.outputs + 1)

        def release(self) -> None:
            """Do nothing."""

    monkeypatch.setattr(other, "_vectorised", Wrong())
    with pytest.warns(UserWarning, match="its outputs differ by 1,"):
        found = adapted(other, images(4))
    assert other.backend_selection is not None
    assert other.backend_selection.backend == "loop"
    expected = adapted(sample_adapter(toy(), backend="loop", lr=1e-3), images(4)).outputs
    assert expected is not None
    assert_close(found.outputs, expected, 1e-10)


def test_no_module_lives_longer_for_what_was_measured_of_it() -> None:
    net = toy()
    dense: Any = net.dense
    dense.forward = partial(type(dense).forward, dense)
    adapter = alike(net, objective=same())
    adapted(adapter, images(4))
    assert len(per_sample._MEASURED[net]) == 1
    gone, others = weakref.ref(net), len(per_sample._MEASURED)
    del net, adapter, dense
    gc.collect()
    assert gone() is None
    assert len(per_sample._MEASURED) < others


def test_what_is_remembered_of_a_module_is_limited(
    times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_sample, "_KEPT", 3)
    net = toy()
    for number in (0, 1, 2, 0, 3, 4):
        adapted(alike(net, (str(number),)), images(4))
        times.asked.clear()
    assert len(per_sample._MEASURED[net]) == 3
    for number, new in ((4, False), (1, True)):  # the first that were measured are gone
        adapted(alike(net, (str(number),)), images(4))
        assert measured(times) is new


def test_a_second_run_of_a_trainer_does_not_choose_again(times: Times) -> None:
    model = lit_net()
    for run, new in (("predict", True), ("predict", False), ("test", True), ("test", False)):
        for prediction in ("first", "mean") if run == "predict" else ("first",):
            callback = adapting(scope="sample", prediction=prediction)
            getattr(quiet(callbacks=[callback]), run)(model, loader())
            assert measured(times) is new
    other = adapting(scope="sample", lr=0.01)
    quiet(callbacks=[other]).predict(model, loader())
    assert measured(times)
    quiet(callbacks=[adapting(scope="sample")]).predict(lit_net(), loader())
    assert measured(times)  # of another module, if an equal one


def test_a_second_predictor_does_not_choose_again(times: Times) -> None:
    model = lit_net()
    settings = Settings(scope="sample", objective=PUBLISHED)
    for given, new in ((samples(6)[0], True), (samples(6)[0], False), (samples(20)[0], True)):
        IT3Predictor(model, settings)(given)
        assert measured(times) is new


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_of_other_outputs_of_a_plain_module_it_is_measured_anew(outputs: Any, times: Times) -> None:
    model = LitNet()
    method = Entropy()
    kinds: Any = ("logits", True), ("logits", False), (outputs, outputs != "logits")
    for kind, new in kinds:
        callback = TestTimeCallback(method, scope="sample", outputs=kind, lr=0.01)
        quiet(callbacks=[callback]).predict(model, loader())
        assert measured(times) is new

"""Adapters of small networks in every scope, by every backend, with the published objective."""

from typing import Any

import torch
from torch import Tensor, nn

from helpers.modules import takes_prior
from helpers.reference import Record, adapt_stream, forward_predict, softmax_label
from helpers.zoo import singles
from it3_lightning.engine import (
    Adaptation,
    BatchAdapter,
    Enters,
    Forward,
    SampleAdapter,
    Settings,
    SourceMoments,
    ToLabel,
    adapter,
)
from it3_lightning.methods import Idempotence

PUBLISHED = Idempotence("l2", None)
BACKENDS = ("vectorised", "loop")
WAYS = ("batch", "loop", "vectorised")
"""Scope ``"batch"``, and scope ``"sample"`` by either backend."""

ONLINE: dict[str, Any] = {"reset": "never", "anchor": "ema", "ema_decay": 0.9}


def going(way: str) -> dict[str, Any]:
    """Return the settings of a way."""
    return {"scope": "batch"} if way == "batch" else {"scope": "sample", "backend": way}


def any_adapter(
    net: nn.Module,
    way: str,
    forward: Forward | None = None,
    enters: Enters | None = None,
    to_label: ToLabel = softmax_label,
    moments: SourceMoments | None = None,
    **given: Any,
) -> BatchAdapter | SampleAdapter:
    """Make what adapts a network whose forward takes the prior."""
    made = Settings(**{"objective": PUBLISHED, "lr": 0.01, **going(way), **given})
    more: dict[str, Any] = {"enters": enters or {}, "moments": moments}
    return adapter(net, forward or takes_prior(net), to_label, made, **more)


def batch_adapter(net: nn.Module, forward: Forward | None = None, **given: Any) -> BatchAdapter:
    """Make what adapts a network to whole batches."""
    made = any_adapter(net, "batch", forward, **given)
    assert isinstance(made, BatchAdapter)
    return made


def sample_adapter(net: nn.Module, forward: Forward | None = None, **given: Any) -> SampleAdapter:
    """Make what adapts a network to each sample of a batch, vectorised unless said otherwise."""
    made = any_adapter(net, given.pop("backend", "vectorised"), forward, **given)
    assert isinstance(made, SampleAdapter)
    return made


def adapted(by: BatchAdapter | SampleAdapter, inputs: Any, answer: Any = None) -> Adaptation:
    """Adapt to a batch; the module is left as it was."""
    with by.adapted(inputs, answer) as adaptation:
        return adaptation


def backend_of(by: BatchAdapter | SampleAdapter) -> str:
    """Name the backend that was taken."""
    assert isinstance(by, SampleAdapter)
    assert by.backend_selection is not None
    return by.backend_selection.backend


def assert_close(actual: Tensor | None, expected: Tensor, atol: float) -> None:
    """Hold a tensor against the expected one, to an absolute error."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def by_reference(net: nn.Module, inputs: Any, **given: Any) -> list[Record]:
    """Run the reference on each sample of a batch alone."""
    return adapt_stream(
        net, singles(inputs), predict=forward_predict, to_label=softmax_label, **given
    )


def assert_is_reference(adaptation: Adaptation, records: list[Record], atol: float) -> None:
    """Hold all that came of a batch against the records of its samples."""
    for actual, name in (
        (adaptation.outputs, "outputs"),
        (adaptation.source_outputs, "y0"),
        (adaptation.distance_source, "distance_source"),
        (adaptation.distance_adapted, "distance_after"),
    ):
        assert_close(actual, torch.cat([getattr(record, name) for record in records]), atol)
    assert not adaptation.skipped.any()


def results(by: BatchAdapter | SampleAdapter, batches: list[Any]) -> list[Adaptation]:
    """Adapt to one batch after another."""
    return [adapted(by, inputs) for inputs in batches]


def outputs_of(by: BatchAdapter | SampleAdapter, batches: list[Any]) -> list[Tensor | None]:
    """Return the outputs of one batch after another."""
    return [adaptation.outputs for adaptation in results(by, batches)]

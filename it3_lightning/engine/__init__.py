"""The adaptation engine, in plain torch: settings in, an :class:`Adaptation` out.

``adapter`` is the algorithm; ``per_sample`` runs it for each sample of a batch; ``fast`` is the
seam of what is optional.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

from torch import nn

from it3_lightning.engine.adapter import BatchAdapter
from it3_lightning.engine.evidence import SourceMoments
from it3_lightning.engine.optimizers import OPTIMIZERS, Rule
from it3_lightning.engine.per_sample import SampleAdapter
from it3_lightning.engine.result import Adaptation
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.trees import batch_size, laid_out
from it3_lightning.engine.types import (
    Answer,
    Enters,
    Forward,
    InputsIn,
    Isolation,
    SampleDims,
    ToLabel,
)

__all__ = [
    "OPTIMIZERS",
    "Adaptation",
    "Answer",
    "BatchAdapter",
    "Enters",
    "Forward",
    "Rule",
    "SampleAdapter",
    "SampleDims",
    "Settings",
    "SourceMoments",
    "ToLabel",
    "adapt",
    "adapter",
    "batch_size",
]


def adapter(
    module: nn.Module,
    forward: Forward,
    to_label: ToLabel,
    settings: Settings,
    *,
    enters: Enters = MappingProxyType({}),
    isolation: Isolation = nullcontext,
    inputs_in: InputsIn | None = None,
    sample_dims: SampleDims | None = None,
    moments: SourceMoments | None = None,
) -> BatchAdapter | SampleAdapter:
    """Return what adapts a module to one batch after another, in the scope of the settings.

    Args:
        module: whose parameters adapt.
        forward: ``(inputs, prior) -> outputs (B, ...)``; ``prior=None`` is the neutral one.
        to_label: brings outputs into label space ``(B, C, ...)``.
        settings: how to adapt.
        enters: the layers at whose ``"input"`` or ``"output"`` the prior enters, by name: what
            comes before them is not computed twice. Empty: unknown.
        isolation: returns a context in which passes leave no trace, in logs for example.
        inputs_in: finds the network's inputs in what the adapter is given.
        sample_dims: ``inputs -> dims``: for each tensor in the inputs the dimension of its samples,
            ``None`` where all samples share it, in the structure of the inputs; default: tensors
            whose first dimension is that of the first tensor hold the samples.
        moments: of source data, for ``norm_stats="evidence"``.

    Raises:
        ValueError: the selection of parameters matches nothing, or moments are needed and unknown.
    """
    kind = SampleAdapter if settings.scope == "sample" else BatchAdapter
    return kind(
        module,
        forward,
        to_label,
        settings,
        enters=enters,
        isolation=isolation,
        inputs_in=inputs_in,
        sample_dims=sample_dims,
        moments=moments,
    )


def adapt(
    module: nn.Module,
    inputs: Any,
    *,
    forward: Forward,
    to_label: ToLabel,
    settings: Settings,
    enters: Enters = MappingProxyType({}),
    sample_dims: SampleDims | None = None,
    moments: SourceMoments | None = None,
) -> Adaptation:
    r"""Adapt a module to one batch and return what came of it; the module is left as it was.

    :math:`\theta \leftarrow \theta - \eta \nabla_\theta d(y_0, F(x, y_0))`, ``steps`` times, then
    the prediction :math:`f_\theta(x, 0)` (Durasov et al., IT3, ICML 2025).

    Args:
        module: whose parameters adapt.
        inputs: what ``forward`` takes: tensors ``(B, ...)``, possibly nested.
        forward: ``(inputs, prior) -> outputs (B, ...)``; ``prior=None`` is the neutral one.
        to_label: brings outputs into label space ``(B, C, ...)``.
        settings: how to adapt.
        enters: see :func:`adapter`.
        sample_dims: likewise.
        moments: likewise.

    Raises:
        ValueError: nothing is selected, what is selected has no influence on the prediction, or
            one sample came where several are needed.

    >>> import torch
    >>> net, x = nn.Linear(1, 1, bias=False), torch.ones(2, 1)
    >>> _ = nn.init.ones_(net.weight)
    >>> def forward(x, prior):  # knows the second prediction: half of the first
    ...     return net(x) if prior is None else prior / 2
    >>> adaptation = adapt(
    ...     net, x, forward=forward, to_label=lambda y: y, settings=Settings(lr=0.1)
    ... )
    >>> adaptation.distance_source.mean().item()
    0.25
    >>> round(adaptation.distance_adapted.mean().item(), 4)
    0.2025
    """
    size = batch_size(inputs if sample_dims is None else laid_out(inputs, sample_dims(inputs)))
    if settings.needs_batch and size < 2:
        raise ValueError(
            f"norm_stats='batch' and batch terms need at least two samples, got {size}. Use larger "
            "batches, or norm_stats='source' without a balance term."
        )
    given: dict[str, Any] = {"enters": enters, "sample_dims": sample_dims, "moments": moments}
    made = adapter(module, forward, to_label, settings, **given)
    try:
        with made.adapted(inputs) as adaptation:
            return adaptation
    finally:
        made.restart()

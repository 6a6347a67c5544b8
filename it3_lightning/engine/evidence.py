r"""Evidence: BatchNorm statistics moved from the source's as far as a batch proves a shift.

Of each channel, with statistics :math:`\mu, \sigma^2` of the source, let :math:`a_i` and
:math:`q_i` be the means of :math:`x - \mu` and :math:`(x - \mu)^2` over the positions of sample
:math:`i`. Of source data, their means for each class, :math:`a_k` and :math:`q_k`, and their
variances within classes, :math:`s_a^2` and :math:`s_q^2`, are known (:class:`SourceMoments`). A
batch of :math:`n` samples with class frequencies :math:`p` is expected to have
:math:`\bar a = \sum_k p_k a_k`, likewise :math:`\bar q`, and a variance
:math:`v = \bar q - \bar a^2 - s_a^2 / n`, up to a sampling error of
:math:`e = s^2 (1/n + \sum_k p_k^2 / (n_k + 1))`, :math:`n_k` the source samples of a class. What it
has instead, :math:`A` and :math:`V`, is believed as far as it is larger than that error:

.. math:: \lambda(d, e) = \max(0, 1 - e / d^2), \qquad
    \delta = \lambda(A - \bar a, e_a) (A - \bar a), \qquad
    \log \gamma = \lambda(r, e_r)\, r, \quad r = \log(V / v) - b

(the positive-part estimator of James and Stein, 1961, of each channel), where :math:`b` and
:math:`e_r` are mean and variance of the logarithm of a :math:`\chi^2` variable that varies as much
as :math:`V / v`. The shift so estimated is one of scale and place,
:math:`x \mapsto \sqrt\gamma (x - \mu - \bar a) + \mu + \bar a + \delta`, and the layer normalises
by what it makes of the source's statistics:

.. math:: \mu' = \mu + \bar a + \delta - \sqrt\gamma\, \bar a, \qquad \sigma'^2 = \gamma \sigma^2

A batch without a shift so keeps the statistics of the source, whatever its classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from it3_lightning.engine.optimizers import HALF
from it3_lightning.engine.trees import batch_size, leaves_of
from it3_lightning.engine.types import ToLabel

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Means and variances ``(C,)`` by the names of layers; of several samples, ``(B, C)`` each."""

_ROUNDS = 2  # of class frequencies: from the source's prediction, then from that of the first round
_LEAST = 1e-2  # share of the expected variance that is left to compare with, at least
_MOST = 1e6  # times the expected variance that a variance may be
_ROUNDED = 0.05  # by how much probabilities may miss a sum of 1, in half precision too
_FEWEST = 0.02  # halves of degrees of freedom


class SourceMoments:
    r"""What :func:`believed` must know of source data: moments of each BatchNorm layer by class.

    Classes are those that the network predicts, each sample weighed by its probabilities; no label
    is seen. Where it predicts no classes there is one. The moments of :math:`K` classes and
    :math:`C` channels take :math:`2 K C` numbers, in float32.

    >>> layer, x = nn.BatchNorm1d(1).eval(), torch.tensor([[1.0], [3.0]])
    >>> moments = SourceMoments()
    >>> moments.add(layer, x, lambda: layer(x), lambda outputs: outputs)
    >>> moments.source_dict()["layers"][""]["means"].flatten()  # of x and of its square
    tensor([2., 5.])
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._count = torch.zeros(0, dtype=torch.float64)
        self._repeated: set[str] = set()  # layers that run several times in a pass
        self._tables: dict[str, dict[str, Tensor]] = {}
        self._near: dict[tuple[str, torch.device, torch.dtype], dict[str, Tensor]] = {}

    @property
    def known(self) -> bool:
        """Whether source data have been seen."""
        return bool(self._sums or self._tables)

    @property
    def classes(self) -> int:
        """The number of classes, 1 where none are predicted."""
        table = next(iter(self._tables.values()), None)
        return len(self._count) if table is None else len(table["count"])

    def source_dict(self) -> dict[str, Any]:
        """Return the moments as plain data; empty where no source data were seen."""
        layers = {name: self._table(sums) for name, sums in self._sums.items()} or self._tables
        return {"layers": layers} if layers else {}

    def load_source_dict(self, source: Mapping[str, Any]) -> None:
        """Take what :meth:`source_dict` returned; from an empty one, begin anew."""
        self.__init__()  # type: ignore[misc]
        self._tables = dict(source.get("layers", {}))

    @torch.no_grad()
    def add(
        self, module: nn.Module, inputs: Any, run: Callable[[], Tensor], to_label: ToLabel
    ) -> None:
        """Take the moments of a batch of source data; one that is not finite is left out.

        Args:
            module: whose BatchNorm layers.
            inputs: ``(B, ...)``.
            run: runs a pass over them.
            to_label: brings what it returns into label space.

        Raises:
            ValueError: the prediction has other classes than that of earlier batches.
        """
        found: dict[str, list[Tensor]] = {}
        samples = _Samples(inputs)

        def take(name: str, layer: _BatchNorm, values: Tensor) -> None:
            moments = samples.moments(layer, values)
            found.setdefault(name, []).extend([] if moments is None else [moments])

        with _watched(module, take):
            labels = to_label(run()).cpu().double()
        every = [moments for calls in found.values() for moments in calls]
        if not all(t.isfinite().all() for t in [labels, *every]) or len(labels) != samples.size:
            return
        weights = labels if _are_classes(labels) else labels.new_ones(len(labels), 1)
        if self._count.numel() and self._count.shape != weights.shape[1:]:
            raise ValueError(
                f"Expected predictions of {len(self._count)} classes, as of earlier batches, got "
                f"{weights.shape[1]}. Show source data by one network."
            )
        self._repeated |= {name for name, calls in found.items() if len(calls) != 1}
        for name, (moments, *_) in ((n, calls) for n, calls in found.items() if calls):
            self._take(name, moments.cpu().double(), weights)
        for name in self._repeated:
            self._sums.pop(name, None)
        self._count = weights.sum(0) + (self._count if self._count.numel() else 0)
        self._tables, self._near = {}, {}

    def _take(self, name: str, moments: Tensor, weights: Tensor) -> None:
        new = {"sums": weights.T @ moments, "squares": moments.square().sum(1)}
        old = self._sums.get(name)
        self._sums[name] = new if old is None else {key: old[key] + new[key] for key in new}

    def _table(
        self, sums: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return means by class ``(2, K, C)``, spread within classes ``(2, C)``, counts ``(K,)``.

        To each class one sample is added that is like all samples, so that a rare one is no guess.
        """
        total = self._count.sum()
        every = sums["sums"].sum(1, keepdim=True) / total
        means = (sums["sums"] + every) / (self._count[:, None] + 1)
        between = (2 * means * sums["sums"] - means.square() * self._count[:, None]).sum(1)
        spread = ((sums["squares"] - between) / total).clamp_min(0)
        table = {"means": means, "spread": spread, "count": self._count}
        return {key: value.to(dtype) for key, value in table.items()}

    def table(self, name: str, like: Tensor) -> dict[str, Tensor] | None:
        """Return the moments of a layer, where and of the type that they are needed."""
        key = name, like.device, like.dtype
        if key not in self._near:
            self._tables = self._tables or self.source_dict().get("layers", {})
            if name not in self._tables:
                return None
            self._near[key] = {k: value.to(like) for k, value in self._tables[name].items()}
        return self._near[key]


@torch.no_grad()
def believed(
    module: nn.Module,
    inputs: Any,
    run: Callable[[], Tensor],
    to_label: ToLabel,
    moments: SourceMoments,
) -> Statistics:
    """Return the statistics of each BatchNorm layer that a batch is to be normalised by.

    A layer sees what comes of the layers before it with their own statistics. The class frequencies
    are those of the prediction with the source's statistics, then of that with the statistics so
    found: three passes, or one where there are no classes. Inputs that are not finite leave the
    source's. The statistics have no graph: for gradients they are constants.

    Args:
        module: in evaluation mode, where layers in training mode keep what they do.
        inputs: ``(B, ...)``.
        run: runs a pass over them, whose outputs are ``(B, ...)``.
        to_label: brings these into label space.
        moments: of source data.
    """
    found: Statistics = {}
    samples = _Samples(inputs)
    share = torch.ones(1)

    def take(name: str, layer: _BatchNorm, values: Tensor) -> None:
        seen = samples.moments(layer, values)
        table = None if seen is None else moments.table(name, seen)
        if seen is not None and table is not None:
            single = values.numel() == values.shape[1]
            found[name] = _statistics(layer, seen.mean(1), samples.size, share, table, single)
            _put(layer, found[name])

    before = {layer: _held(layer) for layer in batch_norms_by_name(module).values()}
    try:
        if moments.classes > 1:
            share = to_label(run()).mean(0)
        for _ in range(_ROUNDS if moments.classes > 1 else 1):
            for layer, own in before.items():
                _put(layer, own)
            with _watched(module, take):
                outputs = run()
            if moments.classes > 1:
                share = to_label(outputs).mean(0)
    finally:
        for layer, own in before.items():
            _put(layer, own)
    return found


def _statistics(
    layer: _BatchNorm,
    seen: Tensor,
    size: int,
    share: Tensor,
    table: Mapping[str, Tensor],
    single: bool,
) -> tuple[Tensor, Tensor]:
    """Return mean and variance ``(C,)``, of moments ``(2, C)`` of a batch; see the module."""
    mean, var = _held(layer)
    share = share.to(seen)
    place, square = share @ table["means"]
    unit = 1 / size + (share.square() / (table["count"] + 1)).sum()
    error, error_square = table["spread"] * unit
    total = (square - place.square()).clamp_min(torch.finfo(seen.dtype).tiny)
    expected = torch.maximum(total - table["spread"][0] / size, _LEAST * total)
    ratio = ((seen[1] - seen[0].square()) / expected).clamp(1 / _MOST, _MOST)
    relative = (error_square + 4 * place.square() * error) / expected.square()
    half = (1 / relative).clamp(_FEWEST, _MOST)
    log_ratio = ratio.log() - (half.digamma() - half.log())
    moved = _shrunk(seen[0] - place, error)
    log_scale = _shrunk(log_ratio, torch.special.polygamma(1, half))
    if single:  # one value has no variance
        log_scale = torch.zeros_like(log_scale)
    new_mean = mean + (place + moved - (log_scale / 2).exp() * place).to(mean)
    new_var = (var * log_scale.exp()).to(var)
    finite = new_mean.isfinite() & new_var.isfinite()
    return torch.where(finite, new_mean, mean), torch.where(finite, new_var, var)


def _shrunk(difference: Tensor, error: Tensor) -> Tensor:
    """Return what is believed of differences that have a sampling error of this variance."""
    share = (1 - error / difference.square()).nan_to_num(0.0, 0.0, 0.0)
    return share.clamp_min(0) * difference


def _are_classes(labels: Tensor) -> bool:
    """Whether predictions are probabilities ``(B, K)`` of several classes."""
    if labels.ndim != 2 or labels.shape[1] < 2 or bool((labels < 0).any()):
        return False
    return bool(((labels.sum(1) - 1).abs() < _ROUNDED).all())


class _Samples:
    """Tells which rows of a layer's inputs are of one sample.

    Args:
        inputs: of the network, ``(B, ...)``; graphs say by ``batch`` which one a node is of.
    """

    def __init__(self, inputs: Any) -> None:
        self.size = batch_size(inputs)
        owners = (getattr(leaf, "batch", None) for leaf in leaves_of(inputs))
        self._owners = next((o for o in owners if isinstance(o, Tensor)), None)

    def moments(self, layer: _BatchNorm, values: Tensor) -> Tensor | None:
        """Return the means of each sample's ``x - mu`` and of their squares, ``(2, B, C)``.

        ``None`` where its rows cannot be told. ``values`` are ``(R, C, ...)``, as many rows of
        each sample, one after the other, or nodes of graphs.
        """
        full = values.float() if values.dtype in HALF else values
        centred = full.detach() - _held(layer)[0].to(full).view(1, -1, *[1] * (full.ndim - 2))
        centred = centred.flatten(2) if full.ndim > 2 else centred[..., None]
        rows = torch.stack([centred.mean(2), centred.square().mean(2)])
        count, owners = rows.shape[1], self._owners
        if owners is not None and len(owners) == count:
            summed = rows.new_zeros(2, self.size, rows.shape[2]).index_add(1, owners, rows)
            nodes = rows.new_zeros(self.size).index_add(0, owners, rows.new_ones(count))
            return summed / nodes.clamp_min(1)[:, None]
        if not count or count % self.size:
            return None
        return rows.reshape(2, self.size, -1, rows.shape[2]).mean(2)


def batch_norms_by_name(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that normalise by statistics of the source."""
    return {
        name.replace("_orig_mod.", ""): layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not layer.training and layer.running_mean is not None
    }


@contextmanager
def _watched(module: nn.Module, take: Callable[[str, _BatchNorm, Tensor], None]) -> Iterator[None]:
    """Show what enters each BatchNorm layer, before it runs."""
    handles = [
        layer.register_forward_pre_hook(partial(_entered, take, name))
        for name, layer in batch_norms_by_name(module).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entered(
    take: Callable[[str, _BatchNorm, Tensor], None], name: str, layer: Any, args: tuple[Any, ...]
) -> None:
    if args:
        take(name, layer, args[0])


def _held(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
    assert mean is not None
    assert var is not None
    return mean, var


def _put(layer: _BatchNorm, statistics: tuple[Tensor, Tensor]) -> None:
    layer._buffers["running_mean"], layer._buffers["running_var"] = statistics


def put(module: nn.Module, statistics: Statistics) -> None:
    """Let layers normalise by these statistics; the buffers of the source are not written."""
    layers = batch_norms_by_name(module)
    for name, own in statistics.items():
        _put(layers[name], own)


def run_by(module: nn.Module, run: Callable[..., Any], given: tuple[Any, Any], *rest: Any) -> Any:
    """Run on inputs of one sample with its statistics, ``(1, C)`` each; put the source's back."""
    inputs, statistics = given
    before = {layer: _held(layer) for layer in batch_norms_by_name(module).values()}
    try:
        put(module, {name: (mean[0], var[0]) for name, (mean, var) in statistics.items()})
        return run(inputs, *rest)
    finally:
        for layer, own in before.items():
            _put(layer, own)


def normalises(module: nn.Module) -> bool:
    """Whether a module has layers that may normalise by statistics of the source."""
    layers = (layer for layer in module.modules() if isinstance(layer, _BatchNorm))
    return any(layer.running_mean is not None for layer in layers)


def check_moments(module: nn.Module, moments: SourceMoments | None) -> bool:
    """Return whether there are layers for ``norm_stats="evidence"``.

    Raises:
        ValueError: there are, and no source data were seen.
    """
    if not normalises(module):
        return False
    if moments is None or not moments.known:
        raise ValueError(
            "norm_stats='evidence' compares a batch with source data, and has seen none with these "
            "weights. Run Trainer(callbacks=[TestTimeCallback(norm_stats='evidence')])"
            ".validate(model, loader) once on clean data; or show the engine some by "
            "adapter.fit_moments(inputs), and give adapter(..., moments=...)."
        )
    return True

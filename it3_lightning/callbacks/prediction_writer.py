"""Prediction writer: a row for each sample that ``predict`` saw, written batch by batch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from it3_lightning.calibration import fingerprint, gate_of
from it3_lightning.callbacks.prediction_table import (
    Format,
    check_format,
    indices_in,
    merge,
    write_part,
)
from it3_lightning.callbacks.test_time import TestTimeCallback
from it3_lightning.engine import Adaptation
from it3_lightning.integration.module import outputs_in
from it3_lightning.integration.namespaces import AnyPredictionWriter
from it3_lightning.priors import ClassPrior, LabelsPrior, MaskPrior
from it3_lightning.priors.classes import is_single, probabilities
from it3_lightning.utils.files import read_json, write, write_json
from it3_lightning.utils.messages import unknown

Outputs = Literal["logits", "probabilities", "values"]


class IT3PredictionWriter(AnyPredictionWriter):
    """Writes a table with a row for each sample that ``Trainer.predict`` saw, in their order.

    Columns: ``dataloader`` and ``index`` in its data set; of classes ``predicted_class`` and
    ``predicted_probability``; of independent labels ``predicted_probability_0`` and so on; of
    values ``predicted_value_0`` and so on, one a channel; of maps ``predicted_map``, the path of a
    file in the folder: PNG of 8 bits, which are class indices, or of a single channel 255 times its
    probability; ``.npy`` of values. Beside a :class:`~it3_lightning.TestTimeCallback` the same of
    the source, ``source_class`` and so on, where that is measured, ``distance_source``,
    ``distance_adapted``, ``moved`` (the weights), ``skipped`` (keeps the source prediction) and
    ``gated`` (within the gate). What is not known is empty.

    Each batch is a part file, written whole; at the end the first process merges them, a sample
    that a sampler repeats once. A run that was cut short is gone on with by the next one into the
    folder: batches that are there are not predicted again (``predict`` returns ``()`` for them),
    except where the adaptation carries a state along the stream: it begins anew. Several processes
    must share the folder. Predict with ``return_predictions=False``, or the Trainer keeps all
    predictions in memory.

    Args:
        output_dir: the folder, made where it is missing: ``predictions.csv`` or
            ``predictions.parquet``, ``run.json`` (what predicted) and ``maps/``.
        format: ``"csv"`` or ``"parquet"``, which needs the extra ``parquet``.
        scores: whether the probability of every class is written too, ``predicted_score_0`` and so
            on.
        outputs: what ``predict_step`` returns: ``"logits"`` or ``"probabilities"`` of classes, or
            ``"values"``. Default: what the module's prior says, else the test-time callback, else
            values.

    Raises:
        ValueError: the format or the outputs are unknown.
        ImportError: pyarrow is missing, for parquet.
        MisconfigurationException: before any batch: the folder holds batches of another model, or
            of other settings; or nothing tells which samples are in a batch on several processes.
        FileExistsError: before any batch: it holds the table of a finished run.

    Example::

        writer = IT3PredictionWriter("predictions")
        trainer = Trainer(callbacks=[IT3TestTimeCallback(steps=1), writer])
        trainer.predict(model, data, return_predictions=False)
    """

    def __init__(
        self,
        output_dir: str | Path,
        format: Format = "csv",
        *,
        scores: bool = False,
        outputs: Outputs | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        check_format(format)
        if outputs is not None and outputs not in get_args(Outputs):
            raise ValueError(unknown("outputs", outputs, get_args(Outputs)))
        self.output_dir = Path(output_dir)
        self.format: Format = format
        self.scores = scores
        self.outputs: Outputs | None = outputs
        self._adapting: TestTimeCallback | None = None
        self._indices: list[int] | None = None  # of the batch; None: not known
        self._kept = False  # whether the batch was written by an earlier run
        self._resumes = False
        self._seen: dict[int, int] = {}  # samples of each dataloader, where indices are not known
        self._undo: Callable[[], object] | None = None

    @property
    def table(self) -> Path:
        """The file that a finished run leaves."""
        return self.output_dir / f"predictions.{self.format}"

    # What Lightning calls, in the order of a run

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the folder, or refuse it; all callbacks have prepared their predictions by now."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        adapting = [c for c in callbacks if isinstance(c, TestTimeCallback)]
        self._adapting = next((c for c in adapting if "predict" in c.stages), None)
        self._seen = {}
        error = self._open(trainer, pl_module) if trainer.is_global_zero else None
        error = trainer.strategy.broadcast(error)
        if error is not None:
            raise error
        self._resumes = any(self._parts.glob("*.csv"))
        self._let_steps_be_left_out(trainer)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Find out which samples these are, and whether they are written already."""
        loader = tree_leaves(trainer.predict_dataloaders)[dataloader_idx]
        seen = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", None)
        self._indices = None if seen is None else list(seen[batch_idx])
        if self._indices is None and trainer.world_size > 1:
            raise MisconfigurationException(
                "Expected a DataLoader with a sampler, which tells the samples of each process "
                f"apart, got a {type(loader).__name__} without. Predict on one process, or give "
                "the data set a length and items by index."
            )
        part = self._part(trainer, batch_idx, dataloader_idx)
        there = indices_in(part) if self._resumes and part.is_file() else None
        if self._indices is None and there is not None:
            self._indices = self._counted(dataloader_idx, len(there))
        self._kept = there is not None and there == sorted(self._indices or ())

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the rows of a batch, and before them the maps that they name."""
        if self._kept:
            return
        own = self._tensor(pl_module, prediction)
        indices = self._indices
        indices = self._counted(dataloader_idx, len(own)) if indices is None else indices
        if len(own) != len(indices):
            raise ValueError(
                f"Expected predict_step to return a tensor (B, ...) with a row for each of "
                f"{len(indices)} samples, got one of shape {tuple(own.shape)}."
            )
        columns = {
            "dataloader": [dataloader_idx] * len(indices),
            "index": indices,
            **self._columns(pl_module, own, "predicted", dataloader_idx, indices),
        }
        if self._adapting is not None:
            adaptation = self._adapting.summary.latest
            assert adaptation is not None
            columns |= self._of_source(pl_module, adaptation, columns, dataloader_idx, indices)
            columns |= _of_adaptation(adaptation)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        write_part(self._part(trainer, batch_idx, dataloader_idx), rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge what all processes have written."""
        self._give_back()
        trainer.strategy.barrier("it3_written")
        if trainer.is_global_zero:
            number = merge(sorted(self._parts.glob("*.csv")), self.table, self.format)
            shutil.rmtree(self._parts)
            rank_zero_info(f"IT3: predictions of {number} samples are in {self.table}")
        trainer.strategy.barrier("it3_merged")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the batches that are written, for the next run."""
        self._give_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the step back, whatever happened."""
        self._give_back()

    # How it works

    @property
    def _parts(self) -> Path:
        return self.output_dir / "parts"

    def _part(self, trainer: Trainer, batch: int, loader: int) -> Path:
        return self._parts / f"{loader:03}-{trainer.global_rank:04}-{batch:08}.csv"

    def _open(self, trainer: Trainer, module: LightningModule) -> Exception | None:
        """Prepare the folder; return what is wrong with it, for every process to raise."""
        if self.table.exists():
            return FileExistsError(
                f"{self.table} holds the predictions of a run that has finished. Give another "
                "output_dir, or remove the file."
            )
        run, file = self._run(trainer, module), self.output_dir / "run.json"
        if any(self._parts.glob("*.csv")):
            try:
                before = read_json(file)
            except (OSError, ValueError) as error:
                return MisconfigurationException(_UNKNOWN.format(folder=self._parts, error=error))
            changed = [name for name in {**run, **before} if run.get(name) != before.get(name)]
            if changed:
                names = ", ".join(changed)
                return MisconfigurationException(_OTHER.format(folder=self._parts, names=names))
            if self._carries(module):
                rank_zero_info("IT3: a state is carried along the stream: predictions begin anew.")
                shutil.rmtree(self._parts)
        self._parts.mkdir(parents=True, exist_ok=True)
        write_json(file, run, indent=2)
        return None

    def _run(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return what the rows of a run depend on."""
        loaders = tree_leaves(trainer.predict_dataloaders)
        return {
            "model": f"{type(module).__module__}.{type(module).__qualname__}",
            "weights": fingerprint(module),
            "adaptation": None if self._adapting is None else _described(self._adapting, module),
            "outputs": self._outputs(module),
            "scores": self.scores,
            "processes": trainer.world_size,
            "samples": [_length(getattr(loader, "dataset", None)) for loader in loaders],
        }

    def _carries(self, module: LightningModule) -> bool:
        """Whether what a batch is predicted with depends on those before it."""
        context = getattr(getattr(module, "it3_prior", None), "context", None)
        adapting = self._adapting
        if adapting is None:
            return False
        return not adapting.settings.episodic or context == "stream" or adapting.gate == "bet"

    def _let_steps_be_left_out(self, trainer: Trainer) -> None:
        """Let the Trainer run no step for batches that are written: neither adapt nor predict."""
        strategy: Any = trainer.strategy
        own = strategy.predict_step

        def predict_step(*args: Any, **kwargs: Any) -> Any:
            return () if self._kept else own(*args, **kwargs)

        self._undo = lambda: vars(strategy).pop("predict_step", None)
        if self._resumes:
            strategy.predict_step = predict_step

    def _give_back(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _counted(self, loader: int, size: int) -> list[int]:
        """Number the samples of a dataloader that does not tell their indices."""
        first = self._seen.get(loader, 0)
        self._seen[loader] = first + size
        return list(range(first, first + size))

    def _tensor(self, module: LightningModule, prediction: Any) -> Tensor:
        """Return the prediction ``(B, ...)`` in what ``predict_step`` returned, on the CPU."""
        if isinstance(prediction, Iterator) or prediction is None:
            got = type(prediction).__name__
            raise ValueError(f"Expected predict_step to return tensors (B, ...), got {got}.")
        tensor = outputs_in(module, prediction).detach().cpu()
        return tensor if tensor.ndim else tensor[None]

    def _outputs(self, module: LightningModule) -> Outputs:
        """Return what predictions are."""
        prior = getattr(module, "it3_prior", None)
        if self.outputs is not None:
            return self.outputs
        if isinstance(prior, ClassPrior | LabelsPrior | MaskPrior):
            return prior.outputs
        return "values" if prior is not None or not self._adapting else self._adapting.outputs

    def _columns(
        self, module: LightningModule, own: Tensor, whose: str, loader: int, indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        """Return what predictions ``(B, ...)`` say, by column."""
        outputs = self._outputs(module)
        if outputs == "values":
            if own.ndim > 2:
                return self._maps(own.float().numpy(), whose, loader, indices)
            values = own.reshape(len(own), -1)
            return {f"{whose}_value_{i}": _numbers(v) for i, v in enumerate(values.T)}
        if not own.is_floating_point():  # class indices
            if own.ndim > 1:
                return self._maps(_bytes(own), whose, loader, indices)
            return {f"{whose}_class": own.tolist(), f"{whose}_probability": [None] * len(own)}
        prior = getattr(module, "it3_prior", None)
        if isinstance(prior, LabelsPrior):
            labels = enumerate(prior.from_output(own)[:, 1].T)
            return {f"{whose}_probability_{i}": _numbers(share) for i, share in labels}
        shares = _probabilities(prior, own, outputs)
        if shares.ndim > 2:
            single = shares.shape[1] == 1
            maps = (255 * shares[:, 0]).round() if single else shares.argmax(1)
            return self._maps(_bytes(maps), whose, loader, indices)
        largest, named = shares.max(1)
        scores = enumerate(shares.T if self.scores else ())
        return {
            f"{whose}_class": named.tolist(),
            f"{whose}_probability": _numbers(largest),
            **{f"{whose}_score_{i}": _numbers(score) for i, score in scores},
        }

    def _maps(
        self, maps: np.ndarray[Any, Any], whose: str, loader: int, indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        """Write a file for each sample; return their paths in the folder."""
        paths = []
        for values, index in zip(maps, indices, strict=True):
            picture = values.dtype == np.uint8 and values.ndim == 2
            stem = f"{index:08}" if whose == "predicted" else f"{index:08}_{whose}"
            path = Path("maps", str(loader), f"{stem}.{'png' if picture else 'npy'}")
            write(self.output_dir / path, _png(values) if picture else _npy(values))
            paths.append(path.as_posix())
        return {f"{whose}_map": paths}

    def _of_source(
        self,
        module: LightningModule,
        adaptation: Adaptation,
        columns: Mapping[str, list[Any]],
        loader: int,
        indices: Sequence[int],
    ) -> dict[str, list[Any]]:
        """Return what the source predicts, by column; nothing where that was not measured."""
        names = [n.replace("predicted", "source", 1) for n in columns if n.startswith("predicted")]
        empty: dict[str, list[Any]] = {name: [None] * len(indices) for name in names}
        outputs = adaptation.source_outputs
        if outputs is None:
            return empty
        found = self._columns(module, outputs.detach().cpu(), "source", loader, indices)
        return {name: found.get(name, empty[name]) for name in names}


_UNKNOWN = """{folder} holds batches of a run that cannot be told ({error}). Give another \
output_dir, or remove the folder."""

_OTHER = """{folder} holds batches of a run with other {names} than this one. Give another \
output_dir, or remove the folder; run.json beside it says what they come from."""


def _described(callback: TestTimeCallback, module: LightningModule) -> dict[str, Any]:
    """Return how a callback adapts, as plain data."""
    gate: Any = callback.gate
    if isinstance(gate, float):
        gate = gate_of(module, callback.settings, gate)
    return {
        "settings": re.sub(r" at 0x[0-9a-f]+", "", repr(callback.settings)),
        "prediction": callback.prediction,
        "gate": gate,
        "outputs": callback.outputs,
    }


def _of_adaptation(adaptation: Adaptation) -> dict[str, list[Any]]:
    """Return what became of each sample, by column."""
    no = torch.zeros_like(adaptation.skipped)
    distances = adaptation.distance_source, adaptation.distance_adapted
    flags = adaptation.reliable, adaptation.skipped, adaptation.gated
    return {
        **{
            name: [None] * no.numel() if values is None else _numbers(values)
            for name, values in zip(("distance_source", "distance_adapted"), distances, strict=True)
        },
        **{
            name: (no if values is None else values).tolist()
            for name, values in zip(("moved", "skipped", "gated"), flags, strict=True)
        },
    }


def _probabilities(prior: Any, own: Tensor, outputs: Outputs) -> Tensor:
    """Return probabilities ``(B, C, ...)``; what already adds up to 1 is taken as it is."""
    own = own.float() if own.dtype in (torch.float16, torch.bfloat16) else own
    several = own.ndim > 1 and own.shape[1] > 1
    if several and bool((own >= 0).all()) and bool(((own.sum(1) - 1).abs() < 1e-4).all()):
        return own
    if isinstance(prior, ClassPrior | MaskPrior):
        return prior.from_output(own)
    assert outputs != "values"
    if own.ndim > 2 and own.shape[1] == 1:  # a single map
        return own.sigmoid() if outputs == "logits" else own
    return probabilities(own, 2 if is_single(own) else own.shape[1], outputs)


def _numbers(values: Tensor) -> list[float | None]:
    """Return numbers with the digits of their type; NaN is none."""
    digits = 17 if values.dtype == torch.float64 else 9
    return [None if v != v else float(f"{v:.{digits}g}") for v in values.detach().tolist()]


def _bytes(values: Tensor) -> np.ndarray[Any, Any]:
    """Return whole numbers in 8 bits.

    Raises:
        ValueError: some do not fit.
    """
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= 255:
        raise ValueError(
            f"Expected maps of classes 0..255, which a PNG of 8 bits holds, got {int(values.min())}"
            f" to {int(values.max())}. Write the outputs themselves, with outputs='values'."
        )
    array: np.ndarray[Any, Any] = values.to(torch.uint8).numpy()
    return array


def _png(values: np.ndarray[Any, Any]) -> Callable[[Any], object]:
    return lambda stream: Image.fromarray(values).save(stream, format="PNG")


def _npy(values: np.ndarray[Any, Any]) -> Callable[[Any], object]:
    return lambda stream: np.save(stream, values)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # it tells none
        return None

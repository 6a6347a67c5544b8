"""Errors and scores of single samples: noted while a module is tested, kept beside the means."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error

from it3_lightning.benchmark.kept import kept
from it3_lightning.benchmark.pictures import Shown, as_plain, from_plain, shown_of
from it3_lightning.integration.isolation import patched
from it3_lightning.integration.module import outputs_in
from it3_lightning.priors import ClassPrior, LabelsPrior, MaskPrior, Prior, ValuePrior
from it3_lightning.priors.classes import both
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.files import load_plain, write

Scores = NDArray[Any]
"""One for each sample, ``(N,)``: bool where they are right or wrong."""
_BINS = 15
_SCORES = ("right", "overlap", "absolute error", "squared error")
_CLOSE = 1e-4  # of a logged metric and the mean of the scores, relative


class Seen:
    """What a module has predicted in its test steps, by dataloader.

    A sample is right or wrong; the share that is right, of tokens and of independent labels; has an
    overlap, of masks; an absolute and a squared error, of values.
    """

    def __init__(self) -> None:
        self._parts: dict[int, dict[str, list[Tensor]]] = {}
        self.shown: dict[int, Shown | None] = {}

    def add(self, model: IT3Mixin, returned: Any, batch: Any, loader: int) -> None:
        """Score the samples of a batch by what ``forward`` returned."""
        outputs, target = outputs_in(model, returned).detach(), model.it3_target(batch)
        if loader not in self.shown:
            inputs = model.it3_inputs(batch)
            self.shown[loader] = shown_of(model.it3_parts()[0], inputs, outputs, target)
        parts = self._parts.setdefault(loader, {})
        for name, scores in _scored(model.it3_parts()[0], outputs, target).items():
            parts.setdefault(name, []).append(scores.cpu())

    def matching(self, loader: int, logged: float) -> Scores | None:
        """Return the scores of the samples whose mean is what was logged; ``None``: it is no mean.

        Args:
            loader: which dataloader.
            logged: of the metric.
        """
        for name in _SCORES:
            found = self._of(loader, name)
            if found is not None and np.isclose(found.mean(), logged, rtol=_CLOSE, atol=_CLOSE):
                return found
        return None

    def calibration_error(self, loader: int) -> float | None:
        """Return the expected calibration error, in percent; ``None`` without classes.

        The mean over 15 equally wide bins of the confidence of how far accuracy and confidence
        differ, weighted by their samples (Guo et al., On calibration of modern neural networks,
        ICML 2017).
        """
        right, confidence = self._of(loader, "right"), self._of(loader, "confidence")
        if right is None or confidence is None:
            return None
        given = torch.from_numpy(confidence), torch.from_numpy(right).long()
        return 100 * float(binary_calibration_error(*given, n_bins=_BINS, norm="l1"))

    def _of(self, loader: int, name: str) -> Scores | None:
        parts = self._parts.get(loader, {}).get(name)
        return None if parts is None else torch.cat(parts).numpy()


@contextmanager
def noting(model: IT3Mixin, *, alone: bool) -> Iterator[Seen]:
    """Note what a module predicts in its ``test_step`` within, as the step itself gets it.

    Args:
        model: whose step calls ``self(...)``; of one that does not, nothing is noted.
        alone: whether a callback answers these calls for each sample by itself.
    """
    seen, own = Seen(), model.test_step

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        batch = args[0] if args else next(iter(kwargs.values()))
        with _calls(model, in_place=alone) as returned:
            output = own(*args, **kwargs)
        if len(returned) == 1:  # else nothing tells which of them is scored
            loader = kwargs.get("dataloader_idx", args[2] if len(args) > 2 else 0)
            seen.add(model, returned[0], batch, loader)
        return output

    with patched(model, test_step=step):
        yield seen


def keep_samples(
    file: Path, fingerprint: str, scores: Mapping[str, Scores], shown: Mapping[str, Shown]
) -> None:
    """Write the scores of samples by shift, right or wrong as single bits, and those to show."""
    found = {shift: _packed(each) for shift, each in scores.items()}
    content = {"fingerprint": fingerprint, "samples": found, "shown": as_plain(shown)}
    write(file, lambda stream: torch.save(content, stream))


def kept_samples(file: Path, fingerprint: str) -> dict[str, Scores] | None:
    """Return what was written; ``None`` where it is to be made."""

    def read(content: dict[str, Any]) -> dict[str, Scores]:
        return {shift: _unpacked(*each) for shift, each in content["samples"].items()}

    return kept(file, fingerprint, read, load_plain)


def kept_shown(file: Path, fingerprint: str) -> dict[str, Shown]:
    """Return the samples to show that were written; none by a former version."""

    def read(content: dict[str, Any]) -> dict[str, Shown]:
        return from_plain(content.get("shown", {}))

    return kept(file, fingerprint, read, load_plain) or {} if file.is_file() else {}


@contextmanager
def _calls(model: IT3Mixin, *, in_place: bool) -> Iterator[list[Any]]:
    """Collect what a module's calls within return, but for those inside of others.

    Args:
        model: that is called.
        in_place: take it from ``forward``, which is answered; hooks would turn fast paths off.
    """
    returned: list[Any] = []
    depth = 0
    forward = model.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            output = forward(*args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:
            returned.append(output)
        return output

    def hook(_: Any, __: Any, output: Any) -> None:
        returned.append(output)

    with ExitStack() as stack:
        if in_place:
            stack.enter_context(patched(model, forward=noted))
        else:  # behind the hooks that make the prediction another
            stack.callback(model.register_forward_hook(hook).remove)
        yield returned


def errors_of(prior: Prior, outputs: Tensor, target: Any) -> Tensor:
    """Return the error of each sample, ``(B,)``; the smaller, the better.

    Of a class 0 or 100 percent, of several (tokens, independent labels) the share that is wrong; of
    masks 100 minus the intersection over union of the image, in percent, see :func:`overlaps`; of
    values the absolute error, mean over them. What the loss ignores is left out.

    Args:
        prior: knows what outputs and targets mean.
        outputs: of the network, ``(B, ...)``.
        target: of the batch.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> errors_of(ClassPrior(2), logits, torch.tensor([0, 1])).tolist()
    [0.0, 100.0]
    """
    found, true = prior.from_output(outputs).detach(), prior.from_target(target)
    if isinstance(prior, MaskPrior):
        return 100.0 * (1 - overlaps(found, true))
    if isinstance(prior, ClassPrior | LabelsPrior):
        most = true.amax(1, keepdim=True)
        wrong = true.gather(1, found.argmax(1, keepdim=True)) < most
        return _mean_where(100.0 * wrong.float(), most > true.amin(1, keepdim=True))
    return _mean_where(*_of_values(prior, outputs, target))


def _of_values(prior: Prior, outputs: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """Return absolute errors in units of the targets, ``(B, C, ...)``, and which of them count."""
    errors = (prior.from_output(outputs).detach() - prior.from_target(target)).abs()
    if isinstance(prior, ValuePrior):
        errors = errors * prior.std.to(errors).reshape(-1, *[1] * (errors.ndim - 2))
    counted, known = torch.ones_like(errors, dtype=torch.bool), prior.known(target)
    return errors, counted if known is None else counted & known.unsqueeze(1)


def _mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of each sample's values that count, ``(B, ...) -> (B,)``; of none 0."""
    total = torch.where(counted, values, 0.0).flatten(1).sum(1)
    return total / counted.flatten(1).sum(1).clamp_min(1)


def overlaps(found: Tensor, true: Tensor) -> Tensor:
    """Return the intersection over union of each image, mean over the classes in it, ``(B,)``.

    Of two classes, or of one map, that of the foreground alone; 1 where there is none, and none is
    found. Pixels of no class, which the loss ignores, are left out.

    Args:
        found: probabilities ``(B, C, H, W)``.
        true: of the same shape.

    >>> overlaps(torch.tensor([[[[0.9, 0.9, 0.1]]]]), torch.tensor([[[[1.0, 0.0, 0.0]]]])).tolist()
    [0.5]
    """
    if found.shape[1] == 1:
        found, true = both(found), both(true)
    classes, told = found.shape[1], true.amax(1, keepdim=True) > true.amin(1, keepdim=True)
    one, other = (
        F.one_hot(maps.argmax(1), classes).movedim(-1, 1).bool() & told for maps in (found, true)
    )
    first = 1 if classes == 2 else 0
    met = (one & other)[:, first:].flatten(2).sum(2)
    joint = (one | other)[:, first:].flatten(2).sum(2)
    shares = torch.where(joint > 0, met / joint.clamp_min(1), 0.0)
    there = (joint > 0).sum(1)
    return torch.where(there > 0, shares.sum(1) / there.clamp_min(1), 1.0)


def unit_of(prior: Prior) -> str:
    """Return what the errors of samples are, in words."""
    if isinstance(prior, ClassPrior | LabelsPrior):
        return "error, percent"
    return "100 - IoU, percent" if isinstance(prior, MaskPrior) else "absolute error"


def _scored(prior: Prior, outputs: Tensor, target: Any) -> dict[str, Tensor]:
    """Return scores ``(B,)`` by name, but for samples of which the target says nothing."""
    errors, known = errors_of(prior, outputs.float(), target), prior.known(target)
    if isinstance(prior, MaskPrior):
        found = {"overlap": 1 - errors / 100}
    elif isinstance(prior, ClassPrior | LabelsPrior):
        found = {"right": 1 - errors / 100}
        single = prior.from_output(outputs)
        if single.ndim == 2:
            found = {"right": errors == 0, "confidence": single.float().amax(1)}
    else:
        values, counted = _of_values(prior, outputs.float(), target)
        found = {"absolute error": errors, "squared error": _mean_where(values.square(), counted)}
    if known is None:
        return found
    some = known.flatten(1).any(1) if known.ndim > 1 else known
    return {name: scores[some] for name, scores in found.items()}


def _packed(scores: Scores) -> tuple[Tensor, int]:
    known = np.packbits(scores) if scores.dtype == np.bool_ else scores
    return torch.from_numpy(known), len(scores)


def _unpacked(known: Tensor, size: int) -> Scores:
    """Return scores as they were.

    Raises:
        ValueError: there are not as many.
    """
    scores: Scores = known.numpy()
    if scores.dtype == np.uint8:
        scores = np.unpackbits(scores, count=size).astype(np.bool_)
    if scores.shape != (size,):
        raise ValueError(f"Expected {size} scores, got {scores.shape}.")
    return scores

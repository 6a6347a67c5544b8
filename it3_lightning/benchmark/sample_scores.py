"""Scores of single samples, noted while a module is tested, and kept beside the means."""

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
from torchmetrics.functional.classification import binary_calibration_error

from it3_lightning.benchmark.kept import kept
from it3_lightning.integration.isolation import patched
from it3_lightning.integration.module import outputs_in
from it3_lightning.priors import ClassPrior, ValuePrior
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.files import load_plain, write

Scores = NDArray[Any]
"""One for each sample, ``(N,)``: bool where they are right or wrong."""
_BINS = 15
_CLOSE = 1e-4  # of a logged metric and the mean of the scores, relative


class Seen:
    """What a module has predicted in its test steps, by dataloader.

    Samples are scored where each has one class, right or wrong, or values, by their absolute and
    their squared errors.
    """

    def __init__(self) -> None:
        self._parts: dict[int, dict[str, list[Tensor]]] = {}

    def add(self, model: IT3Mixin, returned: Any, batch: Any, loader: int) -> None:
        """Score the samples of a batch by what ``forward`` returned."""
        outputs, target = outputs_in(model, returned).detach(), model.it3_target(batch)
        parts = self._parts.setdefault(loader, {})
        for name, scores in _scored(model.it3_prior, outputs, target).items():
            parts.setdefault(name, []).append(scores.cpu())

    def matching(self, loader: int, logged: float) -> Scores | None:
        """Return the scores of the samples whose mean is what was logged; ``None``: it is no mean.

        Args:
            loader: which dataloader.
            logged: of the metric.
        """
        for name in ("right", "absolute error", "squared error"):
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


def keep_samples(file: Path, fingerprint: str, scores: Mapping[str, Scores]) -> None:
    """Write the scores of samples by shift, right or wrong as single bits."""
    found = {shift: _packed(each) for shift, each in scores.items()}
    content = {"fingerprint": fingerprint, "samples": found}
    write(file, lambda stream: torch.save(content, stream))


def kept_samples(file: Path, fingerprint: str) -> dict[str, Scores] | None:
    """Return what was written; ``None`` where it is to be made."""

    def read(content: dict[str, Any]) -> dict[str, Scores]:
        return {shift: _unpacked(*each) for shift, each in content["samples"].items()}

    return kept(file, fingerprint, read, load_plain)


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


def _scored(prior: Any, outputs: Tensor, target: Any) -> dict[str, Tensor]:
    """Return scores ``(B,)`` by name; none of other kinds of predictions."""
    if isinstance(prior, ClassPrior) and getattr(prior, "ignore_index", None) is None:
        most, predicted = prior.from_output(outputs).float().max(1)
        right = predicted == prior.from_target(target).argmax(1)
        return {"right": right, "confidence": most} if right.ndim == 1 else {}
    if isinstance(prior, ValuePrior) and target.numel() == outputs.numel():
        error = (outputs.float() - target.reshape(outputs.shape)).reshape(len(outputs), -1)
        return {"absolute error": error.abs().mean(1), "squared error": error.square().mean(1)}
    return {}


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

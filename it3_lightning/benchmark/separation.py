"""How well the idempotence distance tells shifted samples from clean ones, beside the confidence.

The distance of the un-adapted network is small on data like that of training and grows with shift
(ZigZag: Durasov et al., TMLR 2024). The area under the ROC curve is 50 for no separation at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from it3_lightning.benchmark.results import Record
from it3_lightning.benchmark.rows import Training
from it3_lightning.data import ShiftedData
from it3_lightning.engine import Settings
from it3_lightning.methods import Idempotence
from it3_lightning.predictor import IT3Predictor
from it3_lightning.priors import ClassPrior
from it3_lightning.training.mixin import IT3Mixin

DISTANCE, CONFIDENCE = "distance", "1 - confidence"


def separations(
    models: Mapping[Training, IT3Mixin], data: ShiftedData, objective: Idempotence
) -> list[Record]:
    """Return a record for each training on priors, shift and score, in percent.

    Args:
        models: by training; the ordinary one knows no second prediction.
        data: clean and shifted samples, with the stream and the seed set.
        objective: measures the distance.
    """
    return [
        record
        for training, model in models.items()
        if training != "ordinary"
        for record in _of_model(model, training, data, objective)
    ]


def _of_model(
    model: IT3Mixin, training: Training, data: ShiftedData, objective: Idempotence
) -> list[Record]:
    predictor = IT3Predictor(model, Settings(objective=objective, steps=0))
    clean, *shifted = [_scores(predictor, model, loader) for loader in data.test_dataloader()]
    return [
        Record(
            training, name, data.stream, data.seed, shift, _auroc(clean[name], its[name]), 0.0, 0
        )
        for shift, its in zip(data.test_names[1:], shifted, strict=True)
        for name in clean
    ]


def _scores(predictor: IT3Predictor, model: IT3Mixin, loader: object) -> dict[str, Tensor]:
    """Return scores ``(N,)`` of a loader's samples: the larger, the less like the training data."""
    prior, parts = model.it3_parts()[0], dict[str, list[Tensor]]()
    for batch in loader:  # type: ignore[attr-defined]
        prediction = predictor(model.it3_inputs(batch))
        parts.setdefault(DISTANCE, []).append(prediction.distance.cpu())
        if isinstance(prior, ClassPrior):
            most = prior.from_output(prediction.outputs).amax(1)
            confidence = most.reshape(len(most), -1).mean(1)
            parts.setdefault(CONFIDENCE, []).append(1 - confidence.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def _auroc(clean: Tensor, shifted: Tensor) -> float:
    """Return the area under the ROC curve, in percent.

    >>> _auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]))
    100.0
    """
    scores = torch.cat([clean, shifted]).double()
    target = torch.cat([torch.zeros(len(clean)), torch.ones(len(shifted))]).long()
    known = scores.isfinite()
    return 100 * float(binary_auroc((scores / (1 + scores))[known], target[known]))

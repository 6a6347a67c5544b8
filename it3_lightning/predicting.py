"""Which prediction is asked for: the first, the second or the mean of both, of the same weights."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from it3_lightning.averaging import mean_prediction
from it3_lightning.engine import Answer
from it3_lightning.engine.samples import copied
from it3_lightning.muting import muted
from it3_lightning.protocols import IT3Module
from it3_lightning.takeover import Prediction


def answer_of(module: LightningModule, host: IT3Module, prediction: Prediction) -> Answer | None:
    """Return what the engine is to run with adapted weights; ``None``: the first prediction alone.

    Args:
        module: that predicts; what it logs is not kept.
        host: the same, as what predicts with a prior.
        prediction: which one becomes the answers, beside the outputs of the neutral pass.
    """
    if prediction == "first":
        return None

    def answer(inputs: Any) -> tuple[Tensor, Tensor]:
        prior = host.it3_prior
        with muted(module):
            first = host.predict_with(copied(inputs), None)  # the next pass needs them too
            second = host.predict_with(inputs, prior.from_output(first))
        return first, second if prediction == "second" else mean_prediction(prior, first, second)

    return answer

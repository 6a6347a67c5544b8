"""Serve a classifier over HTTP; the weights adapt to each image by itself.

python examples/serve.py --checkpoint digits.ckpt   # trains one where there is none
curl localhost:8000/predict --json '{"image": [[0, 0.5, ...], ...]}'   # 8 rows of 8 in 0..1
"""

# Without `from __future__ import annotations`: FastAPI checks requests by the types below.
import signal
from multiprocessing import parent_process
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jsonargparse import auto_cli
from lightning.pytorch import Trainer, seed_everything
from litserve import LitAPI, LitServer
from pydantic import BaseModel, Field
from torch import Tensor

from it3_lightning import ClassPrior, FeatureInjection, IT3Mixin, IT3Predictor, Prediction, Settings
from it3_lightning.data import DigitsDataModule
from it3_lightning.networks import SmallCNN
from it3_lightning.tasks import Classifier

Row = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=8, max_length=8)]


class Digits(Classifier):
    """Your own module; its checkpoint holds all that it needs to be made again."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(SmallCNN(1, 10, 8, width=width))
        self.save_hyperparameters()


class IT3Digits(IT3Mixin, Digits):
    """The same module, trained with and without a prior of the label."""


class DigitRequest(BaseModel):
    """An image of 8 by 8 grey values, from 0, the background, to 1."""

    image: Annotated[list[Row], Field(min_length=8, max_length=8)]


class DigitsAPI(LitAPI):  # type: ignore[misc]  # LitServe ships no types
    """Answers several requests at once.

    With `scope="sample"` each image has weights of its own, so an answer does not depend on what
    other clients sent along. With `scope="batch"` it would: `max_batch_size` would have to be 1.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(max_batch_size=8, batch_timeout=0.005)
        self.checkpoint = checkpoint

    def setup(self, device: str) -> None:
        """Load the model, in the process that predicts, and let it choose how to be fast."""
        settings = Settings(scope="sample")
        self.predictor = IT3Predictor.from_checkpoint(
            self.checkpoint, IT3Digits, settings=settings, device=device
        )
        self.predictor(torch.rand(self.max_batch_size, 1, 8, 8))

    def decode_request(self, request: DigitRequest) -> Tensor:
        """Return an image with one channel."""
        return torch.tensor(request.image)[None]

    def predict(self, x: Tensor) -> list[Prediction]:
        """Adapt to each image, predict, and put every weight back."""
        return self.predictor(x).split()

    def encode_response(self, output: Prediction) -> dict[str, Any]:
        """Return what the client gets; `distance` is large where an image is unlike a digit."""
        return {
            "label": int(output.outputs.argmax()),
            "probabilities": output.outputs[0].softmax(0).tolist(),
            "distance": None if output.skipped.any() else output.distance.item(),
            "source_label": int(output.source_outputs.argmax()),
            "skipped": bool(output.skipped.any()),
        }


async def refuse(_: Request, error: Exception) -> JSONResponse:
    """Say what is wrong with a request; FastAPI would repeat it, and fail where it holds NaN."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return JSONResponse({"detail": f"{place}: {first['msg']}"}, status_code=422)


def interrupt(*_: object) -> None:
    """End the server as Ctrl-C does: LitServe would leave its processes behind on SIGTERM."""
    if parent_process() is None:
        raise KeyboardInterrupt


def train(checkpoint: Path, max_epochs: int) -> None:
    """Train the classifier and write its checkpoint."""
    seed_everything(0, verbose=False)
    model = IT3Digits(prior=ClassPrior(10), conditioning=FeatureInjection("network.dense1"))
    trainer = Trainer(max_epochs=max_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=DigitsDataModule())
    trainer.save_checkpoint(checkpoint)


def main(checkpoint: Path = Path("digits.ckpt"), port: int = 8000, max_epochs: int = 10) -> None:
    """Serve the classifier of a checkpoint at `localhost:port`."""
    if not checkpoint.is_file():
        train(checkpoint, max_epochs)
    server = LitServer(DigitsAPI(checkpoint), accelerator="cpu", max_payload_size=16_384)
    server.app.add_exception_handler(RequestValidationError, refuse)
    signal.signal(signal.SIGTERM, interrupt)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    auto_cli(main)

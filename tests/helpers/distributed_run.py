"""Fits, tests and refuses on two CPU processes, and saves what came of it: run by a test.

Started as users do: ``python distributed_run.py STRATEGY FOLDER``. Lightning runs the script again
for the second process of ``ddp``; those of ``ddp_spawn`` and ``ddp_fork`` are its own.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from helpers.toy import IT3Net, LitNet, adapting, loader, net, parts, quiet, samples
from it3_lightning import DualPass, IT3Mixin, ValuePrior

TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
ODD = 13  # samples, of which the sampler of a test serves one twice
BATCHES_BEFORE_DEATH = 1


class Writes(IT3Net):
    """Writes what each process saw and predicted."""

    folder: Path
    scope: str

    def test_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        images, labels, numbers = batch
        name = f"{self.scope}-{self.global_rank}-{batch_idx}.pt"
        torch.save({"numbers": numbers, "logits": self(images).clone()}, self.folder / name)
        super().test_step((images, labels), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def on_validation_end(self) -> None:
        name = f"calibrated-{self.global_rank}.pt"
        torch.save(self.it3_calibration.state_dict(), self.folder / name)


def stream(bad: int | None = None, count: int = 12) -> Any:
    """Serve numbered samples, one of them not finite."""
    images, labels = samples(count)
    if bad is not None:
        images[bad] = float("nan")
    return DataLoader(TensorDataset(images, labels, torch.arange(count)), batch_size=3)


def post_hoc() -> Any:
    dual = DualPass(perturb_prior=False)
    return net(train="conditioning", dual_pass=dual)


class Regression(LitNet):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0])[:, 0], batch[1])


class IT3Regression(IT3Mixin, Regression):
    """The same with priors."""

    def it3_forward(self, inputs: Any) -> Any:
        return super().it3_forward(inputs)[:, :1]


def regression() -> Any:
    return IT3Regression(**parts(prior=ValuePrior(), train="conditioning", dual_pass=DualPass()))


def targets() -> Any:
    """Serve samples with targets that grow, so that each process sees others."""
    return DataLoader(TensorDataset(samples(12)[0], torch.arange(12.0) ** 2), batch_size=2)


class Writer(BasePredictionWriter):
    """Writes the predictions of each process, with the numbers of their samples."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__("epoch")
        self.folder = folder
        self.name = name

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any
    ) -> None:
        name = f"{self.name}-{trainer.global_rank}.pt"
        torch.save((predictions, batch_indices), self.folder / name)


class Doubles(Writes):
    """In float64 in every process; the second one may be killed."""

    dies = False

    def setup(self, stage: str) -> None:
        torch.set_default_dtype(torch.float64)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        if self.dies and self.global_rank == 1 and batch_idx == BATCHES_BEFORE_DEATH:
            os.kill(os.getpid(), signal.SIGKILL)
        return self(batch[0])


def model_of(folder: Path) -> Any:
    """Make a module with seeded weights."""
    model = net(Doubles)
    model.folder, model.scope = folder, "odd"
    return model


def predict(folder: Path, strategy: str, scope: str) -> None:
    """Predict an odd number of samples on two processes, which write what they predict."""
    callbacks = [adapting(scope=scope, backend="loop"), Writer(folder, f"{strategy}-{scope}")]
    trainer = quiet(callbacks=callbacks, devices=2, strategy=strategy)
    trainer.predict(model_of(folder), stream(count=ODD), return_predictions=False)


def killed(folder: Path, strategy: str) -> None:
    """Predict until the second process is killed."""
    model = model_of(folder)
    model.dies = True
    quiet(callbacks=[adapting()], devices=2, strategy=strategy).predict(model, stream(count=ODD))


def script(folder: Path) -> None:
    """What each of two processes runs that Lightning launches: all with one process group."""
    for scope in ("batch", "sample"):
        predict(folder, "ddp", scope)
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    each = adapting(scope="sample", backend="loop")
    quiet(callbacks=[each], **two).test(model_of(folder), stream(count=ODD), verbose=False)
    online = quiet(callbacks=[adapting(reset="never")], **two)
    try:
        online.predict(model_of(folder), stream(count=ODD))
    except Exception as error:
        name = f"refused-{online.global_rank}.pt"
        torch.save(f"{type(error).__name__}: {error}", folder / name)
    killed(folder, "ddp")


def main(folder: Path) -> None:
    model = net(Writes)
    model.folder, model.scope = folder, "batch"
    try:
        quiet(callbacks=[adapting(reset="never")], **TWO).test(model, stream(), verbose=False)
        refused = ""
    except Exception as error:  # the launcher wraps what a process raises
        refused = str(error)
    (logged,) = quiet(callbacks=[adapting()], **TWO).test(model, stream(bad=2), verbose=False)
    model.scope = "sample"
    each = adapting(scope="sample", backend="loop")
    (by_sample,) = quiet(callbacks=[each], **TWO).test(model, stream(bad=2), verbose=False)
    quiet(callbacks=[adapting(gate=0.5)], **TWO).validate(model, stream(2, 14), verbose=False)
    fitted = post_hoc()
    quiet(**TWO).fit(fitted, loader(16, 8))
    measured = regression()
    quiet(**TWO).fit(measured, targets())
    numbers = {"refused": refused, "logged": logged, "by_sample": by_sample}
    states = {"state": fitted.state_dict(), "measured": measured.state_dict()}
    torch.save({**numbers, **states}, folder / "main.pt")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    strategy, where = sys.argv[1], Path(sys.argv[2])
    if "killed" in sys.argv:
        killed(where, strategy)
    elif strategy == "ddp_spawn":
        predict(where, strategy, "sample")
    else:
        {"ddp": script, "ddp_fork": main}[strategy](where)

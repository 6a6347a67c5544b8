"""Fits, tests and refuses on two CPU processes, and saves what came of it: run by a test."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from helpers.toy import IT3Net, LitNet, adapting, loader, net, parts, quiet, samples
from it3_lightning import DualPass, IT3Mixin, ValuePrior

TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}


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


def main(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
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
    main(Path(sys.argv[1]))

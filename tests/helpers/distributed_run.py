"""Fits, tests and refuses on two CPU processes, and saves what came of it: run by a test.

Started as users do: ``python distributed_run.py STRATEGY FOLDER``. Lightning runs the script again
for the second process of ``ddp``; those of ``ddp_spawn`` and ``ddp_fork`` are its own.
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from helpers.method_runs import METHODS, TASKS, Make
from helpers.toy import IT3Net, LitNet, adapting, loader, net, parts, quiet, samples, seeded
from it3_lightning import DualPass, IT3Mixin, IT3PredictionWriter, TestTimeCallback, ValuePrior
from it3_lightning.engine import Settings
from it3_lightning.methods import Idempotence, Iterates

TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
ODD = 13  # samples, of which the sampler of a test serves one twice
UNEVEN = 11  # the same, and no batch has a single sample
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
        kept = self.it3_calibration.state_dict()
        name = "reference" if kept["reference"] else "calibrated"
        torch.save(kept, self.folder / f"{name}-{self.global_rank}.pt")


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


class LeavesParts(IT3PredictionWriter):
    """Ends as a run that was cut short: no table is made."""

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self.teardown(trainer, pl_module, "predict")


def write_tables(folder: Path) -> None:
    """Write tables of an odd number of samples; one from what a run before has left."""
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    for name in ("sample", "resumed"):
        model, data = model_of(folder), stream(count=ODD)
        each = adapting(scope="sample", backend="loop")
        if name == "resumed":
            before = LeavesParts(folder / "table-resumed")
            quiet(callbacks=[before, each], **two).predict(model, data)
            model.dies = True  # predicting one batch of the second process again would end all
        writer = IT3PredictionWriter(folder / f"table-{name}")
        quiet(callbacks=[writer, each], **two).predict(model, data, return_predictions=False)


class Keeps(IT3Net):
    """Keeps the numbers of samples, and what is predicted of them, batch by batch."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def test_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.kept.append((batch[2], self(batch[0]).clone()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


ALL_METHODS: dict[str, Make] = {
    **METHODS,
    "Idempotence": lambda: Idempotence("l2", None),
    "Iterates": Iterates,
}


def episodic(scope: str) -> dict[str, Any]:
    """Return settings by which no batch, or no sample, leaves anything to the next."""
    alone = {"norm_stats": "source"} if scope == "sample" else {}
    return {"reset": "batch", "scope": scope, **alone}


def ways() -> list[tuple[str, str]]:
    """Return each method with the scopes that it may have."""
    found = []
    for name, make in ALL_METHODS.items():
        for scope in ("batch", "sample"):
            method = make()
            with suppress(ValueError):  # a method that looks at several samples
                Settings(objective=method, **{**method.defaults, **episodic(scope)})
                found.append((name, scope))
    return found


def refused() -> list[tuple[str, str]]:
    """Return each method that is refused on two processes, and what for."""
    made = {name: make() for name, make in ALL_METHODS.items()}
    carried = [name for name, m in made.items() if m.defaults.get("reset", "batch") != "batch"]
    needing = [name for name, method in made.items() if method.needs_source]
    return [*((name, "carried") for name in carried), *((name, "source") for name in needing)]


def by_method(
    name: str, data: Any, trainer: dict[str, Any], *, sees: dict[str, Any], **given: Any
) -> list[tuple[Tensor, Tensor]]:
    """Test by a method; return the numbers and predictions of each batch of this process.

    Args:
        name: of the method.
        data: serves numbered samples.
        trainer: settings of the Trainer that tests.
        sees: settings of the one that shows source data, where the method needs them.
        given: settings of the adaptation, beside the method's own.
    """
    module = net(Keeps)
    if name in TASKS:
        module.it3_auxiliary = seeded(TASKS[name]()).eval()
    callback = TestTimeCallback(ALL_METHODS[name](), lr=0.05, **given)
    if callback.settings.method.needs_source:
        source: Any = DataLoader(TensorDataset(*samples(8, seed=5)), batch_size=4)
        quiet(callbacks=[callback], **sees).validate(module, source, verbose=False)
    quiet(callbacks=[callback], **trainer).test(module, data, verbose=False)
    kept: list[tuple[Tensor, Tensor]] = module.kept
    return kept


def methods(folder: Path) -> None:
    """Test by every method in each of two processes, which draw other random numbers.

    MEMO draws its views by those of the process, which has one seed for it.
    """
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    rank = int(os.environ.get("LOCAL_RANK", 0))
    data, found = stream(count=UNEVEN), {}
    for name, scope in ways():
        torch.manual_seed(0 if name == "MEMO" else rank)
        found[name, scope] = by_method(name, data, two, sees={}, **episodic(scope))
    errors = {}
    for name, kind in refused():
        given = {} if kind == "carried" else episodic("batch")
        try:
            by_method(name, data, two, sees={} if kind == "carried" else two, **given)
        except MisconfigurationException as error:
            errors[name, kind] = str(error)
    torch.save((found, errors), folder / f"methods-{rank}.pt")


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
    write_tables(folder)
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
    for gate in (0.5, "bet"):
        quiet(callbacks=[adapting(gate=gate)], **TWO).validate(model, stream(2, 14), verbose=False)
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
        {"ddp": script, "ddp_fork": main, "methods": methods}[strategy](where)

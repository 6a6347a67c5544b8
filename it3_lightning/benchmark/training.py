"""Trains what a benchmark compares: an ordinary model, a joint one, a conditioning post-hoc."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, seed_everything

from it3_lightning.benchmark.rows import Training
from it3_lightning.data import ShiftedData
from it3_lightning.dual_pass import DualPass
from it3_lightning.mixin import IT3Mixin, Train
from it3_lightning.posthoc import load_source, network_weights

if TYPE_CHECKING:
    from it3_lightning.benchmark.run import Benchmark

MakeModel = Callable[[], LightningModule]
Say = Callable[[str], None]


def train_models(
    benchmark: Benchmark, seed: int, make_model: MakeModel, data: ShiftedData, say: Say
) -> dict[Training, IT3Mixin]:
    """Return the three trained models of a seed, each from the same first weights.

    Args:
        benchmark: settings.
        seed: of weights and order.
        make_model: returns a fresh model with priors.
        data: to train on, with equal classes.
        say: is told what is being trained.
    """

    def fresh(training: Training, train: Train, dual_pass: DualPass | None = None) -> IT3Mixin:
        say(f"seed {seed}: training, {training}")
        seed_everything(seed, verbose=False)
        model = with_priors(make_model())
        if dual_pass is not None:
            model.it3_dual_pass = dual_pass
        elif model.it3_train == "conditioning":
            model.it3_dual_pass = DualPass()
        model.it3_train = train
        return model

    data.stream = "equal"
    ordinary = fresh("ordinary", "off")
    if benchmark.ckpt_path is not None:
        load_source(ordinary, benchmark.ckpt_path)
    elif not benchmark.pretrained:
        benchmark.trainer(max_epochs=2 * benchmark.epochs).fit(ordinary, datamodule=data)
    joint = fresh("joint", "joint", benchmark.joint)
    benchmark.trainer(max_epochs=benchmark.epochs).fit(joint, datamodule=data)
    # What a prior knows of the training targets: every row that adapts asks for it.
    ordinary.it3_parts()[0].load_state_dict(joint.it3_parts()[0].state_dict())
    posthoc = fresh("post-hoc", "conditioning", DualPass.of(benchmark.posthoc, post_hoc=True))
    posthoc.load_state_dict(network_weights(ordinary.state_dict()))
    benchmark.trainer(max_epochs=benchmark.posthoc_epochs).fit(posthoc, datamodule=data)
    return {"ordinary": ordinary, "joint": joint, "post-hoc": posthoc}


def with_priors(model: LightningModule) -> IT3Mixin:
    """Return a model as one that predicts with priors.

    Raises:
        TypeError: it is none.
        ValueError: prior or conditioning are missing.
    """
    if not isinstance(model, IT3Mixin):
        raise TypeError(
            f"The benchmark needs a module with IT3Mixin, got {type(model).__name__}: "
            f"class IT3Net(IT3Mixin, {type(model).__name__}): pass"
        )
    model.it3_parts()
    return model

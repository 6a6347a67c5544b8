"""Trains what a benchmark compares: an ordinary model, a joint one, a conditioning post-hoc."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lightning.pytorch import LightningModule, seed_everything

from it3_lightning.benchmark.rows import Training
from it3_lightning.benchmark.settings import BenchmarkSettings
from it3_lightning.data import ShiftedData
from it3_lightning.training.dual_pass import DualPass
from it3_lightning.training.mixin import IT3Mixin, Train
from it3_lightning.training.post_hoc import load_source, network_weights

MakeModel = Callable[[], LightningModule]
Say = Callable[[str], None]
Models = dict[Training, IT3Mixin]

_MODES: Mapping[Training, Train] = MappingProxyType(
    {"ordinary": "off", "joint": "joint", "post-hoc": "conditioning"}
)


def train_models(
    settings: BenchmarkSettings, seed: int, make_model: MakeModel, data: ShiftedData, say: Say
) -> Models:
    """Return the three trained models of a seed, each from the same first weights.

    Args:
        settings: of the training.
        seed: of weights and order.
        make_model: returns a fresh model with priors.
        data: to train on, with equal classes.
        say: is told what is being trained.
    """

    def fitted(training: Training, epochs: int, network: IT3Mixin | None = None) -> IT3Mixin:
        say(f"seed {seed}: training, {training}")
        model = fresh(settings, seed, make_model, training)
        if network is not None:
            model.load_state_dict(network_weights(network.state_dict()))
        if epochs:
            settings.trainer(max_epochs=epochs).fit(model, datamodule=data)
        return model

    given = settings.pretrained or settings.ckpt_path is not None
    ordinary = fitted("ordinary", 0 if given else 2 * settings.epochs)
    if settings.ckpt_path is not None:
        load_source(ordinary, settings.ckpt_path)
    joint = fitted("joint", settings.epochs)
    # What a prior knows of the training targets: every row that adapts asks for it.
    ordinary.it3_parts()[0].load_state_dict(joint.it3_parts()[0].state_dict())
    posthoc = fitted("post-hoc", settings.posthoc_epochs, ordinary)
    return {"ordinary": ordinary, "joint": joint, "post-hoc": posthoc}


def fresh(
    settings: BenchmarkSettings, seed: int, make_model: MakeModel, training: Training
) -> IT3Mixin:
    """Return a model before its training: the first weights are those of the seed."""
    seed_everything(seed, verbose=False)
    model = with_priors(make_model())
    if training == "post-hoc":
        model.it3_dual_pass = DualPass.of(settings.posthoc, post_hoc=True)
    elif training == "joint" and settings.joint is not None:
        model.it3_dual_pass = settings.joint
    elif model.it3_train == "conditioning":
        model.it3_dual_pass = DualPass()
    model.it3_train = _MODES[training]
    return model


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

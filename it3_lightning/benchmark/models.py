"""Trained models of a seed: cached in the output folder under a fingerprint, else trained."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning
import torch
import torchmetrics
import torchvision
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor

from it3_lightning.benchmark.config import BenchmarkSettings
from it3_lightning.benchmark.kept import kept, mark_folder
from it3_lightning.benchmark.peers import training_of
from it3_lightning.benchmark.rows import (
    CONTEXT,
    PERTURBED,
    UNEQUAL,
    Training,
)
from it3_lightning.data import ShiftedData
from it3_lightning.engine.restore import batch_norms
from it3_lightning.integration.checkpoints import load_source, network_weights
from it3_lightning.integration.namespaces import ONE_LINE, ModuleMixin
from it3_lightning.methods import Auxiliary
from it3_lightning.training.auxiliary import with_auxiliary
from it3_lightning.training.dual_pass import DualPass, called, partly
from it3_lightning.training.mixin import IT3Mixin, Train
from it3_lightning.utils.files import load_plain, write
from it3_lightning.utils.specs import spec, without_address

MakeModel = Callable[[], LightningModule]
Say = Callable[[str], None]
Models = dict[Training, IT3Mixin]
_State = Mapping[str, Tensor]
_MODES: Mapping[Training, Train] = MappingProxyType(
    {"ordinary": "off", "joint": "joint", "post-hoc": "conditioning"}
)  # any other training, beside an auxiliary task, is an ordinary one
_NO_SETTINGS = ("seeds", "output", "threads", "higher_is_better", "decimals")  # change no score
_SET_BY_RUN = ("seed", "stream")
_TRAINED_BY = ("epochs", "posthoc_epochs", "pretrained", "joint", "posthoc", "precision")
_LEARNT = ("train", "validation")  # contents that models depend on
_NOT_TRAINED_ON = (
    *("evaluate_on", "shifts", "severity", "concentration", "eval_batch_size", "num_workers"),
    "beyond_size",
)


def models_of(
    settings: BenchmarkSettings,
    seed: int,
    make_model: MakeModel,
    data: ShiftedData,
    say: Say,
    training: Any,
) -> Models:
    """Return the three trained models of a seed, from its file.

    They are kept in ``models/seed_N.ckpt`` of the output folder: their states, and what the
    training depended on. Rows, recipes, shifts and splits to evaluate on are no part of that, so
    ``benchmark`` and ``tune`` share trainings.

    Args:
        settings: of the training.
        seed: of weights and order.
        make_model: returns a fresh model with priors.
        data: to train on.
        say: is told what is being done.
        training: plain data, all that training depends on besides the seed.
    """
    file = Path(settings.output) / "models" / f"seed_{seed}.ckpt"
    fingerprint = json.dumps(training, sort_keys=True)
    data.seed, data.stream = seed, "equal"

    def read(content: dict[str, Any]) -> Models:
        return _with_states(settings, seed, make_model, content["states"])

    models = kept(file, fingerprint, read, load_plain)
    if models is None:
        models = _train_models(settings, seed, make_model, data, say)
        mark_folder(Path(settings.output), training)
        _keep(file, fingerprint, _states(models))
    else:
        say(f"seed {seed}: models from {file}")
    return models


def posthoc_model(
    settings: BenchmarkSettings,
    seed: int,
    make_model: MakeModel,
    data: ShiftedData,
    say: Say,
    training: Any,
) -> IT3Mixin:
    """Return the post-hoc model of a seed, of :func:`models_of` or with the same bits, from a file.

    No joint model is trained for it. See :func:`models_of` for the arguments.
    """
    given = settings, seed, make_model
    folder, fingerprint = Path(settings.output) / "models", json.dumps(training, sort_keys=True)
    if (folder / f"seed_{seed}.ckpt").is_file():
        return models_of(*given, data, say, training)["post-hoc"]
    file = folder / f"seed_{seed}_post-hoc.ckpt"
    data.seed, data.stream = seed, "equal"

    def read(content: dict[str, Any]) -> IT3Mixin:
        model = _fresh(*given, "post-hoc")
        model.load_state_dict(content["states"])
        return model

    found = kept(file, fingerprint, read, load_plain)
    if found is None:
        ordinary = _ordinary(*given, data, say)
        found = _fitted(*given, data, say, "post-hoc", settings.posthoc_epochs, ordinary)
        mark_folder(Path(settings.output), training)
        _keep(file, fingerprint, found.state_dict())
    return found


def further_model(
    name: Training,
    models: Models,
    settings: BenchmarkSettings,
    seed: int,
    make_model: MakeModel,
    data: ShiftedData,
    say: Say,
    training: Any,
) -> IT3Mixin:
    """Return the model of a control, or of training beside an auxiliary task, from its file.

    Args:
        name: of the training.
        models: those of the seed so far; what it stands on is added.
        settings: of the training.
        seed: of weights and order.
        make_model: returns a fresh model with priors.
        data: to train on.
        say: is told what is being done.
        training: plain data, all that training depends on besides the seed.
    """
    base = PERTURBED if name.startswith(PERTURBED) and name != PERTURBED else "ordinary"
    given = settings, seed, make_model
    if base not in models:
        models[base] = further_model(base, models, *given, data, say, training)
    make = partial(_control, name, *given, models[base])
    for head in settings.heads:
        if name == training_of(head):
            make = partial(_with_head, head, *given)
            training = {**training, "head": _plain(spec(head))}
    return _beside(name, make, settings, seed, data, say, training)


def _beside(
    name: Training,
    make: Callable[[], tuple[IT3Mixin, int]],
    settings: BenchmarkSettings,
    seed: int,
    data: ShiftedData,
    say: Say,
    training: Any,
) -> IT3Mixin:
    """Return a model of a further training, kept in a file of its own.

    Args:
        name: of the training.
        make: returns the model before it, and epochs.
        settings: of the Trainer.
        seed: of the order.
        data: to train on.
        say: is told what is being done.
        training: plain data, all that training depends on besides the seed.
    """
    file = Path(settings.output) / "models" / f"seed_{seed}_{name.replace(' ', '_')}.ckpt"
    fingerprint = json.dumps(training, sort_keys=True)
    model, epochs = make()

    def read(content: dict[str, Any]) -> IT3Mixin:
        model.load_state_dict(content["states"])
        return model

    found = kept(file, fingerprint, read, load_plain)
    if found is None:
        say(f"seed {seed}: training, {name}")
        data.seed, data.stream = seed, "equal"
        settings.trainer(max_epochs=epochs).fit(model, datamodule=data)
        _keep(file, fingerprint, model.state_dict())
    return model


def _with_head(
    head: Auxiliary, settings: BenchmarkSettings, seed: int, make_model: MakeModel
) -> tuple[IT3Mixin, int]:
    """Return a model that is to learn an auxiliary task beside its own."""
    model = _fresh(settings, seed, make_model, "ordinary")
    with_auxiliary(model, type(head)(**head.init_args()))
    return model, 2 * settings.epochs


def _control(
    name: Training, settings: BenchmarkSettings, seed: int, make_model: MakeModel, base: IT3Mixin
) -> tuple[IT3Mixin, int]:
    """Return a model of a control training, before it.

    Args:
        name: of the training.
        settings: of all trainings.
        seed: of the first weights.
        make_model: returns a fresh model with priors.
        base: the network that a conditioning is trained on.
    """
    label = settings.label_pass
    if name == PERTURBED:
        model = _fresh(settings, seed, make_model, "ordinary")
        model.it3_parts()[0].load_state_dict(base.it3_parts()[0].state_dict())
        assert label.perturb_inputs is not None
        model.__class__ = type(type(model).__name__, (_PerturbedInputs, type(model)), {})
        object.__setattr__(model, "it3_perturbation", label.perturb_inputs)
        return model, 2 * settings.epochs
    model = _fresh(settings, seed, make_model, "post-hoc")
    if name.endswith(CONTEXT):
        _give_context(model)
    if name.endswith((CONTEXT, UNEQUAL)):
        used = replace(label, own_share=1.0, unequal_share=0.75)
        model.it3_dual_pass = replace(used, norm_stats="batch") if batch_norms(model) else used
    model.load_state_dict(network_weights(base.state_dict()))
    return model, settings.posthoc_epochs


class _PerturbedInputs(ModuleMixin):
    """Trains a model by its own step on batches of which half the samples are perturbed."""

    it3_perturbation: Callable[[Any], Any]

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own step."""
        batch = partly(self, self.it3_perturbation, batch)  # type: ignore[arg-type]
        return called(super().training_step, batch, *args, **kwargs)


def _give_context(model: IT3Mixin) -> None:
    """Let second predictions of a fresh model see the context of their batch too."""
    prior, conditioning = model.it3_parts()
    conditioning.detach(model)
    model.it3_prior = type(prior)(**{**prior.init_args(), "context": "batch"})
    model.it3_conditioning = type(conditioning)(**conditioning.init_args())
    model.it3_conditioning.attach(model, model.it3_prior)


def _keep(file: Path, fingerprint: str, states: Any) -> None:
    content = {"fingerprint": fingerprint, "states": states}
    write(file, lambda stream: torch.save(content, stream))


def _train_models(
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
    given = settings, seed, make_model, data, say
    ordinary = _ordinary(*given)
    joint = _fitted(*given, "joint", settings.epochs)
    # What a prior knows of the training targets: every row that adapts asks for it.
    ordinary.it3_parts()[0].load_state_dict(joint.it3_parts()[0].state_dict())
    posthoc = _fitted(*given, "post-hoc", settings.posthoc_epochs, ordinary)
    return {"ordinary": ordinary, "joint": joint, "post-hoc": posthoc}


def _ordinary(
    settings: BenchmarkSettings, seed: int, make_model: MakeModel, data: ShiftedData, say: Say
) -> IT3Mixin:
    """Return the ordinary model of a seed: trained, or with the weights that are given."""
    given = settings.pretrained or settings.ckpt_path is not None
    epochs = 0 if given else 2 * settings.epochs
    ordinary = _fitted(settings, seed, make_model, data, say, "ordinary", epochs)
    if settings.ckpt_path is not None:
        load_source(ordinary, settings.ckpt_path)
    return ordinary


def _fitted(
    settings: BenchmarkSettings,
    seed: int,
    make_model: MakeModel,
    data: ShiftedData,
    say: Say,
    training: Training,
    epochs: int,
    network: IT3Mixin | None = None,
) -> IT3Mixin:
    """Return the model of a training, from the first weights of the seed.

    Args:
        settings: of all trainings.
        seed: of weights and order.
        make_model: returns a fresh model with priors.
        data: to train on.
        say: is told what is being trained.
        training: which one.
        epochs: of it; 0: none.
        network: whose weights the network has before it; ``None``: its first ones.
    """
    say(f"seed {seed}: training, {training}")
    model = _fresh(settings, seed, make_model, training)
    if network is not None:
        model.load_state_dict(network_weights(network.state_dict()))
    if epochs:
        settings.trainer(max_epochs=epochs).fit(model, datamodule=data)
    return model


def _fresh(
    settings: BenchmarkSettings, seed: int, make_model: MakeModel, training: Training
) -> IT3Mixin:
    """Return a model before its training: the first weights are those of the seed."""
    seed_everything(seed, verbose=False)
    model = with_priors(make_model())
    if training == "post-hoc":
        model.it3_dual_pass = settings.label_pass
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
    if not isinstance(model, LightningModule):
        raise TypeError(
            f"The benchmark runs the Trainer of lightning.pytorch, and {type(model).__name__} is a "
            f"module of pytorch_lightning: {ONE_LINE}"
        )
    model.it3_parts()
    return model


def about(
    benchmark: BenchmarkSettings, model: IT3Mixin, data: ShiftedData, configuration: object = None
) -> dict[str, Any]:
    """Return plain data: ``"settings"``, ``"training"``, ``"seeds"`` and ``"versions"``.

    The settings tell whether kept scores still hold, the training whether kept models do.

    Args:
        benchmark: settings.
        model: whose layers, sizes and settings.
        data: whose public attributes and content.
        configuration: what else the model was made from.
    """
    heads = [spec(head) for head in benchmark.heads if benchmark.methods]
    own = {**asdict(replace(benchmark, heads=())), "heads": heads}
    shared = {
        "model": _described(model),
        "configuration": configuration,
        "checkpoint": _digest(benchmark.ckpt_path),
    }
    content = _content(data)
    attributes = {"class": type(data).__name__, **_plain_attributes(data), "content": content}
    learnt = {name: each for name, each in content.items() if name in _LEARNT}
    settings = {
        "benchmark": {k: v for k, v in own.items() if k not in _NO_SETTINGS},
        "data": attributes,
        **shared,
    }
    training = {
        "benchmark": {k: own[k] for k in _TRAINED_BY},
        "data": {
            **{k: v for k, v in attributes.items() if k not in _NOT_TRAINED_ON},
            "content": learnt,
        },
        "versions": {"it3_lightning": version("it3_lightning"), "torch": torch.__version__},
        **shared,
    }
    return {
        "settings": _plain(settings),
        "training": _plain(training),
        "seeds": list(benchmark.seeds),
        "versions": _versions(),
    }


def _states(models: Models) -> dict[str, _State]:
    """Return the states by training; the post-hoc network is the ordinary one, and kept once."""
    states: dict[str, _State] = {training: models[training].state_dict() for training in models}
    network = network_weights(states["post-hoc"])
    states["post-hoc"] = {k: v for k, v in states["post-hoc"].items() if k not in network}
    return states


def _with_states(
    settings: BenchmarkSettings, seed: int, make_model: MakeModel, states: Mapping[str, _State]
) -> Models:
    models = {training: _fresh(settings, seed, make_model, training) for training in _MODES}
    network = network_weights(states["ordinary"])
    for training, model in models.items():
        more = network if training == "post-hoc" else {}
        model.load_state_dict({**more, **states[training]})
    return models


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "torchmetrics": torchmetrics.__version__,
        "torchvision": torchvision.__version__,
    }


def _plain(values: Any) -> Any:
    """Return the values as a JSON file gives them back."""
    return json.loads(json.dumps(values, default=without_address))


def _described(model: IT3Mixin) -> dict[str, Any]:
    """Return what tells two models apart: layers, sizes, settings, optimizer, prior."""
    attributes = {k: v for k, v in vars(model).items() if k[0] != "_" and not isinstance(v, dict)}
    return {
        "layers": repr(model),
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        "attributes": {k: without_address(v) for k, v in attributes.items()},
        "hparams": {k: without_address(v) for k, v in dict(model.hparams).items()},
        "parts": [spec(model.it3_prior), spec(model.it3_conditioning)],
    }


def _digest(path: str | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _content(data: ShiftedData) -> dict[str, Any]:
    """Return what tells the samples from others: those of seed 0, whichever seeds are run."""
    before = data.seed, data.stream
    data.seed, data.stream = 0, "equal"
    try:
        data.prepare_data()
        return dict(data.content())
    finally:
        data.seed, data.stream = before


def _plain_attributes(data: ShiftedData) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(data).items()
        if not name.startswith("_")
        and name not in _SET_BY_RUN
        and isinstance(value, int | float | str | tuple | list | Path)
    }

"""Checkpoints: plain ones into a module with priors, round trips, resumed fits, at test time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toy import IT3Net, LitNet, loader, parts, quiet, samples, seeded
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from it3_lightning import (
    ClassPrior,
    DualPass,
    FeatureInjection,
    IT3Mixin,
)


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(theirs[k], v) for k, v in ours.items())


def saved(model: LightningModule, path: Path, **kwargs: Any) -> str:
    """Train for an epoch and let the Trainer write a checkpoint."""
    trainer = quiet(**kwargs)
    trainer.fit(model, loader())
    trainer.save_checkpoint(path)
    return str(path)


# Plain checkpoints


def test_plain_weights_load_and_the_conditioning_stays() -> None:
    plain, model = seeded(LitNet(), 1), seeded(IT3Net(**parts()), 2)
    conditioning = {k: v.clone() for k, v in model.it3_conditioning.state_dict().items()}
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items())
    after = model.it3_conditioning.state_dict()
    assert all(torch.equal(after[k], v) for k, v in conditioning.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("net.head.bias"), 'Missing key.*"net.head.bias"'),
        (lambda s: s.update(extra=torch.zeros(1)), 'Unexpected key.*"extra"'),
        (
            lambda s: s.pop("it3_conditioning.embedders.net-dense.last.bias"),
            "Missing key.*last.bias",
        ),
        (lambda s: s.update({"it3_more": torch.zeros(1)}), 'Unexpected key.*"it3_more"'),
    ],
    ids=["missing", "unexpected", "part of it3", "more than it3"],
)
def test_other_missing_and_unexpected_keys_still_raise(change: Any, message: str) -> None:
    model = IT3Net(**parts())
    state = dict((model if "it3" in message or "last" in message else LitNet()).state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)


def test_plain_checkpoint_loads_by_path(tmp_path: Path) -> None:
    plain = seeded(LitNet())
    path, images = saved(plain, tmp_path / "plain.ckpt"), samples(seed=3)[0]
    model = IT3Net.load_from_checkpoint(path, **parts())
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_plain_checkpoint_serves_test_by_path(tmp_path: Path) -> None:
    plain = seeded(LitNet())
    path = saved(plain, tmp_path / "plain.ckpt")
    expected = quiet().test(plain, loader(seed=4), verbose=False)
    assert quiet().test(IT3Net(**parts()), loader(seed=4), path, verbose=False) == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c["state_dict"].pop("net.head.bias"), RuntimeError, 'Missing.*"net.head.bias"'),
        (lambda c: c.update(it3={"calibration": 3}), ValueError, "calibration as a mapping"),
        (lambda c: c.update(it3={"source_in_place": 3}), ValueError, "to be a bool, got 3"),
    ],
)
def test_what_a_trainer_reads_is_named_where_it_does_not_fit(
    change: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = saved(IT3Net(**parts()), tmp_path / "it3.ckpt")
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    model = IT3Net(**parts())
    with pytest.raises(error, match=rf"(?s)it3\.ckpt does not fit IT3Net: .*{message}"):
        quiet().test(model, loader(), path, verbose=False)
    with pytest.raises(RuntimeError, match=r"^Error") as raised:
        model.load_state_dict({})
    assert "it3.ckpt" not in str(raised.value)


# Round trips


class Saves(LitNet):
    def __init__(self, hidden: int = 8, lr: float = 0.1) -> None:
        super().__init__(hidden, lr)
        self.save_hyperparameters()


class SavesSome(LitNet):
    def __init__(self, hidden: int = 8, lr: float = 0.1) -> None:
        super().__init__(hidden, lr)
        self.save_hyperparameters(ignore=["lr"])


class IT3Saves(IT3Mixin, Saves):
    pass


class IT3SavesSome(IT3Mixin, SavesSome):
    pass


class SavesLate(IT3Net):
    """Saves its hyperparameters after the mixin was made, and under names of its own."""

    def __init__(self, my_prior: Any, my_conditioning: Any, hidden: int = 8) -> None:
        super().__init__(hidden, prior=my_prior, conditioning=my_conditioning)
        self.save_hyperparameters()


class Scaling(nn.Module):
    """A perturbation that can tell how it was made."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor

    def init_args(self) -> dict[str, Any]:
        return {"factor": self.factor}


DUAL = DualPass(label_weight=0.5, third_pass=True, perturb_inputs=Scaling(0.25))


@pytest.mark.parametrize("kind", [IT3Saves, IT3SavesSome])
@pytest.mark.parametrize("positional", [False, True])
def test_checkpoint_builds_the_same_module(
    kind: type[IT3Mixin], positional: bool, tmp_path: Path
) -> None:
    args = parts(
        prior=ClassPrior(3, neutral="uniform"),
        conditioning=FeatureInjection("net.dense", mode="film", hidden=5),
        dual_pass=DUAL,
        conditioning_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    model = kind(5, **args) if positional else kind(hidden=5, **args)
    path, (images, labels) = saved(model, tmp_path / "it3.ckpt"), samples(seed=3)
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"]["prior"]["init_args"]["num_classes"] == 3
    twin = kind.load_from_checkpoint(path)
    assert equal(twin, model)
    prior = ClassPrior(3).from_target(labels)
    model.eval(), twin.eval()
    assert torch.equal(twin.predict_with(images, prior), model.predict_with(images, prior))
    assert twin.it3_dual_pass.init_args() == model.it3_dual_pass.init_args()
    assert twin.it3_dual_pass.label_weight == 0.5
    perturb: Any = twin.it3_dual_pass.perturb_inputs
    assert torch.equal(perturb(images), images * 0.25)


def test_hyperparameters_saved_late_and_under_other_names(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="is an instance of `nn.Module`"):
        model = SavesLate(ClassPrior(3), FeatureInjection("net.dense"), hidden=5)
    path = saved(model, tmp_path / "it3.ckpt")
    twin = SavesLate.load_from_checkpoint(path)
    assert equal(twin, model)


def test_checkpoint_without_hyperparameters_takes_them_as_arguments(tmp_path: Path) -> None:
    model = IT3Net(**parts())
    path = saved(model, tmp_path / "it3.ckpt")
    assert torch.load(path, weights_only=True).get("hyper_parameters") is None
    assert equal(IT3Net.load_from_checkpoint(path, **parts()), model)


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_post_hoc_settings_travel_in_the_checkpoint(train: Any, tmp_path: Path) -> None:
    source = str(tmp_path / "source.pt")
    torch.save(LitNet().state_dict(), source)
    model = IT3Saves(**parts(train=train, source_checkpoint=source))
    path = saved(model, tmp_path / "it3.ckpt")
    twin = IT3Saves.load_from_checkpoint(path)
    assert (twin.it3_train, twin.it3_source_checkpoint) == (train, source)
    assert equal(twin, model)


# Resumed


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_resumed_fit_is_bitwise_the_uninterrupted_one(train: Any, tmp_path: Path) -> None:
    source = tmp_path / "source.pt"
    torch.save(seeded(LitNet()).state_dict(), source)

    def model() -> IT3Net:
        torch.manual_seed(0)
        return IT3Adam(**parts(train=train, source_checkpoint=str(source)))

    whole, first, second = model(), model(), model()
    seeds = [Reseeds() for _ in range(3)]
    quiet(max_epochs=2, callbacks=seeds[0]).fit(whole, loader())
    path = saved(first, tmp_path / "half.ckpt", callbacks=seeds[1])
    source.unlink()  # the checkpoint holds all
    quiet(max_epochs=2, callbacks=seeds[2]).fit(second, loader(), ckpt_path=path)
    assert equal(second, whole)
    assert not equal(second, first)


class IT3Adam(IT3Net):
    def configure_optimizers(self) -> Any:
        if self.it3_train == "conditioning":
            return super().configure_optimizers()
        return torch.optim.Adam(self.net.parameters(), lr=0.01)


class Reseeds(Callback):
    """The same random numbers at a step, however it is reached."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)

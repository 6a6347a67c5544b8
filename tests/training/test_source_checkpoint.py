"""Whether the source is in place: loaded before anything copies it, and kept with the weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toy import IT3Net, LitNet, loader, parts, quiet
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from it3_lightning import IT3Mixin, IT3Predictor, Settings


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LitNet:
    """An ordinary network, trained for an epoch; its checkpoint is `plain.ckpt`."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, trainer = LitNet(), quiet()
    trainer.fit(model, loader())
    trainer.save_checkpoint("plain.ckpt")
    return model


def post_hoc(kind: Any = IT3Net, **args: Any) -> Any:
    torch.manual_seed(1)
    return kind(**parts(source_checkpoint="plain.ckpt", **args))


def differing(model: nn.Module, plain: LitNet) -> list[str]:
    expected = plain.state_dict()
    state = {k: v for k, v in model.state_dict().items() if k in expected}
    assert state.keys() == expected.keys()
    return [name for name, value in state.items() if not torch.equal(value, expected[name])]


class Data(LightningDataModule):
    batch_size = 4

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(batch=self.batch_size)

    test_dataloader = train_dataloader


SIZES: dict[str, Any] = {"max_trials": 1, "steps_per_trial": 1, "init_val": 2}
RATES: dict[str, Any] = {"attr_name": "lr", "update_attr": False}


def searched(name: str) -> Any:
    """Return a post-hoc module fitted after a search."""
    model = post_hoc()
    callbacks: dict[str, Callback] = {
        "rate by a callback": LearningRateFinder(num_training_steps=2, **RATES),
        "size by a callback": BatchSizeFinder(**SIZES),
    }
    if name == "rate":
        Tuner(quiet()).lr_find(model, datamodule=Data(), num_training=2, **RATES)
    if name in ("size", "size in a test"):
        method: Any = "fit" if name == "size" else "test"
        tuner = Tuner(quiet())
        tuner.scale_batch_size(model, datamodule=Data(), method=method, **SIZES)
        model.train()
    quiet(callbacks=[callbacks[name]] if name in callbacks else []).fit(model, datamodule=Data())
    return model


@pytest.mark.parametrize(
    "name", ["rate", "size", "size in a test", "rate by a callback", "size by a callback"]
)
def test_a_search_before_fitting_leaves_the_source_in_place(name: str, plain: LitNet) -> None:
    assert differing(searched(name), plain) == []


def test_a_search_runs_the_frozen_network_as_fitting_does(plain: LitNet) -> None:
    class Notes(IT3Net):
        def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            modes.append((self.net.bn.training, self.net.head.weight.requires_grad))
            assert differing(self, plain) == []
            return super().training_step(batch, *args, **kwargs)

    modes: list[tuple[bool, bool]] = []
    model = post_hoc(Notes)
    Tuner(quiet()).lr_find(model, datamodule=Data(), num_training=3, **RATES)
    quiet().fit(model, datamodule=Data())
    assert modes == 6 * [(False, False)]


class Copies(Callback):
    """Copies the module when a run is set up, as averaging callbacks do."""

    copied: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.copied = copy.deepcopy(pl_module)


@pytest.mark.parametrize("run", ["fit", "test", "predict"])
def test_callbacks_see_the_source_when_they_are_set_up(run: str, plain: LitNet) -> None:
    copies = Copies()
    getattr(quiet(callbacks=[copies]), run)(post_hoc(), loader())
    assert differing(copies.copied, plain) == []


def test_a_network_built_by_a_hook_is_loaded_as_soon_as_it_is_there(plain: LitNet) -> None:
    class Lazy(LitNet):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.net: Any = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = LitNet().net

    class IT3Lazy(IT3Mixin, Lazy):
        pass

    class Looks(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert differing(pl_module, plain) == []

    model = post_hoc(IT3Lazy)
    quiet(callbacks=[Looks()]).fit(model, loader())
    assert differing(model, plain) == []


def saved(model: Any, path: str) -> None:
    trainer = quiet()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)


def test_a_checkpoint_written_before_the_source_was_loaded_says_so(plain: LitNet) -> None:
    saved(post_hoc(), "before.ckpt")
    model = IT3Net.load_from_checkpoint(
        "before.ckpt", **parts(source_checkpoint="plain.ckpt"), weights_only=True
    )
    with pytest.raises(MisconfigurationException, match="has not loaded its source_checkpoint"):
        IT3Predictor(model, Settings())
    quiet().fit(model, loader())
    assert differing(model, plain) == []
    saved(model, "after.ckpt")
    again = IT3Net.load_from_checkpoint("after.ckpt", **parts(), weights_only=True)
    assert differing(IT3Predictor(again, Settings()).module, plain) == []


@pytest.mark.parametrize("run", ["fit", "test", "predict"])
def test_a_module_whose_source_is_nowhere_is_not_run(run: str, plain: LitNet) -> None:
    def step(*_: Any) -> None:
        raise AssertionError("a batch was run")

    saved(post_hoc(), "before.ckpt")
    model: Any = IT3Net.load_from_checkpoint("before.ckpt", **parts(train="conditioning"))
    model.training_step = model.test_step = model.predict_step = step
    with pytest.raises(MisconfigurationException, match=r"before they were loaded. Give source_ch"):
        getattr(quiet(), run)(model, loader())


def test_a_search_on_a_network_without_its_source_is_refused(plain: LitNet) -> None:
    model = IT3Net(**parts(source_checkpoint="none.ckpt"))
    finder = LearningRateFinder(num_training_steps=2, **RATES)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at 'none.ckpt'"):
        quiet(callbacks=[finder]).fit(model, loader())


def test_a_run_goes_on_from_a_checkpoint_where_the_source_is_gone(plain: LitNet) -> None:
    trainer = quiet()
    trainer.fit(post_hoc(), loader())
    trainer.save_checkpoint("fitted.ckpt")
    Path("plain.ckpt").unlink()
    model = post_hoc()
    quiet(max_epochs=2).fit(model, loader(), ckpt_path="fitted.ckpt")
    assert differing(model, plain) == []
    quiet().test(post_hoc(), loader(), ckpt_path="fitted.ckpt", verbose=False)


def test_weights_given_to_the_module_itself_are_not_loaded_over(plain: LitNet) -> None:
    first = post_hoc(train="joint")
    quiet().fit(first, loader())
    trained = {name: value.clone() for name, value in first.named_parameters()}
    model = post_hoc(train="joint", lr=0.0)
    model.load_state_dict(first.state_dict())
    quiet().fit(model, loader())
    kept: dict[str, Tensor] = dict(model.named_parameters())
    assert [name for name, value in trained.items() if not torch.equal(value, kept[name])] == []

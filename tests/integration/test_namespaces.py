import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from helpers.toy import LitNet, adapting, parts, quiet, samples, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import (
    AuxiliaryMixin,
    ClassPrior,
    DualPass,
    FeatureInjection,
    Idempotence,
    IT3Mixin,
    IT3Predictor,
    IT3TestTimeCallback,
    RandomNoise,
    Rotation,
    Settings,
    Tent,
    TestTimeCallback,
    ValuePrior,
)
from it3_lightning.benchmark.models import with_priors
from it3_lightning.cli import main
from it3_lightning.data import DigitsDataModule
from it3_lightning.integration.module import Conditioned
from it3_lightning.integration.namespaces import HOOKS


class Steps:
    """The steps of an ordinary module, of whichever namespace."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])  # type: ignore[operator]
        self.log("train_loss", loss)  # type: ignore[attr-defined]
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))  # type: ignore[attr-defined,operator]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))  # type: ignore[attr-defined,operator]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits: Tensor = self(batch[0])  # type: ignore[operator]
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)  # type: ignore[attr-defined]


class New(Steps, lightning.pytorch.LightningModule):
    pass


class Old(Steps, pytorch_lightning.LightningModule):
    pass


class IT3New(IT3Mixin, New):
    pass


class IT3Old(IT3Mixin, Old):  # type: ignore[misc]
    pass


def data() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 4, generator=draw)
    return DataLoader(TensorDataset(inputs, torch.arange(20) % 3), batch_size=5)


def made(kind: Any, **args: Any) -> Any:
    torch.manual_seed(0)
    return kind(**args)


def with_parts(kind: Any, **args: Any) -> Any:
    return made(kind, prior=ClassPrior(3), conditioning=FeatureInjection("net.1"), **args)


def trainer(namespace: Any, *callbacks: Any, **args: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return namespace.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", **quiet, **args}, callbacks=list(callbacks)
    )


EVERY = Idempotence(reliability=None)
BOTH = [(lightning.pytorch, New, IT3New), (pytorch_lightning, Old, IT3Old)]


@pytest.mark.parametrize("train", ["joint", "conditioning"])
@pytest.mark.parametrize(
    "settings",
    [
        {"gate": 0.5},
        {"scope": "sample", "backend": "loop"},
        {"prediction": "mean", "reset": "never"},
    ],
)
def test_each_trainer_trains_and_adapts_its_own_modules_with_the_same_bits(
    train: Any, settings: dict[str, Any]
) -> None:
    found = []
    for namespace, _, kind in BOTH:
        model = with_parts(kind, train=train)
        runs = trainer(namespace, IT3TestTimeCallback(objective=EVERY, lr=0.1, **settings))
        runs.fit(model, data(), data())
        logged = runs.test(model, data(), verbose=False)[0]
        logged.pop("it3/ms_per_sample")
        outputs = torch.cat(runs.predict(model, data()))
        plain = torch.cat(trainer(namespace).predict(model, data()))
        assert not torch.equal(outputs, plain)
        assert logged["it3/moved"] > 0
        found.append((logged, outputs, model.state_dict()))
    (logs, outputs, state), (others, their_outputs, their_state) = found
    assert logs == others
    assert torch.equal(outputs, their_outputs)
    assert state.keys() == their_state.keys()
    assert all(torch.equal(value, their_state[name]) for name, value in state.items())


def test_a_method_without_prior_adapts_an_untouched_module_of_either_namespace() -> None:
    losses = []
    for namespace, plain, _ in BOTH:
        runs = trainer(namespace, TestTimeCallback(Tent(), lr=0.1))
        losses.append(runs.test(made(plain), data(), verbose=False)[0]["test_loss"])
    assert losses[0] == losses[1]
    assert losses[0] != trainer(lightning.pytorch).test(made(New), data(), verbose=False)[0]


def test_a_source_checkpoint_of_the_other_namespace_is_taken_and_served(tmp_path: Path) -> None:
    path = str(tmp_path / "source.ckpt")
    source, runs = made(Old), trainer(pytorch_lightning)
    runs.fit(source, data(), data())
    runs.save_checkpoint(path)
    model = with_parts(IT3Old, source_checkpoint=path)
    runs = trainer(pytorch_lightning)
    runs.fit(model, data(), data())
    assert torch.equal(model.net[0].weight, source.net[0].weight)
    runs.save_checkpoint(str(tmp_path / "both.ckpt"))
    parts: Any = {"prior": ClassPrior(3), "conditioning": FeatureInjection("net.1")}
    predictor = IT3Predictor.from_checkpoint(
        tmp_path / "both.ckpt", IT3Old, settings=Settings(), **parts
    )
    inputs = next(iter(data()))[0]
    assert torch.equal(predictor(inputs).source_outputs, model.eval()(inputs))
    assert bool((predictor(inputs).distance > 0).all())


def test_an_auxiliary_task_is_learnt_in_the_other_namespace() -> None:
    class OfImages(Old):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    class TTTOld(AuxiliaryMixin, IT3Mixin, OfImages):  # type: ignore[misc]
        pass

    model = with_parts(TTTOld, auxiliary=Rotation("net.1", channels=8))
    images = DataLoader(TensorDataset(torch.randn(8, 1, 2, 2), torch.arange(8) % 3), batch_size=4)
    runs = trainer(pytorch_lightning, max_epochs=1)
    runs.fit(model, images, images)
    assert runs.callback_metrics["it3/auxiliary_loss"] > 0


def test_callbacks_that_change_a_frozen_network_are_refused_in_the_other_namespace() -> None:
    pruning = pytorch_lightning.callbacks.ModelPruning("l1_unstructured", amount=0.5)
    with pytest.raises(Exception, match="freezes the network, and ModelPruning changes it"):
        trainer(pytorch_lightning, pruning).fit(with_parts(IT3Old, train="conditioning"), data())


def test_a_module_of_the_other_namespace_without_a_step_or_a_forward_is_refused() -> None:
    class Bare(IT3Mixin, pytorch_lightning.LightningModule):  # type: ignore[misc]
        net = None

    class Alone(pytorch_lightning.LightningModule):
        pass

    with pytest.raises(Exception, match="Bare has no training_step of its own"):
        trainer(pytorch_lightning).fit(_given_net(Bare), data())
    with pytest.raises(Exception, match="Alone has no forward"):
        IT3Predictor(Alone(), TestTimeCallback(Tent()).settings)  # type: ignore[arg-type]


def _given_net(kind: Any) -> Any:
    class Built(kind):  # type: ignore[misc]
        def __init__(self, **args: Any) -> None:
            super().__init__(**args)

        def configure_model(self) -> None:
            self.net = nn.ModuleDict({"1": nn.Linear(4, 3)})
            super().configure_model()

    Built.__name__ = kind.__name__
    return with_parts(Built)


def test_a_mixin_alone_makes_a_lightning_module() -> None:
    class Own(IT3Mixin):
        pass

    class OfTheOther(IT3Mixin, pytorch_lightning.LightningModule):  # type: ignore[misc]
        pass

    class Mixed(Own, New):
        pass

    class Fine(OfTheOther, Old):  # type: ignore[misc]
        pass

    assert isinstance(Own(), lightning.pytorch.LightningModule)
    assert isinstance(made(Mixed), lightning.pytorch.LightningModule)
    assert not issubclass(Fine, lightning.pytorch.LightningModule)
    assert made(Fine).it3_train == "joint"


def test_two_namespaces_in_one_class_are_refused_in_a_sentence_that_names_the_line() -> None:
    class Own(IT3Mixin):
        pass

    line = "write `from lightning import pytorch as pl` in place of"
    with pytest.raises(TypeError, match=f"Expected Net to derive from one .*: {line}"):
        type("Net", (Own, Old), {})


def test_commands_and_benchmark_refuse_the_other_namespace_in_a_sentence_that_names_the_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "write `from lightning import pytorch as pl` in place of"
    with pytest.raises(TypeError, match=f"IT3Old is a module of pytorch_lightning: {line}"):
        with_priors(with_parts(IT3Old))
    with pytest.raises(SystemExit):
        main(["fit", "--model", f"{__name__}.IT3Old", "--data", "DigitsDataModule"])
    assert line in capsys.readouterr().err


def test_data_modules_serve_the_trainer_of_either_namespace() -> None:
    class Digits(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().test_step(batch, batch_idx)

    found = []
    for namespace in (lightning.pytorch, pytorch_lightning):
        kind = type("Digits", (Digits, namespace.LightningModule), {})
        runs, model = trainer(namespace, max_epochs=1), made(kind)
        digits = DigitsDataModule(val_size=20, train_size=100, test_size=20, shifts=["fog"])
        runs.fit(model, datamodule=digits)
        found.append(runs.test(model, datamodule=digits, verbose=False))
    assert found[0] == found[1]


def test_a_prior_measures_the_targets_of_the_other_namespace() -> None:
    class Regression(Old):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0]), batch[0][:, :3])

    class IT3Regression(IT3Mixin, Regression):  # type: ignore[misc]
        def it3_target(self, batch: Any) -> Tensor:
            target: Tensor = batch[0][:, :3]
            return target

    model = made(IT3Regression, prior=ValuePrior(3), conditioning=FeatureInjection("net.1"))
    trainer(pytorch_lightning, max_epochs=1).fit(model, data(), data())
    everything = torch.cat([inputs for inputs, _ in data()])[:, :3]
    torch.testing.assert_close(model.it3_prior.mean, everything.mean(0))


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_messages_stay_with_the_logger_of_the_namespace_that_was_imported(namespace: str) -> None:
    code = (
        f"import {namespace}, it3_lightning\n"
        "from lightning_utilities.core import rank_zero\n"
        "print(rank_zero.log.name)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{namespace}.utilities.rank_zero"


# Hooks that a base defines


class Says(LitNet):
    """Has all hooks, below the mixin; its batches are mappings of its own names."""

    def it3_inputs(self, batch: Any) -> Any:
        return {"pixels": batch["pixels"].mT}

    def it3_target(self, batch: Any) -> Any:
        return batch["truth"]["class"]

    def it3_with_inputs(self, batch: Any, inputs: Any) -> Any:
        return {**batch, "pixels": inputs["pixels"].mT}

    def it3_sample_dims(self, inputs: Any) -> Any:
        return {"pixels": 3}  # (1, 4, 4, B)

    def it3_valid(self, inputs: Any) -> Tensor | None:
        return None  # all count

    def it3_forward(self, inputs: Any) -> Tensor:
        return self.it3_outputs(self(inputs["pixels"]))

    @staticmethod
    def it3_outputs(returned: Any) -> Tensor:
        scores: Tensor = returned["first"]
        return scores


def test_every_hook_that_may_be_overridden_is_known() -> None:
    documented = {
        name
        for kind in (Conditioned, IT3Mixin)
        for name, value in vars(kind).items()
        if name.startswith("it3_") and "verride" in (getattr(value, "__doc__", None) or "")
    }
    assert documented == set(HOOKS)
    assert {name for name in vars(Says) if name.startswith("it3_")} == set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_the_base_goes_before_the_default_of_the_mixin(name: str) -> None:
    hook = vars(Says)[name]
    base = type("Base", (LitNet,), {name: hook})
    mixed = type("Mixed", (IT3Mixin, base), {})
    again = type("Again", (mixed,), {})
    late = type("Late", (type("Without", (IT3Mixin, LitNet), {}), base), {})
    for kind in (mixed, again, late, type("Both", (AuxiliaryMixin, mixed), {})):
        found = inspect.getattr_static(kind, name)
        assert found is hook, kind
    own = type("Own", (mixed,), {name: lambda *_: None})
    assert inspect.getattr_static(own, name) is vars(own)[name]
    plain = type("Plain", (IT3Mixin, LitNet), {})
    assert getattr(plain, name) is getattr(Conditioned, name)


def test_hooks_of_the_base_are_those_that_training_and_testing_ask() -> None:
    class Net(Says):
        def forward(self, pixels: Tensor) -> Any:
            return {"first": super().forward(pixels.permute(3, 0, 1, 2)), "second": pixels.sum()}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch["pixels"])
            logits = self(self.it3_inputs(batch)["pixels"])["first"]
            return F.cross_entropy(logits, batch["truth"]["class"])

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(self.it3_inputs(batch)["pixels"])["first"]

    class Mixed(IT3Mixin, Net):
        pass

    images, labels = samples()
    batches: Any = [
        {"pixels": images[i : i + 4].permute(1, 2, 3, 0).mT, "truth": {"class": labels[i : i + 4]}}
        for i in range(0, 12, 4)
    ]
    loader, seen = DataLoader(batches, batch_size=None), list[Tensor]()
    settings = DualPass(perturb_inputs=RandomNoise(1.0))
    model = seeded(Mixed(**parts(dual_pass=settings)))
    quiet().fit(model, loader)
    assert len(seen) == 6  # both passes
    assert torch.equal(seen[1], batches[0]["pixels"])
    assert not torch.equal(seen[0], seen[1])
    for scope in ("batch", "sample"):
        callback = adapting(scope=scope, backend="loop") if scope == "sample" else adapting()
        predicted: Any = quiet(callbacks=[callback]).predict(model, loader)
        assert [part.shape for part in predicted] == 3 * [(4, 3)]
        assert callback.summary.samples == 12

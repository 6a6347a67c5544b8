"""What a checkpoint keeps of a module with priors, its plain one, and weights by other names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toy import IT3Net, LitNet, adapting, loader, parts, quiet, samples, seeded
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_module
from torch import Tensor, nn

from it3_lightning import (
    ClassPrior,
    DualPass,
    FeatureInjection,
    ForwardArgument,
    InputConcat,
    IT3Mixin,
    IT3Predictor,
    MaskPrior,
    Settings,
    ValuePrior,
)
from it3_lightning.cli import main
from it3_lightning.integration.checkpoints import load_source


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(theirs[k], v) for k, v in ours.items())


def saved(model: LightningModule, path: Path) -> str:
    """Train for an epoch and let the Trainer write a checkpoint."""
    trainer = quiet()
    trainer.fit(model, loader())
    trainer.save_checkpoint(path)
    return str(path)


# The parts are kept by the mixin


@pytest.mark.parametrize("train", ["joint", "conditioning", "off"])
def test_a_module_that_saves_no_hyperparameters_is_made_again_of_its_checkpoint(
    train: Any, tmp_path: Path
) -> None:
    prior = ClassPrior(3, neutral="uniform")
    conditioning = FeatureInjection("net.dense", mode="film", hidden=5)
    settings = DualPass(label_weight=0.5, own_share=0.25)
    model = IT3Net(prior=prior, conditioning=conditioning, train=train, dual_pass=settings)
    path = saved(seeded(model), tmp_path / "it3.ckpt")
    assert "hyper_parameters" not in torch.load(path, weights_only=True)
    twin = IT3Net.load_from_checkpoint(path, weights_only=True)
    assert equal(twin, model)
    assert (twin.it3_train, twin.it3_dual_pass) == (train, settings)
    assert twin.it3_prior.init_args() == prior.init_args()  # type: ignore[union-attr]
    images, labels = samples(seed=3)
    shown = ClassPrior(3).from_target(labels)
    model.eval(), twin.eval()
    assert torch.equal(twin.predict_with(images, shown), model.predict_with(images, shown))


class Values(IT3Net):
    def it3_target(self, batch: Any) -> Any:
        return torch.stack(3 * [batch[1].float()], 1)


class Maps(IT3Net):
    def it3_target(self, batch: Any) -> Any:
        return batch[1]


class Takes(IT3Net):
    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        return super().forward(x) if prior is None else super().forward(x) + prior[:, :3]


@pytest.mark.parametrize(
    ("kind", "prior", "conditioning"),
    [
        (IT3Net, ClassPrior(3), InputConcat("net.conv")),
        (IT3Net, ClassPrior(3), FeatureInjection(["net.conv", "net.dense"])),
        (Takes, ClassPrior(3), ForwardArgument()),
        (Values, ValuePrior(3), FeatureInjection("net.dense")),
        (Values, ValuePrior(3, mean=[1.0, 2.0, 3.0], std=1.0), FeatureInjection("net.dense")),
        (Maps, MaskPrior(3), FeatureInjection("net.dense")),
    ],
)
def test_every_prior_and_conditioning_is_kept(
    kind: Any, prior: Any, conditioning: Any, tmp_path: Path
) -> None:
    model = kind(prior=prior, conditioning=conditioning)
    trainer = quiet()
    if isinstance(prior, MaskPrior):  # there are no maps to fit
        trainer.strategy.connect(model)
    else:
        trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "it3.ckpt")
    twin = kind.load_from_checkpoint(tmp_path / "it3.ckpt", weights_only=True)
    assert equal(twin, model)
    for made, given in ((twin.it3_prior, prior), (twin.it3_conditioning, conditioning)):
        assert type(made) is type(given)
        assert made.init_args() == given.init_args()


def test_a_predictor_needs_the_class_alone(tmp_path: Path) -> None:
    model = IT3Net(**parts())
    path = saved(seeded(model), tmp_path / "it3.ckpt")
    x, settings = samples()[0], Settings(steps=0)
    made = IT3Predictor.from_checkpoint(path, IT3Net, settings=settings)(x)
    expected = IT3Predictor(model, settings)(x)
    assert torch.equal(made.distance, expected.distance)
    assert expected.distance.min() > 0


def test_what_is_given_goes_before_what_is_kept(tmp_path: Path) -> None:
    path = saved(IT3Net(**parts(train="conditioning")), tmp_path / "it3.ckpt")
    uniform = ClassPrior(3, neutral="uniform")
    twin = IT3Net.load_from_checkpoint(path, prior=uniform, train="joint")
    assert twin.it3_prior is uniform
    assert twin.it3_train == "joint"
    assert twin.it3_dual_pass.own_share == 0.5  # that of the checkpoint
    assert IT3Net.load_from_checkpoint(path, **parts()).it3_train == "joint"  # made complete


def test_arguments_of_the_base_are_given_or_saved_by_it(tmp_path: Path) -> None:
    model = IT3Net(5, **parts())
    path = saved(model, tmp_path / "it3.ckpt")
    assert equal(IT3Net.load_from_checkpoint(path, hidden=5), model)


def test_a_network_built_by_a_hook_gets_its_parts_then(tmp_path: Path) -> None:
    class Lazy(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = LitNet().net

    class IT3Lazy(IT3Mixin, Lazy):
        pass

    model = IT3Lazy(**parts())
    path = saved(model, tmp_path / "it3.ckpt")
    assert equal(IT3Lazy.load_from_checkpoint(path), model)


def test_a_checkpoint_without_parts_asks_for_them(tmp_path: Path) -> None:
    path = saved(LitNet(), tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match="no prior and no conditioning"):
        IT3Net.load_from_checkpoint(path)


def test_parts_that_are_no_plain_data_are_left_out(tmp_path: Path) -> None:
    class Odd(ClassPrior):
        def init_args(self) -> dict[str, Any]:
            return {**super().init_args(), "made_by": object}

    path = saved(IT3Net(**parts(prior=Odd(3))), tmp_path / "it3.ckpt")
    kept = torch.load(path, weights_only=True)["it3"]
    assert "prior" not in kept
    assert kept["conditioning"]["init_args"]["layer"] == ["net.dense"]


def test_a_post_hoc_module_made_again_goes_on_post_hoc(tmp_path: Path) -> None:
    source = tmp_path / "plain.ckpt"
    plain = seeded(LitNet())
    saved(plain, source)
    path = saved(IT3Net(**parts(source_checkpoint=str(source))), tmp_path / "it3.ckpt")
    source.unlink()
    model = IT3Net.load_from_checkpoint(path)
    assert (model.it3_train, model.it3_source_checkpoint) == ("conditioning", str(source))
    quiet().fit(model, loader())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items())


# The plain checkpoint


class Saves(LitNet):
    def __init__(self, hidden: int = 8, lr: float = 0.1) -> None:
        super().__init__(hidden, lr)
        self.save_hyperparameters()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = "mine"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["note"] == "mine"


class IT3Saves(IT3Mixin, Saves):
    pass


def by_command(model: LightningModule, path: Path) -> None:
    main(["export", saved(model, path.with_suffix(".it3")), str(path)])


def by_method(model: Any, path: Path) -> None:
    quiet().fit(model, loader())
    model.it3_export(path)


@pytest.mark.parametrize("export", [by_command, by_method])
@pytest.mark.parametrize(("kind", "plain"), [(IT3Net, LitNet), (IT3Saves, Saves)])
def test_the_plain_checkpoint_is_that_of_the_network_and_its_own_class_reads_it(
    export: Callable[..., None], kind: Any, plain: Any, tmp_path: Path
) -> None:
    model = kind(5, **parts())
    export(model, tmp_path / "plain.ckpt")
    content = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert not [name for name in content["state_dict"] if name.startswith("it3")]
    assert not {"it3", "optimizer_states", "callbacks"} & content.keys()
    assert content.get("hyper_parameters", {}).keys() <= {"hidden", "lr"}
    given = {} if plain is Saves else {"hidden": 5}
    read = plain.load_from_checkpoint(tmp_path / "plain.ckpt", **given)
    assert read.state_dict().keys() == {k for k in model.state_dict() if not k.startswith("it3_")}
    images = samples(seed=3)[0]
    assert torch.equal(read.eval()(images), model.eval()(images))
    (tested,) = quiet().test(plain(5), loader(), tmp_path / "plain.ckpt", verbose=False)
    assert tested == quiet().test(model, loader(), verbose=False)[0]


def test_the_plain_checkpoint_is_a_source_again(tmp_path: Path) -> None:
    model = seeded(IT3Net(**parts()))
    model.it3_export(tmp_path / "plain.ckpt")
    again = IT3Net(**parts(source_checkpoint=str(tmp_path / "plain.ckpt")))
    quiet().fit(again, loader())
    for name, value in LitNet().state_dict().items():
        assert value.shape == again.state_dict()[name].shape
        assert torch.equal(again.state_dict()[name], model.state_dict()[name]), name


def test_the_plain_checkpoint_of_a_module_made_by_a_command_line_makes_its_own_class(
    tmp_path: Path,
) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningModule, "model")
    path = f"{IT3Saves.__module__}.IT3Saves"
    arguments = ["--model", path, "--model.hidden=5", "--model.prior=ClassPrior"]
    arguments += ["--model.prior.num_classes=3", "--model.conditioning=FeatureInjection"]
    asked = parser.parse_args([*arguments, "--model.conditioning.layer=net.dense"])
    model = parser.instantiate_classes(asked).model
    noted = asked.model.init_args.as_dict()
    model._set_hparams({"_class_path": path, "_instantiator": _INSTANTIATOR, **noted})
    model.it3_export(tmp_path / "plain.ckpt")
    read = Saves.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert type(read) is Saves
    assert torch.equal(read.net.dense.weight, model.net.dense.weight)


_INSTANTIATOR = f"{instantiate_module.__module__}.{instantiate_module.__name__}"


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    due = IT3Net(**parts(source_checkpoint="none.ckpt"))
    with pytest.raises(ValueError, match="before its source_checkpoint was loaded"):
        due.it3_export(tmp_path / "plain.ckpt")
    torch.save(LitNet().state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="got a file without state_dict"):
        main(["export", str(tmp_path / "net.pt"), str(tmp_path / "plain.ckpt")])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at '.*none\.ckpt'"):
        main(["export", str(tmp_path / "none.ckpt"), str(tmp_path / "plain.ckpt")])
    with pytest.raises(FileExistsError, match=r"Expected a new file, got .*net\.pt"):
        main(["export", str(tmp_path / "net.pt"), str(tmp_path / "net.pt")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt"]


def test_adaptation_before_an_export_changes_nothing_of_it(tmp_path: Path) -> None:
    model = seeded(IT3Net(**parts()))
    model.it3_export(tmp_path / "before.ckpt")
    quiet(callbacks=[adapting(reset="never")]).test(model, loader(), verbose=False)
    model.it3_export(tmp_path / "after.ckpt")
    one, other = (torch.load(tmp_path / f"{n}.ckpt")["state_dict"] for n in ("before", "after"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# Weights by other names


def wrapped(prefix: str) -> Callable[[Any], Any]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda s: {k.removeprefix("net."): v for k, v in s.items()}, "conv.weight"),
        (lambda s: {"model": s}, "net.conv.weight, .*, under 'model'"),
        (
            lambda s: {"epoch": 3, "model": {k.removeprefix("net."): v for k, v in s.items()}},
            "conv.weight, .*, under 'model'",
        ),
        (wrapped("module."), "module.net.conv.weight"),
        (wrapped("_orig_mod."), "_orig_mod.net.conv.weight"),
        (lambda s: {k.replace("net.", "backbone."): v for k, v in s.items()}, "backbone.conv"),
        (lambda s: {"state_dict": wrapped("module.")(s)}, "module.net.conv.weight, .*'state_dict'"),
    ],
)
def test_weights_by_other_names_are_refused_with_the_lines_that_bring_them(
    change: Any, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, model = seeded(LitNet()), IT3Net(**parts())
    torch.save(change(plain.state_dict()), "other.pt")
    with pytest.raises(ValueError, match="by other names") as raised:
        load_source(model, "other.pt")
    message = str(raised.value)
    assert re.search(rf"found: +{found}", message)
    assert re.search(r"expected: net\.conv\.weight, net\.conv\.bias, .*\.\.\.", message)
    code = "\n".join(line.strip() for line in message.partition("that file:\n")[2].splitlines())
    exec(code.replace("...", ""), {"torch": torch, "IT3Net": IT3Net})
    load_source(model, "weights.pt")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"conv.weight": torch.ones(1)}, "Found conv.weight; expected net.conv.weight, net.conv.b"),
        ({"model": {"a": torch.ones(1)}}, "Found model; .* It holds states .* under model."),
        (nn.Linear(2, 2).state_dict(), "missing net.conv.weight; .*Found weight, bias; expected"),
    ],
)
def test_weights_of_another_network_are_refused_with_what_was_found(
    state: Any, message: str, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"checkpoint of another network than IT3Net: .*{message}"):
        load_source(IT3Net(**parts()), str(tmp_path / "other.pt"))

"""Post-hoc training: the network stays bit for bit what it was."""

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from helpers.toy import (
    Batch,
    IT3Net,
    LitNet,
    differing,
    ending,
    everything,
    loader,
    parts,
    quiet,
    samples,
    seeded,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn

from it3_lightning import Idempotence, IT3TestTimeCallback


@pytest.fixture
def plain(tmp_path: Path) -> tuple[LitNet, str]:
    """An ordinary network, trained for an epoch, and the checkpoint its Trainer wrote."""
    torch.manual_seed(0)
    model, trainer = LitNet(), quiet()
    trainer.fit(model, loader())
    path = str(tmp_path / "plain.ckpt")
    trainer.save_checkpoint(path)
    return model, path


def of_network(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith("net.")}


def post_hoc(plain: tuple[LitNet, str], kind: Any = IT3Net, **args: Any) -> Any:
    return kind(**parts(source_checkpoint=plain[1], **args))


def assert_is_source(model: nn.Module, plain: tuple[LitNet, str]) -> None:
    """Check that the network is that of the checkpoint, bit for bit."""
    expected = of_network(plain[0])
    assert [k for k, v in of_network(model).items() if not torch.equal(v, expected[k])] == []


def test_network_is_bitwise_that_of_the_checkpoint_and_only_the_conditioning_moves(
    plain: tuple[LitNet, str],
) -> None:
    model, images = post_hoc(plain), samples(seed=5)[0]
    before = {k: v.clone() for k, v in model.it3_conditioning.state_dict().items()}
    quiet(max_epochs=2).fit(model, loader())
    expected = of_network(plain[0])
    assert {"net.bn.running_mean", "net.bn.num_batches_tracked"} <= expected.keys()
    for name, value in of_network(model).items():
        assert torch.equal(value, expected[name]), name
    after = model.it3_conditioning.state_dict()
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model.eval()(images), plain[0].eval()(images))


def test_conditioning_alone_without_a_checkpoint_takes_the_weights_at_hand(
    plain: tuple[LitNet, str],
) -> None:
    model: Any = IT3Net(**parts(train="conditioning"))
    model.load_state_dict(plain[0].state_dict())
    quiet().fit(model, loader())
    for name, value in of_network(model).items():
        assert torch.equal(value, of_network(plain[0])[name]), name
    assert model.it3_conditioning.embedders["net-dense"].last.weight.abs().max() > 0


class Seen(Callback):
    """Notes at every training batch which layers train, what needs gradients, what is optimized."""

    def __init__(self, fails: BaseException | None = None) -> None:
        self.fails = fails
        self.modes: dict[str, bool] = {}
        self.needing: set[str] = set()
        self.optimized: set[str] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.modes = {name: child.training for name, child in pl_module.named_modules()}
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.needing = {names[id(p)] for p in pl_module.parameters() if p.requires_grad}
        groups = trainer.optimizers[0].param_groups
        self.optimized = {names[id(p)] for group in groups for p in group["params"]}
        if self.fails is not None:
            raise self.fails


def own(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith("it3_conditioning.")}


def test_network_is_in_eval_mode_and_needs_no_gradient_while_training(
    plain: tuple[LitNet, str],
) -> None:
    model, seen = post_hoc(plain), Seen()
    quiet(callbacks=[seen]).fit(model, loader())
    network = {name: on for name, on in seen.modes.items() if name.startswith("net")}
    assert len(network) > 5
    assert not any(network.values())
    assert not seen.modes[""]
    assert seen.modes["it3_conditioning.embedders.net-dense"]
    assert seen.needing == seen.optimized == own(model)


def test_validation_in_between_leaves_the_network_in_eval_mode(plain: tuple[LitNet, str]) -> None:
    class Validated(IT3Net):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self(batch[0])

        def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
            self.train()  # as some modules do
            return super().training_step(batch, *args, **kwargs)

    model, seen = Validated(**parts(source_checkpoint=plain[1])), Seen()
    quiet(callbacks=[seen], max_epochs=2, num_sanity_val_steps=1).fit(model, loader(), loader())
    assert not any(on for name, on in seen.modes.items() if name.startswith("net"))
    for name, value in of_network(model).items():
        assert torch.equal(value, of_network(plain[0])[name]), name


def test_optimizer_made_elsewhere_sees_only_the_conditioning(plain: tuple[LitNet, str]) -> None:
    def of_all(self: LightningModule) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    model, seen = post_hoc(plain), Seen()
    model.configure_optimizers = MethodType(of_all, model)  # as a command line does
    quiet(callbacks=[seen]).fit(model, loader())
    assert seen.optimized == own(model)
    for name, value in of_network(model).items():
        assert torch.equal(value, of_network(plain[0])[name]), name


def test_conditioning_optimizer_is_used(plain: tuple[LitNet, str]) -> None:
    still = post_hoc(plain, conditioning_optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    before = {k: v.clone() for k, v in still.it3_conditioning.state_dict().items()}
    quiet().fit(still, loader())
    assert all(torch.equal(before[k], v) for k, v in still.it3_conditioning.state_dict().items())


def flags(model: nn.Module) -> dict[str, Any]:
    noted = everything(model)
    return {k: v for k, v in noted.items() if k.startswith(("flags", "mode", "attributes"))}


@pytest.mark.parametrize("error", [None, ValueError("stop"), KeyboardInterrupt()], ids=str)
def test_flags_and_modes_are_put_back_however_fitting_ends(
    plain: tuple[LitNet, str], error: BaseException | None
) -> None:
    model = post_hoc(plain)
    model.net.bn.weight.requires_grad_(False)  # by its owner: stays
    quiet().test(model, loader(), verbose=False)  # Lightning leaves attributes of its own
    before = flags(model.train())
    with ending(error):
        quiet(callbacks=[Seen(error)]).fit(model, loader())
    assert differing(before, flags(model)) == []
    assert not model.net.bn.weight.requires_grad


def test_error_before_training_thaws_too(plain: tuple[LitNet, str]) -> None:
    def broken(parameters: Any) -> Any:
        raise ValueError("broken")

    model = post_hoc(plain, conditioning_optimizer=broken)
    with pytest.raises(ValueError, match="broken"):
        quiet().fit(model, loader())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_search_for_a_learning_rate_thaws_too(
    plain: tuple[LitNet, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = post_hoc(plain)
    before = {k: v.clone() for k, v in model.it3_conditioning.state_dict().items()}
    tuner = Tuner(quiet())
    tuner.lr_find(model, loader(40), num_training=3, attr_name="lr", update_attr=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_is_source(model, plain)
    assert all(torch.equal(before[k], v) for k, v in model.it3_conditioning.state_dict().items())


def test_validation_inside_fit_can_adapt_the_frozen_network(plain: tuple[LitNet, str]) -> None:
    class Validated(IT3Net):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            seen.append(of_network(self)["net.head.weight"])

    seen: list[Tensor] = []
    model = Validated(**parts(source_checkpoint=plain[1]))
    objective = Idempotence(reliability=None)
    callback = IT3TestTimeCallback(stages=["validate"], objective=objective, lr=0.1)
    quiet(callbacks=[callback]).fit(model, loader(), loader())
    assert len(seen) == 3
    source = of_network(plain[0])["net.head.weight"]
    assert not any(torch.equal(weight, source) for weight in seen)
    assert torch.equal(of_network(model)["net.head.weight"], source)


def refused(model: Any, error: type[Exception], match: str) -> None:
    def step(*_: Any) -> None:
        raise AssertionError("a batch was run")

    model.training_step = step
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=match):
        quiet().fit(model, loader())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_checkpoint_of_another_network_is_refused(plain: tuple[LitNet, str]) -> None:
    other = IT3Net(hidden=5, **parts(source_checkpoint=plain[1]))
    wrong = r"another network than IT3Net: net.dense.weight \(8, 8\) instead of \(5, 8\); "
    refused(other, ValueError, wrong)


def test_checkpoint_with_other_layers_names_them(tmp_path: Path) -> None:
    path = str(tmp_path / "other.pt")
    state = LitNet().state_dict()
    state["net.tail.weight"] = state.pop("net.head.weight")
    torch.save(state, path)
    model = IT3Net(**parts(source_checkpoint=path))
    refused(model, ValueError, "missing net.head.weight; unexpected net.tail.weight")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    model = IT3Net(**parts(source_checkpoint=str(tmp_path / "none.ckpt")))
    refused(model, FileNotFoundError, "no checkpoint at .*none.ckpt")


def test_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "code.ckpt")
    torch.save({"state_dict": LitNet().state_dict(), "hyper_parameters": {"net": LitNet}}, path)
    refused(IT3Net(**parts(source_checkpoint=path)), ValueError, "holds objects besides weights")


def test_bare_state_dict_serves_as_source_checkpoint(
    plain: tuple[LitNet, str], tmp_path: Path
) -> None:
    path = str(tmp_path / "bare.pt")
    torch.save(plain[0].state_dict(), path)
    model = IT3Net(**parts(source_checkpoint=path))
    quiet().fit(model, loader())
    for name, value in of_network(model).items():
        assert torch.equal(value, of_network(plain[0])[name]), name


def test_joint_training_can_start_from_a_source_checkpoint(plain: tuple[LitNet, str]) -> None:
    model = seeded(IT3Net(lr=0.0, **parts(source_checkpoint=plain[1], train="joint")))
    quiet().fit(model, loader())
    for name, parameter in plain[0].named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert model.net.bn.num_batches_tracked > plain[0].net.bn.num_batches_tracked
    with pytest.raises(MisconfigurationException, match="has no prior"):
        quiet().fit(IT3Net(source_checkpoint=plain[1]), loader())


def test_second_fit_goes_on_from_the_first_not_from_the_source(plain: tuple[LitNet, str]) -> None:
    model = IT3Net(**parts(source_checkpoint=plain[1], train="joint"))
    quiet().fit(model, loader())
    first = {name: value.clone() for name, value in model.named_parameters()}
    model.lr = 0.0
    quiet().fit(model, loader())
    assert [n for n, value in model.named_parameters() if not torch.equal(first[n], value)] == []


def test_a_source_checkpoint_is_loaded_to_be_tested_before_any_fit(
    plain: tuple[LitNet, str],
) -> None:
    images = samples(seed=5)[0]
    model, adapt = post_hoc(plain), IT3TestTimeCallback(steps=0, measure=False)
    quiet(callbacks=[adapt]).test(model, loader(), verbose=False)
    for name, value in of_network(plain[0]).items():
        assert torch.equal(value, of_network(model)[name]), name
    assert torch.equal(model.eval()(images), plain[0].eval()(images))


def test_the_loss_of_the_conditioning_is_logged(plain: tuple[LitNet, str]) -> None:
    class Losses(Callback):
        values: list[float]

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.values.append(float(trainer.callback_metrics["it3/label_loss_step"]))

    model, losses = post_hoc(plain), Losses()
    losses.values = []
    trainer = quiet(callbacks=[losses], max_epochs=2)
    trainer.fit(model, loader())
    assert len(losses.values) == 6
    last = float(trainer.callback_metrics["it3/label_loss"])
    assert last == pytest.approx(sum(losses.values[3:]) / 3, abs=1e-6)


def test_a_callback_that_watches_the_frozen_network_is_told(plain: tuple[LitNet, str]) -> None:
    stops = EarlyStopping("train_loss", check_on_train_epoch_end=True, strict=False)
    with pytest.warns(UserWarning, match=r"EarlyStopping monitors 'train_loss'.*it3/label_loss"):
        quiet(callbacks=[stops]).fit(post_hoc(plain), loader())
    quiet(callbacks=[EarlyStopping("it3/label_loss", check_on_train_epoch_end=True)]).fit(
        post_hoc(plain), loader()
    )

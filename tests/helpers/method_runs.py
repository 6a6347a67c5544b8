"""Methods by hand, under a Trainer and from YAML: what they predict, batch by batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.modules import images, toy
from helpers.toy import LitNet, differing, everything, quiet
from it3_lightning import TestTimeCallback
from it3_lightning.engine import Adaptation, BatchAdapter, Settings
from it3_lightning.engine.types import Plain
from it3_lightning.methods import (
    EATA,
    LAME,
    MEMO,
    ROID,
    SAR,
    T3A,
    TTT,
    TTTMAE,
    ActMAD,
    Auxiliary,
    Contrastive,
    CoTTA,
    DeYO,
    Entropy,
    LabelShiftEM,
    MaskedPatches,
    RDumb,
    Rotation,
    Tent,
    TestTimeAugmentation,
    TestTimeMethod,
    TTTPlusPlus,
)
from it3_lightning.methods.views import crop_and_flip

Make = Callable[[], TestTimeMethod]

METHODS: dict[str, Make] = {
    "ActMAD": ActMAD,
    "LAME": LAME,
    "LabelShiftEM": LabelShiftEM,
    "T3A": lambda: T3A("net.head"),
    "augmentation": TestTimeAugmentation,
    "CoTTA": lambda: CoTTA(views=2, confidence=1.0, augment=crop_and_flip),
    "RDumb": lambda: RDumb(margin=1.1, epsilon=1.0),
    "ROID": ROID,
    "DeYO": lambda: DeYO(tau_entropy=1.1, tau_plpd=-1.0, margin=1.1, patches=2),
    "EATA": lambda: EATA(margin=1.1, epsilon=1.0, fisher_samples=4),
    "ETA": lambda: EATA(margin=1.1, epsilon=1.0, fisher_weight=0),
    "Entropy": Entropy,
    "MEMO": lambda: MEMO(views=2, augment=crop_and_flip),
    "SAR": lambda: SAR(margin=1.1, recovery=0.0),
    "TTT": TTT,
    "TTT++": lambda: TTTPlusPlus(alignment=0.01, queue=6),
    "TTT-MAE": lambda: TTTMAE(masks=2),
    "Tent": Tent,
}
"""With settings by which every sample counts: small networks are not sure of anything."""

TASKS: dict[str, Callable[[], Auxiliary]] = {
    "TTT": lambda: Rotation("net.dense", 8),
    "TTT++": lambda: Contrastive("net.dense", 8),
    "TTT-MAE": lambda: MaskedPatches("net.conv", 2, image_channels=1, patch=2),
}
"""What those of them need that step on the loss of an auxiliary head."""

NEVER = 1000
"""Batches after which weights go back: none has as many."""

RESETS: dict[Any, int] = {"never": NEVER, "batch": 1, 2: 2}
"""The setting, and the number of batches it stands for."""


def batches(count: int = 5, size: int = 8) -> list[Tensor]:
    """Draw batches of images, of which some spread more."""
    return [images(size, seed=index) * (1 + index % 3) for index in range(count)]


def adapter_of(method: TestTimeMethod, net: nn.Module, **given: Any) -> BatchAdapter:
    """Make what adapts a network by a method with its own settings, or others."""
    settings = Settings(**{**method.defaults, "objective": method, **given})
    return BatchAdapter(net, lambda x, _: net(x), lambda outputs: outputs.softmax(1), settings)


def adapted(adapter: BatchAdapter, net: nn.Module, x: Tensor) -> Adaptation:
    """Adapt to a batch."""
    with adapter.adapted(x, Plain(lambda inputs, _: net(inputs))) as found:
        return found


def run(adapter: BatchAdapter, net: nn.Module, stream: Sequence[Tensor]) -> list[Adaptation]:
    """Adapt to one batch after the other, with one that has a bad sample after each."""
    found = []
    for x in stream:
        found.append(adapted(adapter, net, x))
        bad = x.clone()
        bad[1] = torch.nan
        refused = adapted(adapter, net, bad)
        assert (refused.reason, refused.prediction) == ("non-finite output", None)
    return found


class Validates(LitNet):
    """Ordinary, with a validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Predict, as any does."""
        self(batch[0])


def plain_module(net: nn.Module | None = None) -> Validates:
    """Make an ordinary module in float64 of this network, that has been in a Trainer."""
    module = Validates().double().eval()
    module.net.load_state_dict((net or toy()).state_dict())
    quiet().predict(module, served(batches(1)))
    return module


def served(stream: Sequence[Tensor]) -> DataLoader[Any]:
    """Serve these batches, without labels."""
    return DataLoader([[x] for x in stream], batch_size=None)  # type: ignore[arg-type]


def predicted(
    callback: TestTimeCallback, module: LitNet, *streams: Sequence[Tensor]
) -> list[list[Tensor]]:
    """Predict a dataloader after the other, which leaves the module bitwise as it was."""
    before = everything(module)
    loaders = [served(stream) for stream in streams]
    found: Any = quiet(callbacks=[callback]).predict(module, loaders)
    assert differing(before, everything(module)) == []
    return found if len(streams) > 1 else [found]


def from_yaml(name: str, **arguments: Any) -> Any:
    """Make a method as a configuration names it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--method", type=TestTimeMethod)
    named = {"class_path": f"it3_lightning.{name}", "init_args": arguments}
    return parser.instantiate_classes(parser.parse_object({"method": named})).method

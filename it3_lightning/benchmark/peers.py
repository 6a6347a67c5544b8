"""Rows of methods from the literature: each as its paper has it, where model and data allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from it3_lightning.benchmark.rows import FEWER, Kind, Row
from it3_lightning.engine import Settings
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
    Iterates,
    LabelShiftEM,
    MaskedPatches,
    RDumb,
    Rotation,
    Tent,
    TestTimeAugmentation,
    TestTimeMethod,
    TTTPlusPlus,
)
from it3_lightning.methods.views import is_images
from it3_lightning.utils.messages import unknown

_MANY = 100  # classes: papers take other margins for ImageNet than for CIFAR-10
_MASKS = 8  # of 128: the time of TTT-MAE is proportional


@dataclass(frozen=True)
class Peer:
    """A method as a row.

    Args:
        make: returns it for a kind of model.
        images: whether it needs images ``(B, C, H, W)``, for views.
        classes: whether it needs one class a sample.
        head: kind of auxiliary head that it steps on.
    """

    make: Callable[[Facts], TestTimeMethod]
    images: bool = False
    classes: bool = True
    head: type[Auxiliary] | None = None


@dataclass(frozen=True)
class Facts:
    """What peers must know of a model and its data.

    Args:
        kind: of the model.
        images: whether its inputs are images.
        classes: outputs ``C``.
        last: name of its last linear layer with so many outputs; empty: there is none.
    """

    kind: Kind
    images: bool
    classes: int
    last: str

    @classmethod
    def of(cls, model: Any, kind: Kind, inputs: Any) -> Facts:
        """Return the facts of a model with priors.

        Args:
            model: of the benchmark.
            kind: of it.
            inputs: of the network, one batch.
        """
        classes = int(model.it3_prior.channels)
        last = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear)
            and layer.out_features == classes
            and not name.startswith("it3_")
        ]
        return cls(kind, is_images(inputs), classes, last[-1] if last else "")


def _eata(facts: Facts) -> EATA:
    many = facts.classes >= _MANY
    return EATA(epsilon=0.05 if many else 0.4, fisher_weight=2000.0 if many else 1.0)


def _rdumb(facts: Facts) -> RDumb:
    return RDumb(epsilon=0.05 if facts.classes >= _MANY else 0.4)


PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "Tent": Peer(lambda _: Tent()),
        "EATA": Peer(_eata),
        "SAR": Peer(lambda _: SAR()),
        "DeYO": Peer(lambda _: DeYO(), images=True),
        "CoTTA": Peer(lambda _: CoTTA(), images=True),
        "ROID": Peer(lambda _: ROID(), images=True),
        "RDumb": Peer(_rdumb),
        "ActMAD": Peer(lambda _: ActMAD(), classes=False),
        "LAME": Peer(lambda _: LAME()),
        "LabelShiftEM": Peer(lambda _: LabelShiftEM()),
        "T3A": Peer(lambda facts: T3A(facts.last)),
        "TestTimeAugmentation": Peer(lambda _: TestTimeAugmentation(), images=True),
        "MEMO": Peer(lambda _: MEMO(), images=True),
        "TTT": Peer(lambda _: TTT(), images=True, classes=False, head=Rotation),
        "TTTPlusPlus": Peer(lambda _: TTTPlusPlus(), images=True, classes=False, head=Contrastive),
        "TTTMAE": Peer(
            lambda _: TTTMAE(masks=_MASKS), images=True, classes=False, head=MaskedPatches
        ),
        "Iterates": Peer(lambda _: Iterates(), classes=False),
    }
)
"""By the names of their classes in :mod:`it3_lightning.methods`.

EATA and RDumb have the ``epsilon`` and the weight of their papers for few classes or for many; of
TTT-MAE's 128 masks a step there are 8, or it would take a second for an image.
"""


def peers(
    names: Literal["all"] | Sequence[str],
    facts: Facts,
    heads: Iterable[Auxiliary] = (),
    alone: int | None = None,
) -> list[Row]:
    """Return the rows of methods that go with a model and its data.

    Args:
        names: of methods; ``"all"``: those that do.
        facts: of the model.
        heads: auxiliary heads; a method that needs one of another kind is left out.
        alone: samples of each loader for methods in which each adapts by itself.

    Raises:
        ValueError: a name is unknown, or a method that is named does not go with the model.
    """
    by_kind = {type(head): training_of(head) for head in heads}
    asked = list(PEERS) if names == "all" else names
    rows: list[Row] = []
    for name in asked:
        if name not in PEERS:
            raise ValueError(unknown("method", name, PEERS))
        why = _missing(PEERS[name], facts, by_kind)
        if why and names != "all":
            raise ValueError(f"{name} needs {why}: leave it out of benchmark.methods.")
        if not why:
            rows += _rows(name, PEERS[name], facts, by_kind, alone)
    return rows


def training_of(head: Auxiliary) -> str:
    """Return what the training beside an auxiliary task is called.

    >>> training_of(Rotation("net.layer1", 8))
    'with Rotation'
    """
    return f"with {type(head).__name__}"


def _missing(peer: Peer, facts: Facts, heads: Mapping[type[Auxiliary], str]) -> str:
    if peer.classes and not (facts.kind.classes and facts.kind.balanced):
        return "one class for each sample"
    if peer.images and not facts.images:
        return "images"
    if peer.head is not None and peer.head not in heads:
        return f"a head: benchmark.heads with a {peer.head.__name__}"
    return ""


def _rows(
    name: str, peer: Peer, facts: Facts, heads: Mapping[type[Auxiliary], str], alone: int | None
) -> Iterator[Row]:
    method = peer.make(facts)
    own = dict(method.defaults)
    if not facts.kind.batch_norm:
        own.pop("norm_stats", None)
    elif own.get("steps") == 0 and "norm_stats" not in own:
        own["norm_stats"] = "batch"  # it does not move the network: take the stronger one
    settings = Settings(objective=method, measure=False, **own)
    training = "post-hoc" if method.needs_prior else "ordinary"
    if peer.head is not None:
        training = heads[peer.head]
        yield Row(training, "source")
        if facts.kind.batch_norm:
            still = Settings(steps=0, norm_stats="batch", measure=False)
            yield Row(training, "batch statistics", still)
    most = alone if settings.scope == "sample" else None
    if most is not None:
        yield Row(training, FEWER, samples=most)
    company = facts.kind.context == "batch" and method.needs_prior
    yield Row(training, name, settings, samples=most, published=True, company=company)


def at_rate(row: Row, factor: float) -> Row:
    """Return a row at another learning rate, by a factor."""
    settings = row.settings
    assert settings is not None
    assert settings.lr is not None
    return replace(row, settings=replace(settings, lr=settings.lr * factor))

"""How large the distance usually is: its quantiles on validation data, kept with the weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import fields
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from it3_lightning.engine import Settings, SourceMoments
from it3_lightning.engine.betting import ConformalMartingale
from it3_lightning.engine.types import NormStats
from it3_lightning.methods import TestTimeMethod, TestTimeObjective

_LEVELS = 1000  # quantiles kept, besides that of level 0
_KINDS = {
    "source": "source data as a dict",
    "moments": "moments as a dict",
    "reference": "a reference as a dict",
    "policy": "a policy as a dict",
}
_POLICY = {"name": str, "weights": str, "arguments": dict}


class Calibration:
    """Quantiles of a distance, which distance it was, and of which weights, as plain data.

    It is no part of the weights, so that nothing casts or averages it. ``IT3Mixin`` keeps it in
    checkpoints; another module does so by handing on :meth:`state_dict` in its
    ``on_save_checkpoint`` and giving it to :meth:`load_state_dict` in its ``on_load_checkpoint``.

    >>> calibration = Calibration()
    >>> calibration.take(torch.arange(101.0), by="l2")
    >>> calibration.quantile(0.955, by="l2")
    95.5
    """

    def __init__(self) -> None:
        self.quantiles = torch.zeros(_LEVELS + 1, dtype=torch.float64, device="cpu")
        self.by = ""
        """What the distances were measured by; empty where none were."""
        self.weights = ""
        """Fingerprint of the weights that they were measured with."""
        self.source: dict[str, Any] = {}
        """What a method took from source data, which method it was, and with which weights."""
        self.moments: dict[str, Any] = {}
        """Moments of source data, for ``norm_stats="evidence"``, and with which weights."""
        self.policy: dict[str, Any] = {}
        """How to adapt, as ``it3 calibrate`` chose it, and for which weights: ``"name"``,
        ``"weights"``, and as ``"arguments"`` those of an ``IT3TestTimeCallback``."""
        self.reference: dict[str, Any] = {}
        """Distances for ``gate="bet"``, what they were measured by, and with which weights."""

    def take(self, distances: Tensor, *, by: str, weights: str = "") -> None:
        """Keep the quantiles of distances ``(N,)``, linear between the samples.

        Args:
            distances: of validation samples; those that are not finite do not count, and where none
                is left, what was known before is forgotten.
            by: what they were measured by.
            weights: :func:`fingerprint` of the module then.
        """
        known = distances[distances.isfinite()].cpu().sort().values
        self.by, self.weights = "", ""
        if not known.numel():
            return
        levels = torch.linspace(0, 1, _LEVELS + 1, dtype=torch.float64, device="cpu")
        self.quantiles = _between(known, levels)
        self.by, self.weights = by, weights

    def quantile(self, level: float, *, by: str, weights: str | None = None) -> float:
        """Return the distance that this share of the validation samples does not exceed.

        Args:
            level: the share, in [0, 1].
            by: what the distance is to be measured by.
            weights: :func:`fingerprint` of the module that is to measure; ``None``: any.

        Raises:
            MisconfigurationException: nothing has been measured, or by something else, or with
                other weights.
        """
        if self.by != by:
            has = f"were measured by {self.by}" if self.by else "have not been measured"
            raise _refused(level, f", measured by {by}; they {has}")
        if weights is not None and self.weights != weights:
            raise _refused(level, _OTHERS)
        return float(_between(self.quantiles, torch.tensor([level], dtype=torch.float64)))

    def take_reference(self, distances: Tensor, *, by: str, weights: str) -> None:
        """Keep distances ``(N,)`` for ``gate="bet"``, at random where there are more than 10,000.

        Args:
            distances: as in :meth:`take`.
            by: likewise.
            weights: likewise.
        """
        kept = ConformalMartingale.of(distances.tolist()).reference.tolist()
        known = torch.tensor(kept, dtype=torch.float64, device="cpu")
        self.reference = {"by": by, "weights": weights, "distances": known} if kept else {}

    def bet(self, *, by: str, weights: str) -> ConformalMartingale:
        """Return a bet against these distances that begins.

        Args:
            by: what the distances of the stream are measured by.
            weights: :func:`fingerprint` of the module that measures.

        Raises:
            MisconfigurationException: nothing has been measured, or by something else, or with
                other weights.
        """
        known = self.reference.get("by")
        if known != by:
            has = f"were measured by {known}" if known else "have not been measured"
            raise _refused("bet", f", measured by {by}; they {has}")
        if self.reference.get("weights") != weights:
            raise _refused("bet", _OTHERS)
        return ConformalMartingale.of(self.reference["distances"].tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, for a checkpoint."""
        own = {"quantiles": self.quantiles, "by": self.by, "weights": self.weights}
        return {**own, **{name: getattr(self, name) for name in _KINDS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; nothing where that was not kept.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"Expected a calibration as a mapping, got {type(state).__name__}.")
        if not state:
            return
        quantiles, by, weights = (state.get(name) for name in ("quantiles", "by", "weights"))
        kinds = {name: state.get(name, {}) for name in _KINDS}
        if not isinstance(by, str) or not isinstance(weights, str):
            raise ValueError(
                f"Expected a calibration with names as strings, got by {by!r}, weights {weights!r}."
            )
        for name, kind in kinds.items():
            if not isinstance(kind, dict):
                raise ValueError(f"Expected a calibration with {_KINDS[name]}, got {kind!r}.")
        if kinds["reference"]:
            _checked(kinds["reference"].get("distances"), "distances")
        policy = kinds["policy"]
        if policy and not all(isinstance(policy.get(k), kind) for k, kind in _POLICY.items()):
            raise ValueError(f"Expected a calibration with a policy of {[*_POLICY]}, got {policy}.")
        self.quantiles, self.by, self.weights = _checked(quantiles), by, weights
        self.source, self.moments = kinds["source"], kinds["moments"]
        self.reference, self.policy = kinds["reference"], policy

    def take_former(self, state: Mapping[str, Any]) -> None:
        """Take what version 0.1.0 kept among the weights: quantiles, and a name as bytes.

        Its names did not tell apart what is no string: such a distance is to be measured again.

        Raises:
            ValueError: it is something else.
        """
        name = state.get("name")
        if not isinstance(name, Tensor) or name.dtype != torch.uint8 or name.ndim != 1:
            raise ValueError(f"Expected a calibration with a name as bytes, got {name!r}.")
        self.quantiles = _checked(state.get("quantiles"))
        self.by = bytes(name.tolist()).rstrip(b"\0").decode(errors="ignore")


_OTHERS = ", measured with these weights; they were measured with others"


def _refused(gate: float | str, wanted: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"The gate needs distances of validation samples{wanted}. Run "
        f"Trainer(callbacks=[IT3TestTimeCallback(gate={gate!r})]).validate(model, data) once, or "
        "have that callback in trainer.fit; they are kept in the checkpoint."
    )


_NOT_IN_THE_MEASURE = ("reliability", "balance", "sharpen")


def measured_by(objective: TestTimeMethod | TestTimeObjective, norm_stats: NormStats) -> str:
    """Name what a distance is measured by; what is no plain value has a fingerprint.

    >>> from it3_lightning.methods import Idempotence
    >>> measured_by(Idempotence("js"), "batch")
    "Idempotence, distance 'js', norm_stats 'batch'"
    """
    kind, settings = type(objective), ""
    if not kind.__module__.startswith("it3_lightning.methods."):
        return f"{_label(objective)}, norm_stats {norm_stats!r}"
    for field in fields(objective):  # type: ignore[arg-type]
        if field.init and field.name not in _NOT_IN_THE_MEASURE:
            value = getattr(objective, field.name)
            plain = value is None or isinstance(value, str | int | float)
            settings += f", {field.name} {value if plain else _label(value)!r}"
    return f"{kind.__name__}{settings}, norm_stats {norm_stats!r}"


def _label(value: Any) -> str:
    name = getattr(value, "__qualname__", type(value).__qualname__)
    hashed = hashlib.blake2b(digest_size=8)
    for part in _parts(value, ()):
        hashed.update(part)
    return f"{name}#{hashed.hexdigest()}"


def _parts(value: Any, outer: tuple[int, ...]) -> Iterator[bytes]:
    """Yield bytes that tell a value, with all that it holds, from others.

    Args:
        value: a function with its defaults and what it closes over, an object with its attributes,
            or data.
        outer: which values it lies in, so that circles end.

    Raises:
        MisconfigurationException: it cannot be told.
    """
    yield f"<{type(value).__module__}.{type(value).__qualname__} ".encode()
    held = _held(value) if id(value) not in outer else b"again"
    if isinstance(held, bytes):
        yield held
        return
    yield str(len(held)).encode()
    for part in held:
        yield from _parts(part, (*outer, id(value)))


def _held(value: Any) -> bytes | tuple[Any, ...]:
    """Return what tells a value: bytes, or the values that it holds."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), _bytes(value))
    if isinstance(value, tuple | list):
        return tuple(value)
    if isinstance(value, Mapping):
        return tuple(value.items())
    if isinstance(value, Set):
        return tuple(sorted(map(_label, value)))
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        named = f"{value.__module__}.{value.__qualname__}"
        return (named, value.__code__, value.__defaults__, value.__kwdefaults__, cells)
    if isinstance(value, CodeType):
        return (value.co_code, value.co_consts, value.co_names)
    if isinstance(value, type | ModuleType):
        return f"{getattr(value, '__module__', '')}.{value.__name__}".encode()
    if isinstance(value, BuiltinFunctionType):
        return (value.__qualname__, value.__self__)
    if hasattr(value, "tobytes"):  # arrays and numbers of numpy
        return (str(value.dtype), value.shape, value.tobytes())
    if hasattr(value, "__dict__"):
        return (*_local_methods(type(value)), *vars(value).items())
    return _described(value)


def _local_methods(kind: type) -> list[Any]:
    """Return the methods of a class made inside a function: others there have the same name."""
    return [*filter(callable, vars(kind).values())] if "<locals>" in kind.__qualname__ else []


def _described(value: Any) -> bytes:
    described = repr(value)
    if " at 0x" in described:
        raise MisconfigurationException(
            f"The gate cannot tell {described} from others that measure otherwise. Give a name, a "
            "function, functools.partial of one, or an object with attributes."
        )
    return described.encode()


def fingerprint(module: nn.Module) -> str:
    """Return what tells a module's weights and statistics from others, in any precision above half.

    It covers parameters and persistent buffers that are no counts, ``it3_*`` too, not where they
    lie or which type holds them: a cast that changes no value changes no fingerprint.

    >>> layer = nn.Linear(1, 1)
    >>> before = fingerprint(layer)
    >>> fingerprint(layer.double()) == before
    True
    """
    hashed = hashlib.blake2b(digest_size=16)
    for path, layer in module.named_modules():
        for name, value in {**layer._parameters, **layer._buffers}.items():
            passing = value is None or name in layer._non_persistent_buffers_set
            if passing or (name in layer._buffers and not value.is_floating_point()):
                continue
            hashed.update(f"{path}.{name}".replace("_orig_mod.", "").encode())
            hashed.update(_bytes(value.float() if value.is_floating_point() else value))
    return hashed.hexdigest()


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(values: Tensor) -> Tensor:
    """Return values as integers of the same bits, so that NaN equals NaN, and 0 not -0.

    >>> bits(torch.tensor([0.0, -0.0], dtype=torch.float16)).tolist()
    [0, -32768]
    """
    plain = torch.view_as_real(values.detach()) if values.is_complex() else values.detach()
    return plain.view(_INTEGERS[plain.element_size()])


def _bytes(values: Tensor) -> bytes:
    held: bytes = bits(values).cpu().numpy().tobytes()
    return held


def calibration_of(module: nn.Module) -> Calibration:
    """Return the calibration of a module.

    Raises:
        MisconfigurationException: it has none.
    """
    calibration = getattr(module, "it3_calibration", None)
    if not isinstance(calibration, Calibration):
        raise MisconfigurationException(
            f"The gate keeps quantiles of distances in the module, and {type(module).__name__} has "
            "no place for them. Mix IT3Mixin into it, or set self.it3_calibration = Calibration(), "
            "from it3_lightning.calibration, in its constructor."
        )
    return calibration


def gate_of(module: nn.Module, settings: Settings, level: float) -> float:
    """Return the distance that this share of the validation samples does not exceed.

    Raises:
        MisconfigurationException: it is not known.
    """
    by = measured_by(settings.objective, settings.norm_stats)
    return calibration_of(module).quantile(level, by=by, weights=fingerprint(module))


def moments_of(module: nn.Module) -> SourceMoments:
    """Return the moments of source data that a module keeps, with the weights it has.

    They are empty where it keeps none, or with other weights.
    """
    moments, calibration = SourceMoments(), getattr(module, "it3_calibration", None)
    kept = calibration.moments if isinstance(calibration, Calibration) else {}
    if kept and kept["weights"] == fingerprint(module):
        moments.load_source_dict(kept["source"])
    return moments


def source_of(module: nn.Module, settings: Settings) -> dict[str, Any]:
    """Return what the method took from source data, as a module keeps it, with the weights it has.

    It is empty where it keeps nothing, or of another method, or with other weights.
    """
    calibration = getattr(module, "it3_calibration", None)
    kept = calibration.source if isinstance(calibration, Calibration) else {}
    if not settings.method.needs_source or not kept:
        return {}
    here = measured_by(settings.objective, settings.norm_stats), fingerprint(module)
    source: dict[str, Any] = kept["source"] if (kept["by"], kept["weights"]) == here else {}
    return source


def check_level(gate: float | str | None) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: it is not.
    """
    if isinstance(gate, str):
        raise ValueError(f"Expected gate to be a share in [0, 1], 'bet' or None, got {gate!r}.")
    if gate is not None and not 0 <= gate <= 1:
        raise ValueError(f"Expected gate to be a share in [0, 1] or None, got {gate}.")


def _checked(values: Any, what: str = "quantiles") -> Tensor:
    """Return what a checkpoint holds as quantiles, or as distances.

    Raises:
        ValueError: it is no row of finite numbers.
    """
    if isinstance(values, Tensor) and values.ndim == 1 and values.is_floating_point():
        plain = values.detach().cpu().double()
        if len(plain) and plain.isfinite().all():
            return plain
    raise ValueError(f"Expected a calibration with finite {what} (N,), got {values!r}.")


def _between(ordered: Tensor, levels: Tensor) -> Tensor:
    """Return quantiles of ordered values ``(N,)``, linear between them."""
    places = levels * (len(ordered) - 1)
    low, high = ordered.double()[places.floor().long()], ordered.double()[places.ceil().long()]
    return low + (high - low) * (places - places.floor())

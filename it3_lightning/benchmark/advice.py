"""Advice: which row of a benchmark to use, if any, by one written rule, in words and as YAML."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import Any

import yaml

from it3_lightning.benchmark.intervals import Interval
from it3_lightning.benchmark.results import Harm, Results
from it3_lightning.benchmark.rows import FEWER, PERTURBED, Row
from it3_lightning.callbacks.test_time import TestTimeCallback
from it3_lightning.engine import Settings
from it3_lightning.methods import Idempotence
from it3_lightning.utils.specs import public_path

_TOLERANCE = 0.01  # of the mean error of what is compared with
_UNMOVED = ("source", "batch statistics", "evidence")
_SHUFFLED = "shuffled prior"  # of controls
_PLAIN = str | int | float | bool | None
_NOT_USED = ("measure", "gate", "objective")  # in a callback by other names, or the benchmark's own


@dataclass(frozen=True)
class Judged:
    """A row over another one, on all streams that both are scored on.

    Args:
        row: that is judged.
        over: the other one.
        gain: mean over streams and shifts.
        clean: mean over streams, on clean samples.
        harm: over all cells.
        harmless: whether no cell surely loses more than what is tolerated: 1 % of the mean error of
            the other row. A cell surely loses what its whole interval lies below.
    """

    row: Row
    over: Row
    gain: Interval
    clean: Interval
    harm: Harm
    harmless: bool

    @property
    def good(self) -> bool:
        """Whether it surely gains, and is harmless."""
        return self.gain.low > 0 and self.harmless


@dataclass(frozen=True)
class Advice:
    """What a benchmark advises.

    What moves nothing (other statistics of norm layers, ordinary training on perturbed inputs) is
    taken where it is good over the network as trained; of several what gains most. What adapts, or
    predicts otherwise, is taken where it is good over that, and over the row of its own training
    that has the same statistics. Rows on fewer samples, and controls with a shuffled prior, are not
    judged.

    Args:
        source: the network as trained.
        still: what moves nothing, over the source; ``None``: the source itself is better.
        chosen: what adapts, over what moves nothing; ``None``: nothing is good.
        runner_up: where nothing is good, what gains most.
        judged: number of rows that adapt and were judged.
    """

    source: Row
    still: Judged | None
    chosen: Judged | None
    runner_up: Judged | None
    judged: int

    @property
    def row(self) -> Row:
        """What is advised."""
        best = self.chosen or self.still
        return self.source if best is None else best.row


def advice(results: Results) -> Advice | None:
    """Return what a benchmark advises; ``None`` where nothing has an interval.

    That is so of a single seed and a metric that is no mean over samples.
    """
    rows = {(row.training, row.name): row for row in results.rows}
    source = rows.get(("ordinary", "source"))
    if source is None:
        return None
    plain = [r for r in results.rows if r.training in ("ordinary", PERTURBED) and r is not source]
    unmoved = [judged(results, r, source) for r in plain if r.name in _UNMOVED]
    found = [each for each in unmoved if each is not None]
    still = max((e for e in found if e.good), key=lambda e: e.gain.mean, default=None)
    base = source if still is None else still.row
    moving = []
    for row in results.rows:
        own = rows.get((row.training, base.name), results.baseline(row))
        if row.name in (*_UNMOVED, FEWER) or _SHUFFLED in row.name or row.samples is not None:
            continue
        pair = judged(results, row, base), None if own is None else judged(results, row, own)
        if pair[0] is not None and pair[1] is not None:
            moving.append((pair[0], pair[0].good and pair[1].good))
    if not moving and not found:
        return None
    best = sorted(moving, key=lambda pair: pair[0].gain.mean)
    good = [each for each, is_good in best if is_good]
    return Advice(
        source,
        still,
        chosen=good[-1] if good else None,
        runner_up=best[-1][0] if best and not good else None,
        judged=len(moving),
    )


def judged(results: Results, row: Row, over: Row) -> Judged | None:
    """Return a row over another one; ``None`` where an interval is unknown.

    Args:
        results: of both.
        row: that is judged.
        over: what it is compared with.
    """
    gain, clean = (results.overall(row, over, clean=clean) for clean in (False, True))
    harm = results.harm(row, over=over)
    if gain is None or clean is None or harm is None:
        return None
    tolerated = _TOLERANCE * abs(_error(results, over))
    harmless = all(each.high >= -tolerated for each in results.cells(row, over).values() if each)
    return Judged(row, over, gain, clean, harm, harmless)


def lines(results: Results, found: Advice) -> list[tuple[str, str]]:
    """Return the advice in words: what each is about, and what is to be said."""
    style = f".{results.decimals}f"
    unit = " points" if results.percent else ""
    said = [("", _headline(found))]
    if found.still is not None:
        text = f"{found.still.gain:{style}}{unit} over the network as trained, under the shifts"
        said.append((_called(found.still.row), text))
    best = found.chosen
    if best is not None:
        streams = [s for s in results.streams if results.has(best.row, s)]
        many = f"mean over streams {', '.join(streams)}"
        where = many if len(streams) > 1 else "under the shifts"
        said.append(("gain", f"{best.gain:{style}}{unit} over {_called(best.over)}, {where}"))
    known = best or found.still
    if known is not None:
        said.append(("clean samples", f"{known.clean:{style}}{unit}"))
        said.append(("worst case", f"{_worst(known.harm, style)}; {_share(known.harm)}"))
        said.append(("cost", _cost(results, found)))
    if found.runner_up is not None:
        other = found.runner_up
        said.append(
            (
                "best of the others",
                f"{_name(other.row)}: {other.gain:{style}}{unit}, worst "
                f"{_worst(other.harm, style)}; {_share(other.harm)}",
            )
        )
    return said


def callback_yaml(row: Row) -> str:
    """Return the lines of a configuration that put a row's callback into a Trainer.

    Empty for the network as trained, and for what cannot be written as plain data.

    >>> from it3_lightning.engine import Settings
    >>> still = Settings(steps=0, norm_stats="batch", measure=False)
    >>> print(callback_yaml(Row("ordinary", "batch statistics", still)))
    trainer:
      callbacks:
      - class_path: it3_lightning.IT3TestTimeCallback
        init_args:
          steps: 0
          norm_stats: batch
    <BLANKLINE>
    """
    if row.settings is None:
        return ""
    method = row.settings.objective
    usual = TestTimeCallback(method).settings  # what a configuration leaves out is either of these
    given = {"steps": row.settings.steps, **_differing(row.settings, usual)}
    given |= _differing(row.settings, Settings(objective=method))
    if row.prediction != "first":
        given["prediction"] = row.prediction
    own = isinstance(method, Idempotence)
    name = "IT3TestTimeCallback" if own else "TestTimeCallback"
    if not own or (_differing(method, Idempotence()) and row.settings.steps):
        given["objective" if own else "method"] = _method(method)
    if not _is_plain(given):
        return ""
    callback = {"class_path": f"it3_lightning.{name}", "init_args": given}
    return str(yaml.safe_dump({"trainer": {"callbacks": [callback]}}, sort_keys=False))


def _headline(found: Advice) -> str:
    if found.chosen is not None:
        row = found.chosen.row
        return f"Use it: {row.name}{_TRAININGS.get(row.training, f' ({row.training})')}."
    of = f"nothing of {found.judged} that adapt gains for sure without harm"
    if found.still is not None:
        return f"Do not adapt; use {_called(found.still.row)} alone: {of}."
    return f"Do not adapt; leave the network as it is: {of}."


_TRAININGS: Mapping[str, str] = MappingProxyType(
    {
        "ordinary": "",
        "post-hoc": "; train its conditioning on your network first (post-hoc)",
        "joint": "; train the network jointly first",
        f"{PERTURBED} post-hoc": "; train the network on perturbed inputs, then its conditioning",
    }
)


def _called(row: Row) -> str:
    """Return a row that moves nothing, in words."""
    training = "" if row.training == "ordinary" else f" after training on {row.training} inputs"
    return ("the network as trained" if row.name == "source" else row.name) + training


def _worst(harm: Harm, style: str) -> str:
    number = f"{harm.gain:+{style}}" if harm.interval is None else f"{harm.interval:{style}}"
    return f"{number} on {harm.cell}"


def _share(harm: Harm) -> str:
    return f"{harm.harmed} of {harm.cells} surely harmed"


def _cost(results: Results, found: Advice) -> str:
    forwards, backwards, time = results.cost(found.row)
    times = time / max(results.cost(found.source)[2], 1e-9)
    return (
        f"{forwards:.3g} forward and {backwards:.3g} backward passes; {time:.2g} ms a sample, "
        f"{times:.2g} times the network as trained"
    )


def _name(row: Row) -> str:
    return f"{row.training}, {row.name}"


def _error(results: Results, row: Row) -> float:
    """Return the mean error of a row on the shifts of the first stream it is scored on."""
    stream = next(stream for stream in results.streams if results.has(row, stream))
    score = statistics.fmean(results.scores(row, stream, results.shifts_of(stream)))
    return (100 if results.percent else 1) - score if results.higher_is_better else score


def _differing(one: Any, other: Any) -> dict[str, Any]:
    """Return the fields of a dataclass in which it differs from another one of its kind."""
    return {
        each.name: getattr(one, each.name)
        for each in fields(one)
        if each.init
        and each.name not in _NOT_USED
        and repr(getattr(one, each.name)) != repr(getattr(other, each.name))
    }


def _method(method: Any) -> Any:
    """Return a method as what would make it again; one that does not tell, as it is."""
    if not is_dataclass(method):
        return method
    kind = type(method)
    path = "it3_lightning.Idempotence" if kind is Idempotence else public_path(kind)
    own = {
        each.name: getattr(method, each.name)
        for each in fields(method)
        if each.init and repr(getattr(method, each.name)) != repr(_default(each))
    }
    return {"class_path": path, **({"init_args": own} if own else {})}


def _default(own: Field[Any]) -> Any:
    if own.default_factory is not MISSING:
        return own.default_factory()
    return own.default


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)

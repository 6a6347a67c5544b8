"""Kept files of a benchmark: read back where they are whole and of the same settings."""

from __future__ import annotations

import json
import reprlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from it3_lightning.utils.files import read_json, write_json

T = TypeVar("T")

_RUN = "run.json"
_REPORTS = (
    *("calibrated.ckpt", "calibration.md", "distances.svg", "page.html", "policy.yaml"),
    *("results.csv", "results.json", "table.md", "tuning.md"),
)
_MOST = 5  # differences that are said


def kept(
    file: Path,
    fingerprint: str,
    read: Callable[[dict[str, Any]], T],
    load: Callable[[Path], Any] = read_json,
) -> T | None:
    """Return what a file holds; ``None`` where it is to be made, with a warning if it is there.

    Args:
        file: with a ``"fingerprint"`` among its content.
        fingerprint: JSON of the settings that it must have been made with.
        read: takes the content; what it raises is damage.
        load: the file.
    """
    if not file.is_file():
        return None
    try:
        content = load(file)
        wrong = differences(json.loads(fingerprint), json.loads(content["fingerprint"]))
        if not wrong:
            return read(content)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        warnings.warn(
            f"{file} is damaged ({type(error).__name__}: {error}). It is made again.", stacklevel=2
        )
        return None
    warnings.warn(
        f"{file} is of other settings: {_listed(wrong)}. It is made again, in its place.",
        stacklevel=2,
    )
    return None


def check_folder(folder: Path, training: Mapping[str, Any]) -> None:
    """Refuse a folder with another run, or with files of another origin by the names of reports.

    Args:
        folder: of the results.
        training: all that the training of a run depends on.

    Raises:
        FileExistsError: it is one.
        ValueError: what says which run it is of is damaged.
    """
    run = folder / _RUN
    if not run.is_file():
        found = [name for name in _REPORTS if (folder / name).exists()]
        if found and not [*folder.glob("seed_*"), *folder.glob("*/seed_*")]:
            raise FileExistsError(
                f"{folder} holds {', '.join(found)}, and no run that wrote them: they would be "
                "written over. Set benchmark.output to another folder."
            )
        return
    try:
        wrong = differences(_of_run(training), read_json(run)["training"])
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{run} is damaged, which says what the run in {folder} trained. Remove it if this is "
            "the same run, or set benchmark.output to another folder."
        ) from error
    if wrong:
        raise FileExistsError(
            f"{folder} holds a run with other data, model or training: {_listed(wrong)}. Set "
            f"benchmark.output to another folder, or remove {folder}."
        )


def mark_folder(folder: Path, training: Mapping[str, Any]) -> None:
    """Write down in a folder which run it is of."""
    write_json(folder / _RUN, {"training": _of_run(training)})


def differences(now: Any, then: Any, name: str = "") -> list[str]:
    """Say where plain data differ.

    >>> differences({"data": {"size": 10}, "epochs": 1}, {"data": {"size": 20}, "epochs": 1})
    ['data.size 10 instead of 20']
    """
    if isinstance(now, list) and isinstance(then, list):
        now, then = dict(enumerate(now)), dict(enumerate(then))
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        return [
            each
            for key in {**now, **then}
            for each in differences(now.get(key), then.get(key), f"{name}.{key}".lstrip("."))
        ]
    if repr(now) == repr(then):  # NaN is NaN
        return []
    return [f"{name} {reprlib.repr(now)} instead of {reprlib.repr(then)}"]


def rebuilt(kind: type[T], saved: Mapping[str, Any]) -> T:
    """Return an object of a dataclass of plain fields from what ``asdict`` made of it.

    Fields that a former version did not have yet take their defaults.

    Raises:
        ValueError: names or types of the fields are others.
    """
    hints = get_type_hints(kind)
    needed = {each.name for each in fields(kind) if each.default is MISSING}  # type: ignore[arg-type]
    if not needed <= saved.keys() <= hints.keys():
        raise ValueError(f"Expected {', '.join(hints)}, got {', '.join(saved)}.")
    for name, value in saved.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"Expected {name} to be a {hints[name]}, got {value!r}.")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def _fits(value: Any, hint: Any) -> bool:
    if hint in (str, int):
        return isinstance(value, hint)
    if type(None) in get_args(hint):
        return value is None or _fits(value, get_args(hint)[0])
    numbers = [value] if hint is float else value
    return isinstance(numbers, list) and all(isinstance(each, int | float) for each in numbers)


def _of_run(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells two runs apart: another version trains again, in the same place."""
    return {name: value for name, value in training.items() if name != "versions"}


def _listed(wrong: list[str]) -> str:
    return f"{'; '.join(wrong[:_MOST])}{'; ...' * (len(wrong) > _MOST)}"

"""What the settings of a data module may be, and the errors for everything else."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from it3_lightning.data.shifts import Shift
from it3_lightning.messages import unknown

Stream = Literal["equal", "unequal"]
Split = Literal["test", "validation"]
Severity = int | Literal["all"]
SEVERITIES = (1, 2, 3, 4, 5)


def check_integer(name: str, value: object, least: int, *, optional: bool = False) -> None:
    """Refuse what is not an integer of at least ``least`` (or None, where that is allowed)."""
    if optional and value is None:
        return
    if type(value) is not int or value < least:
        raise ValueError(
            f"Expected {name} to be an integer of at least {least}{' or None' * optional}, got "
            f"{value!r}. Set {name}={least} or more."
        )


def check_choices(stream: str, evaluate_on: str) -> None:
    """Refuse an unknown stream or split."""
    if stream not in get_args(Stream):
        raise ValueError(unknown("stream", stream, get_args(Stream)))
    if evaluate_on not in get_args(Split):
        raise ValueError(unknown("evaluate_on", evaluate_on, get_args(Split)))


def check_share(name: str, value: float) -> None:
    """Refuse what is no share of something: a number between 0 and 1, neither included."""
    if not 0 < value < 1:
        raise ValueError(
            f"Expected {name} to be between 0 and 1, got {value!r}. Set {name}=0.2 for a fifth."
        )


def check_shifts(
    shifts: Sequence[str],
    severity: Severity,
    change: Callable[[str, int], object] = Shift,
    *,
    example: str = "fog",
) -> None:
    """Refuse an unknown or repeated shift, a single string, and a severity outside 1 to 5.

    Args:
        shifts: Names.
        severity: 1 to 5, or ``"all"``.
        change: Makes a shift of a name and a severity, and refuses what it does not know.
        example: Name of a shift that it knows.
    """
    if isinstance(shifts, str) or len(set(shifts)) != len(shifts):
        raise ValueError(
            f"Expected shifts to be a list of different names, got {shifts!r}. "
            f'Write for example shifts=["{example}"].'
        )
    for name in [*shifts, example]:  # severity is checked though the list be empty
        change(name, SEVERITIES[0] if severity == "all" else severity)


def check_corrupted(corruptions: str, known: Sequence[str], evaluate_on: Split) -> None:
    """Refuse an unknown source of corruptions, and files of test images for validation."""
    if corruptions not in known:
        raise ValueError(unknown("source of corruptions", corruptions, known))
    if corruptions == "files" and evaluate_on == "validation":
        raise ValueError(
            'Expected evaluate_on="test" with corruptions="files", got "validation": the published '
            "files hold test images alone. To choose settings without these, set "
            f"corruptions={' or '.join(repr(k) for k in known if k != 'files')}."
        )

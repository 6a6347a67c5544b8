"""What the settings of a data module may be, and the errors for everything else."""

from collections.abc import Sequence

from it3_lightning.data.contract import Stream
from it3_lightning.utils.messages import unknown


def check_integer(name: str, value: object, least: int, *, optional: bool = False) -> None:
    """Refuse what is not an integer of at least ``least`` (or None, where that is allowed)."""
    if optional and value is None:
        return
    if type(value) is not int or value < least:
        raise ValueError(
            f"Expected {name} to be an integer of at least {least}{' or None' * optional}, got "
            f"{value!r}. Set {name}={least} or more."
        )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse what is none of the known words.

    >>> check_choice("stream", "equal", ["equal", "unequal"])
    """
    if value not in known:
        raise ValueError(unknown(name, value, known))


def check_share(name: str, value: float) -> None:
    """Refuse what is no share of something: a number between 0 and 1, neither included."""
    if not 0 < value < 1:
        raise ValueError(
            f"Expected {name} to be between 0 and 1, got {value!r}. Set {name}=0.2 for a fifth."
        )


def check_deviation(name: str, value: float, unit: str) -> None:
    """Refuse a negative standard deviation."""
    if not value >= 0:
        raise ValueError(
            f"Expected {name} to be at least 0 {unit}, got {value!r}. Set {name}=0 for none."
        )


def check_equal(stream: Stream, why: str) -> None:
    """Refuse a stream of unequal classes on data that have none."""
    if stream != "equal":
        raise ValueError(
            f"Expected stream='equal', got {stream!r}: {why}. For the benchmark set "
            "streams: [equal]."
        )


def check_names(shifts: Sequence[str], example: str) -> None:
    """Refuse a single string and repeated names."""
    if not isinstance(shifts, list | tuple) or len(set(shifts)) != len(shifts):
        raise ValueError(
            f"Expected shifts to be a list of different names, got {shifts!r}. "
            f'Write for example shifts=["{example}"].'
        )

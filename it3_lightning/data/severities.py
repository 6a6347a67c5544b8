"""How strong a shift is, 1 (weak) to 5 (strong), and how that stands in the names of tests."""

from collections.abc import Iterable
from typing import Literal

Severity = int | Literal["all"]
SEVERITIES = (1, 2, 3, 4, 5)


def by_severity(shifts: Iterable[str], severity: Severity) -> dict[str, tuple[str, int]]:
    """Return shift and severity of every test on shifted samples, by the test's name.

    Args:
        shifts: Names of the shifts.
        severity: 1 (weak) to 5 (strong), or ``"all"``: each in turn.

    >>> list(by_severity(["fog"], "all"))
    ['fog/1', 'fog/2', 'fog/3', 'fog/4', 'fog/5']
    """
    if severity != "all":
        return {name: (name, severity) for name in shifts}
    return {f"{name}/{level}": (name, level) for name in shifts for level in SEVERITIES}


def parted(name: str) -> tuple[str, int | None]:
    """Return shift and severity of a test's name; None for one that tells no severity.

    Levels of a range are other samples, and shifts of their own.

    >>> [parted(name) for name in ("fog/3", "shape_2", "clean")]
    [('fog', 3), ('shape_2', None), ('clean', None)]
    """
    shift, _, severity = name.rpartition("/")
    if not shift or severity not in map(str, SEVERITIES):
        return name, None
    return shift, int(severity)


def check_severity(severity: object) -> None:
    """Refuse what is not an integer from 1 to 5.

    >>> check_severity(3)
    """
    if type(severity) is not int or severity not in SEVERITIES:
        raise ValueError(
            f"Expected severity to be one of 1, 2, 3, 4, 5, got {severity!r}. "
            "Give an integer: 1 is the weakest, 5 the strongest."
        )

"""How strong a shift is: 1 (weak) to 5 (strong)."""

from typing import Literal

Severity = int | Literal["all"]
SEVERITIES = (1, 2, 3, 4, 5)


def check_severity(severity: object) -> None:
    """Refuse what is not an integer from 1 to 5.

    >>> check_severity(3)
    """
    if type(severity) is not int or severity not in SEVERITIES:
        raise ValueError(
            f"Expected severity to be one of 1, 2, 3, 4, 5, got {severity!r}. "
            "Give an integer: 1 is the weakest, 5 the strongest."
        )

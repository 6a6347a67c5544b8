"""Files of every table and profile under damage of any kind: they load, or the error names them."""

import functools
import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.airfoil_files import write_self_noise
from helpers.tables import covertype_lines, write_adult, write_boston, write_covertype, write_houses
from hypothesis import given, settings
from hypothesis import strategies as st

from it3_lightning.data import (
    AdultDataModule,
    AirfoilSelfNoiseDataModule,
    BostonDataModule,
    CovertypeDataModule,
    CSVDataModule,
)
from it3_lightning.data.airfoils import POLAR_NAMES, ProfileSet

PROFILES = ProfileSet(count=8)


def packed_houses(root: Path) -> None:
    file = write_houses(root / "houses.csv", 12)
    (root / "houses.csv.gz").write_bytes(gzip.compress(file.read_bytes()))


def polars(root: Path) -> None:
    arrays = {name: np.full(8, 0.9) for name in POLAR_NAMES}
    arrays |= {"parameters": PROFILES.parameters().numpy()}
    np.savez(PROFILES.file(root), settings=np.array(PROFILES.settings), **arrays)  # type: ignore[arg-type]


KINDS: dict[str, tuple[Callable[[Path], object], str, Callable[[Path], object]]] = {
    "csv": (
        lambda root: write_houses(root / "houses.csv", 12),
        "houses.csv",
        lambda root: CSVDataModule(root / "houses.csv", target="price", task="regression").load(),
    ),
    "gzip": (
        packed_houses,
        "houses.csv.gz",
        lambda root: CSVDataModule(root / "houses.csv.gz", target="town").load(),
    ),
    "test_file": (
        packed_houses,
        "houses.csv",
        lambda root: CSVDataModule(
            root / "houses.csv.gz", test_path=root / "houses.csv", target="town"
        ).load(),
    ),
    "no_header": (
        lambda root: (root / "rows.csv").write_bytes(b"1;01;a\n2;02;b\n;01;a\n4;;b\n"),
        "rows.csv",
        lambda root: CSVDataModule(
            root / "rows.csv",
            target="y",
            names=["x", "code", "y"],
            categorical=["code"],
            separator=";",
        ).load(),
    ),
    "boston": (
        lambda root: write_boston(root / "boston.csv", 8),
        "boston.csv",
        lambda root: BostonDataModule(root / "boston.csv").load(),
    ),
    "adult": (
        lambda root: write_adult(root, 6, 5),
        "adult.test",
        lambda root: AdultDataModule(root).load(),
    ),
    "covertype": (
        lambda root: write_covertype(root, covertype_lines(10), "covtype.data"),
        "covtype.data",
        lambda root: CovertypeDataModule(root).load(),
    ),
    "self_noise": (
        write_self_noise,
        "airfoil_self_noise.dat",
        lambda root: AirfoilSelfNoiseDataModule(root).load(),
    ),
    "polars": (polars, PROFILES.file("").name, PROFILES.polars),
}


PIECES = (
    b"",
    b"?",
    b"x",
    b'"',
    b"\r",
    b"\n\n",
    b"\0",
    b"\xff",
    b"1e400",
    b"1" * 40,
    b",",
    b"|",
    b"1,5",
)
EDITS = st.tuples(st.floats(0, 1), st.integers(0, 3), st.sampled_from(PIECES), st.integers(0, 255))


@pytest.fixture(scope="module", params=list(KINDS))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[[], object]]:
    """A file of each kind, and what loads it."""
    root = tmp_path_factory.mktemp(request.param)
    write, name, load = KINDS[request.param]
    write(root)
    load(root)  # whole, it loads
    return root / name, lambda: load(root)


def edited(data: bytes, edit: tuple[float, int, bytes, int]) -> bytes:
    """Insert a piece of text, put a byte in the place of others, or cut off the rest."""
    where, gone, piece, byte = edit
    start = int(where * len(data))
    if not gone:
        return data[:start] + piece + data[start:]
    return data[:start] + (bytes([byte]) + data[start + gone :] if gone < 3 else b"")


def refused(load: Callable[[], object]) -> Exception | None:
    """Return the error of loading, if there is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Expected categories")
        try:
            load()
        except Exception as error:
            return error
    return None


@settings(derandomize=True, max_examples=20, deadline=None, database=None)
@given(edits=st.lists(EDITS, min_size=1, max_size=3))
def test_a_damaged_file_loads_or_is_named(
    case: tuple[Path, Callable[[], object]], edits: list[tuple[float, int, bytes, int]]
) -> None:
    file, load = case
    whole = file.read_bytes()
    file.write_bytes(functools.reduce(edited, edits, whole))
    refusal = refused(load)
    file.write_bytes(whole)
    if refusal is not None:
        assert type(refusal) is ValueError
        assert str(refusal).startswith("Expected")
        assert file.name in str(refusal)

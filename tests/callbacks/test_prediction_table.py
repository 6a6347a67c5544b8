"""Part files merged into a table: in order, each sample once, in csv and in parquet."""

import csv
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from it3_lightning.callbacks.prediction_table import indices_in, merge, write_part


def row(index: int, value: float | None = 0.5, loader: int = 0) -> dict[str, Any]:
    return {"dataloader": loader, "index": index, "predicted_value_0": value, "moved": index > 2}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_many_parts_become_one_table_in_order_with_each_sample_once(tmp_path: Path) -> None:
    parts = []
    for number in range(150):  # of two samples; the last repeats the first's
        own = [2 * number + 1, 2 * number] if number < 149 else [1, 0]
        parts.append(tmp_path / f"{number:03}.csv")
        write_part(parts[-1], [row(index, float(number)) for index in own])
    assert indices_in(parts[3]) == [6, 7]
    assert merge(parts, tmp_path / "all.csv", "csv") == 298
    rows = table(tmp_path / "all.csv")
    assert [int(each["index"]) for each in rows] == list(range(298))
    assert [float(each["predicted_value_0"]) for each in rows] == [i // 2 for i in range(298)]
    assert [path.name for path in tmp_path.iterdir() if path not in parts] == ["all.csv"]


def test_dataloaders_come_one_after_the_other(tmp_path: Path) -> None:
    write_part(tmp_path / "1.csv", [row(0, loader=1), row(5, loader=0)])
    write_part(tmp_path / "0.csv", [row(7, loader=0), row(1, loader=1)])
    merge(sorted(tmp_path.glob("*.csv")), tmp_path / "all", "csv")
    keys = [(each["dataloader"], each["index"]) for each in table(tmp_path / "all")]
    assert keys == [("0", "5"), ("0", "7"), ("1", "0"), ("1", "1")]


def test_parquet_holds_the_same_values_with_their_types(tmp_path: Path) -> None:
    write_part(tmp_path / "part.csv", [row(3, 0.1), row(1, None)])
    merge([tmp_path / "part.csv"], tmp_path / "all", "parquet")
    assert parquet.read_table(tmp_path / "all").to_pylist() == [row(1, None), row(3, 0.1)]


def test_other_columns_in_another_part_are_told(tmp_path: Path) -> None:
    write_part(tmp_path / "0.csv", [row(0)])
    write_part(tmp_path / "1.csv", [{"dataloader": 0, "index": 1, "predicted_class": 2}])
    with pytest.raises(ValueError, match=r"as in 0\.csv, got dataloader, index, predicted_class"):
        merge(sorted(tmp_path.glob("*.csv")), tmp_path / "all", "csv")
    assert not (tmp_path / "all").exists()

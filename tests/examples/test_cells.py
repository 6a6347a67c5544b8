"""The examples in cells run, and print what their pages show: the same words, other figures."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CELLS = runpy.run_path(str(ROOT / "docs" / "cells.py"))
FIGURE = re.compile(r"[+-]?(\d+\.\d+|nan)")
VERDICT = re.compile(r"(gains|loses|is level)$", re.MULTILINE)


def words(text: str) -> list[str]:
    """Return what stands in a text beside figures and verdicts."""
    return VERDICT.sub("VERDICT", FIGURE.sub("FIGURE", text)).split()


def faster(text: str) -> str:
    """Return an example with two seeds and an epoch."""
    changed, count = re.subn(r"^SEEDS, EPOCHS = .*$", "SEEDS, EPOCHS = 2, 1", text, flags=re.M)
    assert count == 1
    return changed


@pytest.mark.parametrize("name", sorted(CELLS["PAGES"]))
def test_an_example_prints_what_its_page_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # figures are drawn there
    text = CELLS["script"](name)
    shown = CELLS["printed_by"](name)
    printed = CELLS["run"](faster(text))
    assert len(printed) == len(shown)
    assert list(map(words, printed)) == list(map(words, shown))
    assert any(FIGURE.search(part) for part in shown)
    drawn = re.findall(r"savefig\(\"(\w+\.svg)\"", text)
    assert {path.name for path in tmp_path.glob("*.svg")} == set(drawn)
    for figure in drawn:
        labels = [
            re.findall(r"<text[^>]*>([a-z][^<]+)<", (folder / figure).read_text())
            for folder in (tmp_path, ROOT / "docs")
        ]
        assert labels[0] == labels[1] != []


def test_a_page_has_words_code_and_what_was_printed_in_their_order() -> None:
    text = '"""A."""\n\n# %% [markdown]\n# # One\n#\n# two\n\n# %%\nx = 1\nprint(x)\n\n# %%\nx\n'
    assert CELLS["run"](text) == ["1", ""]
    assert CELLS["page"](text, ["1", ""]) == (
        "# One\n\ntwo\n\n```python\nx = 1\nprint(x)\n```\n\n```text\n1\n```\n\n```python\nx\n```\n"
    )


def test_every_example_in_cells_is_a_page() -> None:
    found = {path.stem for path in (ROOT / "examples").glob("*.py") if "\n# %%" in path.read_text()}
    assert found == CELLS["PAGES"]
    assert found == {path.stem for path in (ROOT / "docs" / "printed").glob("*.txt")}

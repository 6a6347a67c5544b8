"""Documents: what they name exists, their examples run, their commands are those that are run."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grimp
import pytest
import yaml
from helpers.reader import reader
from packaging.requirements import Requirement
from packaging.version import Version

from it3_lightning.cli import main
from it3_lightning.engine import OPTIMIZERS

ROOT = Path(__file__).parent.parent
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *PAGES)
WHOLE = ("CONTRIBUTING.md", "docs/from_torch_ttt.md", "docs/ttt_layers.md")
TOP = ("it3_lightning", "configs", "tests", "examples", ".ci")  # folders
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, TOP))})/[\w./-]*")
FILE = re.compile(r"`(\.?[\w-]+\.(?:md|toml|cff|yaml))`")  # at the top
TEST = re.compile(r"`(test_\w+)`")
OF_RUNS = {"policy.yaml", "table.md", "tuning.md"}  # written by commands
CHECKS = ["ruff check .", "ruff format --check .", "mypy", "lint-imports"]
TESTS = "python -m pytest -n auto"


def text(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{re.escape(language)}\n(.*?)^```$", text(name), re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_in_documents_exist(name: str) -> None:
    paths = {path.rstrip(".") for path in PATH.findall(text(name))}
    paths |= set(FILE.findall(text(name))) - OF_RUNS
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text(name)) if ":" not in link]
    folder = (ROOT / name).parent
    assert [link for link in links if not (folder / link.partition("#")[0]).is_file()] == []


def test_the_readme_and_the_first_page_lead_to_every_page() -> None:
    pages = {Path(page).stem for page in PAGES} - {"index"}
    assert {page for page in pages if f"docs/{page}.md" not in text("README.md")} <= {
        "api",
        "testing",
    }
    listed = "\n".join(blocks("docs/index.md", "{toctree}")).split()
    assert sorted(set(listed) & pages) == sorted(pages)


def test_the_documents_are_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    found = subprocess.run(
        [*command, "docs", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    page = (tmp_path / "api.html").read_text()
    assert all(name in page for name in ("IT3Mixin", "IT3TestTimeCallback", "TTTLinear", "ROID"))


def test_the_figure_is_what_its_script_draws(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs/draw_how_it_works.py"))["draw"](tmp_path / "figure.svg")
    words = [re.findall(r"<text[^>]*>([^<]+)<", path.read_text()) for path in _figures(tmp_path)]
    assert words[0] == words[1] != []


def _figures(folder: Path) -> tuple[Path, Path]:
    return folder / "figure.svg", ROOT / "docs/how_it_works.svg"


def test_the_map_names_every_folder_of_the_package() -> None:
    package = ROOT / "it3_lightning"
    folders = {f"it3_lightning/{init.parent.name}/" for init in package.glob("*/__init__.py")}
    for name in ("README.md", "CONTRIBUTING.md"):
        assert folders - set(PATH.findall(text(name))) == set()


def test_laws_name_tests_that_exist() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = TEST.findall(text("CONTRIBUTING.md"))
    assert len(named) >= 11
    assert [name for name in named if f"def {name}(" not in code] == []


@pytest.mark.parametrize(
    "code", [pytest.param(block, id=name) for name in WHOLE for block in blocks(name, "python")]
)
def test_examples_that_are_whole_run(code: str, tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(code)
    with patch.dict(OPTIMIZERS):
        defined: dict[str, Any] = runpy.run_path(str(file))
    tests: list[Callable[[], None]] = [v for k, v in defined.items() if k.startswith("test_")]
    for test in tests:
        test()


@pytest.mark.parametrize("name", [n for n in ("README.md", *PAGES) if n not in WHOLE])
def test_examples_run_on_what_a_reader_has(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (code := blocks(name, "python")):
        return
    names = reader(tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in code:
        exec(compile(block.replace("cuda", "cpu"), name, "exec"), names)


def commands(name: str) -> list[list[str]]:
    """Return the arguments of the commands `it3 benchmark` in a document that name a config."""
    lines = "".join(blocks(name, "sh")).replace("\\\n", " ").splitlines()
    ours = [line for line in lines if line.startswith("it3 benchmark --config c")]
    found = [shlex.split(line, comments=True)[1:] for line in ours]
    return [[word for word in words if not word.startswith("$")] for words in found]


@pytest.mark.parametrize("name", ["command_line", "results", "which_method"])
def test_benchmarks_in_documents_are_understood(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = commands(f"docs/{name}.md")
    assert found
    for arguments in found:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--print_config"])
        assert ended.value.code in (0, None)
        assert "benchmark:" in capsys.readouterr().out


def test_checks_are_the_same_everywhere() -> None:
    (commands,) = (block for block in blocks("CONTRIBUTING.md", "sh") if "mypy" in block)
    assert commands.splitlines() == [*CHECKS, TESTS]
    for command in (*CHECKS, TESTS):
        assert f"\n.venv/bin/{command}\n" in text(".ci/run")
    assert any(block.endswith(f".venv/bin/{TESTS}\n") for block in blocks("README.md", "sh"))
    assert f"&& .oldest/bin/{TESTS}\n" in text("CONTRIBUTING.md")


def test_the_oldest_versions_that_are_tested_are_the_bounds_that_are_stated() -> None:
    lines = [line.partition("#")[0].strip() for line in text("tests/oldest.txt").splitlines()]
    pinned = {line.partition("==")[0]: line.partition("==")[2] for line in filter(None, lines)}
    assert pinned["lightning"] == pinned["pytorch-lightning"]  # the same, by two names
    project = tomllib.loads(text("pyproject.toml"))["project"]
    for stated in map(Requirement, project["dependencies"]):
        (bound,) = stated.specifier
        assert bound.operator == ">="
        assert Version(bound.version) == Version(pinned.pop(stated.name))
    assert pinned == {}


def test_hooks_are_local_and_run_the_checks() -> None:
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == CHECKS
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert not any(hook["pass_filenames"] for hook in repository["hooks"])


def test_the_citation_is_that_of_the_paper() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Durasov", "Shocher", "Oner", "Chechik", "Efros", "Fua"]
    assert (paper["title"], paper["year"]) == ("IT3: Idempotent Test-Time Training", 2025)
    assert paper["identifiers"][0]["value"] == "arXiv:2410.04201"


def test_imports_keep_their_contracts() -> None:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    found = subprocess.run(
        [*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


def test_no_file_imports_the_folder_it_lies_in() -> None:
    graph = grimp.build_graph("it3_lightning", cache_dir=None)
    parents = {m: m.rpartition(".")[0] for m in graph.modules if "." in m}
    circles = {m for m, p in parents.items() if p in graph.find_modules_directly_imported_by(m)}
    public = {
        m for m in graph.modules if "it3_lightning" in graph.find_modules_directly_imported_by(m)
    }
    assert circles | public == set()

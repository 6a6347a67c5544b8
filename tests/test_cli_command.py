"""The command in a shell: what it lists, what its help says, and how a user's mistake ends."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

import it3_lightning
from it3_lightning import cli

CONFIG = f"--config={Path(__file__).parent.parent / 'configs' / 'digits.yaml'}"
CALLBACKS = ["TestTimeCallback", "IT3TestTimeCallback", "IT3PredictionWriter"]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in a shell, and return its exit code and what it printed."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delenv("IT3_TRACEBACK", raising=False)

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["it3", *arguments])
        code: object = 0
        try:
            cli.command()
        except SystemExit as end:
            code = end.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.mark.parametrize("asked", [(), ("-h",), ("--help",)])
def test_every_command_is_listed(asked: tuple[str, ...], shell: Any) -> None:
    code, out, _ = shell(*asked)
    listed = re.findall(r"^  (\w+) +(\S.*)\.$", out, re.MULTILINE)
    commands = [name for name, _ in listed]
    assert code == 0
    assert commands[:4] == ["fit", "validate", "test", "predict"]
    assert {"benchmark", "tune", "calibrate", "compare"} <= set(commands)
    assert all(len(line) <= 100 for line in out.splitlines())
    for name in commands:
        code, out, _ = shell(name, "--help")
        assert code == 0
        assert re.match(rf"usage: it3 (\[options\] )?{name}\b", out), name


def test_the_version_is_that_of_the_package(shell: Any) -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)
    assert version is not None
    assert shell("--version") == (0, f"it3_lightning {version[1]}\n", "")


def test_an_unknown_command_is_told_the_known_ones(shell: Any) -> None:
    code, _, err = shell("trian", CONFIG)
    assert code == 1
    assert err.startswith("it3: Unknown command 'trian'.")
    assert "Known: fit, validate, test, predict, benchmark" in err


OWN_MODULE = """
import lightning.pytorch as pl
class Net(pl.LightningModule):
    def __init__(self, fails: bool = False):
        super().__init__()
        if fails:
            raise ValueError("of the module's own")
"""


def test_a_mistake_is_one_paragraph(
    shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(tmp_path / "none")
    code, _, err = shell("compare", missing)
    assert code == 1
    assert err.startswith(f"it3: Expected results.json in {missing}")
    assert "Traceback" not in err
    assert err.count("\n") == 1
    monkeypatch.setenv("IT3_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["it3", "compare", missing])
    with pytest.raises(FileNotFoundError, match=r"Expected results\.json"):
        cli.command()


@pytest.mark.parametrize(
    "error", [ValueError("a"), MisconfigurationException("a"), FileExistsError("a")]
)
def test_mistakes_that_this_library_finds_end_the_command_and_others_show_where(
    error: Exception, shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foreign(arguments: list[str]) -> None:
        raise error.with_traceback(None)

    own: dict[str, Any] = {"__name__": "it3_lightning.some.file", "error": error}
    exec("def run(arguments):\n    raise error", own)
    monkeypatch.setattr(cli, "_commands", lambda: {"run": own["run"]})
    assert shell("run")[::2] == (1, "it3: a\n")
    monkeypatch.setattr(cli, "_commands", lambda: {"run": foreign})
    with pytest.raises(type(error)):
        shell("run")


def test_a_module_of_the_current_folder_can_be_named(
    shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_module_here.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    code, out, _ = shell("fit", "--model.help=own_module_here.Net")
    assert code == 0
    assert "--model.fails" in out


@pytest.mark.parametrize("name", CALLBACKS)
def test_help_has_a_text_for_every_argument_of_a_callback(name: str, shell: Any) -> None:
    code, out, _ = shell("test", f"--trainer.callbacks.help=it3_lightning.{name}")
    assert code == 0
    arguments = inspect.signature(getattr(it3_lightning, name)).parameters
    texts = out.partition("Help for --trainer.callbacks")[2]
    for argument in arguments:
        found = re.search(rf"--trainer\.callbacks\.{argument} \S.*?\n?((?:\s+.*\n)+)", texts)
        assert found is not None, argument
        words = re.sub(r"\(type: .*|\(required.*|\(default.*", "", found[0], flags=re.DOTALL)
        assert len(words.split()) > 4, argument

"""The command ``it3``: a LightningCLI, and commands that compare, choose and export."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from it3_lightning.benchmark import Benchmark, PolicyChoice, Tuning
from it3_lightning.benchmark.calibrate import show_choice
from it3_lightning.benchmark.report import show, show_tuning, write_comparison
from it3_lightning.benchmark.scoring import quiet
from it3_lightning.data import ShiftedData
from it3_lightning.integration.candidates import suggest_layers
from it3_lightning.integration.checkpoints import exported, save_plain
from it3_lightning.integration.namespaces import ONE_LINE
from it3_lightning.predictor import check_checkpoint
from it3_lightning.utils.files import load_plain
from it3_lightning.utils.messages import unknown

_EXTRAS: Mapping[str, str] = MappingProxyType(
    {"segmentation_models_pytorch": "vision", "timm": "vision"}
)
"""Packages that configurations name as a ``class_path``, and the extra that brings each."""


class IT3CLI(LightningCLI):
    """LightningCLI with groups for the commands of its own: one file serves every command."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of the benchmark, of tuning and of the choice of a policy."""
        parser.add_class_arguments(Benchmark, "benchmark")
        parser.add_class_arguments(Tuning, "tune")
        parser.add_class_arguments(PolicyChoice, "calibrate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer, which names the checkpoint where it cannot read one."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = _CheckpointIO()
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Read the hyperparameters in a checkpoint, which Lightning does first; name the file."""
        path = self.config.get(f"{self.config.get('subcommand')}.ckpt_path")
        if path and Path(path).is_file():  # else "best", an address, or nothing to read yet
            with _reading(path):
                super()._parse_ckpt_path()


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Refuse a checkpoint that no Trainer wrote, or whose content cannot be read within.

    Raises:
        ValueError: it is one.
    """
    check_checkpoint(path)
    try:
        yield
    except OSError:  # names it
        raise
    except Exception as error:  # content of any kind
        raise ValueError(
            f"Expected a checkpoint that a Trainer wrote, got another: {path} "
            f"({type(error).__name__}: {error})."
        ) from error


class _CheckpointIO(TorchCheckpointIO):
    """Reads the checkpoints of Trainers, and names a file that is none, or damaged."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what a Trainer wrote.

        Raises:
            ValueError: no Trainer wrote it, or not so.
        """
        with _reading(path):
            found: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
            missing = {"pytorch-lightning_version", "state_dict"} - found.keys()
        if missing:
            raise ValueError(
                f"Expected a checkpoint that a Trainer wrote, got a file without "
                f"{', '.join(sorted(missing))}: {path}. Give weights alone as "
                "--model.source_checkpoint."
            )
        return found


class _SavedConfig(SaveConfigCallback):
    """Saves the configuration beside the logs of a run, and over no file."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it, under the first name that is free; without a logger, say that it is not."""
        if self.already_saved:
            return
        if trainer.logger is None:
            rank_zero_info("config.yaml is not saved: without a logger, a run has no folder.")
            self.already_saved = True
            return
        folder, names = trainer.log_dir, chain(["config"], (f"config_{n}" for n in count(1)))
        taken = get_filesystem(str(folder)).exists
        free = (name for name in names if not taken(f"{folder}/{name}.yaml"))
        self.config_filename = f"{next(free)}.yaml"
        super().setup(trainer, pl_module, stage)


class _Parser(LightningArgumentParser):
    """LightningCLI's parser, with hints."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse the arguments, with a hint."""
        super().error(_with_hint(message), ex)


def _with_hint(message: str) -> str:
    r"""Return a message with what helps: a package to install, or a namespace to import from.

    >>> _with_hint("No module named 'timm'")
    "No module named 'timm'\nInstall it with: pip install 'it3_lightning[vision]'"
    """
    for package, extra in _EXTRAS.items():
        missing = f"No module named '{package}'", f"import of {package} halted"
        if any(text in message for text in missing):
            return f"{message}\nInstall it with: pip install 'it3_lightning[{extra}]'"
    if "does not correspond to a subclass of LightningModule" in message:
        return (
            f"{message}\nThe command runs the Trainer of lightning.pytorch; in a module of "
            f"pytorch_lightning, {ONE_LINE}"
        )
    return message


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    ``it3 benchmark --config FILE`` trains, adapts, compares and reports; ``it3 tune --config FILE``
    chooses how to adapt, on validation samples under other shifts; ``it3 calibrate --config FILE
    --ckpt_path CHECKPOINT`` chooses for one checkpoint what harms nowhere, or no adaptation;
    ``it3 layers --config FILE`` lists where a prior may enter; ``it3 compare FOLDER ...`` puts the
    results of several benchmarks side by side; ``it3 export CHECKPOINT PLAIN`` writes that of a
    network alone.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    first, own = "".join(arguments[:1]), _commands()
    if first in ("", "-h", "--help", "--version"):
        print(_version() if first == "--version" else _overview())  # noqa: T201
    elif first in own:
        own[first](arguments[1:])
    elif first in _OF_THE_TRAINER or first.startswith("-"):
        _cli(arguments)
    else:
        raise ValueError(unknown("command", first, [*_OF_THE_TRAINER, *own]))


def command() -> None:
    """Run what the shell asks for; a user's mistake ends in one paragraph, with exit code 1.

    ``IT3_TRACEBACK=1`` in the environment shows where it was found. Modules in the current folder
    can be named in a configuration.
    """
    sys.path.append(str(Path.cwd()))
    try:
        main()
    except (ImportError, MisconfigurationException, OSError, TypeError, ValueError) as error:
        if os.environ.get("IT3_TRACEBACK") or not _on_purpose(error):
            raise
        print(f"it3: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(1) from None


_OURS = ("__main__", "it3_lightning", "lightning", "lightning_fabric", "pytorch_lightning")


def _on_purpose(error: BaseException) -> bool:
    """Whether this library, or Lightning, has raised an error itself."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return str(last.f_globals.get("__name__")).partition(".")[0] in _OURS


_OF_THE_TRAINER = {
    "fit": "Train a module.",
    "validate": "Evaluate a module on validation data.",
    "test": "Evaluate a module on test data, adapting to it where a callback does.",
    "predict": "Predict, adapting where a callback does.",
}


def _commands() -> dict[str, Callable[[list[str]], None]]:
    """Return the commands that are not the Trainer's; the first line of each says what it does."""
    return {
        "benchmark": benchmark,
        "tune": tune,
        "calibrate": calibrate,
        "layers": layers,
        "compare": compare,
        "export": export,
    }


def _overview() -> str:
    """Return what ``it3 --help`` prints: every command."""
    own = {name: (run.__doc__ or "").splitlines()[0] for name, run in _commands().items()}
    listed = "\n".join(f"  {name:<10} {text}" for name, text in {**_OF_THE_TRAINER, **own}.items())
    return (
        f"usage: it3 COMMAND [--config FILE] [--ckpt_path FILE] ...\n\n{listed}\n\n"
        "it3 COMMAND --help says what one takes, it3 --version which version this is.\n"
        "IT3_TRACEBACK=1 in the environment shows where an error was found."
    )


def _version() -> str:
    return f"it3_lightning {metadata.version('it3_lightning')}"


def benchmark(arguments: list[str]) -> None:
    """Run the benchmark of a configuration and show its results."""
    asked = asked_for(arguments, "benchmark")
    results = asked.settings.run(asked.make_model, asked.data, asked.configuration)
    show(results, Path(asked.settings.output))


def tune(arguments: list[str]) -> None:
    """Choose how to adapt with the models of a configuration, and show what was found.

    Shifts and samples are those of the data to tune on, whatever the configuration says.
    """
    asked = asked_for(arguments, "tune")
    tuning: Tuning = asked.cli.config_init.tune
    tuned = tuning.run(asked.settings, asked.make_model, asked.data, asked.configuration)
    show_tuning(tuned, Path(asked.settings.output))


def calibrate(arguments: list[str]) -> None:
    """Choose for a checkpoint how to adapt, or not to, and put that into it.

    Shifts and samples are those of the data to tune on, whatever the configuration says.
    """
    asked = asked_for(arguments, "calibrate", ckpt_path="calibrate.ckpt_path")
    choice: PolicyChoice = asked.cli.config_init.calibrate
    found = choice.run(asked.settings, asked.make_model, asked.data, asked.configuration)
    show_choice(found, Path(asked.settings.output))


def compare(arguments: list[str]) -> None:
    """Print what every way to predict gains in several benchmarks, as Markdown; write a page."""
    parser = argparse.ArgumentParser("it3 compare", description=compare.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="outputs of it3 benchmark")
    page = Path("compare.html")
    parser.add_argument("--page", type=Path, default=page, help=f"HTML to write, {page} if not set")
    asked = parser.parse_args(arguments)
    print(write_comparison(asked.folders, asked.page))  # noqa: T201
    print(f"Written to {asked.page}", file=sys.stderr)  # noqa: T201


def export(arguments: list[str]) -> None:
    """Write the checkpoint of a network alone, without prior and conditioning.

    The class that was mixed with IT3Mixin reads it: LitNet.load_from_checkpoint(PLAIN).
    """
    parser = argparse.ArgumentParser("it3 export", description=export.__doc__)
    parser.add_argument("checkpoint", type=Path, help="of a module with priors, by a Trainer")
    parser.add_argument("plain", type=Path, help="the file to write; none may be there")
    asked = parser.parse_args(arguments)
    if not asked.checkpoint.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {str(asked.checkpoint)!r}.")
    if asked.plain.exists():
        raise FileExistsError(f"Expected a new file, got one that is there: {asked.plain}.")
    check_checkpoint(asked.checkpoint)
    save_plain(exported(load_plain(asked.checkpoint)), asked.plain)


def layers(arguments: list[str]) -> None:
    """Print the layers of a configuration's model where a prior may enter.

    One training batch runs through the network, without gradients.
    """
    with quiet():
        cli = _cli(arguments, "layers")
        data, model = cli.datamodule, cli.model
        data.prepare_data()
        data.setup("fit")
        model.configure_model()
        batch = next(iter(data.train_dataloader()))
        table = suggest_layers(model, batch)
    print(table)  # noqa: T201


@dataclass(frozen=True)
class _Asked:
    """What a configuration asks for."""

    cli: IT3CLI
    settings: Benchmark
    data: ShiftedData  # that of the settings; each new model brings another

    @property
    def configuration(self) -> object:
        """What a model is made from."""
        return self.cli.config.as_dict().get("model")

    def make_model(self) -> LightningModule:
        """Return a new model."""
        self.cli.instantiate_classes()
        model: LightningModule = self.cli.model
        return model


def asked_for(
    arguments: list[str], command: str, *, ckpt_path: str = "benchmark.ckpt_path"
) -> _Asked:
    """Read a configuration for a command of the benchmark; ``ckpt_path`` is its own."""
    own = [a.replace("--ckpt_path", f"--{ckpt_path}", 1) for a in arguments]
    with quiet():
        cli = _cli(own, command)
    if not isinstance(cli.datamodule, ShiftedData):
        raise TypeError(
            f"it3 {command} needs ShiftedData data, got {type(cli.datamodule).__name__}."
        )
    return _Asked(cli, cli.config_init.benchmark, cli.datamodule)


def _cli(arguments: list[str], command: str | None = None) -> IT3CLI:
    """Return the command line of these arguments; LightningCLI wants them in ``sys.argv``.

    Args:
        arguments: without the command.
        command: one of this library's own; ``None``: run the Trainer's that the arguments name.
    """
    before = sys.argv
    sys.argv = [" ".join(filter(None, ("it3", command))), *arguments]
    try:
        return IT3CLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=_SavedConfig,
            save_config_kwargs={"overwrite": True},  # processes see it when the first has written
            auto_configure_optimizers=False,
            run=command is None,
            parser_class=_Parser,
            parser_kwargs={"description": __doc__},
        )
    finally:
        sys.argv = before


if __name__ == "__main__":
    command()

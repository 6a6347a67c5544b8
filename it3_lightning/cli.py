"""``it3 fit / validate / test / predict / benchmark``: a thin LightningCLI."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from it3_lightning.benchmark import Benchmark
from it3_lightning.benchmark.progress import quiet
from it3_lightning.data import ShiftedData
from it3_lightning.parser import Parser
from it3_lightning.report import show


class IT3CLI(LightningCLI):
    """LightningCLI with a group ``benchmark``, so that one file serves every command."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the benchmark's settings."""
        parser.add_class_arguments(Benchmark, "benchmark")


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; ``it3 benchmark --config FILE`` trains, adapts, compares and reports."""
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == ["benchmark"]:
        benchmark(arguments[1:])
    else:
        _cli(arguments, run=True)


def benchmark(arguments: list[str]) -> None:
    """Run the benchmark of a configuration and show its results."""
    own = [a.replace("--ckpt_path", "--benchmark.ckpt_path", 1) for a in arguments]
    with quiet():
        cli = _cli(own, run=False)
    if not isinstance(cli.datamodule, ShiftedData):
        raise TypeError(
            f"The benchmark needs ShiftedData data, got {type(cli.datamodule).__name__}."
        )

    def make_model() -> LightningModule:
        cli.instantiate_classes()
        model: LightningModule = cli.model
        return model

    settings: Benchmark = cli.config_init.benchmark
    data = cli.datamodule  # the one of these settings; each new model brings another
    model = cli.config.as_dict().get("model")
    show(settings.run(make_model, data, model), Path(settings.output))


def _cli(arguments: list[str], *, run: bool) -> IT3CLI:
    """Return the command line of these arguments; LightningCLI wants them in ``sys.argv``."""
    before = sys.argv
    sys.argv = ["it3" if run else "it3 benchmark", *arguments]
    try:
        return IT3CLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            run=run,
            parser_class=Parser,
            parser_kwargs={"description": __doc__},
        )
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()

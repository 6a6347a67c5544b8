"""A progress bar over a whole benchmark, and silence of everything else."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """A bar over the evaluations of all seeds, with a line that says what is being done.

    Args:
        seeds: number of seeds.
        evaluations: rows times streams, per seed.
    """

    def __init__(self, seeds: int, evaluations: int) -> None:
        self._bar = Bar(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task("starting", total=seeds * evaluations)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.say("done")
        self._bar.stop()

    def say(self, text: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=text)

    def advance(self) -> None:
        """Count one evaluation."""
        self._bar.advance(self._task)

    def skip(self, text: str, evaluations: int) -> None:
        """Count evaluations that were there already."""
        self._bar.update(self._task, description=text, advance=evaluations)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch use this many threads on the CPU within; ``None``: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notices about every run of a Trainer out of the way."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        warnings.filterwarnings("ignore", ".*`tensorboardX` has been removed.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

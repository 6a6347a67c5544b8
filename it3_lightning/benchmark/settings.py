"""The settings of a benchmark, checked when they are made, and its Trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import Trainer

from it3_lightning.benchmark.recipe import Recipe
from it3_lightning.training.dual_pass import DualPass


@dataclass(kw_only=True)
class BenchmarkSettings:
    """Settings of a benchmark.

    Args:
        seeds: one training of everything per seed.
        epochs: of joint training. Ordinary training gets twice as many, so that both compute as
            many gradients.
        posthoc_epochs: of training the conditioning on the ordinary network.
        ckpt_path: an ordinary checkpoint to take instead of ordinary training.
        pretrained: whether the model comes with trained weights: then ordinary training is left
            out, and joint training starts from these weights.
        streams: ``"equal"`` and ``"unequal"`` class frequencies.
        metric: key that the module's ``test_step`` logs; the score.
        percent: multiply scores by 100.
        higher_is_better: whether a larger score is the better one; false for errors such as
            ``"test_mae"``. Gains in the tables are improvements either way.
        decimals: of scores and gains in the tables.
        rows: ``"main"``: each training's unadapted rows and the default objective; ``"all"``: also
            the published objective, the balance term, filtered entropy, the mean prediction, and
            each sample by itself.
        recipe: settings that the rows share.
        distance_samples: samples of each split whose idempotence distances are measured; 0: none.
        joint: the dual pass of joint training; ``None``: the model's own.
        posthoc: the dual pass of post-hoc training; ``None``: the default.
        output: folder of the results; what is there already, with the same settings, is kept.
        accelerator: as of a Trainer.
        precision: as of a Trainer.
        threads: of torch on the CPU; small networks are often faster on one. ``None``: as it is.
    """

    seeds: Sequence[int] = (0,)
    epochs: int = 6
    posthoc_epochs: int = 2
    ckpt_path: str | None = None
    pretrained: bool = False
    streams: Sequence[str] = ("equal", "unequal")
    metric: str = "test_acc"
    percent: bool = True
    higher_is_better: bool = True
    decimals: int = 1
    rows: Literal["main", "all"] = "main"
    recipe: Recipe = field(default_factory=Recipe)
    distance_samples: int = 1000
    joint: DualPass | None = None
    posthoc: DualPass | None = None
    output: str = "results"
    accelerator: str = "auto"
    precision: str = "32-true"
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("Expected at least one seed, got none.")
        if self.epochs < 1 or self.posthoc_epochs < 1:
            raise ValueError(
                f"Expected epochs >= 1, got {self.epochs} and posthoc_epochs {self.posthoc_epochs}."
            )
        if self.distance_samples < 0:
            raise ValueError(f"Expected distance_samples >= 0, got {self.distance_samples}.")
        wrong = [stream for stream in self.streams if stream not in ("equal", "unequal")]
        if wrong or not self.streams:
            raise ValueError(f"Expected streams among equal, unequal, got {list(self.streams)}.")

    @property
    def sign(self) -> int:
        """1 where a larger score is the better one, else -1."""
        return 1 if self.higher_is_better else -1

    def error(self, score: float) -> float:
        """Return how far a score is from the best possible one.

        >>> BenchmarkSettings().error(90.0)
        10.0
        """
        return (100 if self.percent else 1) - score if self.higher_is_better else score

    def trainer(self, **arguments: Any) -> Trainer:
        """Return a silent Trainer on the benchmark's device."""
        return Trainer(
            accelerator=self.accelerator,
            precision=self.precision,  # type: ignore[arg-type]
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            **arguments,
        )

"""Decision rules of tuning: a written grid of candidates, and the choice among their gains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Literal, get_args

from torch import nn

from it3_lightning.benchmark.config import Recipe
from it3_lightning.benchmark.intervals import Cell
from it3_lightning.benchmark.rows import Kind, Row, Training
from it3_lightning.engine import Settings
from it3_lightning.engine.selection import select
from it3_lightning.integration.module_adapter import WhichPrediction as Prediction
from it3_lightning.utils.messages import unknown

Form = Literal["published", "filtered", "sharpened"]
Mode = Literal["episodic", "online", "sample"]
Choice = Literal["all", "norm", "bias"]
Gains = Mapping[str, Sequence[float]]
"""Improvements over the strongest unadapted row, by name of the samples, one for each seed."""
_FORMS: Mapping[Form, tuple[float | None, float]] = MappingProxyType(
    {"published": (None, 0.0), "filtered": (0.6, 0.0), "sharpened": (0.6, 1.0)}
)  # reliability, sharpen


@dataclass(frozen=True)
class Candidate:
    """A way to adapt.

    Args:
        mode: ``"episodic"``, ``"online"``, ``"sample"``: each sample by itself; ``"none"``: no step
            at all.
        recipe: with its learning rate, steps, parameters and objective.
        prediction: what is predicted.
        form: name of the objective; empty where there is no step.
    """

    mode: Mode | Literal["none"]
    recipe: Recipe
    prediction: Prediction = "first"
    form: str = ""

    @property
    def name(self) -> str:
        """All that tells it from others, in words."""
        if self.mode == "none":
            return f"{self.prediction} prediction"
        own = self.settings(Settings())
        steps = f"{own.steps} step{'s' * (own.steps > 1)} of {own.optimizer} {own.lr:g}"
        mode = "each sample" if self.mode == "sample" else self.mode
        parts = [f"{self.form} objective", str(own.parameters), steps, mode]
        if self.prediction != "first":
            parts.append(f"{self.prediction} prediction")
        return ", ".join(parts)

    def settings(self, still: Settings) -> Settings:
        """Return settings of the adaptation; ``still`` are those without a step."""
        if self.mode == "none":
            return still
        make = {"episodic": self.recipe.episodic, "online": self.recipe.online}
        return make.get(self.mode, self.recipe.each)(still, self.recipe.objective)

    def row(self, training: Training, still: Settings) -> Row:
        """Return it as a row."""
        return Row(training, self.name, self.settings(still), self.prediction)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is combined with what.

    Args:
        shares: of the distance that a step is to take away (``optimizer="polyak"``).
        lrs: learning rates of Adam.
        steps: steps per batch.
        forms: objectives: ``"published"``: the distance alone; ``"filtered"``: that of reliable
            samples; ``"sharpened"``: with the entropy of these. On values they are all the same.
        parameters: that adapt; what a model has none of is left out.
        modes: ``"episodic"``, ``"online"``, ``"sample"``: each sample by itself.
        predictions: of what adapts. The second and the mean prediction without any step are always
            compared.

    Raises:
        ValueError: a name is unknown, or a number out of range.
    """

    shares: Sequence[float] = (0.25, 0.5, 1.0)
    lrs: Sequence[float] = (2.5e-5, 1e-4, 1e-3)
    steps: Sequence[int] = (1,)
    forms: Sequence[Form] = ("published", "filtered", "sharpened")
    parameters: Sequence[Choice] = ("all", "norm")
    modes: Sequence[Mode] = ("episodic", "online")
    predictions: Sequence[Prediction] = ("first",)

    def __post_init__(self) -> None:
        for what, values, known in (
            ("form", self.forms, get_args(Form)),
            ("selection", self.parameters, get_args(Choice)),
            ("mode", self.modes, get_args(Mode)),
            ("prediction", self.predictions, get_args(Prediction)),
        ):
            for value in values:
                if value not in known:
                    raise ValueError(unknown(what, value, known))
        if any(lr <= 0 for lr in self.lrs) or any(steps < 1 for steps in self.steps):
            raise ValueError(
                f"Expected lrs > 0 and steps >= 1, got {list(self.lrs)} and {list(self.steps)}."
            )
        if any(not 0.01 <= share <= 2 for share in self.shares):
            raise ValueError(f"Expected shares in [0.01, 2], got {list(self.shares)}.")

    def candidates(self, recipe: Recipe, kind: Kind, model: nn.Module) -> list[Candidate]:
        """Return the candidates that make sense for a model, each different from all others.

        Args:
            recipe: with what is not varied: the distance, the decay of the average.
            kind: of the model; objectives differ on classes alone.
            model: whose parameters.
        """
        forms = self.forms if kind.classes else ("published",)
        there = [choice for choice in self.parameters if _has(model, choice)]
        still = [Candidate("none", recipe, "second"), Candidate("none", recipe, "mean")]
        moves = [("polyak", share) for share in self.shares] + [("adam", lr) for lr in self.lrs]
        grid = product(forms, self.modes, there, self.predictions, self.steps, moves)
        return still + [
            Candidate(mode, _varied(recipe, form, choice, steps, *move), prediction, form)
            for form, mode, choice, prediction, steps, move in grid
        ]


@dataclass(frozen=True)
class Rule:
    """Chooses among candidates, on validation samples, by one rule for every domain.

    A candidate is *harmless* if it loses no more than what is tolerated, on clean samples and under
    every shift, mean over seeds. It *gains* if its mean gain over the shifts is larger than what is
    tolerated as a loss, larger than ``significance`` times its standard error over seeds, and above
    zero in every seed. Chosen is the harmless one that gains most; where none does, nothing is.

    What is tolerated is a share of the unadapted error, mean over clean and shifted samples, or the
    standard error over seeds of a gain on one kind of samples, where that is larger: the median of
    it over all candidates and kinds, so that wild candidates are not tolerated more.

    Args:
        tolerance: the share.
        significance: standard errors by which a gain must differ from zero.

    Raises:
        ValueError: one is negative.
    """

    tolerance: float = 0.01
    significance: float = 2.0

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.significance < 0:
            raise ValueError(
                f"Expected tolerance and significance >= 0, got {self.tolerance} and "
                f"{self.significance}."
            )

    def tolerated(self, gains: Sequence[Gains], error: float) -> float:
        """Return the loss that is tolerated, in units of the score.

        Args:
            gains: of all candidates.
            error: of the unadapted row.

        >>> Rule(tolerance=0.01).tolerated([{"clean": [0.0, 0.4], "noise": [1.0, 1.0]}], 25.0)
        0.25
        """
        errors = [_standard_error(values) for each in gains for values in each.values()]
        return max(self.tolerance * error, statistics.median(errors) if errors else 0.0)

    def verdict(self, gains: Gains, tolerated: float) -> Verdict:
        """Judge a candidate by its gains; ``"clean"`` is no shift."""
        means = {name: statistics.fmean(values) for name, values in gains.items()}
        shifted = [values for name, values in gains.items() if not is_clean(name)]
        by_seed = [statistics.fmean(values) for values in zip(*shifted, strict=True)]
        worst = min(means, key=lambda name: means[name])
        least = max(tolerated, self.significance * _standard_error(by_seed))
        return Verdict(
            clean=Cell.of(_clean(gains)),
            gain=Cell.of(by_seed),
            worst=worst,
            loss=-means[worst],
            harmless=-means[worst] <= tolerated,
            gains=statistics.fmean(by_seed) > least and min(by_seed) > 0,
        )

    def chosen(self, verdicts: Sequence[Verdict]) -> int | None:
        """Return the index of the one that is chosen; ``None``: adapt nothing."""
        good = [i for i, verdict in enumerate(verdicts) if verdict.harmless and verdict.gains]
        return max(good, key=lambda i: verdicts[i].gain.mean, default=None)


@dataclass(frozen=True)
class Verdict:
    """What the rule says of a candidate.

    Args:
        clean: gain on clean samples.
        gain: mean gain over the shifts.
        worst: the samples it gains least on.
        loss: how much it loses there; negative for a gain.
        harmless: whether it loses nowhere more than is tolerated.
        gains: whether it gains.
    """

    clean: Cell
    gain: Cell
    worst: str
    loss: float
    harmless: bool
    gains: bool


def is_clean(name: str) -> bool:
    """Whether samples are clean ones, of whichever stream.

    >>> is_clean("clean, unequal"), is_clean("fog")
    (True, False)
    """
    return name.partition(",")[0] == "clean"


def _varied(
    recipe: Recipe, form: Form, parameters: Choice, steps: int, optimizer: str, lr: float
) -> Recipe:
    reliability, sharpen = _FORMS[form]
    return replace(
        recipe,
        optimizer=optimizer,  # type: ignore[arg-type]
        reliability=reliability,
        sharpen=sharpen,
        parameters=parameters,
        lr=lr,
        episodic_lr=lr,
        sample_lr=lr,
        steps=steps,
        episodic_steps=steps,
    )


def _has(model: nn.Module, choice: Choice) -> bool:
    """Whether a model has such parameters."""
    try:
        return bool(select(model, choice))
    except ValueError:
        return False


def _clean(gains: Gains) -> list[float]:
    kept = [values for name, values in gains.items() if is_clean(name)]
    return [statistics.fmean(values) for values in zip(*kept, strict=True)]


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0

"""What tuning compares: a small written grid of ways to adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Literal, get_args

from torch import nn

from it3_lightning.benchmark.kind import Kind
from it3_lightning.benchmark.recipe import Recipe
from it3_lightning.benchmark.rows import Row, Training
from it3_lightning.engine import Settings
from it3_lightning.engine.selection import select
from it3_lightning.integration.module_adapter import WhichPrediction as Prediction
from it3_lightning.utils.messages import unknown

Form = Literal["published", "filtered", "sharpened"]
Mode = Literal["episodic", "online", "sample"]
Choice = Literal["all", "norm", "bias"]

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

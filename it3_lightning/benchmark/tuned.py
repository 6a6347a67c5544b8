"""What tuning found: the verdict on every candidate, and the lines of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from it3_lightning.benchmark.candidates import Candidate
from it3_lightning.benchmark.choosing import Rule, Verdict
from it3_lightning.benchmark.recipe import Recipe
from it3_lightning.benchmark.rows import Row, Training
from it3_lightning.engine import Settings

_SHARED = ("optimizer", "distance", "parameters", "reliability", "sharpen")  # by all modes
_OWN_LR = {"episodic": ("episodic_lr", "episodic_steps"), "online": ("lr", "steps")}


@dataclass(frozen=True)
class Tuned:
    """All candidates of a search, and which one the rule chooses.

    Args:
        title: name of the score, and its direction where smaller is better.
        decimals: of scores and gains.
        training: which one it was chosen for.
        seeds: of the models.
        shifts: that it was chosen under.
        base: the strongest unadapted row.
        before: its scores by name of the samples, one for each seed.
        candidates: ways to adapt.
        verdicts: of the rule, in the same order.
        tolerated: the loss that is tolerated.
        rule: that chose.
    """

    title: str
    decimals: int
    training: Training
    seeds: tuple[int, ...]
    shifts: tuple[str, ...]
    base: Row
    before: Mapping[str, Sequence[float]]
    candidates: tuple[Candidate, ...]
    verdicts: tuple[Verdict, ...]
    tolerated: float
    rule: Rule

    @property
    def ranked(self) -> list[tuple[Candidate, Verdict]]:
        """Candidates that may be chosen first, and among equals those that gain more."""
        pairs = list(zip(self.candidates, self.verdicts, strict=True))
        return sorted(pairs, key=lambda p: (p[1].harmless and p[1].gains, p[1].gain.mean))[::-1]

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that the rule chooses; ``None``: adapt nothing."""
        index = self.rule.chosen(self.verdicts)
        return None if index is None else self.candidates[index]

    def chosen_of(self, mode: str, like: Recipe | None = None) -> Candidate | None:
        """Return what the rule chooses among the candidates of a mode.

        Args:
            mode: of the candidates.
            like: whose objective and parameters they must have; ``None``: any.
        """
        own = [
            i
            for i, candidate in enumerate(self.candidates)
            if candidate.mode == mode and (like is None or _alike(candidate.recipe, like))
        ]
        index = self.rule.chosen([self.verdicts[i] for i in own])
        return None if index is None else self.candidates[own[index]]

    def yaml(self) -> str:
        """Return the lines to put into a configuration: the callback, and the benchmark's recipe.

        The recipe has the objective and the parameters of the best candidate that takes a step, and
        the learning rate of the best one with these in each mode. A mode in which none may be
        chosen is left out.
        """
        callback = {"class_path": "it3_lightning.IT3TestTimeCallback", "init_args": self._args()}
        lines: dict[str, Any] = {"trainer": {"callbacks": [callback]}}
        if recipe := self._recipe():
            lines["benchmark"] = {"recipe": recipe}
        return str(yaml.safe_dump(lines, sort_keys=False, default_flow_style=None))

    def _args(self) -> dict[str, Any]:
        """Return the arguments of the callback."""
        still = self.base.settings
        norm_stats = "source" if still is None else still.norm_stats
        if self.chosen is None or self.chosen.mode == "none":
            prediction = "first" if self.chosen is None else self.chosen.prediction
            return {"steps": 0, "norm_stats": norm_stats, "prediction": prediction}
        settings = self.chosen.settings(still or Settings(steps=0))
        objective = self.chosen.recipe.objective
        return {
            "scope": settings.scope,
            "steps": settings.steps,
            "optimizer": settings.optimizer,
            "lr": settings.lr,
            "parameters": settings.parameters,
            "reset": settings.reset,
            "anchor": settings.anchor,
            "norm_stats": settings.norm_stats,
            "prediction": self.chosen.prediction,
            "objective": {
                "class_path": "it3_lightning.Idempotence",
                "init_args": {
                    "distance": objective.distance,
                    "reliability": objective.reliability,
                    "sharpen": objective.sharpen,
                },
            },
        }

    def _recipe(self) -> dict[str, Any]:
        moving = [c for mode in ("episodic", "online", "sample") if (c := self.chosen_of(mode))]
        gains = {c: v.gain.mean for c, v in zip(self.candidates, self.verdicts, strict=True)}
        if not moving:
            return {}
        best = max(moving, key=lambda candidate: gains[candidate]).recipe
        recipe = {name: getattr(best, name) for name in _SHARED}
        for mode, (lr, steps) in _OWN_LR.items():
            if own := self.chosen_of(mode, like=best):
                recipe |= {lr: getattr(own.recipe, lr), steps: getattr(own.recipe, steps)}
        if own := self.chosen_of("sample", like=best):
            recipe["sample_lr"] = own.recipe.sample_lr
        return recipe


def _alike(one: Recipe, other: Recipe) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _SHARED)

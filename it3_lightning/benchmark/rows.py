"""The rows of a benchmark: which training, and what happens at test time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from it3_lightning.benchmark.kind import Kind
from it3_lightning.callback import IT3TestTimeCallback
from it3_lightning.distances import DistanceName
from it3_lightning.engine import Settings
from it3_lightning.objectives import Entropy, Idempotence, TestTimeObjective

Training = Literal["ordinary", "joint", "post-hoc"]


@dataclass(frozen=True)
class Row:
    """One way to predict with one training.

    Args:
        training: which of the trained models.
        name: what happens at test time.
        settings: of the adaptation; ``None``: no callback at all.
        second: predict with the second prediction, ``f(x, f(x, 0))``.
    """

    training: Training
    name: str
    settings: Settings | None = None
    second: bool = False

    @property
    def main(self) -> bool:
        """Whether it belongs to the short table."""
        return not any(word in self.name for word in ("published", "balance", "filtered"))

    def callback(self) -> IT3TestTimeCallback | None:
        """Return the callback that does it; ``None`` for the source row."""
        if self.settings is None:
            return None
        prediction: Literal["first", "second"] = "second" if self.second else "first"
        return IT3TestTimeCallback(**vars(self.settings), prediction=prediction)


@dataclass(frozen=True)
class Recipe:
    """The settings that the rows of a benchmark share.

    Args:
        lr: learning rate of the online rows (Adam).
        steps: steps per batch of the online rows.
        ema_decay: of the anchor in the online rows.
        episodic_lr: learning rate of the episodic rows (Adam).
        episodic_steps: steps per batch of the episodic rows.
        tent_lr: learning rate of Tent, which moves the norm layers only.
        distance: of all idempotence objectives.
        reliability: of the default objective, and of filtered entropy beside it.
        sharpen: of the default objective.
        balance: weight of the balance term in the rows that have one.
    """

    lr: float = 1e-4
    steps: int = 1
    ema_decay: float = 0.99
    episodic_lr: float = 1e-3
    episodic_steps: int = 1
    tent_lr: float = 1e-3
    distance: DistanceName = "js"
    reliability: float = 0.6
    sharpen: float = 1.0
    balance: float = 0.3


def rows_for(recipe: Recipe, kind: Kind) -> list[Row]:
    """Return the rows that make sense for a kind of model, each different from all others."""
    still = Settings(steps=0, norm_stats="batch" if kind.batch_norm else "source", measure=False)
    rows = list(_ordinary(recipe, still, kind))
    for training in ("joint", "post-hoc"):
        rows += _with_priors(recipe, still, training, kind)
    return [row for row in rows if kind.balanced or "balance" not in row.name]


def _ordinary(recipe: Recipe, still: Settings, kind: Kind) -> Iterator[Row]:
    yield Row("ordinary", "source")
    if kind.batch_norm:
        yield Row("ordinary", "batch statistics", still)
    if not kind.classes:
        return
    if kind.batch_norm:
        tent = replace(
            _online(recipe, still, Entropy()), lr=recipe.tent_lr, parameters="norm", anchor="frozen"
        )
        yield Row("ordinary", "Tent", tent)
    filtered = Entropy(recipe.reliability)
    yield Row("ordinary", "filtered entropy, online", _online(recipe, still, filtered))
    balanced = Entropy(recipe.reliability, recipe.balance)
    yield Row("ordinary", "filtered entropy + balance, online", _online(recipe, still, balanced))


def _with_priors(
    recipe: Recipe, still: Settings, training: Training, kind: Kind
) -> Iterator[Row]:
    yield Row(training, "source")
    if kind.batch_norm:
        yield Row(training, "batch statistics", still)
    yield Row(training, "second prediction", still, second=True)
    published = Idempotence(recipe.distance, reliability=None)
    default = Idempotence(recipe.distance, recipe.reliability, sharpen=recipe.sharpen)
    filtered = replace(default, sharpen=0.0)
    yield Row(training, "published objective, episodic", _episodic(recipe, still, published))
    yield Row(training, "published objective, online", _online(recipe, still, published))
    yield Row(training, "filtered distance alone, online", _online(recipe, still, filtered))
    yield Row(training, "default objective, episodic", _episodic(recipe, still, default))
    yield Row(training, "default objective, online", _online(recipe, still, default))
    if kind.classes:
        balanced = replace(default, balance=recipe.balance)
        episodic = _episodic(recipe, still, balanced)
        yield Row(training, "default objective + balance, episodic", episodic)
        online = _online(recipe, still, balanced)
        yield Row(training, "default objective + balance, online", online)


def _online(recipe: Recipe, still: Settings, objective: TestTimeObjective) -> Settings:
    return replace(
        still,
        objective=objective,
        steps=recipe.steps,
        lr=recipe.lr,
        reset="never",
        anchor="ema",
        ema_decay=recipe.ema_decay,
    )


def _episodic(recipe: Recipe, still: Settings, objective: TestTimeObjective) -> Settings:
    return replace(still, objective=objective, steps=recipe.episodic_steps, lr=recipe.episodic_lr)

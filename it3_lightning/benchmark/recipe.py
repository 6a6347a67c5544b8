"""The settings that the rows of a benchmark share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from it3_lightning.engine import Settings
from it3_lightning.engine.optimizers import OptimizerName
from it3_lightning.engine.selection import Selection
from it3_lightning.methods import Idempotence, TestTimeObjective
from it3_lightning.methods.terms import DistanceName


@dataclass(frozen=True)
class Recipe:
    """The settings that the rows of a benchmark share.

    Rows of the default objective take steps of ``optimizer``. Those of the published objective, of
    entropy and of the balance term are Adam's, as published.

    Args:
        optimizer: of the default objective; ``"polyak"`` needs no learning rate of a domain's own.
        lr: of it in the online rows; of ``"polyak"`` the share of the distance that a step is to
            take away.
        steps: steps per batch of the online rows.
        ema_decay: of the anchor in the online rows.
        episodic_lr: the same as ``lr`` in the episodic rows.
        episodic_steps: steps per batch of the episodic rows.
        sample_lr: the same as ``lr`` in the rows in which each sample adapts by itself.
        adam_lr: learning rate of Adam in the online rows.
        adam_episodic_lr: learning rate of Adam in the episodic rows.
        tent_lr: learning rate of Tent, which moves the norm layers only.
        distance: of all idempotence objectives.
        parameters: that adapt, in all rows of idempotence and of filtered entropy; Tent's are
            those of the norm layers.
        reliability: of the default objective, and of filtered entropy beside it.
        sharpen: of the default objective.
        balance: weight of the balance term in the rows that have one.

    Raises:
        ValueError: a share of the distance is none.

    >>> Recipe(lr=1e-4)
    Traceback (most recent call last):
    ValueError: Expected the lr of optimizer polyak to be a share of the distance in [0.01, 2], \
such as 0.5, got 0.0001. For a learning rate, set optimizer to adam.
    """

    optimizer: OptimizerName = "polyak"
    lr: float = 0.5
    steps: int = 1
    ema_decay: float = 0.99
    episodic_lr: float = 0.5
    episodic_steps: int = 1
    sample_lr: float = 0.5
    adam_lr: float = 1e-4
    adam_episodic_lr: float = 1e-3
    tent_lr: float = 1e-3
    distance: DistanceName = "js"
    parameters: Selection = "all"
    reliability: float | None = 0.6
    sharpen: float = 0.0
    balance: float = 0.3

    def __post_init__(self) -> None:
        shares = (self.lr, self.episodic_lr, self.sample_lr) if self.optimizer == "polyak" else ()
        for share in shares:
            if not 0.01 <= share <= 2:
                raise ValueError(
                    "Expected the lr of optimizer polyak to be a share of the distance in "
                    f"[0.01, 2], such as 0.5, got {share:g}. For a learning rate, set optimizer to "
                    "adam."
                )

    @property
    def objective(self) -> Idempotence:
        """The default objective, as the rows have it."""
        return Idempotence(self.distance, self.reliability, sharpen=self.sharpen)

    @property
    def by_adam(self) -> Recipe:
        """The same with steps of Adam."""
        return replace(
            self,
            optimizer="adam",
            lr=self.adam_lr,
            episodic_lr=self.adam_episodic_lr,
            sample_lr=self.adam_episodic_lr,
        )

    def online(self, still: Settings, objective: TestTimeObjective) -> Settings:
        """Return settings that carry the weights along the stream."""
        return replace(
            self._moving(still, objective),
            steps=self.steps,
            lr=self.lr,
            reset="never",
            anchor="ema",
            ema_decay=self.ema_decay,
        )

    def episodic(self, still: Settings, objective: TestTimeObjective) -> Settings:
        """Return settings that start every batch from the source."""
        moving = self._moving(still, objective)
        return replace(moving, steps=self.episodic_steps, lr=self.episodic_lr)

    def each(self, still: Settings, objective: TestTimeObjective) -> Settings:
        """Return settings of scope ``"sample"``, where BatchNorm has the statistics of training."""
        alone = replace(still, scope="sample", norm_stats="source")
        return replace(self.episodic(alone, objective), lr=self.sample_lr)

    def _moving(self, still: Settings, objective: TestTimeObjective) -> Settings:
        own = {"optimizer": self.optimizer, "parameters": self.parameters}
        return replace(still, objective=objective, **own)  # type: ignore[arg-type]

"""The settings that the rows of a benchmark share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from it3_lightning.distances import DistanceName
from it3_lightning.engine import Settings
from it3_lightning.objectives import Idempotence, TestTimeObjective
from it3_lightning.selection import Selection


@dataclass(frozen=True)
class Recipe:
    """The settings that the rows of a benchmark share.

    Args:
        lr: learning rate of the online rows (Adam).
        steps: steps per batch of the online rows.
        ema_decay: of the anchor in the online rows.
        episodic_lr: learning rate of the episodic rows (Adam).
        episodic_steps: steps per batch of the episodic rows.
        sample_lr: learning rate of the rows in which each sample adapts by itself (Adam).
        tent_lr: learning rate of Tent, which moves the norm layers only.
        distance: of all idempotence objectives.
        parameters: that adapt, in all rows of idempotence and of filtered entropy; Tent's are
            those of the norm layers.
        reliability: of the default objective, and of filtered entropy beside it.
        sharpen: of the default objective.
        balance: weight of the balance term in the rows that have one.
    """

    lr: float = 1e-4
    steps: int = 1
    ema_decay: float = 0.99
    episodic_lr: float = 1e-3
    episodic_steps: int = 1
    sample_lr: float = 1e-4
    tent_lr: float = 1e-3
    distance: DistanceName = "js"
    parameters: Selection = "all"
    reliability: float | None = 0.6
    sharpen: float = 1.0
    balance: float = 0.3

    @property
    def objective(self) -> Idempotence:
        """The default objective, as the rows have it."""
        return Idempotence(self.distance, self.reliability, sharpen=self.sharpen)

    def online(self, still: Settings, objective: TestTimeObjective) -> Settings:
        """Return settings that carry the weights along the stream."""
        return replace(
            still,
            objective=objective,
            parameters=self.parameters,
            steps=self.steps,
            lr=self.lr,
            reset="never",
            anchor="ema",
            ema_decay=self.ema_decay,
        )

    def episodic(self, still: Settings, objective: TestTimeObjective) -> Settings:
        """Return settings that start every batch from the source."""
        return replace(
            still,
            objective=objective,
            parameters=self.parameters,
            steps=self.episodic_steps,
            lr=self.episodic_lr,
        )

    def each(self, still: Settings, objective: TestTimeObjective) -> Settings:
        """Return settings of scope ``"sample"``, where BatchNorm has the statistics of training."""
        alone = replace(still, scope="sample", norm_stats="source")
        return replace(self.episodic(alone, objective), lr=self.sample_lr)

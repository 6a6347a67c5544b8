"""Settings of a benchmark, and of the adaptation that its rows share: checked dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lightning.pytorch import Trainer

from it3_lightning.data.base import Stream
from it3_lightning.engine import Settings
from it3_lightning.engine.optimizers import OptimizerName
from it3_lightning.engine.selection import Selection
from it3_lightning.methods import Auxiliary, Idempotence, TestTimeObjective
from it3_lightning.methods.terms import DistanceName
from it3_lightning.training.dual_pass import DualPass


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
        streams: ``"equal"`` and ``"unequal"`` class frequencies, ``"correlated"`` neighbours, or
            ``"continual"``: one shift after another without a reset, or ``"mixed"``; see
            :class:`~it3_lightning.data.ShiftedData`. After a slash a size of batches of its own, as
            ``"equal/16"``.
        metric: key that the module's ``test_step`` logs; the score.
        percent: multiply scores by 100.
        higher_is_better: whether a larger score is the better one; false for errors such as
            ``"test_mae"``. Gains in the tables are improvements either way.
        decimals: of scores and gains in the tables.
        rows: ``"main"``: each training's unadapted rows and the default objective; ``"all"``: also
            the published objective, the balance term, filtered entropy, the mean prediction, and
            each sample by itself; or patterns of *training: row*, as ``"perturbed*: *"``, beside
            which stand the unadapted rows of their trainings.
        controls: also the matched controls of what a conditioning gains: ordinary training on
            inputs perturbed as in the label pass, conditionings on that network, trained as they
            are used, with the context of the batch and without; statistics by evidence; priors of
            other samples. Those on a network that is given are trained on that.
        methods: ``"all"`` or names of methods from the literature that are rows too, as far as they
            go with model and data: those of
            :data:`~it3_lightning.benchmark.peers.PEERS`.
        heads: auxiliary heads for the methods that need one, each in a training of its own.
        rates: factors of each method's published learning rate, among which one is chosen on
            validation samples under the data's tuning shifts by the rule of ``it3 tune``; such rows
            are called *tuned*. Empty: the published ones alone.
        rate_batches: batches of each loader to choose on, with the models of the first seed.
        batches: the most of each loader in streams with a size of batches of their own.
        alone: samples of each loader for methods in which each adapts by itself, rounded up to
            whole batches.
        recipe: settings that the rows share.
        distance_samples: samples of each split whose idempotence distances are measured; 0: none.
        joint: the dual pass of joint training; ``None``: the model's own.
        posthoc: the dual pass of post-hoc training; ``None``: the default.
        output: folder of the results; what is there already, with the same settings, is kept. One
            with a run of other data, another model or another training is refused.
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
    rows: Literal["main", "all"] | Sequence[str] = "main"
    controls: bool = True
    methods: Literal["all"] | Sequence[str] = ()
    heads: Sequence[Auxiliary] = ()
    rates: Sequence[float] = (0.1, 1.0, 10.0)
    rate_batches: int = 10
    batches: int = 500
    alone: int = 500
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
        if not self.streams:
            raise ValueError("Expected at least one stream, got none: set streams: [equal].")
        for stream in self.streams:
            stream_and_size(stream)
        for name in ("rate_batches", "batches", "alone"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)}.")
        if any(rate <= 0 for rate in self.rates):
            raise ValueError(f"Expected rates > 0, factors, got {list(self.rates)}.")

    @property
    def label_pass(self) -> DualPass:
        """The dual pass of post-hoc training."""
        return DualPass.of(self.posthoc, post_hoc=True)

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
            **{"limit_val_batches": 0, **arguments},
        )


def stream_and_size(stream: str) -> tuple[str, int | None]:
    """Return the name of a stream and its size of batches; ``None``: that of the data.

    Raises:
        ValueError: there is no such stream.

    >>> stream_and_size("equal"), stream_and_size("equal/16")
    (('equal', None), ('equal', 16))
    """
    name, slash, size = stream.partition("/")
    if name not in get_args(Stream) or (slash and not (size.isdecimal() and int(size))):
        raise ValueError(
            f"Expected streams among {', '.join(get_args(Stream))}, or one of them with a size of "
            f"batches as in 'equal/16', got {stream!r}."
        )
    return name, int(size) if slash else None

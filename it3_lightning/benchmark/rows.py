"""Rows of a benchmark: which training, what happens at test time, and for which kind of model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor

from it3_lightning.benchmark.config import BenchmarkSettings, Recipe, stream_and_size
from it3_lightning.callbacks.test_time import IT3TestTimeCallback
from it3_lightning.engine import Settings
from it3_lightning.engine.restore import batch_norms
from it3_lightning.integration.module_adapter import WhichPrediction as Prediction
from it3_lightning.methods import Entropy, Idempotence, Iterates, Passes
from it3_lightning.methods.iterates import Which
from it3_lightning.methods.terms import Distance, DistanceName
from it3_lightning.priors import ClassPrior, MaskPrior, ValuePrior
from it3_lightning.priors.prior import Context
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.messages import unknown

Training = str
"""``"ordinary"``, ``"joint"``, ``"post-hoc"``; a control as ``"perturbed"``; or beside an auxiliary
task: ``"with Rotation"``."""
PERTURBED = "perturbed"  # ordinary training on inputs perturbed as in the label pass
UNEQUAL, CONTEXT = "unequal", "context"  # at the end of conditionings trained as they are used
FEWER = "source, fewer samples"  # beside methods in which each sample adapts by itself
_FURTHER = ("published", "balance", "filtered", "mean", "each sample")  # not in the short table


@dataclass(frozen=True)
class Kind:
    """What the rows of a model depend on.

    Args:
        classes: whether it predicts distributions over classes; entropy and balance need them.
        batch_norm: whether it has BatchNorm layers; else there are no batch statistics.
        balanced: whether the classes may be about equally frequent, as balance needs them; those of
            pixels are not.
        values: whether it predicts values or binary masks of one channel, which distances of
            probabilities cannot compare.
        context: what second predictions see beside their prior.
        redrawn: whether unequal batches can be drawn of a batch, sample by sample.
    """

    classes: bool
    batch_norm: bool
    balanced: bool = True
    values: bool = False
    context: Context | None = None
    redrawn: bool = True

    @classmethod
    def of(cls, model: IT3Mixin) -> Kind:
        """Return the kind of a model."""
        prior = model.it3_prior
        maps = isinstance(prior, MaskPrior) and prior.channels > 1
        return cls(
            classes=isinstance(prior, ClassPrior) or maps,
            batch_norm=bool(batch_norms(model)),
            balanced=not maps,
            values=isinstance(prior, ValuePrior) or (isinstance(prior, MaskPrior) and not maps),
            context=None if prior is None else prior.context,
            redrawn=type(model).it3_sample_dims is IT3Mixin.it3_sample_dims,
        )

    def check(self, distance: DistanceName | Distance) -> None:
        """Refuse a distance that this kind of prediction has not.

        Raises:
            ValueError: it compares probabilities, and the model predicts values.
        """
        if self.values and distance not in ("l1", "l2"):
            raise ValueError(
                f"Expected recipe.distance l1 or l2 for a model of values, got {distance!r}, which "
                "compares probabilities. Set benchmark.recipe.distance to one of the two; for "
                "binary masks, num_classes of MaskPrior to 2 does as well."
            )


@dataclass(frozen=True)
class Row:
    """One way to predict with one training.

    Args:
        training: which of the trained models.
        name: what happens at test time.
        settings: of the adaptation; ``None``: no callback at all.
        prediction: what is predicted; see :class:`~it3_lightning.IT3TestTimeCallback`.
        samples: the most of each loader; ``None``: all.
        published: whether it is a method from the literature, with the settings of its paper.
        company: whether its second predictions depend on the other samples of a batch.

    Raises:
        ValueError: the settings have a gate, which is a distance; that of a callback is a share.

    >>> Row("post-hoc", "gated", Settings(gate=0.95))
    Traceback (most recent call last):
    ValueError: Expected settings without a gate, got gate=0.95: a distance here, a share of the \
validation samples in a callback, which a benchmark does not calibrate. Leave it out.
    """

    training: Training
    name: str
    settings: Settings | None = None
    prediction: Prediction = "first"
    samples: int | None = None
    published: bool = False
    company: bool = False

    def __post_init__(self) -> None:
        if self.settings is not None and self.settings.gate is not None:
            raise ValueError(
                f"Expected settings without a gate, got gate={self.settings.gate}: a distance here,"
                " a share of the validation samples in a callback, which a benchmark does not "
                "calibrate. Leave it out."
            )

    @property
    def main(self) -> bool:
        """Whether it belongs to the short table."""
        return not any(word in self.name for word in _FURTHER)

    @property
    def alone(self) -> bool:
        """Whether every sample is by itself, so that there are no batch statistics."""
        return self.settings is not None and self.settings.scope == "sample"

    def goes_with(self, stream: str) -> bool:
        """Whether it is scored on a stream: not, for orders or batches that make no difference.

        Some rows need several samples in a batch.
        """
        name, size = stream_and_size(stream)
        if self.alone or self.samples is not None:
            return name in ("equal", "unequal") and size is None
        several = self.settings is not None and (self.company or self.settings.method.needs_batch)
        return size != 1 or not several

    def on(self, stream: str) -> Row:
        """Return the row as it is on a stream: single images have no batch statistics."""
        settings = self.settings
        if stream_and_size(stream)[1] != 1 or settings is None or settings.norm_stats != "batch":
            return self
        return replace(self, settings=replace(settings, norm_stats="source"))

    def callback(self) -> IT3TestTimeCallback | None:
        """Return the callback that does it; ``None`` for the source row."""
        if self.settings is None:
            return None
        names = [field.name for field in fields(self.settings) if field.name != "gate"]
        settings = {name: getattr(self.settings, name) for name in names}
        settings["objective"] = deepcopy(self.settings.objective)  # it may keep what it has seen
        return IT3TestTimeCallback(**settings, prediction=self.prediction)


def rows_for(recipe: Recipe, kind: Kind) -> list[Row]:
    """Return the rows that make sense for a kind of model, each different from all others."""
    still = _still(kind)
    rows = list(_ordinary(recipe, still, kind))
    for training in ("joint", "post-hoc"):
        rows += _with_priors(recipe, still, training, kind)
    if kind.context == "batch":  # which a sample by itself has not
        rows = [replace(r, company=r.training != "ordinary") for r in rows if not r.alone]
    return _different([row for row in rows if kind.balanced or "balance" not in row.name], kind)


def _still(kind: Kind) -> Settings:
    """Return settings that move no weight, with batch statistics where there are some."""
    return Settings(steps=0, norm_stats="batch" if kind.batch_norm else "source", measure=False)


def _ordinary(recipe: Recipe, still: Settings, kind: Kind) -> Iterator[Row]:
    yield Row("ordinary", "source")
    if kind.batch_norm:
        yield Row("ordinary", "batch statistics", still)
    if not kind.classes:
        return
    adam = recipe.by_adam
    if kind.batch_norm:
        tent = replace(
            adam.online(still, Entropy()), lr=recipe.tent_lr, parameters="norm", anchor="frozen"
        )
        yield Row("ordinary", "Tent", tent)
    reliability = Recipe().reliability if recipe.reliability is None else recipe.reliability
    filtered = Entropy(reliability)
    yield Row("ordinary", "filtered entropy, online", adam.online(still, filtered))
    balanced = Entropy(reliability, recipe.balance)
    yield Row("ordinary", "filtered entropy + balance, online", adam.online(still, balanced))


def _with_priors(recipe: Recipe, still: Settings, training: Training, kind: Kind) -> Iterator[Row]:
    yield Row(training, "source")
    if kind.batch_norm:
        yield Row(training, "batch statistics", still)
    yield Row(training, "second prediction", still, "second")
    yield Row(training, "mean prediction", still, "mean")
    adam, default = recipe.by_adam, recipe.objective
    published = Idempotence(recipe.distance, reliability=None)
    yield Row(training, "published objective, episodic", adam.episodic(still, published))
    yield Row(training, "published objective, online", adam.online(still, published))
    if kind.classes:
        entropy = replace(default, sharpen=1.0)
        yield Row(training, "filtered distance + entropy, episodic", adam.episodic(still, entropy))
        yield Row(training, "filtered distance + entropy, online", adam.online(still, entropy))
        balanced = replace(entropy, balance=recipe.balance)
        yield Row(
            training,
            "filtered distance + entropy + balance, episodic",
            adam.episodic(still, balanced),
        )
        yield Row(
            training, "filtered distance + entropy + balance, online", adam.online(still, balanced)
        )
    yield Row(training, "default objective, episodic", recipe.episodic(still, default))
    yield Row(training, "default objective, online", recipe.online(still, default))
    mean = recipe.episodic(still, default)
    yield Row(training, "default objective, mean prediction", mean, "mean")
    yield Row(training, "published objective, each sample", adam.each(still, published))
    yield Row(training, "default objective, each sample", recipe.each(still, default))


def control_trainings(settings: BenchmarkSettings, kind: Kind) -> list[Training]:
    """Return what else is trained, so that no gain is put down to the method that is not its own.

    Ordinary training with the input perturbation of the label pass, and a conditioning on that
    network; and conditionings trained as they are used, under the statistics of test time and on
    unequal batches, without the context of the batch and with it.
    """
    if not settings.controls:
        return []
    given = settings.pretrained or settings.ckpt_path is not None
    perturbed = not given and settings.label_pass.perturb_inputs is not None
    base = PERTURBED if perturbed else "post-hoc"
    found = [PERTURBED, f"{PERTURBED} post-hoc"] if perturbed else []
    if kind.classes and kind.balanced and kind.redrawn and kind.context is None:
        found += [f"{base} {UNEQUAL}", f"{base} {CONTEXT}"]
    return found


@dataclass(frozen=True)
class ShuffledPrior(Iterates):
    """The second prediction from the prior of another sample of the batch: a control."""

    count: int = 1
    which: Which = "last"

    def predict(self, passes: Passes) -> Tensor:
        """Return :math:`F(x_b, y_0^{(b - 1)})`."""
        return passes.second(passes.y0.roll(1, 0))


def control_rows(recipe: Recipe, kind: Kind, trainings: Sequence[Training]) -> Iterator[Row]:
    """Return the rows of control trainings, and the controls of all others.

    Args:
        recipe: the settings that rows share.
        kind: of the model.
        trainings: of :func:`control_trainings`.
    """
    still = _still(kind)
    evidence = replace(still, norm_stats="evidence")
    shuffled = Settings(
        objective=ShuffledPrior(), steps=0, norm_stats=still.norm_stats, measure=False
    )
    published = Idempotence(recipe.distance, reliability=None)
    kept = replace(recipe.by_adam.episodic(still, published), reset="weights")
    for training in ("ordinary", "joint", "post-hoc", *trainings):
        company = training.endswith(CONTEXT)
        own = training in trainings
        if own:
            yield Row(training, "source")
        if own and kind.batch_norm:
            yield Row(training, "batch statistics", still)
        if training in ("ordinary", PERTURBED):
            if kind.batch_norm:
                yield Row(training, "evidence", evidence)
            continue
        if own:
            yield Row(training, "second prediction", still, "second", company=company)
        yield Row(training, "second prediction, shuffled prior", shuffled, company=True)
        if kind.batch_norm:
            name = "second prediction, evidence"
            yield Row(training, name, evidence, "second", company=company)
        if not own:
            yield Row(training, "published objective, kept moments", kept)
        elif not training.endswith(UNEQUAL):
            steps = recipe.episodic(still, recipe.objective)
            yield Row(training, "default objective, episodic", steps, company=company)
            steps = recipe.online(still, recipe.objective)
            yield Row(training, "default objective, online", steps, company=company)


def asked_for(
    rows: list[Row], which: Literal["main", "all"] | Sequence[str], always: Sequence[Row] = ()
) -> list[Row]:
    """Return the rows of the short table, all, or those of patterns; each with its unadapted ones.

    Args:
        rows: there are.
        which: ``"main"``, ``"all"``, or patterns of *training: row*.
        always: rows among them that stay, whatever is asked for.

    Raises:
        ValueError: no row goes with a pattern.

    >>> rows = [Row("joint", "source"), Row("joint", "mean prediction"), Row("ordinary", "source")]
    >>> [row.name for row in asked_for(rows, ["joint: mean*"])]
    ['source', 'mean prediction']
    """
    if which == "all":
        return rows
    names = {f"{row.training}: {row.name}": row for row in rows}
    found = {name for name, row in names.items() if any(row is other for other in always)}
    patterns = which
    if which == "main":
        patterns, found = (), found | {name for name, row in names.items() if row.main}
    for pattern in patterns:
        if not (some := fnmatch.filter(names, pattern)):
            raise ValueError(unknown("row", pattern, names))
        found |= {*some}
    trainings = {names[name].training for name in found}
    found |= {f"{t}: {name}" for t in trainings for name in ("source", "batch statistics")}
    return [row for row in rows if f"{row.training}: {row.name}" in found]


def _different(rows: list[Row], kind: Kind) -> list[Row]:
    """Return the rows in their order, less those that do the same as another of the training.

    Of rows that do the same, as the published and the default objective on values, the default
    one stays.
    """
    kept: dict[object, Row] = {}
    for row in sorted(rows, key=lambda row: "default" not in row.name):
        kept.setdefault((row.training, row.prediction, _in_effect(row.settings, kind)), row)
    return [row for row in rows if any(row is other for other in kept.values())]


def _in_effect(settings: Settings | None, kind: Kind) -> Settings | None:
    """Return settings without what has no effect on a kind of prediction."""
    if settings is None or not isinstance(settings.objective, Idempotence):
        return settings
    objective = settings.objective
    if not kind.classes:
        objective = replace(objective, reliability=None)
    if objective.reliability is None:
        objective = replace(objective, sharpen=0.0)
    return replace(settings, objective=objective)

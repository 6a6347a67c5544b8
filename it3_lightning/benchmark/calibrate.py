"""Choice of a policy for one model, on validation samples under simulated shifts; or of none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from rich.table import Table

from it3_lightning.benchmark.config import BenchmarkSettings, Recipe
from it3_lightning.benchmark.kept import check_folder, mark_folder
from it3_lightning.benchmark.models import MakeModel, about, posthoc_model, with_priors
from it3_lightning.benchmark.peers import Facts, peers
from it3_lightning.benchmark.policy_errors import SampleErrors
from it3_lightning.benchmark.policy_rule import Choice, Errors, HarmlessRule, Judgement
from it3_lightning.benchmark.rendering import as_markdown, console
from it3_lightning.benchmark.rows import Kind, Row
from it3_lightning.benchmark.sample_scores import unit_of
from it3_lightning.benchmark.scoring import Progress, quiet, threads
from it3_lightning.benchmark.tune import to_tune_on
from it3_lightning.calibration import fingerprint
from it3_lightning.data import ShiftedData
from it3_lightning.engine import Settings
from it3_lightning.integration.checkpoints import KEPT
from it3_lightning.integration.module_adapter import WhichPrediction
from it3_lightning.priors import ValuePrior
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.files import load_plain, write
from it3_lightning.utils.messages import unknown
from it3_lightning.utils.specs import public_path

ClassStream = Literal["equal", "unequal", "correlated"]
_STREAMS: tuple[ClassStream, ...] = get_args(ClassStream)
_SOURCE = "source"
_NO_ARGUMENTS = ("objective", "gate", "backend", "chunk_size", "memory", "compile")
_TITLES = ("policy", "gain", "surely", "clean", "may lose", "on", "verdict")


@dataclass(frozen=True, kw_only=True)
class PolicyChoice:
    """Settings of the choice of a policy for one model.

    Samples are those to validate on, shifts the data's tuning shifts: no test sample is looked at.
    What is compared are errors of single samples, see
    :func:`~it3_lightning.benchmark.sample_scores.errors_of`.

    Args:
        ckpt_path: checkpoint of the model, as ``it3 fit`` wrote it; the policy is put into it.
            ``None``: the post-hoc model that ``it3 benchmark`` trains with the first seed, written
            to ``calibrated.ckpt`` of the output folder.
        methods: ``"all"`` or names of methods from the literature that are policies too, with the
            settings of their papers: those of :data:`~it3_lightning.benchmark.peers.PEERS` that
            need no auxiliary head.
        policies: names of those that are compared; empty: all.
        streams: of classes, see :class:`~it3_lightning.data.ShiftedData`; ``None``: all that the
            data has.
        batch_sizes: that the model may be asked for. With 1 among them, policies that need several
            samples, such as batch statistics, are not compared.
        batches: the most of each loader.
        rule: by which one is chosen.
        in_range: of values, whether under every shift they stay within the range that the
            validation samples have. Else a policy is chosen only if a tuning shift goes beyond it:
            what is known to help within a range may harm outside of it.

    Raises:
        ValueError: a stream is unknown, there is none, or a number is out of range.
    """

    ckpt_path: str | None = None
    methods: Literal["all"] | Sequence[str] = ()
    policies: Sequence[str] = ()
    streams: Sequence[ClassStream] | None = None
    batch_sizes: Sequence[int] = (16, 100)
    batches: int = 200
    rule: HarmlessRule = field(default_factory=HarmlessRule)
    in_range: bool = False

    def __post_init__(self) -> None:
        for stream in self.streams or ():
            if stream not in _STREAMS:
                raise ValueError(unknown("stream", stream, _STREAMS))
        if (self.streams is not None and not self.streams) or not self.batch_sizes:
            raise ValueError("Expected at least one of streams and of batch_sizes, got none.")
        if self.batches < 1 or min(self.batch_sizes) < 1:
            raise ValueError(
                f"Expected batches >= 1 and batch_sizes >= 1, got {self.batches} and "
                f"{list(self.batch_sizes)}."
            )

    def run(
        self,
        settings: BenchmarkSettings,
        make_model: MakeModel,
        data: ShiftedData,
        configuration: object = None,
    ) -> Calibrated:
        """Score every policy that has not been scored, choose, and put that into a checkpoint.

        Args:
            settings: of the benchmark: Trainer, recipe; training where there is no checkpoint.
            make_model: returns a fresh model with priors.
            data: to validate on.
            configuration: see :meth:`~it3_lightning.benchmark.Benchmark.run`.

        Raises:
            ValueError: the data has no tuning shifts, or no validation samples with labels; a
                policy or a method is unknown; the checkpoint is of another model.
            FileNotFoundError: there is no such checkpoint.
            FileExistsError: see :meth:`~it3_lightning.benchmark.Benchmark.run`.
        """
        folder = Path(settings.output)
        with quiet(), threads(settings.threads), to_tune_on(data):
            model = with_priors(make_model())
            kind = Kind.of(model)
            kind.check(settings.recipe.distance)
            if self.ckpt_path is not None:
                model = _loaded(model, self.ckpt_path)
            rows = self._rows(settings.recipe, kind, model, _labelled(model, data))
            streams = [s for s in self.streams or _STREAMS if self.streams or _has(data, s)]
            facts = about(settings, model, data, configuration)
            check_folder(folder, facts["training"])
            with Progress(len(rows) * len(streams) * len(self.batch_sizes)) as progress:
                seed = data.seed
                if self.ckpt_path is None:
                    seed, say = settings.seeds[0], progress.say
                    known = facts["training"]
                    model = posthoc_model(settings, seed, make_model, data, say, known)
                mark_folder(folder, facts["training"])
                tried = self.in_range or _beyond_range(model, data)
                own = facts["settings"]["data"]
                scores = SampleErrors(settings, model, data, seed, own, self.batches, progress)
                errors = scores.of(rows, streams, self.batch_sizes)
                choice = self.rule.choose(errors)
                if not tried:
                    choice = replace(choice, chosen=None)
                chosen = next(r for r in rows if r.name == (choice.chosen or _SOURCE))
                scores.see_source(chosen)
            policy: dict[str, Any] = {"name": chosen.name, "weights": fingerprint(model)}
            policy["arguments"] = arguments_of(chosen)
            model.it3_calibration.policy = policy
            path = folder / "calibrated.ckpt" if self.ckpt_path is None else Path(self.ckpt_path)
            _keep(settings, model, path, new=self.ckpt_path is None)
        unit, decimals = unit_of(model.it3_parts()[0]), settings.decimals
        return Calibrated(unit, decimals, errors, choice, policy, self.rule, path)

    def _rows(self, recipe: Recipe, kind: Kind, model: IT3Mixin, inputs: Any) -> list[Row]:
        """Return the source, and the policies that are asked for.

        Raises:
            ValueError: one is unknown.
        """
        rows = list(policies_of(recipe, kind))
        if self.methods:
            found = peers(self.methods, Facts.of(model, kind, inputs))
            rows += [replace(row, training="", company=False) for row in found if row.published]
        names = [row.name for row in rows]
        for name in self.policies:
            if name not in names:
                raise ValueError(unknown("policy", name, names))
        rows = [r for r in rows if not self.policies or r.name in (_SOURCE, *self.policies)]
        return [r for r in rows if 1 not in self.batch_sizes or not _needs_several(r, kind)]


def policies_of(recipe: Recipe, kind: Kind) -> Iterator[Row]:
    """Yield the source, and the policies that make sense for a kind of model, simple ones first."""
    still = Settings(steps=0, measure=False)
    moving = [replace(still, norm_stats=stats) for stats in ("batch", "evidence")]
    yield Row("", _SOURCE)
    if kind.batch_norm:
        yield Row("", "batch statistics", moving[0])
        yield Row("", "evidence", moving[1])
    predictions: tuple[WhichPrediction, ...] = ("second", "mean")
    for own in (still, *moving[: 2 * kind.batch_norm]):
        by = f" ({own.norm_stats})" if kind.batch_norm else ""
        for prediction in predictions:
            yield Row("", f"{prediction} prediction{by}", own, prediction)
    for own in moving if kind.batch_norm else [still]:
        by = f" ({own.norm_stats})" if kind.batch_norm else ""
        yield Row("", f"IT3, episodic{by}", recipe.episodic(own, recipe.objective))
        yield Row("", f"IT3, online{by}", recipe.online(own, recipe.objective))


def _needs_several(row: Row, kind: Kind) -> bool:
    """Whether a policy makes no sense for a sample by itself."""
    own = row.settings
    if own is None:
        return False
    asks = bool(own.steps or own.measure or own.predicts) and own.method.needs_prior
    company = kind.context == "batch" and (asks or row.prediction != "first")
    return own.needs_batch or company


def arguments_of(row: Row) -> dict[str, Any]:
    """Return the arguments of an ``IT3TestTimeCallback`` that predicts as a row does.

    >>> arguments_of(Row("", "second", Settings(steps=0, norm_stats="batch"), "second"))
    {'steps': 0, 'norm_stats': 'batch', 'prediction': 'second'}
    """
    settings = row.settings or Settings(steps=0, measure=False)
    method: Any = settings.objective
    plain = Settings(objective=method, **getattr(method, "defaults", {}))
    names = [f.name for f in fields(Settings) if f.name not in _NO_ARGUMENTS]
    now = {name: getattr(settings, name) for name in names}
    found = {name: value for name, value in now.items() if value != getattr(plain, name)}
    if row.prediction != "first":
        found["prediction"] = row.prediction
    if settings.steps or settings.predicts or settings.method.needs_source:
        found["objective"] = {"class_path": public_path(type(method)), "init_args": _given(method)}
    return found


def _given(method: Any) -> dict[str, Any]:
    """Return the fields of a method that are not at their defaults."""
    own = [f for f in fields(method) if f.init]
    default = {f.name: f.default_factory() for f in own if f.default_factory is not MISSING}
    default |= {f.name: f.default for f in own if f.default is not MISSING}
    values = {f.name: getattr(method, f.name) for f in own}
    return {k: v for k, v in values.items() if k not in default or v != default[k]}


def _labelled(model: IT3Mixin, data: ShiftedData) -> Any:
    """Return the inputs of a validation batch.

    Raises:
        ValueError: there is none, or it has no labels.
    """
    try:
        batch = next(iter(data.val_dataloader()), None)
    except KeyError:  # of the split
        batch = None
    if batch is None:
        raise ValueError(
            f"Expected {type(data).__name__} with validation samples, got none. A policy is chosen "
            'on samples that the model has not learnt: give data.val_size, or return "validation" '
            "from split()."
        )
    try:
        model.it3_parts()[0].from_target(model.it3_target(batch))
    except Exception as error:  # batches of any kind
        raise ValueError(
            f"Expected validation batches with labels, got one in which {type(model).__name__} "
            f"finds none that its prior knows ({type(error).__name__}: {error}). Without labels "
            "nothing tells a gain from harm: label some hundred samples, or adapt nothing."
        ) from error
    return model.it3_inputs(batch)


def _beyond_range(model: IT3Mixin, data: ShiftedData) -> bool:
    """Whether a shift has mostly values that no clean sample comes near; true for other targets."""
    if not isinstance(model.it3_parts()[0], ValuePrior):
        return True
    clean, *shifted = (
        torch.cat([target.reshape(len(target), -1) for target in map(model.it3_target, loader)])
        for loader in data.test_dataloader()
    )
    told = clean.isfinite()
    low, high = (clean.where(told, end) for end in (math.inf, -math.inf))
    low, high = low.amin(0), high.amax(0)
    shares = [((own < low) | (own > high)).any(1).float().mean() for own in shifted]
    return any(share > 0.5 for share in shares)


def _has(data: ShiftedData, stream: ClassStream) -> bool:
    """Whether the data has such a stream."""
    before, data.stream = data.stream, stream
    try:
        data.check()
    except ValueError:
        return False
    finally:
        data.stream = before
    return True


def _loaded(model: IT3Mixin, path: str) -> IT3Mixin:
    """Return the model with the weights of its checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another model.
    """
    content = _content(Path(path))
    try:
        model.configure_model()
        model.on_load_checkpoint(content)
        model.load_state_dict(content["state_dict"])
    except Exception as error:  # content of any kind
        raise ValueError(
            f"Expected a checkpoint of {type(model).__name__} as it3 fit writes it, got another: "
            f"{path} ({type(error).__name__}: {error})."
        ) from error
    return model


def _content(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a checkpoint that it3 fit wrote, got no such file: {path}."
        )
    return load_plain(path)


def _keep(settings: BenchmarkSettings, model: IT3Mixin, path: Path, *, new: bool) -> None:
    """Put the calibration of a model into its checkpoint, where all else stays as it is."""
    if new:
        trainer = settings.trainer()
        trainer.strategy.connect(model)
        trainer.save_checkpoint(path)
        return
    content = _content(path)
    content.setdefault(KEPT, {})["calibration"] = model.it3_calibration.state_dict()
    write(path, lambda stream: torch.save(content, stream))


@dataclass(frozen=True)
class Calibrated:
    """What was chosen for a model, and by which errors.

    Args:
        unit: what errors are, in words.
        decimals: of errors in the table.
        errors: of all samples, without and with each policy.
        choice: of the rule.
        policy: the chosen one as plain data, as it stands in the checkpoint.
        rule: that chose.
        path: of the checkpoint.
    """

    unit: str
    decimals: int
    errors: Errors
    choice: Choice
    policy: Mapping[str, Any]
    rule: HarmlessRule
    path: Path

    def yaml(self) -> str:
        """Return the lines to put into a configuration."""
        own = {"class_path": "it3_lightning.IT3TestTimeCallback"}
        callback = {**own, "init_args": dict(self.policy["arguments"])}
        lines = {"trainer": {"callbacks": [callback]}}
        return str(yaml.safe_dump(lines, sort_keys=False, default_flow_style=None))

    def title(self) -> str:
        """Return what the table shows."""
        source = [float(values.mean()) for values in self.errors.source.values()]
        return f"{self.unit}: of the source {self._shown(sum(source) / len(source))}"

    def table(self) -> Table:
        """Return the table of all policies, those that may be chosen first."""
        shown = Table(title=self.title())
        for title in _TITLES:
            left = title in ("policy", "on", "verdict")
            shown.add_column(title, justify="left" if left else "right", no_wrap=True)
        for cells in self.lines():
            shown.add_row(*cells)
        return shown

    def lines(self) -> list[list[str]]:
        """Return the cells of the table, without its head."""
        judged = self.choice.judgements.items()
        ranked = sorted(judged, key=lambda pair: (pair[1].eligible, pair[1].gain), reverse=True)
        return [
            [
                name,
                self._shown(own.gain, "+"),
                self._shown(own.surely, "+"),
                self._shown(own.clean, "+"),
                self._shown(own.limit[1], "+"),
                own.limit[0],
                "chosen" if name == self.choice.chosen else own.verdict,
            ]
            for name, own in ranked
        ]

    def words(self) -> str:
        """Return the verdict in sentences."""
        if self.choice.chosen is None:
            return self._abstained()
        own = self.choice.judgements[self.choice.chosen]
        gains = {family: gain for family, (_, gain) in self.choice.left_out.items()}
        worst = min(gains, key=lambda family: gains[family])
        share = f"{100 * self.rule.confidence:g} %"
        return (
            f"Chosen: {self.choice.chosen}. Under shift it takes {self._shown(own.gain)} off the "
            f"error of the source, at least {self._shown(own.surely)} with a confidence of {share};"
            f" {self._shown(own.clean, '+')} on clean samples. In each group of conditions the "
            f"loss is at most {self._shown(own.limit[1], '+')} ({own.limit[0]}), with "
            f"{self._shown(self.choice.tolerated)} tolerated. Chosen without a family of shifts, "
            f"policies gain {self._shown(sum(gains.values()) / len(gains), '+')} on it, mean over "
            f"families, {self._shown(gains[worst], '+')} on {worst}."
        )

    def _abstained(self) -> str:
        judged = self.choice.judgements
        first = "No adaptation: predictions are those of the source, bit for bit."
        if not judged:
            return f"{first} There is no policy to choose."
        good = [name for name, own in judged.items() if own.eligible]
        name = max(good or judged, key=lambda name: judged[name].gain)
        own = judged[name]
        if good:
            return f"{first} {_UNCOVERED.format(name=name, gain=self._shown(own.gain, '+'))}"
        return (
            f"{first} {name}, which gains most under shift ({self._shown(own.gain, '+')}), "
            f"{self._why(own)}"
        )

    def _why(self, own: Judgement) -> str:
        tolerated = f"{self._shown(self.choice.tolerated)} tolerated"
        if own.harm is not None:
            where, harm = own.harm
            return f"harms: it loses {self._shown(harm)} on {where}, with {tolerated}."
        if own.doubt is not None:
            group, limit = own.doubt
            count = max(len(own) for own in self.errors.samples.values())
            return (
                f"is not shown to be harmless: of {group} it may lose {self._shown(limit)}, with "
                f"{tolerated}. There are {count} validation samples: more of them "
                "(data.val_size) tell more; calibrate.rule.tolerance says what you tolerate."
            )
        return f"does not surely gain: at least {self._shown(own.surely, '+')}."

    def _shown(self, value: float, sign: str = "") -> str:
        return f"{value:{sign}.{self.decimals}f}"


_UNCOVERED = (
    "{name} gains most ({gain}) within the range of the validation samples, and no tuning shift "
    "has values beyond it, where it may harm: predictions are drawn back into the range that was "
    "learnt. Give tuning shifts that go beyond it (data.beyond_size of airfoils), or, where values "
    "cannot leave the range, calibrate.in_range=true."
)


def show_choice(found: Calibrated, folder: Path) -> None:
    """Print the table, the verdict and the lines to paste; write them into the folder."""
    shown = found.table()
    terminal = console()
    terminal.print(shown)
    terminal.print(found.words())
    lines = found.yaml()
    terminal.print(f"\n{lines}")
    rows = as_markdown([list(_TITLES), *found.lines()], left=(0, 5, 6))
    parts = [f"{found.title()}.", rows, found.words(), f"```yaml\n{lines}```"]
    write(folder / "calibration.md", "\n\n".join(parts) + "\n")
    write(folder / "policy.yaml", lines)
    terminal.print(
        f"Put into {found.path}: IT3TestTimeCallback(policy='calibrated') predicts so. Written to "
        f"{folder}: calibration.md, policy.yaml"
    )

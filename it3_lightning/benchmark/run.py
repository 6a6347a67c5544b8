"""Runs a benchmark seed by seed: trains, scores every row, and goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer

from it3_lightning.benchmark.about import about
from it3_lightning.benchmark.distances import keep_distances, kept_distances
from it3_lightning.benchmark.progress import Progress, quiet, threads
from it3_lightning.benchmark.results import Record, Results
from it3_lightning.benchmark.rows import Recipe, Row, rows_for
from it3_lightning.benchmark.separation import separations
from it3_lightning.benchmark.training import MakeModel, train_models, with_priors
from it3_lightning.data import ShiftedData
from it3_lightning.dual_pass import DualPass
from it3_lightning.engine.norm import batch_norms
from it3_lightning.mixin import IT3Mixin
from it3_lightning.objectives import Idempotence
from it3_lightning.priors import ClassPrior, MaskPrior, ValuePrior
from it3_lightning.selection import select

_KEPT = ("records", "separations")  # of a seed, in its file


@dataclass(kw_only=True)
class Benchmark:
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
            the published objective, the balance term and filtered entropy.
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

    def run(
        self, make_model: MakeModel, data: ShiftedData, configuration: object = None
    ) -> Results:
        """Run everything that has not been run and return all results.

        Args:
            make_model: returns a fresh model with priors, the same one for the same seed.
            data: gives the loaders of clean and shifted samples.
            configuration: plain data that ``make_model`` depends on, for telling whether scores
                that are there already still hold.
        """
        with quiet(), threads(self.threads):
            probe = with_priors(make_model())
            rows = self._rows(probe)
            results = Results(
                self.metric,
                rows,
                about=about(self, probe, data, configuration),
                higher_is_better=self.higher_is_better,
                decimals=self.decimals,
                baseline_errors=self._baseline_errors(data),
            )
            with Progress(len(self.seeds), len(rows) * len(self.streams)) as progress:
                for seed in self.seeds:
                    settings = results.about["settings"]
                    scores = self._seed(seed, rows, make_model, data, progress, settings)
                    results.records += scores[0]
                    results.separations += scores[1]
        results.distances = kept_distances(Path(self.output), self.seeds)
        results.save(Path(self.output))
        return results

    def _baseline_errors(self, data: ShiftedData) -> dict[str, float] | None:
        """Return the errors that those of an accuracy in per cent are compared with, if any."""
        if data.baseline_errors is None or not (self.percent and self.higher_is_better):
            return None
        return dict(data.baseline_errors)

    def _rows(self, model: IT3Mixin) -> list[Row]:
        prior, distance = model.it3_prior, self.recipe.distance
        maps = isinstance(prior, MaskPrior) and prior.channels > 1
        classes, batch_norm = isinstance(prior, ClassPrior) or maps, bool(batch_norms(model))
        values = isinstance(prior, ValuePrior) or (isinstance(prior, MaskPrior) and not maps)
        if values and distance not in ("l1", "l2"):
            raise ValueError(
                f"Expected recipe.distance l1 or l2 for a model of values, got {distance!r}, which "
                "compares probabilities. Set benchmark.recipe.distance to one of the two; for "
                "binary masks, num_classes of MaskPrior to 2 does as well."
            )
        rows = rows_for(self.recipe, classes=classes, batch_norm=batch_norm, balanced=not maps)
        return [row for row in rows if row.main or self.rows == "all"]

    def _seed(
        self,
        seed: int,
        rows: list[Row],
        make_model: MakeModel,
        data: ShiftedData,
        progress: Progress,
        settings: Any,
    ) -> tuple[list[Record], list[Record]]:
        """Return scores and separations of one seed, from its file where that fits the settings."""
        file = Path(self.output) / f"seed_{seed}.json"
        fingerprint = json.dumps(settings, sort_keys=True)
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if kept.get("fingerprint") == fingerprint:
            progress.skip(f"seed {seed}: from {file}", len(rows) * len(self.streams))
            first, second = ([Record(**r) for r in kept.get(k, ())] for k in _KEPT)
            return first, second
        data.seed = seed
        models = train_models(self, seed, make_model, data, progress.say)
        records: list[Record] = []
        for stream in self.streams:
            data.stream = stream  # type: ignore[assignment]
            for row in rows:
                progress.say(f"seed {seed}, {stream} classes: {row.training}, {row.name}")
                records += self._scored(seed, stream, row, models[row.training], data)
                progress.advance()
        data.stream = self.streams[0]  # type: ignore[assignment]
        told = separations(models, data, Idempotence(self.recipe.distance))
        progress.say(f"seed {seed}: distances")
        keep_distances(self, models, rows, data)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {k: [asdict(r) for r in v] for k, v in zip(_KEPT, (records, told), strict=True)}
        file.write_text(json.dumps({"fingerprint": fingerprint, **content}))
        return records, told

    def _scored(
        self, seed: int, stream: str, row: Row, model: IT3Mixin, data: ShiftedData
    ) -> list[Record]:
        """Score one row on all loaders."""
        callback = row.callback()
        trainer = self.trainer(callbacks=[] if callback is None else [callback])
        logged = trainer.test(model, datamodule=data, verbose=False)
        adapts = row.settings is not None and row.settings.steps > 0
        chosen = select(model, row.settings.parameters) if adapts and row.settings else {}
        time = 0.0 if callback is None else callback.summary.ms_per_sample
        adapted = sum(p.numel() for p in chosen.values())
        return [
            Record(row.training, row.name, stream, seed, shift, self._score(scores), time, adapted)
            for shift, scores in zip(data.test_names, logged, strict=True)
        ]

    def _score(self, scores: Any) -> float:
        for key, value in scores.items():
            if key.partition("/dataloader_idx_")[0] == self.metric:
                return float(value) * (100 if self.percent else 1)
        raise ValueError(
            f"test_step logged no {self.metric!r}, but {', '.join(scores)}. Set benchmark.metric "
            "to one of them."
        )

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

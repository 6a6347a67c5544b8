"""Shows what the default at test time did, and what the rule of ``it3 calibrate`` makes of it.

``python tests/benchmarks/harm.py configs/boston.yaml --seeds 0 1 2 --streams equal unequal`` trains
the post-hoc model of a configuration for each seed, lets the rule choose on its validation samples
under the tuning shifts, and predicts its *test* samples, clean and under the shifts that results
are reported on: as it is, by the step that was the default, and by what was chosen. Further
arguments are those of ``it3 calibrate``. Models and errors are kept in ``benchmark.output``, a
folder for each seed. Lines are rows of a table in Markdown.

Gains are errors taken away, with 95 % intervals over seeds *and* samples: of ``t`` over seeds, and
within a seed of a normal mean over samples, each of which counts once under all conditions; the
wider of both. The worst cell is the condition with the largest loss, mean over seeds, whatever its
interval.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from it3_lightning.benchmark.calibrate import policies_of
from it3_lightning.benchmark.config import BenchmarkSettings
from it3_lightning.benchmark.models import about, with_priors
from it3_lightning.benchmark.policy_errors import SampleErrors
from it3_lightning.benchmark.policy_rule import Condition, Errors, upper_limit
from it3_lightning.benchmark.rows import Kind, Row
from it3_lightning.benchmark.scoring import Progress, quiet, threads
from it3_lightning.cli import asked_for
from it3_lightning.engine import Settings
from it3_lightning.utils.files import load_plain

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided quantiles of t by the number of seeds
BEFORE = "one step"  # IT3TestTimeCallback() of version 0.1.0
NAMES = {"IT3, episodic (batch)": "one step, batch statistics"}


@dataclass(frozen=True)
class Found:
    """What a seed has come to: what was chosen, and the errors on test samples."""

    chosen: str
    errors: Errors


def run(config: str, seed: int, streams: Sequence[str], size: int, arguments: list[str]) -> Found:
    """Calibrate the model of a seed, and predict its test samples."""
    named = Path(config).stem
    output = next(
        (a.split("=", 1)[1] for a in arguments if a.startswith("--benchmark.output=")), ""
    )
    folder = Path(output or f"results/harm/{named}") / f"seed_{seed}"
    own = [a for a in arguments if not a.startswith("--benchmark.output=")]
    own += ["--benchmark.seeds", f"[{seed}]", "--benchmark.output", str(folder)]
    own += ["--benchmark.threads", "1"]
    asked = asked_for(["--config", config, *own], "calibrate")
    choice: Any = asked.cli.config_init.calibrate
    settings: BenchmarkSettings = asked.settings
    found = choice.run(settings, asked.make_model, asked.data, asked.configuration)
    print(f"<!-- {named}, seed {seed}: {found.words()} -->", flush=True)  # noqa: T201
    chosen = str(found.policy["name"])
    with quiet(), threads(settings.threads):
        model = with_priors(asked.make_model())
        model.configure_model()
        content = load_plain(found.path)
        model.on_load_checkpoint(content)
        model.load_state_dict(content["state_dict"])
        kind = Kind.of(model)
        known = {row.name: row for row in policies_of(settings.recipe, kind)}
        rows = [known["source"], Row("", BEFORE, Settings())]
        rows += [known[name] for name in ("batch statistics", *NAMES) if name in known]
        rows += [known[chosen]] * (chosen not in [row.name for row in rows])
        test = replace(settings, output=str(folder / "test"))
        with Progress(len(rows) * len(streams)) as progress:
            data = about(settings, model, asked.data, asked.configuration)["settings"]["data"]
            given = test, model, asked.data, seed, data, choice.batches, progress
            return Found(chosen, SampleErrors(*given).of(rows, streams, [size]))


def gain(
    errors: Errors, name: str, over: str, conditions: Sequence[Condition]
) -> tuple[float, float]:
    """Return the mean gain of a policy over another, and half of its 95 % interval over samples."""
    every: Mapping[str, Mapping[Condition, Any]] = {"source": errors.source, **errors.policies}
    taken = {c: every[over][c] - every[name][c] for c in conditions}
    mean = statistics.fmean(float(v.mean()) for v in taken.values())
    parts = [(errors.samples[c], v) for c, v in taken.items()]
    return mean, upper_limit(parts, mean, 0.975) - mean


def over_seeds(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean over seeds and half of its interval: that over seeds or that over samples."""
    means = [mean for mean, _ in pairs]
    within = math.sqrt(sum(half**2 for _, half in pairs)) / len(pairs)
    if len(means) == 1:
        return means[0], within
    between = T_95[len(means)] * statistics.stdev(means) / math.sqrt(len(means))
    return statistics.fmean(means), max(within, between)


def lines(title: str, found: Sequence[Found], decimals: int) -> list[str]:
    """Return the rows of the table: before, what else is there, and what the rule chose."""

    def shown(pair: tuple[float, float]) -> str:
        return f"{pair[0]:+.{decimals}f} ± {pair[1]:.{decimals}f}"

    conditions = [*found[0].errors.source]
    clean = [c for c in conditions if c.shift == "clean"]
    shifted = [c for c in conditions if c.shift != "clean"]
    source = statistics.fmean(float(own.errors.source[c].mean()) for own in found for c in shifted)
    shared = [BEFORE, *(n for n in ("batch statistics", *NAMES) if n in found[0].errors.policies)]
    chosen = [own.chosen for own in found]
    made = []
    for name in [*shared, "by the rule"]:

        def of(some: Sequence[Condition], name: str = name) -> tuple[float, float]:
            names = chosen if name == "by the rule" else [name] * len(found)
            pairs = zip(found, names, strict=True)
            return over_seeds([gain(own.errors, n, "source", some) for own, n in pairs])

        cells = {c: of([c]) for c in conditions}
        worst = min(cells, key=lambda c: cells[c][0])
        label = (
            f"**by the rule**: {told(chosen)}" if name == "by the rule" else NAMES.get(name, name)
        )
        made.append(
            f"| {title} | {source:.{decimals}f} | {label} | {shown(of(shifted))} "
            f"| {shown(of(clean))} | {shown(cells[worst])} ({worst.shift}, {worst.stream}) |"
        )
    return made


def told(chosen: Sequence[str]) -> str:
    """Return what was chosen, and by how many seeds where they differ.

    >>> told(["source", "source"]), told(["source", "evidence", "source"])
    ('no adaptation', 'no adaptation (2), evidence (1)')
    """
    names = ["no adaptation" if name == "source" else name for name in chosen]
    counts = {name: names.count(name) for name in names}
    if len(counts) == 1:
        return names[0]
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows of one configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--title", default="")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--streams", nargs="+", default=["equal"])
    parser.add_argument("--size", type=int, default=100, help="of the batches that are tested on")
    parser.add_argument("--decimals", type=int, default=1)
    asked, further = parser.parse_known_args(arguments)
    found = [run(asked.config, s, asked.streams, asked.size, further) for s in asked.seeds]
    for line in lines(asked.title or Path(asked.config).stem, found, asked.decimals):
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()

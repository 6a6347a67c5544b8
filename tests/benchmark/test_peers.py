"""Rows of methods from the literature: which there are, at which rates, on which streams."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benchmark_runs import benchmark, digits, make_model, scored_rows
from torch import nn

from it3_lightning import FeatureInjection, ValuePrior
from it3_lightning.benchmark import Results, Row, scoring
from it3_lightning.benchmark.peers import PEERS, Facts, peers
from it3_lightning.benchmark.results import Record
from it3_lightning.benchmark.rows import FEWER, Kind
from it3_lightning.benchmark.scoring import Progress, Scoring, streaming
from it3_lightning.benchmark.tune import at_chosen_rates
from it3_lightning.engine import Settings
from it3_lightning.methods import Contrastive, MaskedPatches, Rotation, Tent
from it3_lightning.networks import MLP
from it3_lightning.tasks import IT3Regressor

IMAGES = torch.zeros(2, 1, 8, 8)
HEADS = (
    Rotation("network.features.5", 8, 4),
    Contrastive("network.features.5", 8, 4, 4),
    MaskedPatches("network.features.5", 8, 1, 2, hidden=4),
)
STREAMS = ("equal", "continual", "equal/1")
ALONE = ("MEMO", "TTT", "TTTMAE")


def facts() -> Facts:
    model = make_model()
    return Facts.of(model, Kind.of(model), IMAGES)


def names(rows: list[Row]) -> set[str]:
    return {row.name for row in rows if row.published}


def test_all_are_those_that_go_with_model_and_data() -> None:
    found = peers("all", facts(), HEADS)
    assert names(found) == set(PEERS)
    assert facts().last == "network.head"
    assert names(peers("all", facts())) == set(PEERS) - {"TTT", "TTTPlusPlus", "TTTMAE"}
    rows = Facts.of(make_model(), Kind.of(make_model()), torch.zeros(2, 8))
    of_classes = {"Tent", "EATA", "SAR", "RDumb", "LAME", "LabelShiftEM", "T3A"}
    without_views = of_classes | {"ActMAD", "Iterates"}
    assert names(peers("all", rows)) == without_views
    values = IT3Regressor(
        MLP(10, 1, (8,)), prior=ValuePrior(), conditioning=FeatureInjection("network.layer0")
    )
    kind = Kind.of(values)
    assert names(peers("all", Facts.of(values, kind, torch.zeros(2, 10)))) == {"ActMAD", "Iterates"}


def test_each_has_the_settings_of_its_paper_on_the_network_that_it_needs() -> None:
    for row in peers("all", facts(), HEADS, alone=7):
        if not row.published:
            continue
        assert row.settings is not None
        method = row.settings.method
        for name, value in method.defaults.items():
            assert getattr(row.settings, name) == value, row.name
        assert row.samples == (7 if row.name in ALONE else None)
        head = {"TTT": "Rotation", "TTTPlusPlus": "Contrastive", "TTTMAE": "MaskedPatches"}
        training = "post-hoc" if method.needs_prior else "ordinary"
        assert row.training == f"with {head[row.name]}" if row.name in head else training


def test_epsilon_of_few_and_of_many_classes() -> None:
    many = replace(facts(), classes=1000)
    for name in ("EATA", "RDumb"):
        few, more = (peers([name], each)[0].settings for each in (facts(), many))
        assert few is not None
        assert more is not None
        assert [s.method.epsilon for s in (few, more)] == [0.4, 0.05]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tnet", "Unknown method 'Tnet'. Did you mean 'Tent'"),
        ("TTT", "TTT needs a head: benchmark.heads with a Rotation"),
    ],
)
def test_what_does_not_go_is_refused_where_it_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peers([name], facts())


def test_a_method_of_classes_is_refused_for_values() -> None:
    values = replace(facts(), kind=Kind(classes=False, batch_norm=False, values=True))
    with pytest.raises(ValueError, match="LAME needs one class for each sample"):
        peers(["LAME"], values)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("methods")
    return folder, ran(folder)


def ran(folder: Path) -> Results:
    settings = benchmark(
        folder,
        methods="all",
        heads=HEADS,
        rates=(1.0,),
        rate_batches=1,
        alone=2,
        batches=2,
        streams=STREAMS,
        distance_samples=0,
    )
    return settings.run(make_model, digits(eval_batch_size=8, test_size=16))


def test_every_method_is_scored_at_both_rates_on_every_stream(run: tuple[Path, Results]) -> None:
    _, results = run
    assert names(results.rows) == set(PEERS)
    tuned = {row.name.partition(",")[0] for row in results.rows if ", tuned" in row.name}
    assert tuned == {row.name for row in results.rows if row.published and steps(row)}
    for row in results.rows:
        needs = row.settings is not None and row.settings.method.needs_batch
        expected = ("equal",) if row.samples else STREAMS[:-1] if needs else STREAMS
        assert tuple(s for s in STREAMS if results.has(row, s)) == expected, row.name
        forwards, backwards, milliseconds = results.cost(row)
        assert forwards >= 1
        assert milliseconds > 0
        assert backwards == 0 or steps(row), row.name  # one that finds nothing reliable takes none
        if row.published and row.name in ("Tent", "ROID", "CoTTA", "ActMAD", *ALONE):
            assert backwards > 0, row.name
    assert {r.shift for r in results.records if r.stream == "continual"} == {"clean", "continual"}


def steps(row: Row) -> bool:
    return row.settings is not None and row.settings.steps > 0


def test_rows_of_samples_by_themselves_are_compared_on_the_same_samples(
    run: tuple[Path, Results],
) -> None:
    _, results = run
    for row in results.rows:
        base = results.baseline(row)
        if row.samples is not None and row.name != FEWER:
            assert base is not None
            assert (base.training, base.name, base.samples) == (row.training, FEWER, row.samples)


def test_nothing_is_trained_or_scored_again(
    run: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = run
    monkeypatch.setattr(scoring, "scored", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr(scoring, "models_of", lambda *_: pytest.fail("trained again"))
    assert ran(folder).records == results.records


def test_other_methods_cost_their_own_scores_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"rates": (), "distance_samples": 0}
    benchmark(tmp_path, **given).run(make_model, digits())
    ran = scored_rows(monkeypatch)
    more = benchmark(tmp_path, methods=["Tent", "TTTPlusPlus"], heads=HEADS[1:2], **given)
    more.run(make_model, digits())
    head = "with Contrastive"
    assert ran == [
        ("ordinary", "Tent"),
        *((head, name) for name in ("source", "batch statistics", "TTTPlusPlus")),
    ]


@pytest.mark.parametrize("pattern", ["joint: mean*", "ordinary: LabelShift*"])
def test_methods_stay_beside_rows_of_patterns_and_may_be_named(
    pattern: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"rates": (), "distance_samples": 0, "methods": ["LabelShiftEM"]}
    found = benchmark(tmp_path, rows=[pattern], **given).run(make_model, digits())
    still = ["source", "batch statistics"]
    expected = [("ordinary", name) for name in [*still, "LabelShiftEM"]]
    if "joint" in pattern:
        expected += [("joint", name) for name in [*still, "mean prediction"]]
    assert {(row.training, row.name) for row in found.rows} == set(expected)
    assert len(found.rows) == len(expected)
    assert found.gain(found.rows[-1], "equal") is not None


def test_single_images_have_the_statistics_of_the_source() -> None:
    row = Row("ordinary", "Tent", Settings(objective=Tent(), norm_stats="batch"))
    alone, pair = row.on("equal/1").settings, row.on("equal/2").settings
    assert alone is not None
    assert pair is not None
    assert (alone.norm_stats, pair.norm_stats) == ("source", "batch")


def test_the_data_are_as_before_after_a_stream() -> None:
    data = digits(eval_batch_size=8)
    with streaming(data, 3, "correlated/4"):
        assert (data.seed, data.stream, data.eval_batch_size) == (3, "correlated", 4)
    assert (data.seed, data.stream, data.eval_batch_size) == (0, "equal", 8)


@pytest.mark.parametrize(
    ("gains", "name"),
    [
        ({0.0001: 1.0, 0.001: 2.0, 0.01: -5.0}, "Tent, tuned: lr 0.001"),
        ({0.0001: 1.0, 0.001: 0.0, 0.01: 3.0}, "Tent, tuned: lr 0.01"),
        ({0.0001: -1.0, 0.001: 0.1, 0.01: -5.0}, "Tent, tuned: no step"),
    ],
)
def test_the_rate_is_that_which_the_rule_chooses(
    gains: dict[float, float], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, asked = digits(), []

    def records(self: Scoring, row: Row, seed: int, stream: str, *, batches: int) -> list[Record]:
        asked.append((seed, stream, batches, self.data.evaluate_on, tuple(self.data.shifts)))
        settings = row.settings
        assert settings is not None
        gain = gains[round(float(settings.lr or 0), 6)] if settings.steps else 0.0
        scores = {"clean": 90.0, "fog": 60.0 + gain}
        return [Record("ordinary", "", stream, 0, *pair, 0.1, 3) for pair in scores.items()]

    monkeypatch.setattr(Scoring, "records", records)
    settings = benchmark(tmp_path, seeds=(4, 5), rate_batches=3)
    scores = Scoring(settings, make_model, data, {"training": {}}, Progress(1))
    (found,) = at_chosen_rates(peers(["Tent"], facts()), make_model(), scores)
    assert (found.name, found.published) == (name, False)
    assert found.settings is not None
    assert found.settings.steps == (0 if "no step" in name else 1)
    assert set(asked) == {(4, "equal", 3, "validation", tuple(data.tuning_shifts))}
    assert (data.evaluate_on, tuple(data.shifts)) == ("test", ("contrast",))


def test_a_network_without_batch_norm_keeps_the_statistics_that_it_has() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

    model: Any = Plain()
    model.it3_prior = make_model().it3_prior
    found = Facts.of(model, Kind(classes=True, batch_norm=False), torch.zeros(2, 4))
    assert found.last == ""  # three outputs, and ten classes
    for row in peers("all", found):
        assert row.settings is not None
        assert row.settings.norm_stats == "source"

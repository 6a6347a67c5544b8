"""Advice: what gains for sure and harms nowhere, or nothing; in words, and as YAML that runs."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.benchmark_runs import candidate, toy_results, toy_tuned
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from it3_lightning.benchmark import Record, Results, Row, rows_for
from it3_lightning.benchmark.advice import advice, callback_yaml, lines
from it3_lightning.benchmark.config import Recipe
from it3_lightning.benchmark.peers import Facts, peers
from it3_lightning.benchmark.report import show, show_tuning
from it3_lightning.benchmark.rows import Kind
from it3_lightning.engine import Settings

STILL = Settings(steps=0, norm_stats="batch", measure=False)
ROWS = [
    Row("ordinary", "source"),
    Row("ordinary", "batch statistics", STILL),
    Row("ordinary", "Tent", replace(STILL, steps=1)),
    Row("post-hoc", "source"),
    Row("post-hoc", "batch statistics", STILL),
    Row("post-hoc", "second prediction", STILL, "second"),
]


def made(**shares: dict[str, float]) -> Results:
    """Results whose rows are right on these shares of the samples, by stream and shift.

    Args:
        **shares: by the name of the row, then by shift; what is not named has that of the source.
    """
    results = Results("test_acc", list(ROWS), percent=True)
    draws = {(n, s): np.random.default_rng(n).random(2000) for n in (0, 1) for s in ("equal",)}
    for row in ROWS:
        own = {"clean": 0.9, "fog": 0.6, "blur": 0.6} | shares.get(row.name.replace(" ", "_"), {})
        for (seed, stream), draw in draws.items():
            for shift, share in own.items():
                scores = draw < share
                results.samples[row.training, row.name, stream, seed, shift] = scores
                score, ms = 100 * float(scores.mean()), 1.0 + 2 * (row.settings is not None)
                results.records.append(
                    Record(row.training, row.name, stream, seed, shift, score, ms, 0, 2.0, 1.0)
                )
    return results


BATCH = {"clean": 0.9, "fog": 0.7, "blur": 0.65}


def said(results: Results) -> tuple[str, dict[str, str]]:
    found = advice(results)
    assert found is not None
    (_, first), *others = lines(results, found)
    return first, dict(others)


def test_what_gains_most_and_harms_nowhere_is_advised() -> None:
    results = made(
        batch_statistics=BATCH,
        Tent={**BATCH, "fog": 0.72},
        second_prediction={"clean": 0.9, "fog": 0.75, "blur": 0.67},
    )
    found = advice(results)
    assert found is not None
    assert found.row == ROWS[5]
    first, facts = said(results)
    assert first.startswith("Use it: second prediction; train its conditioning")
    gain = results.overall(ROWS[5], ROWS[1])
    assert gain is not None
    assert facts["gain"] == f"{gain:.1f} points over batch statistics, under the shifts"
    assert facts["worst case"].endswith("on clean; 0 of 3 surely harmed")
    assert "2 forward and 1 backward passes; 3 ms a sample, 3 times" in facts["cost"]


@pytest.mark.parametrize("harm", [{"clean": 0.85}, {"blur": 0.6}])
def test_what_harms_anywhere_is_not_advised_whatever_it_gains(harm: dict[str, float]) -> None:
    strong = {**BATCH, "fog": 0.95}
    results = made(batch_statistics=BATCH, second_prediction={**strong, **harm})
    found = advice(results)
    assert found is not None
    assert (found.chosen, found.row) == (None, ROWS[1])
    first, facts = said(results)
    assert first.startswith("Do not adapt; use batch statistics alone: nothing of 2 ")
    assert facts["best of the others"].startswith("post-hoc, second prediction: +")
    assert f"on {next(iter(harm))}; 1 of 3 surely harmed" in facts["best of the others"]


def test_a_loss_within_the_tolerance_does_not_count_as_harm() -> None:
    small = {"clean": 0.898, "fog": 0.9, "blur": 0.8}  # 0.2 points; 1 % of the error are 0.3
    results = made(batch_statistics=BATCH, second_prediction=small)
    found = advice(results)
    assert found is not None
    assert found.row == ROWS[5]


def test_where_batch_statistics_harm_the_network_is_left_as_it_is() -> None:
    results = made(batch_statistics={**BATCH, "clean": 0.8})
    first, facts = said(results)
    assert first.startswith("Do not adapt; leave the network as it is")
    assert "batch statistics" not in facts
    found = advice(results)
    assert found is not None
    assert callback_yaml(found.row) == ""


def test_a_gain_that_may_be_chance_is_none() -> None:
    results = made(batch_statistics=BATCH, second_prediction={**BATCH, "fog": 0.7004})
    assert said(results)[0].startswith("Do not adapt; use batch statistics")


def test_what_ordinary_training_on_perturbed_inputs_gains_is_not_put_down_to_a_method() -> None:
    gains = {"clean": 0.9, "fog": 0.8, "blur": 0.8}
    results = made(batch_statistics=BATCH, second_prediction=gains)
    results.rows += [replace(row, training="perturbed") for row in ROWS[:2]]
    for record in results.records[:]:
        key = "post-hoc", "second prediction", record.stream, record.seed, record.shift
        if record.training == "ordinary" and record.row in ("source", "batch statistics"):
            mine = replace(record, training="perturbed")
            if record.row == "batch statistics":
                mine = replace(mine, score=100 * float(results.samples[key].mean()))
            results.records.append(mine)
            name = "perturbed", record.row, record.stream, record.seed, record.shift
            own = "ordinary", *name[1:]
            results.samples[name] = results.samples[key if record.row[0] == "b" else own]
    first, facts = said(results)
    text = "batch statistics after training on perturbed inputs"
    assert first.startswith(f"Do not adapt; use {text} alone: nothing of 2 ")
    assert text in facts


def test_controls_with_a_shuffled_prior_are_not_advised() -> None:
    results = made(batch_statistics=BATCH, second_prediction={**BATCH, "fog": 0.95})
    name = "second prediction, shuffled prior"
    results.rows[5] = replace(ROWS[5], name=name)
    results.records = [
        replace(r, row=name) if r.row == "second prediction" else r for r in results.records
    ]
    results.samples |= {
        (k[0], name, *k[2:]): v for k, v in results.samples.items() if "sec" in k[1]
    }
    assert said(results)[0].startswith("Do not adapt; use batch statistics alone: nothing of 1 ")


def test_rows_on_fewer_samples_are_not_judged() -> None:
    results = made(batch_statistics=BATCH, second_prediction={**BATCH, "fog": 0.95})
    results.rows[5] = replace(ROWS[5], samples=10)
    found = advice(results)
    assert found is not None
    assert found.chosen is None


def test_without_any_interval_there_is_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = toy_results()
    results.records = [r for r in results.records if r.seed == 0]
    assert advice(results) is None
    show(results, tmp_path)
    assert capsys.readouterr().out.startswith("No verdict: one seed")


def test_verdict_choice_of_tuning_and_lines_to_paste_stand_on_top_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = made(batch_statistics=BATCH, second_prediction={**BATCH, "fog": 0.8})
    show(results, tmp_path)
    assert "it3 tune: not run in this folder" in capsys.readouterr().out
    show_tuning(toy_tuned((candidate(1e-3), 0.0, 2.0)), tmp_path)
    capsys.readouterr()
    show(results, tmp_path)
    out, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    table = (tmp_path / "table.md").read_text()
    assert out.startswith("Use it: second prediction")
    assert table.startswith("**Use it: second prediction")
    assert page.index("Use it: second prediction") < page.index("<table")
    for text in (out, table, page):
        assert "chose sharpened objective, all, 1 step of adam 0.001, episodic" in text
        assert "prediction: second" in text
    file = tmp_path / "tuning.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "chosen": "another"}))
    show(results, tmp_path)
    assert "tuning.jsonisdamaged" in "".join(capsys.readouterr().out.split())  # wrapped


def pasted(text: str) -> Any:
    """Make the callback of a configuration as the command line does."""
    parser = LightningArgumentParser()
    parser.add_argument("--trainer.callbacks", type=list[Callback])
    return parser.instantiate_classes(parser.parse_string(text)).trainer.callbacks[0]


KIND = Kind(classes=True, batch_norm=True)
SETTINGS = {each.name for each in fields(Settings)} - {"objective", "measure"}
ALL = [*rows_for(Recipe(), KIND), *peers("all", Facts(KIND, True, 10, "network.dense2"))]


@pytest.mark.parametrize("row", ALL, ids=lambda row: f"{row.training}, {row.name}")
def test_the_lines_to_paste_make_the_callback_of_the_row(row: Row) -> None:
    text = callback_yaml(row)
    if row.settings is None:
        assert text == ""
        return
    callback, own = pasted(text), row.callback()
    assert own is not None
    assert callback.prediction == own.prediction
    mine, theirs = (
        {n: v for n, v in vars(each.settings).items() if n in SETTINGS} for each in (callback, own)
    )
    assert mine == theirs
    assert row.settings.steps == 0 or repr(callback.settings.method) == repr(own.settings.method)

"""Kept files of a benchmark: made again where they do not fit, and never those of another run."""

import functools
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benchmark_runs import benchmark, digits, make_model, scored_rows
from lightning.pytorch import Trainer

from it3_lightning.benchmark import Record, Results, Tuning
from it3_lightning.benchmark.distance_lines import Distances
from it3_lightning.benchmark.kept import check_folder, kept, mark_folder, rebuilt
from it3_lightning.benchmark.tune_rules import Grid
from it3_lightning.utils.files import write_json

RECORD = Record("joint", "source", "equal", 0, "clean", 50.0, 0.5, 7)
FINGERPRINT = json.dumps({"data": {"size": 1}})


def scores(content: dict[str, Any]) -> list[Record]:
    return [rebuilt(Record, saved) for saved in content["records"]]


read = functools.partial(kept, fingerprint=FINGERPRINT, read=scores)


def test_what_fits_is_read_back_equal(tmp_path: Path) -> None:
    file = tmp_path / "seed_0.json"
    assert read(file) is None  # nothing is there: nothing to say
    write_json(file, {"fingerprint": FINGERPRINT, "records": [asdict(RECORD)]})
    assert read(file) == [RECORD]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"records": [asdict(RECORD)]},
        {"fingerprint": 3, "records": [asdict(RECORD)]},
        {"fingerprint": FINGERPRINT},
        {"fingerprint": FINGERPRINT, "records": None},
        {"fingerprint": FINGERPRINT, "records": ["junk"]},
        {"fingerprint": FINGERPRINT, "records": [{**asdict(RECORD), "more": 1}]},
        {"fingerprint": FINGERPRINT, "records": [{**asdict(RECORD), "score": "high"}]},
        {"fingerprint": FINGERPRINT, "records": [{**asdict(RECORD), "row": 3}]},
    ],
)
def test_other_content_is_named_and_made_again(content: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "seed_0.json", content)
    with pytest.warns(UserWarning, match=r"seed_0\.json is damaged .*\. It is made again"):
        assert read(tmp_path / "seed_0.json") is None


def test_other_settings_are_named_and_made_again(tmp_path: Path) -> None:
    file = tmp_path / "seed_0.json"
    write_json(file, {"fingerprint": '{"data": {"size": 2}, "lr": NaN}', "records": []})
    wrong = r"seed_0\.json is of other settings: data\.size 1 instead of 2; lr None instead of nan"
    with pytest.warns(UserWarning, match=wrong):
        assert read(file) is None


def test_distances_come_back_as_they_were() -> None:
    given = Distances("joint", "source", 0, "clean", (0.1, 3.0))
    assert rebuilt(Distances, json.loads(json.dumps(asdict(given)))) == given


@pytest.mark.parametrize("name", ["results.csv", "tuning.md"])
def test_files_of_another_origin_are_not_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    for go in (
        lambda: benchmark(tmp_path).run(make_model, digits()),
        lambda: Tuning().run(benchmark(tmp_path), make_model, digits()),
    ):
        with pytest.raises(FileExistsError, match=rf"holds {name}, and no run .*another folder"):
            go()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_of_a_version_that_left_no_mark_goes_on(tmp_path: Path) -> None:
    for name in ("results.json", "seed_0.json"):
        (tmp_path / name).write_text("{}")
    check_folder(tmp_path, {"epochs": 1})


def test_what_says_which_run_a_folder_is_of_is_refused_where_it_is_damaged(tmp_path: Path) -> None:
    mark_folder(tmp_path, {"epochs": 1, "versions": {"torch": "1"}})
    check_folder(tmp_path, {"epochs": 1, "versions": {"torch": "2"}})
    for content in ("", "{}", '{"training": 1, "digest": ""}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json is damaged.* Remove it if"):
            check_folder(tmp_path, {"epochs": 1})


def test_a_correlated_stream_of_another_strength_costs_its_own_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"streams": ("equal", "correlated"), "distance_samples": 0}
    data = digits()
    first = benchmark(tmp_path, **settings).run(make_model, data)
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    ran = scored_rows(monkeypatch)
    data.concentration = 0.01
    second = benchmark(tmp_path, **settings).run(make_model, data)
    assert ran == [(row.training, row.name) for row in second.rows if row.goes_with("correlated")]
    changed = [a.stream for a, b in zip(first.records, second.records, strict=True) if a != b]
    assert set(changed) == {"correlated"}
    data.concentration = 0.1
    assert benchmark(tmp_path, **settings).run(make_model, data).records == first.records


GRID = Grid(shares=(), lrs=(1e-3,), forms=("published",), parameters=("all",), modes=("episodic",))
KEPT = ("seed_0.json", "distances_seed_0.json", "models/seed_0.ckpt")


@pytest.fixture(scope="module")
def run_of_both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("kept")
    results = benchmark(folder, distance_samples=4).run(make_model, digits())
    tuning(folder)
    return folder, results


def tuning(folder: Path) -> tuple[object, ...]:
    settings = benchmark(folder, distance_samples=4)
    return Tuning(grid=GRID, batches=1).run(settings, make_model, digits()).verdicts


@pytest.mark.parametrize("name", KEPT)
def test_a_benchmark_makes_a_damaged_file_again_to_the_same_numbers(
    name: str, run_of_both: tuple[Path, Results]
) -> None:
    folder, results = run_of_both
    file = folder / name
    file.write_bytes(file.read_bytes()[:-9])
    if name.startswith("models"):
        (folder / "seed_0.json").unlink()  # the models are asked for
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged .*It is made again"):
        again = benchmark(folder, distance_samples=4).run(make_model, digits())
    assert [r.score for r in again.records] == [r.score for r in results.records]
    assert again.distances == results.distances
    assert [r.score for r in again.separations] == [r.score for r in results.separations]


def test_tuning_makes_a_damaged_file_again_to_the_same_gains(
    run_of_both: tuple[Path, Results],
) -> None:
    folder, _ = run_of_both
    file = folder / "tuning" / "seed_0.json"
    found = tuning(folder)
    file.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"tuning.seed_0\.json is damaged .*It is made again"):
        assert tuning(folder) == found


def test_models_of_other_shapes_are_trained_again(run_of_both: tuple[Path, Results]) -> None:
    folder, _ = run_of_both
    file = folder / "models" / "seed_0.ckpt"
    content = torch.load(file, weights_only=True)
    name = next(iter(content["states"]["joint"]))
    content["states"]["joint"][name] = torch.zeros(1)
    torch.save(content, file)
    (folder / "seed_0.json").unlink()
    with pytest.warns(UserWarning, match=rf"(?s)seed_0\.ckpt is damaged .*{name}.*made again"):
        benchmark(folder, distance_samples=4).run(make_model, digits())


@pytest.mark.parametrize("name", [*KEPT, "results.json"])
def test_an_interrupted_run_leaves_no_half_of_a_file_and_goes_on(
    name: str,
    run_of_both: tuple[Path, Results],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, results = run_of_both
    folder, replace = tmp_path / "out", Path.replace
    shutil.copytree(run_of_both[0], folder)
    for each in {name, "seed_0.json"} if name.startswith("models") else {name}:
        (folder / each).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupted(part: Path, target: Path) -> Path:
        if target.name == Path(name).name:
            raise KeyboardInterrupt
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(folder, distance_samples=4).run(make_model, digits())
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    again = benchmark(folder, distance_samples=4).run(make_model, digits())
    assert [r.score for r in again.records] == [r.score for r in results.records]
    assert again.distances == results.distances

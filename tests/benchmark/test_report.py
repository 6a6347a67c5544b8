"""Reports of a benchmark: lines, gains by shift, the page, and several benchmarks side by side."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.benchmark_runs import benchmark, cells, digits, make_model, toy_results

from it3_lightning.benchmark import Results
from it3_lightning.benchmark.distances import CONFIDENCE, DISTANCE
from it3_lightning.benchmark.page import dots, made_with, page
from it3_lightning.benchmark.report import overview, show
from it3_lightning.benchmark.tables import (
    by_shift,
    by_stream,
    headers,
    line,
    markdown,
    separation,
    terminal,
)
from it3_lightning.cli import main


def test_where_lower_is_better_a_gain_is_how_much_lower() -> None:
    results = toy_results()
    results.higher_is_better, results.decimals = False, 2
    gain, worst = results.gain(results.rows[2], "equal"), results.worst(results.rows[2], "equal")
    assert gain is not None
    assert worst is not None
    assert gain.mean == worst[1] == pytest.approx(-4.0)
    assert line(results, results.rows[2])[2:6] == [
        "90.00 ± 1.41",
        "64.00 ± 1.41",
        "-4.00 [-5.00, -3.00]",
        "-4.00 noise",
    ]
    assert cells(by_shift(results, "equal"))[2:] == [["ordinary", "Tent", "+0.00", "-4.00"]]
    assert str(terminal(results)[0].title).startswith("acc (lower is better)")
    assert "<h1>IT3 benchmark: acc (lower is better)</h1>" in page(results)


def test_every_line_of_the_table_has_a_cell_for_every_title() -> None:
    results = toy_results()
    assert all(len(line(results, row)) == len(headers(results)) for row in results.rows)
    assert markdown(results).count("\n") == len(results.rows) + 1
    assert "+4.0 [+3.0, +5.0]" in markdown(results)
    results.records = [r for r in results.records if r.seed == 0]
    assert "+3.0 ± 0.0" in markdown(results)  # nothing to draw an interval from


def test_more_than_two_streams_have_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = toy_results()
    for stream, less in (("correlated", 5.0), ("equal/4", 10.0)):
        results.records += [
            replace(r, stream=stream, score=r.score - less * (r.row == "Tent"))
            for r in results.records
            if r.stream == "equal" and (r.row != "source" or stream != "equal/4")
        ]
    assert headers(results)[2:] == ["equal: clean", "shifts", "gain", "worst shift", *LAST]
    assert by_stream(results) == [
        ["training", "at test time", "equal", "correlated", "equal/4"],
        ["ordinary", "source", "50.0 ± 0.0", "50.0 ± 0.0", ""],
        ["ordinary", "batch statistics", *["60.0 ± 0.0"] * 3],
        ["ordinary", "Tent", "+4.0 ± 1.4", "-1.0 ± 1.4", "-6.0 ± 1.4"],
    ]
    show(results, tmp_path)
    assert "-6.0 ± 1.4" in page(results)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Tent", "+4.0", "-1.0", "-6.0"] in printed
    assert "| equal/4 |" in (tmp_path / "table.md").read_text().replace("    equal/4", " equal/4")


LAST = ["worst case", "harmed", "ECE clean", "ECE shifts", "passes", "ms/sample", "x source"]


@pytest.mark.parametrize("columns", [None, 100])
def test_what_is_printed_fits_a_hundred_columns(
    columns: int | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    results = toy_results()
    long = "filtered distance + entropy + balance, mean prediction, each sample, episodic"
    results.rows[2] = replace(results.rows[2], name=long)
    results.records = [
        replace(r, row=long if r.row == "Tent" else r.row, stream=stream, score=r.score / 1.7)
        for r in results.records
        for stream in ("equal", "unequal", "correlated", "continual", "equal/16", "equal/4")
    ]
    results.decimals = 3
    show(results, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in "".join(lines)  # nothing is cut off
    assert sum("+2.353 [+1.765, +2.941]" in line for line in lines) == 2  # verdict and table


def test_dots_have_their_intervals_on_an_axis_that_shows_small_gains_as_small() -> None:
    results = toy_results()
    drawn = dots(results, {"noise": ("equal", "noise"), "clean": ("equal", "clean")})
    assert drawn.count("<circle") == 2
    assert "<title>+4.0 [+3.0, +5.0]</title>" in drawn
    assert "+5.4<" in drawn  # the axis ends a little beyond the interval
    results.records = [
        replace(r, score=r.score + (100 - 14 * r.seed) * (r.row == "Tent" and r.shift == "noise"))
        for r in results.records
    ]
    far = dots(results, {"noise": ("equal", "noise")})
    assert "<circle" not in far
    assert "+97.0 ▸" in far  # written at the edge
    results.records = [
        replace(r, score=60.01 if r.row == "Tent" and r.shift == "noise" else r.score)
        for r in results.records
    ]
    assert "+3.5<" in dots(results, {"noise": ("equal", "noise")})  # 5 % of 70, the source's


def test_the_page_says_in_words_what_it_was_made_with() -> None:
    results = toy_results()
    prior = {"class_path": "it3_lightning.ClassPrior", "init_args": {"num_classes": 3}}
    layer = {"class_path": "it3_lightning.FeatureInjection", "init_args": {"layer": ["a", "b"]}}
    model = {
        "layers": "LitNet(\n  (a)",
        "parameters": {"a.weight": [3, 4]},
        "parts": [prior, layer],
    }
    results.about = {
        "settings": {"model": model, "data": {"class": "Mine"}},
        "made": {"date": "2020-01-02", "hardware": "a CPU"},
        "versions": {"torch": "2.6"},
    }
    assert dict(made_with(results)) == {
        "model": "LitNet",
        "parameters": "12",
        "prior": "ClassPrior, num_classes 3",
        "conditioning": "FeatureInjection, layer a, b",
        "data": "Mine",
        "seeds": "0, 1",
        "hardware": "a CPU",
        "date": "2020-01-02",
        "versions": "torch 2.6",
    }
    text = page(results)
    assert "<dt>conditioning</dt><dd>FeatureInjection, layer a, b</dd>" in text
    assert "{&#x27;" not in text  # no dict as Python writes it


def test_gains_by_shift_are_means_over_seeds_and_leave_unadapted_rows_out() -> None:
    found = cells(by_shift(toy_results(), "equal"))
    assert found[2:] == [["ordinary", "Tent", "+0.0", "+4.0"]]  # clean: -1 and +1, noise: 3 and 5


def test_page_holds_the_table_and_its_plots(finished: tuple[Path, Results]) -> None:
    text = page(finished[1])
    rows = text.split("<h2>All rows</h2>")[1].split("<h2>")[0]
    trainings = {row.training for row in finished[1].rows}
    assert rows.count("<tr>") == len(finished[1].rows) + 1
    assert rows.count("<tr class=section>") == len(trainings)
    assert text.count("<svg") == 4  # by stream, by shift of two streams, distances
    assert trainings >= {"ordinary", "joint", "post-hoc"}
    assert all(f">{training}</text>" in text for training in trainings)
    assert "http" not in text.partition("<svg")[0]  # one file, nothing loaded from elsewhere


def test_benchmark_reports_the_separation_and_keeps_it(tmp_path: Path) -> None:
    def run() -> Results:
        return benchmark(tmp_path).run(make_model, digits())

    first, second = run(), run()  # the second time from the file
    titles, *rows = separation(first)
    assert titles == ["training", "score", "contrast"]
    assert [row[:2] for row in rows] == [
        [training, name] for training in ("joint", "post-hoc") for name in (DISTANCE, CONFIDENCE)
    ]
    assert rows == separation(second)[1:]
    assert all(f"<td>{row[2]}</td>" in page(first) for row in rows)


def entry(training: str, row: str, **streams: tuple[float, float, float | None]) -> dict[str, Any]:
    """One line of a results.json: clean and shifted score, and gain, by stream."""
    cells = {
        stream: {
            "clean": {"mean": clean, "std": 0.1},
            "shifted": {"mean": shifted, "std": 0.2},
            "gain": None if gain is None else {"mean": gain, "std": 0.3},
        }
        for stream, (clean, shifted, gain) in streams.items()
    }
    return {"training": training, "row": row, **cells, "ms_per_sample": 0.0}


def written(folder: Path, metric: str, decimals: int, *table: dict[str, Any]) -> Path:
    folder.mkdir()
    content = {"metric": metric, "decimals": decimals, "table": table}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two benchmarks, one with two streams and one more way to predict."""
    return [
        written(
            tmp_path / "digits",
            "test_acc",
            1,
            entry("ordinary", "source", equal=(97, 77, None), unequal=(96, 76, None)),
            entry("post-hoc", "source", equal=(97, 77, None), unequal=(96, 76, None)),
            entry("post-hoc", "batch statistics", equal=(97, 80, None), unequal=(96, 79, None)),
            entry("post-hoc", "adapted", equal=(97, 81, 1.0), unequal=(96, 78, -1.0)),
        ),
        written(
            tmp_path / "boston",
            "test_mae",
            3,
            entry("ordinary", "source", equal=(2.5, 3.9, None)),
            entry("post-hoc", "source", equal=(2.5, 3.9, None)),
            entry("post-hoc", "adapted", equal=(2.4, 3.8, 0.0125)),
        ),
    ]


def test_a_line_for_each_benchmark_and_stream(folders: list[Path]) -> None:
    ordinary, posthoc = overview(folders).split("**post-hoc**")
    assert ordinary.startswith("**ordinary**")
    head, _, *lines = cells(posthoc.strip())
    assert head == ["benchmark", "score", "clean", "source", "batch statistics", "adapted"]
    assert lines == [
        ["digits", "test_acc", "97.0 ± 0.1", "77.0 ± 0.2", "80.0 ± 0.2", "+1.0 ± 0.3"],
        ["digits, unequal", "test_acc", "96.0 ± 0.1", "76.0 ± 0.2", "79.0 ± 0.2", "-1.0 ± 0.3"],
        ["boston", "test_mae", "2.500 ± 0.100", "3.900 ± 0.200", "", "+0.013 ± 0.300"],
    ]
    assert len({len(line) for line in posthoc.strip().splitlines()}) == 1  # aligned


def test_folders_of_one_name_are_named_by_as_many_above_as_tell_them_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["a/results", "b/results", "b/x/run", "c/x/run", "other", "results"]
    for place, gain in zip(places, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), strict=True):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        adapted = entry("ordinary", "adapted", equal=(97, 81, gain))
        source = entry("ordinary", "source", equal=(97, 77, None))
        written(tmp_path / place, "test_acc", 1, source, adapted)
    monkeypatch.chdir(tmp_path)
    main(["compare", *places, "other"])
    _, _, *lines = cells(capsys.readouterr().out.strip().split("\n\n")[1])
    names = [*places[:5], f"{tmp_path.name}/results"]
    gains = [f"+{gain:.1f} ± 0.3" for gain in (1, 2, 3, 4, 5, 6)]
    assert [(line[0], line[-1]) for line in lines] == list(zip(names, gains, strict=True))


def test_the_command_prints_the_tables_and_writes_a_page_of_them(
    folders: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a comparison of before is replaced
        main(["compare", *map(str, folders)])
        said = capsys.readouterr()
        assert said.out.strip() == overview(folders)
        assert said.err == "Written to compare.html\n"
    shown = (tmp_path / "compare.html").read_text()
    for own in cells(overview(folders).split("**post-hoc**")[1].strip())[2:]:
        assert "".join(f"<td>{cell}</td>" for cell in own) in shown
    dots = shown[shown.index("Gain by benchmark") :]
    assert [dots.count(f"<title>{gain}") for gain in ("+1.0", "-1.0", "+0.013")] == [1, 1, 1]
    assert dots.count("<svg") == len(folders)


def test_a_page_is_written_over_no_other_file(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(FileExistsError, match=r"would be written over: .*mine\.html.*--page"):
        main(["compare", *map(str, folders), "--page", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected results.json in .*Run it3 benchmark"):
        overview([tmp_path])


def test_names_are_text_whatever_is_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "<script>alert(1)</script>[/red]"
    results = toy_results()
    results.records = [
        replace(r, shift=name, score=r.score - 9 * (r.row == "Tent")) if r.shift == "noise" else r
        for r in results.records
    ]
    (tmp_path / "out").mkdir()
    show(results, tmp_path / "out")
    assert "<script>" in capsys.readouterr().out
    assert name in (tmp_path / "out" / "table.md").read_text()
    shown = (tmp_path / "out" / "page.html").read_text()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[/red]" in shown

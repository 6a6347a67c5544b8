"""The speed benchmark: what its rows say and how it measures, on its smallest case; no times."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import speed
import torch
from costs import curves, sequence_layers
from costs.clock import Piece, Plan, Times, side_by_side
from costs.curves import ENGINES
from costs.engines import Ours
from costs.extent import Extent
from costs.floor import BY_OPTIMIZER, LOOP, PARTS, UPDATE, Floor
from costs.items import Required, Row
from costs.memory import kept_bytes, peak_bytes
from costs.networks import Architecture, Entry, Subject, resnet18, small_cnn
from costs.peer import Peer
from costs.results import Results
from costs.tables import comparisons
from helpers.fast import needs_fast_paths
from torch import nn

CPU = torch.device("cpu")
ONCE = Plan(seconds=0.0, least=1, most=1)
SMALLEST = Extent(
    name="smallest",
    plan=ONCE,
    small=small_cnn(4, 8),
    large=replace(small_cnn(2, 4), name="larger CNN"),
    extra=(replace(small_cnn(2, 4), name="another CNN"),),
    batch=4,
    few=2,
    gated=1,
    calibration=16,
    curves=ONCE,
    batches=(1, 2),
    steps=(1, 2),
    widths=(2, 4),
    lengths=(5, 8),
    affordable=60.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves behind."""
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "QUICK", SMALLEST)
        speed.main(["--quick", "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What it found."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_every_requirement_is_a_row_of_its_section(found: dict[str, Any]) -> None:
    judged: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        if row["required"]:
            judged.setdefault(row["section"], {})[row["case"]] = row["required"]["bound"]
    nets = "small CNN", "larger CNN"
    places = [f"{net}, prior at {layer}" for net in nets for layer in ("features.0", "dense1")]
    first, late, larger_first, larger_late = places
    by_itself = {
        **{f"{place}, all weights, 4 at once": 15.0 for place in (first, late)},
        **{f"{place}, norm layers, 4 at once": 20.0 for place in (larger_first, larger_late)},
        **{f"{place}, all weights, 2 at once": 4.0 for place in (larger_first, larger_late)},
    }
    assert judged == {
        "Scope batch against torch-ttt": {
            f"{place}, batch {size}": bound
            for net in nets
            for layer, bounds in (("features.0", (2.0, 1.4)), ("dense1", (3.0, 2.0)))
            for size, bound in zip((1, 4), bounds, strict=True)
            for place in [f"{net}, prior at {layer}"]
        },
        "Scope sample against torch-ttt on one sample, per sample": by_itself,
        "Backend auto against the better one, scope sample, per sample": dict.fromkeys(
            by_itself, 0.95
        ),
        "Scope batch against the passes it cannot do without, each timed alone": {
            f"{place}, batch {size}": 1.1 for place in places for size in (1, 4)
        },
        "A gate that 95 % of clean samples stay under, against no gate": {
            f"{place}, {what}": 0.5
            for place, weights in ((first, "all weights"), (larger_first, "norm layers"))
            for what in (
                "all weights, scope batch, batch 1",
                "all weights, scope batch, batch 4",
                f"{weights}, scope sample, batch 4",
            )
        },
        "Memory at its peak beyond network and batch, scope batch": {
            f"{larger_first}, batch {size}": 1.0 for size in (1, 4)
        },
        "Under a Trainer: predict, scope sample, defaults, against torch-ttt on single images": {
            f"{first}, 4 batches of 4, a new run each time": 4.8
        },
        "Fast paths: with each, against without it, the same engine otherwise": dict.fromkeys(
            (
                "activation_cache: larger CNN, late, batch 4 ",
                "grad_sample: larger CNN, first, batch 2 sample, vectorised",
                "vmap: small CNN, first, batch 4 sample",
            ),
            1.1,
        ),
    }


def test_a_ratio_of_one_round_is_that_of_the_two_figures(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        backward = ("torch-ttt", "loop", "vectorised", *sequence_layers.OTHERS)
        faster = row["against"] in backward or row["against"].startswith("without ")
        at_most = not faster or row["unit"] == "MiB"
        quotient = row["ours"] / row["other"] if at_most else row["other"] / row["ours"]
        assert row["ratio"] == pytest.approx(quotient)


def test_rows_that_nothing_is_required_of_are_there_to_be_read(found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if not row["required"]]
    assert all(row["verdict"] == "" for row in rows)
    places = [f"another CNN, prior at {layer}" for layer in ("features.0", "dense1")]
    peers = [row for row in rows if row["against"] == "torch-ttt" and row["unit"] == "ms"]
    extra = {row["case"] for row in peers if not row["section"].startswith("Under a Trainer")}
    assert extra == {f"{place}, batch {size}" for place in places for size in (1, 4)}
    assert sum(row["against"] == "a plain loop" for row in rows) == 8
    assert sum(row["unit"] == "MiB" for row in rows) == 2


def test_verdicts_follow_from_ratios(found: dict[str, Any]) -> None:
    judged = [row for row in found["rows"] if row["required"]]
    for row in judged:
        difference = row["ratio"] - row["required"]["bound"]
        sign = -1 if row["required"]["at_most"] else 1
        assert row["verdict"] == ("ok" if sign * difference >= 0 else "missed")
    met = sum(row["verdict"] == "ok" for row in judged)
    assert found["summary"] == f"{met} of {len(judged)} required bounds hold."


def test_the_update_counted_as_unavoidable_lowers_the_ratio(found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if row["against"] == "its passes"]
    assert all(0 < row["with_update"] < row["ratio"] for row in rows)
    assert len(rows) == 8


@needs_fast_paths
def test_both_engines_adapt_the_same_weights_in_as_many_passes(found: dict[str, Any]) -> None:
    number = sum(p.numel() for p in small_cnn(4, 8).make().parameters())
    cases = [f"small CNN, prior at {layer}, a batch" for layer in ("features.0", "dense1")]
    batch = [deed for deed in found["deeds"] if deed["case"] in cases]
    done = {(d["engine"], d["weights"], d["forwards"], d["backwards"]) for d in batch}
    assert done == {("it3_lightning", number, 3, 1), ("torch-ttt", number, 3, 1)}
    answered = {(deed["engine"], deed["case"]): deed["answered"] for deed in batch}
    assert answered == {  # the first layer; all convolutions and the dense layer after them
        ("it3_lightning", cases[0]): 1,
        ("it3_lightning", cases[1]): 2,
        ("torch-ttt", cases[0]): 0,
        ("torch-ttt", cases[1]): 0,
    }


def test_layers_are_timed_at_every_length_on_the_same_work(found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if row["section"].startswith("Layers")]
    cases = {(r["section"], r["case"].partition(",")[0], r["against"]) for r in rows}
    assert len(cases) == 3 * 2 * 2
    assert len(rows) == 2 * len(cases)  # at two lengths
    with torch.no_grad():
        whole = sequence_layers.runs("outputs", 21, CPU)
        stream = sequence_layers.runs("stream", 5, CPU)
        for name in (*sequence_layers.OURS, *sequence_layers.OTHERS):
            outputs: Any = whole[name](None)
            torch.testing.assert_close(stream[name](None), outputs[:, 5:], msg=name)


def test_curves_cover_every_engine_and_place(found: dict[str, Any]) -> None:
    sizes = [sum(p.numel() for p in small_cnn(w, 8 * w).make().parameters()) for w in (2, 4)]
    places = {"batch size": [1, 2], "steps": [1, 2], "parameters": sizes}
    expected = {(a, at, name) for a, ats in places.items() for at in ats for name in ENGINES}
    points = [point for point in found["points"] if point["network"] == "small CNN"]
    assert {(p["axis"], p["at"], p["engine"]) for p in points} == expected
    others = {p["axis"] for p in found["points"] if p["network"] == "larger CNN"}
    assert others == {"batch size", "steps"}


def test_a_curve_ends_where_a_call_would_take_too_long() -> None:
    impatient = replace(SMALLEST, affordable=0.0)
    points = [
        item
        for job in curves.jobs(impatient, CPU)
        if job.label == "over steps: small CNN"
        for item in job.run()
    ]
    assert [getattr(point, "at", None) for point in points] == [1] * len(ENGINES)


def test_the_page_needs_nothing_else_and_shows_every_case(
    folder: Path, found: dict[str, Any]
) -> None:
    page = (folder / "page.html").read_text()
    assert re.findall(r"<(?:script|link|img|iframe)\b|@import|(?:src|href)=.https?:", page) == []
    assert all(row["case"] in page and row["section"] in page for row in found["rows"])
    assert found["summary"] in page
    assert page.count("<svg") == 2


def row(section: str, ratio: float, required: Required | None, **others: Any) -> Row:
    return Row(
        section=section,
        case="case",
        against="other",
        ours=2.0,
        other=3.0,
        ratio=ratio,
        required=required,
        **others,
    )


def test_a_section_is_a_table_with_a_cell_for_every_title() -> None:
    rows = row("a", 1.5, Required(2.0)), row("b", 1.05, Required(1.1, at_most=True), with_update=1)
    first, second = comparisons(Results.of([*rows, row("b", 0.5, None)], {}))
    assert first.headers == (
        *("case", "against", "ours, ms", "other, ms"),
        *("other / ours", "quartiles", "required", "verdict"),
    )
    assert first.rows == (("case", "other", "2.00", "3.00", "1.50", "", ">= 2", "missed"),)
    assert second.headers[4:] == ("ours / other", "quartiles", "required", "verdict", "with update")
    assert [cells[4:] for cells in second.rows] == [
        ("1.05", "", "<= 1.1", "ok", "1.00"),
        ("0.50", "", "", "", ""),
    ]


class Clock:
    """Time that passes only where it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_pieces_are_timed_in_turns_without_what_prepares_them() -> None:
    clock, order = Clock(), list[str]()
    durations = {"ours": iter([9.0, 1.0, 2.0, 6.0]), "theirs": iter([9.0, 4.0, 4.0, 6.0])}

    def piece(name: str, per: int) -> Piece:
        def run(_: object) -> None:
            order.append(name)
            clock.passes(next(durations[name]))

        return Piece(name, run, prepare=lambda: clock.passes(100.0), per=per)

    times = side_by_side([piece("ours", 1), piece("theirs", 2)], Plan(0.0, 3, 3, clock=clock))
    assert order == ["ours", "theirs"] * 4
    assert times.by_name == {"ours": [1.0, 2.0, 6.0], "theirs": [2.0, 2.0, 3.0]}
    assert times.milliseconds("ours", "theirs") == 4000.0
    assert times.ratio(["theirs"], ["ours"]) == 1.0  # of 2, 1 and 0.5
    assert times.ratio(["ours", "theirs"], ["ours"]) == 2.0
    assert times.spread(["theirs"], ["ours"]) == (0.75, 1.5)


def test_of_a_short_piece_the_second_run_in_its_turn_counts() -> None:
    clock, seconds = Clock(), iter([0.04, 0.01, 0.04, 0.02, 0.04, 0.03])
    piece = Piece("short", lambda _: clock.passes(next(seconds)))
    times = side_by_side([piece], Plan(0.0, 2, 2, clock=clock))
    assert times.by_name["short"] == pytest.approx([0.02, 0.03])


def test_no_piece_always_follows_the_same_where_there_are_several() -> None:
    order: list[str] = []
    names = ["a", "b", "c"]
    pieces = [Piece(name, order.append, prepare=lambda name=name: name) for name in names]  # type: ignore[misc]
    times = side_by_side(pieces, Plan(0.0, 12, 12))
    turns = order[::2]
    assert turns == order[1::2]
    assert {turns[i - 1] for i in range(4, len(turns)) if turns[i] == "a"} >= {"b", "c"}
    assert all(sorted(turns[i : i + 3]) == names for i in range(0, len(turns), 3))
    assert times.rounds == 12


def test_rounds_go_on_until_the_time_is_spent() -> None:
    assert side_by_side([Piece("a", lambda _: None)], Plan(0.0, 2, 9)).rounds == 2
    assert side_by_side([Piece("a", lambda _: None)], Plan(1e9, 2, 9)).rounds == 9


def test_the_spread_of_one_round_is_its_ratio() -> None:
    assert Times({"a": [1.0], "b": [3.0]}).spread(["b"], ["a"]) == (3.0, 3.0)


@pytest.mark.parametrize("entry", ["first", "late"])
@pytest.mark.parametrize("architecture", [small_cnn(4, 8), resnet18()], ids=lambda a: a.name)
def test_the_floor_does_what_the_engine_does(architecture: Architecture, entry: Entry) -> None:
    subject = Subject.of(architecture, entry, CPU)
    images, network = subject.images(3), subject.conditioned.net
    floor, ours = Floor(subject, images), Ours(subject, optimizer="sgd", lr=1.0)
    gradients = floor.gradients(floor.loss())
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    weights = ours.adapt(images).weights
    for (name, value), gradient in zip(before.items(), gradients, strict=True):
        moved = value - weights[f"net.{name}"]
        torch.testing.assert_close(moved, gradient, rtol=1e-3, atol=1e-6)
    assert torch.equal(floor.final(), subject.plain(images))


def test_the_floor_is_timed_part_by_part() -> None:
    subject = Subject.of(small_cnn(4, 8), "late", CPU)
    times = side_by_side(Floor(subject, subject.images(2)).pieces(), ONCE)
    assert list(times.by_name) == [*PARTS, UPDATE, LOOP, BY_OPTIMIZER]


def test_engine_and_peer_start_from_the_same_network() -> None:
    subject = Subject.of(small_cnn(4, 8), "first", CPU)
    images = subject.images(3)
    expected = subject.plain(images)
    peer = Peer(subject.plain, "features.0", images, steps=1, lr=0.0)
    assert torch.equal(Ours(subject, lr=0.0)(images), expected)
    assert torch.equal(peer(images), expected)


def test_the_peer_adapts_and_leaves_the_network_as_it_was() -> None:
    subject = Subject.of(small_cnn(4, 8), "first", CPU)
    images = subject.images(3)
    expected = subject.plain(images).detach()
    peer = Peer(subject.plain, "features.0", images, steps=2, lr=1e-2)
    assert (peer(images) - expected).abs().max() > 1e-3
    assert torch.equal(subject.plain(images), expected)
    assert peer.deeds(images)[1:] == (5, 2, 0)


def test_a_network_of_no_chain_has_no_floor() -> None:
    unknown = replace(small_cnn(4, 8), chain=None)
    with pytest.raises(ValueError, match="Expected a chain of modules, got small CNN"):
        Subject.of(unknown, "late", CPU).split()


def test_the_peak_counts_what_is_alive_at_once() -> None:
    there = torch.ones(256)

    def run() -> torch.Tensor:
        for _ in range(3):
            there.square()  # 1 KiB, gone at once
        kept = there + 1
        kept.mul_(2)
        return (kept.view(16, 16) + kept.view(16, 16)).sum()

    assert peak_bytes(run, [there]) == 2 * 1024 + 4  # two tensors and their sum


def test_what_autograd_keeps_is_counted_once_and_without_what_was_there() -> None:
    layer, x = nn.Linear(8, 8), torch.zeros(4, 8)

    def run() -> torch.Tensor:
        hidden: torch.Tensor = layer(x).relu()  # kept by relu and by the square
        return hidden.square().sum()

    assert kept_bytes(run, [*layer.parameters(), x]) == 4 * 4 * 8


def test_cpu_time_is_refused_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(["--cpu-time", "--device", "cuda"])
    assert "expected --cpu-time without a GPU" in capsys.readouterr().err

"""Wing profiles: contours, files of lift and drag, ranges, levels, graphs and rows."""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compute_airfoils import compute
from helpers.airfoil_files import write_polars
from torch import Tensor
from torch_geometric.data import Batch

from it3_lightning.data import AirfoilDataModule
from it3_lightning.data import airfoils as geometry
from it3_lightning.data.airfoils import (
    ContourGraphs,
    Polars,
    ProfileSet,
    contours,
    normals,
)
from it3_lightning.data.ranges import deciles

# --- files of lift and drag


def test_parameters_fill_their_box_and_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    drawn = ProfileSet(count=4000).parameters()
    assert torch.equal(torch.get_rng_state(), before)
    low, high = torch.tensor([[0.0, 0.2, 0.06], [0.08, 0.7, 0.24]], dtype=torch.float64)
    scaled = (drawn - low) / (high - low)
    assert 0 <= scaled.min() < 0.01 < 0.99 < scaled.max() <= 1
    assert scaled.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.02)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def text(file: Path) -> None:
    file.write_text("lift,drag\n1,2\n")


def without_drag(file: Path) -> None:
    with np.load(file) as arrays:
        np.savez(file, **{name: arrays[name] for name in arrays if name != "drag"})


def of_other_profiles(file: Path) -> None:
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, "parameters": arrays["parameters"] + 0.001})


def of_other_settings(file: Path) -> None:
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, "settings": np.array("others")})


def uneven(file: Path) -> None:
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, "drag": arrays["drag"][:1]})


@pytest.mark.parametrize(
    "damage",
    [emptied, truncated, text, without_drag, of_other_profiles, of_other_settings, uneven],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: Any) -> None:
    drawn = ProfileSet(count=2)
    write_polars(tmp_path, 2)
    damage(drawn.file(tmp_path))
    with pytest.raises(ValueError, match=rf"Expected .*{drawn.file(tmp_path).name}.* Delete it"):
        drawn.polars(tmp_path)


def test_only_usable_forces_are_good() -> None:
    nan, inf = math.nan, math.inf
    lift = torch.tensor([1.0, nan, 1.0, 1.0, 1.0, 1.0, -1.0])
    drag = torch.tensor([0.1, 0.1, inf, 0.0, -0.1, 0.1, 0.1])
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.9, 0.7, 0.8])
    good = Polars(torch.zeros(7, 3), lift, drag, confidence).good(0.8)
    assert good.tolist() == [True, False, False, False, False, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "profiles to be an integer of at least 1"),
        ({"model_size": "huge"}, "Unknown model_size 'huge'"),
        ({"angle": 40.0}, "angle from -20 to 20.* got 40"),
        ({"reynolds": 10.0}, "reynolds from 10000 to 1e\\+08.* got 10"),
    ],
)
def test_profiles_that_make_no_sense_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProfileSet(**settings)


def test_missing_lift_and_drag_say_what_to_run(tmp_path: Path) -> None:
    data = AirfoilDataModule(tmp_path, profiles=150, angle=3.0)
    script = r"compute_airfoils\.py --root .* --profiles 150 --angle 3\.0 --reynolds 1000000\.0"
    for look in (data.prepare_data, lambda: data.setup("fit")):
        with pytest.raises(FileNotFoundError, match=rf"naca_\w+\.npz, got no such file.*{script}"):
            look()


def test_a_file_of_fewer_profiles_says_how_many_it_has(tmp_path: Path) -> None:
    profiles = ProfileSet(count=3)
    compute(profiles, tmp_path)
    with np.load(profiles.file(tmp_path)) as arrays:
        fewer = {k: v[:2] if v.ndim else v for k, v in arrays.items()}
    np.savez(profiles.file(tmp_path), **fewer)
    assert len(profiles.known(tmp_path)) == 2
    with pytest.raises(FileNotFoundError, match=r"of 3 profiles .*, got 2\. Compute them"):
        profiles.polars(tmp_path)


# --- the data module


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that keeps the lift and drag of the profiles of all tests below."""
    root = tmp_path_factory.mktemp("airfoils")
    for angle in (4.0, 5.0):
        compute(ProfileSet(count=200, angle=angle), root)
    return write_polars(root, 1000)


@pytest.fixture
def make(root: Path) -> Any:
    small = {"profiles": 200, "test_size": 30, "val_size": 20, "batch_size": 16}

    def module(**settings: Any) -> AirfoilDataModule:
        return AirfoilDataModule(root, **{**small, **settings})

    return module


def gather(loader: Iterable[Any]) -> tuple[list[Any], Tensor]:
    """All graphs (or rows) of a loader, one by one, and the targets."""
    inputs, targets = zip(*loader, strict=True)
    apart = [x.to_data_list() if isinstance(x, Batch) else list(x) for x in inputs]
    return [one for some in apart for one in some], torch.cat(targets)


def coordinates(loader: Iterable[Any]) -> Tensor:
    return torch.stack([graph.x[:, :2] for graph in gather(loader)[0]])


def test_ranges_hold_what_they_say(make: Any, root: Path) -> None:
    data = make(profiles=200, inner=0.8, held_ratio=0.2)
    pool = data.load()
    polars = ProfileSet(count=200).polars(root)
    ratios = polars.lift / polars.drag
    low, high = torch.tensor([[0.0, 0.2, 0.06], [0.08, 0.7, 0.24]], dtype=torch.float64)
    place = ((polars.parameters - low) / (high - low) - 0.5).abs().max(1).values
    parts = {"inside": pool.inside, **pool.levels}
    found = {name: torch.isin(ratios, part.targets[:, 0]) for name, part in parts.items()}
    assert (place[found["inside"]] <= 0.4).all()
    highest = ratios[found["inside"]].max()
    for level in range(1, 6):
        assert (place[found[f"shape_{level}"]] > 0.4).all()
        assert (place[found[f"ratio_{level}"]] <= 0.4).all()
        assert (ratios[found[f"ratio_{level}"]] > highest).all()
    means = [ratios[found[f"ratio_{level}"]].mean() for level in range(1, 6)]
    assert means == sorted(means)
    counted = sum(len(part) for part in parts.values())
    assert counted == 200 - data.dropped == int(polars.good(0.8).sum())
    inner = sum(len(pool.levels[f"ratio_{level}"]) for level in range(1, 6)) + len(pool.inside)
    assert inner - len(pool.inside) == int(0.2 * inner)


def test_profiles_of_low_confidence_are_dropped_and_counted(make: Any, root: Path) -> None:
    confidence = ProfileSet(count=200).polars(root).confidence
    limit = confidence.median().item()
    data = make(min_confidence=limit)
    assert data.dropped == int((confidence < limit).sum()) == 99
    pool = data.load()
    assert len(pool.inside) + sum(len(part) for part in pool.levels.values()) == 101


def test_loaders_are_clean_first_then_levels_and_noise(make: Any) -> None:
    data = make()
    names = [f"{what}_{level}" for what in ("shape", "ratio") for level in range(1, 6)]
    assert data.test_names == ["clean", *names, "noise"]
    loaders = dict(zip(data.test_names, data.test_dataloader(), strict=True))
    clean, noise = gather(loaders["clean"]), gather(loaders["noise"])
    assert len(clean[1]) == 30
    assert torch.equal(clean[1], noise[1])
    added = coordinates(loaders["noise"]) - coordinates(loaders["clean"])
    assert added.std().item() == pytest.approx(0.002, rel=0.05)
    for name in names:
        assert torch.isin(gather(loaders[name])[1], clean[1]).sum() == 0
    for test, predict in zip(data.test_dataloader(), data.predict_dataloader(), strict=True):
        assert torch.equal(coordinates(test), coordinates(predict))


def test_splits_are_disjoint_and_the_seed_decides(make: Any) -> None:
    def targets(**settings: Any) -> list[list[float]]:
        data = make(**settings)
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()[0]
        return [gather(loader)[1][:, 0].sort().values.tolist() for loader in loaders]

    train, validation, test = targets()
    assert len(set(train) | set(validation) | set(test)) == len(train) + 50
    assert targets(seed=0) == [train, validation, test]
    assert targets(seed=1)[2] != test
    assert len(targets(train_size=7)[0]) == 7


def test_tuning_is_on_validation_profiles_under_other_shifts(make: Any) -> None:
    assert set(AirfoilDataModule.SHIFTS).isdisjoint(AirfoilDataModule.TUNING_SHIFTS)
    data = make(evaluate_on="validation", shifts=list(AirfoilDataModule.TUNING_SHIFTS))
    clean, *shifted = data.test_dataloader()
    assert torch.equal(gather(clean)[1], gather(make().val_dataloader())[1])
    for loader in shifted:
        assert torch.equal(gather(loader)[1], gather(clean)[1])
        assert 1e-4 < (coordinates(loader) - coordinates(clean)).abs().mean() < 0.03
    for level in ("shape_1", "ratio_5"):
        with pytest.raises(
            ValueError, match=rf"no levels .* got '{level}'.* set shifts=\['rotation'"
        ):
            make(evaluate_on="validation", shifts=[level])


def test_the_unequal_stream_makes_three_deciles_ten_times_as_frequent(make: Any) -> None:
    settings = {"profiles": 1000, "test_size": 100, "shifts": ["shape_2", "noise"]}
    equal, unequal = make(**settings), make(**settings, stream="unequal")
    for loader, whole in zip(unequal.test_dataloader(), equal.test_dataloader(), strict=True):
        chosen, targets = gather(loader)[1][:, 0], gather(whole)[1][:, 0]
        tenth = len(targets) / 10
        places = (chosen[:, None] == targets).nonzero()[:, 1]
        counts = deciles(targets)[places].bincount(minlength=10).sort().values
        assert counts[:7].tolist() == pytest.approx([tenth / 10] * 7, abs=1)
        assert counts[7:].tolist() == pytest.approx([tenth] * 3, abs=1)
    clean, _, noise = unequal.test_dataloader()
    assert torch.equal(gather(clean)[1], gather(noise)[1])


def test_changed_settings_give_the_data_of_a_new_module(make: Any) -> None:
    changes: list[dict[str, Any]] = [
        {"seed": 3},
        {"nodes": 32},
        {"representation": "contour"},
        {"noise": 0.01},
        {"angle": 4.0},
        {"inner": 0.7},
        {"shifts": ["shape_3", "noise"]},
        {"evaluate_on": "validation", "shifts": ["rotation"]},
    ]
    data, settings = make(), {}
    data.test_dataloader()
    for change in changes:
        settings.update(change)
        for name, value in change.items():
            setattr(data, name, value)
        new = make(**settings)
        for ours, theirs in zip(data.test_dataloader(), new.test_dataloader(), strict=True):
            assert torch.equal(gather(ours)[1], gather(theirs)[1])
            pairs = zip(gather(ours)[0], gather(theirs)[0], strict=True)
            assert all(torch.equal(getattr(a, "x", a), getattr(b, "x", b)) for a, b in pairs)


def test_setup_again_loads_nothing_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = make(shifts=["shape_1", "noise"]), []
    load = data.load

    def counted() -> Any:
        calls.append(1)
        return load()

    monkeypatch.setattr(data, "load", counted)
    for _ in range(2):
        data.train_dataloader()
        data.test_dataloader()
        data.noise += 0.001
        data.stream = "unequal"
    assert len(calls) == 1
    data.seed = 5
    data.test_dataloader()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"representation": "image"}, "Unknown representation 'image'"),
        ({"shifts": ["fog"]}, "Unknown shift 'fog'.* Known: shape_1"),
        ({"inner": 1.0}, "inner to be between 0 and 1, got 1.0"),
        ({"held_ratio": 0.0}, "held_ratio to be between 0 and 1"),
        ({"min_confidence": 2.0}, r"min_confidence in \[0, 1\], got 2"),
        ({"noise": -1.0}, "noise to be at least 0 chords, got -1.0"),
        ({"nodes": 7}, "even number of nodes"),
        ({"angle": 90.0}, "angle from -20 to 20"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(
    settings: Any, message: str, make: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_size": 500}, "test_size to be at most"),
        ({"val_size": 500}, "val_size to be at most"),
        ({"train_size": 500}, "train_size to be at most"),
        ({"min_confidence": 1.0}, "samples outside the range of shape.* Draw more profiles"),
        ({"inner": 0.01}, "samples outside the range of ratio.* change inner"),
        ({"held_ratio": 0.001}, "samples outside the range of ratio.* got 0.* held_ratio"),
    ],
)
def test_too_few_profiles_are_refused(settings: Any, message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings).setup("fit")


# --- graphs and rows


def test_graphs_are_closed_rings_in_both_directions(make: Any) -> None:
    graphs, targets = next(iter(make(nodes=12).train_dataloader()))
    assert graphs.num_graphs == 16
    assert targets.shape == (16, 1)
    assert targets.dtype == torch.float32
    assert "y" not in graphs
    edges = set(zip(*graphs.edge_index.tolist(), strict=True))
    expected = {
        (12 * g + i, 12 * g + (i + way) % 12)
        for g in range(16)
        for i in range(12)
        for way in (1, -1)
    }
    assert edges == expected
    assert graphs.edge_index.shape == (2, len(expected))
    here, there = graphs.edge_index
    way = graphs.x[there, :2] - graphs.x[here, :2]
    lengths = way.norm(dim=1).reshape(16, -1).mean(1)
    torch.testing.assert_close(graphs.edge_attr, way / lengths.repeat_interleave(24)[:, None])


def test_rows_are_the_coordinates_less_their_mean_over_the_training_set(make: Any) -> None:
    graph, rows = make(), make(representation="contour")
    expected = coordinates(graph.test_dataloader()[1]).double()
    train = coordinates(graph.train_dataloader()).double()
    spread = (train - train.mean(0)).square().mean().sqrt()
    actual, targets = gather(rows.test_dataloader()[1])
    wanted = ((expected - train.mean(0)) / spread).flatten(1)
    torch.testing.assert_close(torch.stack(actual).double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(targets, gather(graph.test_dataloader()[1])[1])
    one = rows.dataset(rows._splits["test"])[3]
    assert one[0].shape == (128,)


def test_without_the_library_graphs_say_what_to_install(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(
        ImportError, match=r"representation='contour' needs none.*'it3_lightning\[graphs\]'"
    ):
        make().train_dataloader()
    assert len(make(representation="contour").train_dataloader()) > 0


def test_a_profile_set_has_its_number_of_profiles() -> None:
    assert ProfileSet(count=2).parameters().shape == (2, 3)
    one = torch.ones(3).double()
    drag = torch.tensor([1.0, 0.0, 1.0])
    assert Polars(one[:, None], one, drag, one / 2).good(0.5).tolist() == [True, False, True]


# --- contours: the closed formula, perturbations of nodes, graphs


NACA_0012 = torch.tensor([[0.0, 0.4, 0.12]], dtype=torch.float64)
NACA_2412 = torch.tensor([[0.02, 0.4, 0.12]], dtype=torch.float64)

# --- geometry


def by_hand(m: float, p: float, t: float, x: float, upper: bool) -> tuple[float, float]:
    """One point of a contour, in plain floats."""
    square = 0.2969 * math.sqrt(x) - 0.126 * x - 0.3516 * x**2 + 0.2843 * x**3 - 0.1036 * x**4
    half = t / 0.2 * square * (1 if upper else -1)
    ahead = x < p
    line = (
        m / p**2 * (2 * p * x - x * x)
        if ahead
        else m / (1 - p) ** 2 * (1 - 2 * p + 2 * p * x - x * x)
    )
    slope = 2 * m / p**2 * (p - x) if ahead else 2 * m / (1 - p) ** 2 * (p - x)
    across = 1 / math.sqrt(1 + slope**2)
    return x - half * slope * across, line + half * across


@pytest.mark.parametrize("m", [0.0, 0.02, 0.08])
def test_nodes_lie_on_the_closed_formula_with_cosine_spacing(m: float) -> None:
    nodes = 20
    contour = contours(torch.tensor([[m, 0.35, 0.15]], dtype=torch.float64), nodes)[0]
    for i, (x, y) in enumerate(contour.tolist()):
        along = 0.5 + 0.5 * math.cos(2 * math.pi * i / nodes)
        assert (x, y) == pytest.approx(by_hand(m, 0.35, 0.15, along, i <= nodes / 2), abs=1e-12)


@pytest.mark.parametrize(
    ("x", "half"), [(0.1, 0.04683), (0.2, 0.05737), (0.3, 0.06002), (0.5, 0.05294), (0.8, 0.02623)]
)
def test_naca_0012_has_the_published_ordinates(x: float, half: float) -> None:
    contour = contours(NACA_0012, 4000)[0]
    upper = contour[:2001].flip(0)
    ours = np.interp(x, upper[:, 0], upper[:, 1])
    opened = 5 * 0.12 * 0.0021 * x**4  # the published trailing edge is open
    assert ours + opened == pytest.approx(half, abs=1e-5)


def test_naca_0012_is_12_percent_thick_at_30_percent_of_the_chord() -> None:
    contour = contours(NACA_0012, 4000)[0]
    thickest = contour[:, 1].argmax()
    assert 2 * contour[thickest, 1].item() == pytest.approx(0.12, abs=5e-5)
    assert contour[thickest, 0].item() == pytest.approx(0.30, abs=0.01)


def test_mean_line_of_naca_2412_is_highest_at_40_percent() -> None:
    contour = contours(NACA_2412, 4000)[0]
    middle = (contour[:2001] + contour[1999:].roll(1, 0).flip(0)[:2001]) / 2
    top = middle[:, 1].argmax()
    assert middle[top].tolist() == pytest.approx([0.4, 0.02], abs=2e-3)


def test_contours_are_closed_and_run_against_the_clock_around_the_known_area() -> None:
    x, y = contours(NACA_0012, 4000)[0].unbind(1)
    area = (x * y.roll(-1) - x.roll(-1) * y).sum().item() / 2
    integral = 0.2969 * 2 / 3 - 0.126 / 2 - 0.3516 / 3 + 0.2843 / 4 - 0.1036 / 5
    assert area == pytest.approx(10 * 0.12 * integral, rel=1e-5)
    assert (x[0].item(), y[0].item()) == pytest.approx((1.0, 0.0), abs=1e-15)
    assert (x[2000].item(), y[2000].item()) == (0.0, 0.0)


def test_symmetric_profiles_mirror_bit_for_bit() -> None:
    contour = contours(NACA_0012, 64)[0]
    mirrored = contour.flip(0).roll(1, 0) * torch.tensor([1.0, -1.0])
    assert torch.equal(contour[1:], mirrored[1:] + 0.0)


def test_normals_of_a_circle_point_outwards() -> None:
    turns = 2 * math.pi * torch.arange(12, dtype=torch.float64) / 12
    circle = torch.stack([turns.cos(), turns.sin()], dim=1)[None]
    torch.testing.assert_close(normals(3 * circle + 1), circle)


@pytest.mark.parametrize(
    ("parameters", "nodes", "message"),
    [
        ([0.02, 0.4, 0.12], 8, r"parameters \(B, 3\).* got \(3,\)"),
        ([[0.02, 0.4, 0.0]], 8, r"thickness > 0.* got \[0\.0"),
        ([[-0.02, 0.4, 0.1]], 8, "camber >= 0"),
        ([[0.02, 1.0, 0.1]], 8, "0 < position < 1"),
        ([[0.02, 0.4, 0.1]], 9, "even number of nodes, 8 or more, got 9"),
        ([[0.02, 0.4, 0.1]], 6, "got 6"),
    ],
)
def test_what_is_no_profile_is_refused(parameters: Any, nodes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contours(torch.tensor(parameters), nodes)


# --- perturbations


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


WINGS = contours(ProfileSet(count=200).parameters(), 64)


def test_noise_has_its_size() -> None:
    added = geometry.noise(WINGS, 0.01, draw()) - WINGS
    assert added.std().item() == pytest.approx(0.01, rel=0.02)


def test_rotation_keeps_every_length_and_the_quarter_chord() -> None:
    turned = geometry.rotation(WINGS, 10.0, draw())
    torch.testing.assert_close(
        (turned - turned.roll(5, 1)).norm(dim=2), (WINGS - WINGS.roll(5, 1)).norm(dim=2)
    )
    quarter = torch.tensor([0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close((turned - quarter).norm(dim=2), (WINGS - quarter).norm(dim=2))
    tail = turned[:, 0] - quarter
    angles = torch.atan2(tail[:, 1], tail[:, 0]).rad2deg()
    assert 9 < angles.max() <= 10
    assert -10 <= angles.min() < -9


def test_roughness_is_smooth_along_the_normals() -> None:
    moved = geometry.roughness(WINGS, 0.003, draw()) - WINGS
    along = (moved * normals(WINGS)).sum(2)
    torch.testing.assert_close(along.abs(), moved.norm(dim=2))
    assert along.square().mean().sqrt().item() == pytest.approx(0.003, rel=0.1)
    assert (along - along.roll(1, 1)).square().mean().sqrt().item() < 0.001


def test_resampled_nodes_lie_between_their_former_neighbours() -> None:
    moved = geometry.resampling(WINGS, 0.8, draw()) - WINGS
    way = WINGS.roll(-1, 1) - WINGS
    parts = (moved * way).sum(2) / way.square().sum(2)
    torch.testing.assert_close(parts[..., None] * way, moved)
    assert 0 <= parts.min() < 0.01 < 0.79 < parts.max() <= 0.8


# --- graphs


def test_nodes_are_coordinates_and_normals() -> None:
    source: Any = ContourGraphs(contours(NACA_2412, 64), torch.tensor([[50.0]]))
    graph, target = source[0]
    torch.testing.assert_close(graph.x[:, :2].double(), contours(NACA_2412, 64)[0])
    torch.testing.assert_close(graph.x[:, 2:].double(), normals(contours(NACA_2412, 64))[0])
    graph.x.zero_()
    assert source[0][0].x.any()  # a copy
    assert target.tolist() == [50.0]
    assert len(source) == 1


def test_ways_along_edges_are_the_same_for_a_profile_of_any_size() -> None:
    sets: list[Any] = [ContourGraphs(wing, torch.zeros(200, 1)) for wing in (WINGS, 5 * WINGS + 3)]
    one, five = (source[0][0] for source in sets)
    torch.testing.assert_close(one.edge_attr, five.edge_attr)


def test_edges_go_forth_and_back_and_their_ways_are_in_mean_steps() -> None:
    square = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]]])
    source: Any = ContourGraphs(square, torch.tensor([[7.0]]))
    graph, target = source[0]
    assert graph.edge_index.tolist() == [[0, 1, 2, 3, 1, 2, 3, 0], [1, 2, 3, 0, 0, 1, 2, 3]]
    assert graph.edge_attr[:2].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert target.tolist() == [7.0]


def test_the_normal_at_the_leading_edge_is_against_the_flow() -> None:
    profile = contours(torch.tensor([[0.0, 0.4, 0.12]]), nodes=8)
    assert normals(profile)[0, 4, 0].item() == -1.0


def test_a_turned_tail_stays_as_far_from_the_quarter_chord() -> None:
    turned = geometry.rotation(torch.tensor([[[1.0, 0.0]]]), 90.0, draw())
    distance = (turned - torch.tensor([0.25, 0.0])).norm().item()
    assert distance == pytest.approx(0.75, abs=1e-6)

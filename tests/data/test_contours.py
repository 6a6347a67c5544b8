"""Geometry of wing profiles: the closed formula, perturbations of nodes, graphs."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from it3_lightning.data import airfoils as geometry
from it3_lightning.data.airfoils import ContourGraphs, ProfileSet, contours, normals, ring, steps

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
    source = ContourGraphs(contours(NACA_2412, 64), torch.tensor([[50.0]]))
    graph, target = source[0]
    torch.testing.assert_close(graph.x[:, :2].double(), contours(NACA_2412, 64)[0])
    torch.testing.assert_close(graph.x[:, 2:].double(), normals(contours(NACA_2412, 64))[0])
    graph.x.zero_()
    assert source[0][0].x.any()  # a copy
    assert target.tolist() == [50.0]
    assert len(source) == 1


def test_steps_are_the_same_for_a_profile_of_any_size() -> None:
    torch.testing.assert_close(steps(WINGS, ring(64)), steps(5 * WINGS + 3, ring(64)))


SQUARE = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]]])


def test_edges_of_a_ring_go_forth_and_back() -> None:
    assert ring(3).tolist() == [[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]]


def test_ways_along_edges_are_in_mean_steps() -> None:
    assert steps(SQUARE, ring(4))[0, 0].tolist() == [1.0, 0.0]
    graph, _ = ContourGraphs(SQUARE, torch.tensor([[7.0]]))[0]
    assert graph.edge_attr[:2].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_the_normal_at_the_leading_edge_is_against_the_flow() -> None:
    profile = contours(torch.tensor([[0.0, 0.4, 0.12]]), nodes=8)
    assert normals(profile)[0, 4, 0].item() == -1.0


def test_a_turned_tail_stays_as_far_from_the_quarter_chord() -> None:
    turned = geometry.rotation(torch.tensor([[[1.0, 0.0]]]), 90.0, draw())
    distance = (turned - torch.tensor([0.25, 0.0])).norm().item()
    assert distance == pytest.approx(0.75, abs=1e-6)

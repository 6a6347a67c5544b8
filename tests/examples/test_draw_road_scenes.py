"""Drawn scenes with roads: seeded, in range, masks where the roads are, not told by brightness."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draw_road_scenes import Curves, DetailedScenes, edge, grid, main, moved, noise, paint, roads
from torch import Tensor

from it3_lightning.data import RoadScenesDataModule
from it3_lightning.data.roads import scene_file


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    return DetailedScenes(64)(32, seeded())


def test_images_are_8_bit_colour_and_masks_are_bool(drawn: tuple[Tensor, Tensor]) -> None:
    images, masks = drawn
    assert (images.shape, images.dtype) == ((32, 3, 64, 64), torch.uint8)
    assert (masks.shape, masks.dtype) == ((32, 1, 64, 64), torch.bool)


def test_every_scene_has_a_road_and_no_scene_is_all_road(drawn: tuple[Tensor, Tensor]) -> None:
    share = drawn[1].float().mean((1, 2, 3))
    assert 0.02 < share.min() < share.max() < 0.45


def test_scenes_differ_and_use_the_range_of_values(drawn: tuple[Tensor, Tensor]) -> None:
    images = drawn[0].float() / 255
    assert images.mean((1, 2, 3)).std() > 0.03
    assert images.std((2, 3)).mean() > 0.07


def test_the_same_seed_draws_the_same_scenes(drawn: tuple[Tensor, Tensor]) -> None:
    for value, again in zip(drawn, DetailedScenes(64)(32, seeded()), strict=True):
        assert torch.equal(value, again)
    assert not torch.equal(drawn[1], DetailedScenes(64)(32, seeded(1))[1])


def test_the_global_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    DetailedScenes(16)(2, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_brightness_alone_does_not_tell_the_roads(drawn: tuple[Tensor, Tensor]) -> None:
    grey, masks = drawn[0].float().mean(1, keepdim=True), drawn[1]
    scores = []
    for low in range(0, 250, 25):
        for high in range(low + 25, 275, 25):
            found = (grey >= low) & (grey < high)
            scores.append(((found & masks).sum() / (found | masks).sum()).item())
    assert max(scores) < 0.3


def test_roads_look_alike_along_and_otherwise_than_what_is_beside(
    drawn: tuple[Tensor, Tensor],
) -> None:
    images, masks = drawn[0].float() / 255, drawn[1]
    saturation = (images.amax(1) - images.amin(1))[:, None]
    assert saturation[masks].mean() < 0.7 * saturation[~masks].mean()


def test_distances_from_curves_equal_those_from_many_points_on_them() -> None:
    curves = roads(2, 16, seeded(3))
    found = curves.distances(16)
    steps = torch.linspace(0, 1, 400)[:, None, None]
    for scene in range(2):
        starts, ends = curves.points[scene, 0, :-1], curves.points[scene, 0, 1:]
        dense = (starts + steps * (ends - starts)).reshape(-1, 2)
        for column, row in ((0, 0), (15, 3), (7, 8)):
            expected = (dense - torch.tensor([column, row])).norm(dim=1).min()
            assert found[scene, 0, row, column].item() == pytest.approx(expected.item(), abs=0.05)


def test_a_straight_road_is_as_wide_as_it_says() -> None:
    points = torch.tensor([[-5.0, 8.0], [25.0, 8.0]]).view(1, 1, 2, 2)
    rims = Curves(points, torch.tensor([[4.0]])).distances(20) - 2.0
    assert (rims <= 0).sum(2).flatten().tolist() == [5] * 20  # rows 6 to 10


def test_branches_start_on_the_road_they_leave() -> None:
    curves = roads(40, 64, seeded())
    start = curves.points[:, 2, 0]
    distance = (curves.points[:, 0] - start[:, None]).norm(dim=2).amin(1)
    there = start[:, 0] < 1e3
    assert 10 < int(there.sum()) < 40
    assert distance[there].max().item() == pytest.approx(0, abs=1e-4)


def test_noise_is_smooth_and_about_normal() -> None:
    values = noise(64, 32, 8.0, seeded())
    assert abs(values.mean().item()) < 0.1
    assert values.std().item() == pytest.approx(1, abs=0.25)
    assert values.diff(dim=3).std() < 0.4


def test_shadows_move_by_whole_and_half_pixels() -> None:
    layer = torch.zeros(1, 1, 5, 5)
    layer[0, 0, 2, 2] = 1
    whole = moved(layer, torch.tensor([[1.0, -1.0]]))
    assert whole[0, 0, 1, 3].item() == pytest.approx(1, abs=1e-5)
    half = moved(layer, torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(half[0, 0, 2, 2:4], torch.tensor([0.5, 0.5]))


def test_paint_mixes_by_cover() -> None:
    image, color = torch.full((1, 3, 1, 2), 0.2), torch.tensor([1.0, 0.6, 0.2]).view(1, 3, 1, 1)
    cover = torch.tensor([0.0, 0.5]).view(1, 1, 1, 2)
    expected = torch.tensor([[0.2, 0.6], [0.2, 0.4], [0.2, 0.2]]).view(1, 3, 1, 2)
    torch.testing.assert_close(paint(image, color, cover), expected)


def test_scenes_too_small_to_draw_are_refused() -> None:
    assert math.prod(DetailedScenes(16)(1, seeded())[0].shape) == 768
    with pytest.raises(ValueError, match="at least 16 pixels, got 15"):
        DetailedScenes(15)


SMALL = ["--size=16", "--train=20", "--validation=10", "--test=12"]


def test_the_data_module_reads_the_scenes_of_its_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"--root={tmp_path}", "--seeds", "0", "1", *SMALL])
    assert capsys.readouterr().out.count("42 scenes in") == 2
    sizes: dict[str, Any] = {"size": 16, "train_size": 20, "val_size": 10, "test_size": 7}
    found = []
    for seed in (0, 1):
        data = RoadScenesDataModule(tmp_path, seed=seed, shifts=["contrast"], **sizes)
        (images, masks), *_ = data.test_dataloader()[0]
        with np.load(scene_file(tmp_path, 16, seed)) as arrays:
            assert torch.equal(images * 255, torch.from_numpy(arrays["test_images"][:7]).float())
            assert torch.equal(masks, torch.from_numpy(arrays["test_masks"][:7]).float())
        found.append(images)
    assert not torch.equal(*found)


def test_parts_have_scenes_of_their_own_and_a_smaller_count_the_first(tmp_path: Path) -> None:
    main([f"--root={tmp_path}", "--seeds", "0", *SMALL])
    main([f"--root={tmp_path / 'fewer'}", "--seeds", "0", *SMALL, "--test=5"])
    with (
        np.load(scene_file(tmp_path, 16, 0)) as more,
        np.load(scene_file(tmp_path / "fewer", 16, 0)) as fewer,
    ):
        assert (fewer["test_images"] == more["test_images"][:5]).all()
        assert (more["train_images"][:10] != more["validation_images"]).any()


def test_an_interruption_while_writing_leaves_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main([f"--root={tmp_path}", "--seeds", "0", *SMALL])
    file = scene_file(tmp_path, 16, 0)
    before = file.read_bytes()

    def interrupted(stream: Any, **_: Any) -> None:
        stream.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([f"--root={tmp_path}", "--seeds", "0", *SMALL])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_the_grid_has_columns_and_rows() -> None:
    assert grid(2)[0].flatten().tolist() == [0, 1, 0, 1]


def test_an_edge_covers_inside_and_half_on_the_rim() -> None:
    assert edge(torch.tensor([-2.0, 0.0, 2.0])).tolist() == [1, 0.5, 0]


def test_a_quarter_of_paint_lays_a_quarter_of_the_colour() -> None:
    black, white, cover = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), torch.ones(1, 1, 1, 1)
    assert paint(black, white, cover / 4).sum().item() == 0.75


def test_a_layer_moves_by_a_pixel() -> None:
    layer = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
    assert moved(layer, torch.tensor([[1.0, 0.0]])).flatten().tolist() == [0, 1, 0, 0]


def test_a_third_of_these_scenes_is_road() -> None:
    _, masks = DetailedScenes(32)(2, seeded())
    assert masks.float().mean().item() == pytest.approx(0.34, abs=0.005)

"""Adaptations put together from those of parts: what is known, what is not, what it cost."""

from typing import Any

import pytest
import torch
from torch import Tensor

from it3_lightning.engine import Adaptation
from it3_lightning.engine.result import merged, replaced

NAN = float("nan")


def made(numbers: list[float], **given: Any) -> Adaptation:
    """Return an adaptation whose fields are these numbers and what is given."""
    values = torch.tensor(numbers)
    size = len(numbers)
    fields: dict[str, Any] = {
        "outputs": values,
        "source_outputs": 10 * values,
        "distance_source": values + 0.5,
        "distance_adapted": values + 0.25,
        "reliable": torch.ones(size, dtype=torch.bool),
        "skipped": torch.zeros(size, dtype=torch.bool),
        "reason": None,
        "weights": {},
        "forwards": 4,
        "backwards": 3,
        "cache_hits": 2,
        "seconds": 1.0,
        "answers": {"y": -values},
    }
    return Adaptation(**{**fields, **given})


def skipped(number: float, reason: str) -> Adaptation:
    return Adaptation.skipping(
        torch.tensor([number]),
        outputs=torch.tensor([number]),
        reason=reason,
        forwards=1,
        cache_hits=5,
        answers={"y": torch.tensor([-number])},
    )


def numbers(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(value, 4) for value in tensor.tolist()]


def costs(adaptation: Adaptation) -> tuple[int, int, int, float]:
    a = adaptation
    return a.forwards, a.backwards, a.cache_hits, a.seconds


def test_a_batch_is_its_parts_in_order() -> None:
    whole = merged([made([1.0, 2.0]), skipped(3.0, "bad"), made([4.0]), skipped(5.0, "worse")])
    assert numbers(whole.outputs) == [1, 2, 3, 4, 5]
    assert numbers(whole.source_outputs) == [10, 20, 3, 40, 5]
    assert numbers(whole.answers["y"]) == [-1, -2, -3, -4, -5]
    assert str(numbers(whole.distance_source)) == str([1.5, 2.5, NAN, 4.5, NAN])
    assert str(numbers(whole.distance_adapted)) == str([1.25, 2.25, NAN, 4.25, NAN])
    assert whole.reliable is not None
    assert whole.reliable.tolist() == [True, True, False, True, False]
    assert whole.skipped.tolist() == [False, False, True, False, True]
    assert whole.gated is None
    assert whole.reason == "bad, worse"
    assert costs(whole) == (4 + 1 + 4 + 1, 3 + 3, 2 + 5 + 2 + 5, 2.0)


def test_a_batch_is_measured_where_all_its_parts_are() -> None:
    whole = merged([made([1.0]), made([2.0], outputs=None, source_outputs=None, answers=None)])
    assert (whole.outputs, whole.source_outputs, whole.answers) == (None, None, None)
    assert whole.reason is None


def test_reasons_are_told_once() -> None:
    assert merged([skipped(1.0, "bad"), skipped(2.0, "bad")]).reason == "bad"


@pytest.mark.parametrize("known", [True, False])
def test_samples_are_put_in_the_place_of_others(known: bool) -> None:
    unknown: dict[str, Any] = {} if known else {"distance_source": None}
    gated = torch.tensor([True, False, False])
    whole = made([1.0, 2.0, 3.0], gated=gated, reason="worse", **unknown)
    found = replaced(whole, skipped(7.0, "bad"), [1])
    assert numbers(found.outputs) == [1, 7, 3]
    assert numbers(found.source_outputs) == [10, 20, 30]
    assert numbers(found.answers["y"]) == [-1, -7, -3]
    assert found.skipped.tolist() == [False, True, False]
    assert found.reliable is not None
    assert found.reliable.tolist() == [True, False, True]
    assert found.gated is not None
    assert found.gated.tolist() == gated.tolist()
    assert str(numbers(found.distance_adapted)) == str([1.25, NAN, 3.25])
    if known:
        assert str(numbers(found.distance_source)) == str([1.5, NAN, 3.5])
    else:
        assert found.distance_source is None
    assert found.reason == "worse, bad"
    assert costs(found) == (4 + 1, 3, 2 + 5, 1.0)


def test_what_is_known_of_the_samples_put_in_only_is_unknown_of_the_others() -> None:
    whole = made([1.0, 2.0], distance_source=None, reliable=None)
    found = replaced(whole, made([9.0]), [1])
    assert str(numbers(found.distance_source)) == str([NAN, 9.5])
    assert found.reliable is not None
    assert found.reliable.tolist() == [False, True]

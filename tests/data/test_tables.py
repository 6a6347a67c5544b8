"""Tables in memory: features against scikit-learn's, splits without leaks, shifts as they say."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor

from it3_lightning.data import TABULAR_SHIFTS, TABULAR_TUNING_SHIFTS, ShiftedTables, TabularShift
from it3_lightning.data.sampling import streamed
from it3_lightning.data.tables import Layout, Preprocessing, Schema, Table, tenths

NAN = float("nan")
COLOURS = ("blue", "green", "red")
SCHEMA = Schema(("age", "pay"), {"colour": COLOURS, "town": ("N", "S")}, ("no", "yes"))


def table(
    numeric: list[list[float]], codes: list[list[int]], schema: Schema = SCHEMA, first: int = 0
) -> Table:
    """A table whose target is the number of the row."""
    target = torch.arange(first, first + len(numeric))
    return Table(schema, torch.tensor(numeric, dtype=torch.float64), torch.tensor(codes), target)


def random_table(count: int, seed: int = 0, first: int = 0) -> Table:
    generator = torch.Generator().manual_seed(seed)
    numeric = 50 + 20 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    numeric[torch.rand(count, 2, generator=generator) < 0.2] = NAN
    codes = torch.stack([torch.randint(-1, n, (count,), generator=generator) for n in (3, 2)], 1)
    return Table(SCHEMA, numeric, codes, torch.arange(first, first + count))


class Numbered(ShiftedTables):
    """80 rows to train on and 60 to test on (from number 1000), told by their targets."""

    loads = 0

    def load(self) -> tuple[Table, Table | None]:
        self.loads += 1
        return random_table(80), random_table(60, seed=1, first=1000)


class OneFile(ShiftedTables):
    """100 rows, some of which are held out."""

    def load(self) -> tuple[Table, Table | None]:
        return random_table(100), None


class Classes(ShiftedTables):
    """600 rows in as many classes as asked for."""

    def __init__(self, classes: int, **settings: Any) -> None:
        self.classes = classes
        super().__init__(**settings)

    def source(self) -> tuple[object, ...]:
        return (*super().source(), self.classes)

    def load(self) -> tuple[Table, Table | None]:
        schema = Schema(("x",), {}, tuple(map(str, range(self.classes))))
        numeric = torch.arange(600.0, dtype=torch.float64)[:, None]
        codes = torch.empty(600, 0, dtype=torch.int64)
        return Table(schema, numeric, codes, torch.arange(600) % self.classes), None


def small(**settings: Any) -> Numbered:
    return Numbered(**{"val_size": 20, "shifts": ["zeroed", "gaussian_noise"], **settings})


def gather(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    features, target = zip(*loader, strict=True)
    return torch.cat(features), torch.cat(target)


def numbers(loader: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
    return gather(loader)[1].tolist()


# --- preprocessing


def test_features_are_those_of_scikit_learns_scaler_imputers_and_encoder() -> None:
    train, test = random_table(200), random_table(50, seed=1)
    scaler = StandardScaler().fit(train.numeric.numpy())
    median = SimpleImputer(strategy="median").fit(scaler.transform(train.numeric.numpy()))
    mode = SimpleImputer(strategy="most_frequent", missing_values=-1).fit(train.codes.numpy())
    encoder = OneHotEncoder(sparse_output=False).fit(mode.transform(train.codes.numpy()))
    preprocessing = Preprocessing.fit(train)
    for part in (train, test):
        scaled = median.transform(scaler.transform(part.numeric.numpy()))
        encoded = encoder.transform(mode.transform(part.codes.numpy()))
        expected = torch.from_numpy(np.hstack([scaled, encoded])).float()
        torch.testing.assert_close(preprocessing(part), expected, rtol=0, atol=1e-6)


def test_a_constant_column_is_centred_and_not_scaled() -> None:
    schema = Schema(("x",), {}, None)
    train = table([[0.1], [0.1], [0.1], [NAN]], [[]] * 4, schema)
    test = table([[0.1], [1.1]], [[]] * 2, schema)
    torch.testing.assert_close(Preprocessing.fit(train)(test).flatten(), torch.tensor([0.0, 1.0]))


def test_missing_is_the_first_most_frequent_category_and_unknown_is_none() -> None:
    train = table([[0.0, 0.0]] * 5, [[2, 0], [0, 0], [2, 1], [0, 1], [-1, 1]])
    blocks = Preprocessing.fit(train)(table([[0.0, 0.0]] * 2, [[-1, -1], [-2, -2]]))[:, 2:]
    assert blocks.tolist() == [[1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]  # blue as often as red, S


def test_a_category_that_no_training_row_has_is_all_zeros() -> None:
    train = table([[0.0, 0.0]] * 3, [[0, 0], [2, 0], [0, 1]])
    blocks = Preprocessing.fit(train)(table([[0.0, 0.0]] * 2, [[1, 0], [2, 0]]))[:, 2:5]
    assert blocks.tolist() == [[0, 0, 0], [0, 0, 1]]


def test_a_column_without_any_training_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"among the 2 training rows, got none of 'pay', 'town'"):
        Preprocessing.fit(table([[1.0, NAN], [2.0, NAN]], [[0, -1], [1, -2]]))


def test_a_table_of_categories_alone_has_their_features() -> None:
    schema = Schema((), {"colour": COLOURS}, None)
    rows = Table(schema, torch.empty(2, 0).double(), torch.tensor([[0], [2]]), torch.zeros(2, 1))
    assert Preprocessing.fit(rows)(rows).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_layout_tells_the_variables_and_what_stands_for_missing() -> None:
    train = random_table(100)
    layout = Preprocessing.fit(train).layout
    assert layout.variable.tolist() == [0, 1, 2, 2, 2, 3, 3]
    assert layout.numeric.tolist() == [True] * 2 + [False] * 5
    assert layout.variables == 4
    nothing = table([[NAN, NAN]], [[-1, -1]])
    assert torch.equal(layout.missing, Preprocessing.fit(train)(nothing)[0])


# --- splits


def test_train_validation_and_test_share_no_row_and_hold_all() -> None:
    data = small()
    train, validation = numbers(data.train_dataloader()), numbers(data.val_dataloader())
    assert len(validation) == 20
    assert sorted(train + validation) == list(range(80))
    assert numbers(data.test_dataloader()[0]) == list(range(1000, 1060))
    assert set(numbers(small(seed=1).val_dataloader())) != set(validation)


def test_without_a_test_table_a_seeded_share_is_held_out() -> None:
    data = OneFile(test_share=0.3, shifts=[])
    test = numbers(data.test_dataloader()[0])
    train, validation = numbers(data.train_dataloader()), numbers(data.val_dataloader())
    assert (len(test), len(validation), len(train)) == (30, 7, 63)
    assert sorted(test + train + validation) == list(range(100))
    other = numbers(OneFile(test_share=0.3, shifts=[], seed=1).test_dataloader()[0])
    assert set(other) != set(test)


def test_sizes_are_seeded_subsets() -> None:
    data = small(train_size=30, test_size=15)
    train, test = numbers(data.train_dataloader()), numbers(data.test_dataloader()[0])
    assert len(set(train)) == 30
    assert set(train).isdisjoint(numbers(data.val_dataloader()))
    assert len(test) == 15
    assert test == sorted(test) == numbers(small(train_size=30, test_size=15).test_dataloader()[0])


def test_no_held_out_row_changes_a_training_feature() -> None:
    held_out: list[int] = []

    class Changed(Numbered):
        def load(self) -> tuple[Table, Table | None]:
            train, test = random_table(80), random_table(60, seed=9, first=1000)
            train.numeric[held_out] = 1e6
            train.codes[held_out] = 0
            test.numeric.fill_(NAN)
            return train, test

    before = small(shifts=[])
    first = gather(before.train_dataloader())
    held_out += numbers(before.val_dataloader())
    changed = Changed(val_size=20, shifts=[])
    second = gather(changed.train_dataloader())
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert gather(changed.val_dataloader())[0].max() > 1e4


def test_training_rows_have_mean_0_and_deviation_1_and_test_rows_have_not() -> None:
    data = OneFile(shifts=[], test_share=0.5)
    train, test = gather(data.train_dataloader())[0], gather(data.test_dataloader()[0])[0]
    present = train[:, 0] != train[:, 0].mode().values  # imputed cells all hold the median
    torch.testing.assert_close(train[present, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    std = train[present, 0].std(correction=0)
    torch.testing.assert_close(std, torch.tensor(1.0), atol=1e-6, rtol=0)
    assert test[:, 0].mean().abs() > 0.01


def test_more_rows_than_there_are_is_refused() -> None:
    for settings, most in (
        ({"val_size": 81}, 80),
        ({"train_size": 61}, 60),
        ({"test_size": 61}, 60),
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(settings))} to be at most {most}"):
            small(**settings).setup("fit")


# --- loaders


def test_loaders_are_clean_first_then_each_shift_of_the_same_rows() -> None:
    data = small()
    assert data.test_names == ["clean", "zeroed", "gaussian_noise"]
    clean, zeroed, noisy = (gather(loader) for loader in data.test_dataloader())
    assert torch.equal(clean[1], zeroed[1])
    assert torch.equal(clean[1], noisy[1])
    assert 0 < (clean[0] != zeroed[0]).float().mean() < 0.4
    assert (clean[0] != noisy[0])[:, :2].all()
    for test, predict in zip(data.test_dataloader(), data.predict_dataloader(), strict=True):
        assert torch.equal(gather(test)[0], gather(predict)[0])


def test_batches_are_float_features_and_integer_classes_or_float_values() -> None:
    class Values(Numbered):
        def load(self) -> tuple[Table, Table | None]:
            rows = random_table(80)
            schema = Schema(SCHEMA.numeric, SCHEMA.categorical, None)
            values = 1000 + rows.target[:, None].float()
            return Table(schema, rows.numeric, rows.codes, values), None

    features, target = next(iter(small(batch_size=16).train_dataloader()))
    assert (features.shape, features.dtype) == ((16, 7), torch.float32)
    assert (target.shape, target.dtype) == ((16,), torch.int64)
    values = Values(batch_size=16, shifts=[])
    _, target = next(iter(values.train_dataloader()))
    assert (target.shape, target.dtype) == ((16, 1), torch.float32)
    assert target.min() >= 1000  # in its own units
    assert (values.num_features, values.num_outputs, values.num_classes) == (7, 1, None)
    assert (small().num_features, small().num_outputs, small().num_classes) == (7, 2, 2)


def test_one_row_equals_its_row_of_the_batch_and_is_a_copy() -> None:
    dataset: Any = small(shifts=[]).test_dataloader()[0].dataset
    batch = dataset.__getitems__([5, 3])
    assert torch.equal(dataset[5][0], batch[0][0])
    assert int(dataset[3][1]) == int(batch[1][1]) == 1003
    dataset[5][0].fill_(7)
    assert torch.equal(dataset[5][0], batch[0][0])


def test_worker_processes_give_the_same_batches() -> None:
    there = gather(small(shifts=[], num_workers=1).test_dataloader()[0])
    here = gather(small(shifts=[]).test_dataloader()[0])
    assert torch.equal(there[0], here[0])


def test_another_source_is_loaded_anew() -> None:
    data = Classes(2, shifts=[])
    assert data.num_classes == 2
    data.classes = 5
    assert data.num_classes == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_share": 1.0}, "test_share to be between 0 and 1, got 1.0"),
        ({"shifts": ["zroed"]}, "Unknown shift 'zroed'. Did you mean 'zeroed'"),
        ({"shifts": ["fog"]}, "Unknown shift 'fog'"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_a_class_without_load_says_what_to_define() -> None:
    with pytest.raises(NotImplementedError, match="ShiftedTables to define load"):
        ShiftedTables().setup("fit")


# --- the unequal stream


@pytest.mark.parametrize(("classes", "frequent"), [(2, 1), (3, 1), (5, 2), (6, 3), (10, 3)])
def test_some_classes_become_ten_times_as_frequent(classes: int, frequent: int) -> None:
    labels = torch.arange(classes).repeat(100)
    chosen = labels[streamed(tenths(labels), "unequal", seed=1)]
    counts = chosen.bincount().sort(descending=True).values
    assert counts.tolist() == [100] * frequent + [10] * (classes - frequent)


def test_some_tenths_of_the_values_become_ten_times_as_frequent() -> None:
    values = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).exp()
    chosen = streamed(tenths(values), "unequal", seed=3)
    edges = np.quantile(values.double().numpy(), np.arange(1, 10) / 10)
    counts = np.bincount(np.digitize(values[chosen, 0].double().numpy(), edges))
    assert sorted(counts.tolist()) == [10] * 7 + [100] * 3


def test_unequal_loaders_hold_the_same_rows_under_every_shift() -> None:
    data = Classes(2, stream="unequal", shifts=["zeroed", "swapped"])
    clean, zeroed, swapped = (gather(loader)[1] for loader in data.test_dataloader())
    assert torch.equal(clean, zeroed)
    assert torch.equal(clean, swapped)
    few, many = sorted(clean.bincount().tolist())
    assert many == pytest.approx(10 * few, rel=0.2)


def test_an_unequal_stream_of_a_single_class_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 classes"):
        streamed(torch.zeros(10).long(), "unequal", seed=0)


# --- shifts


def block_features(count: int) -> tuple[Tensor, Layout]:
    """Two standard normal numbers and two categories of 3 and 2, with their layout."""
    generator = torch.Generator().manual_seed(5)
    blocks = [torch.eye(n)[torch.randint(n, (count,), generator=generator)] for n in (3, 2)]
    features = torch.cat([torch.randn(count, 2, generator=generator), *blocks], dim=1)
    variable = torch.tensor([0, 1, 2, 2, 2, 3, 3])
    missing = torch.tensor([0.25, -0.5, 0.0, 1.0, 0.0, 1.0, 0.0])
    return features, Layout(variable, variable < 2, missing)


def shifted(name: str, severity: int, count: int = 20_000) -> tuple[Tensor, Tensor, Layout]:
    features, layout = block_features(count)
    kept = features.clone()
    result = TabularShift(name, severity)(features, layout)
    assert torch.equal(features, kept)
    assert (result.shape, result.dtype) == (features.shape, torch.float32)
    return features, result, layout


@pytest.mark.parametrize(("severity", "rate"), list(enumerate((0.05, 0.1, 0.2, 0.3, 0.4), 1)))
def test_cells_are_zeroed_at_the_rate_of_the_severity(severity: int, rate: float) -> None:
    before, after, _ = shifted("zeroed", severity)
    for column in (0, 1):
        assert (after[:, column] == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
    for block in (slice(2, 5), slice(5, 7)):  # a category goes as a whole, or stays as it is
        gone = after[:, block].sum(1) == 0
        assert gone.float().mean().item() == pytest.approx(rate, abs=0.01)
        assert torch.equal(after[~gone, block], before[~gone, block])
    both = (after[:, 0] == 0) & (after[:, 1] == 0)  # cells go one by one
    assert both.float().mean().item() == pytest.approx(rate**2, abs=0.01)


@pytest.mark.parametrize(("severity", "count"), list(enumerate((1, 1, 1, 1, 2), 1)))
def test_missing_columns_are_imputed_in_every_row(severity: int, count: int) -> None:
    before, after, layout = shifted("missing", severity)
    gone = [
        v
        for v in range(4)
        if not torch.equal(*(x[:, layout.variable == v] for x in (before, after)))
    ]
    assert len(gone) == count  # 0.4 of 4 variables are 2
    for variable in gone:
        columns = layout.variable == variable
        assert torch.equal(after[:, columns], layout.missing[columns].expand(len(after), -1))


@pytest.mark.parametrize(("severity", "level"), list(enumerate((0.1, 0.2, 0.4, 0.7, 1.0), 1)))
def test_gaussian_noise_has_its_deviation_and_spares_categories(
    severity: int, level: float
) -> None:
    before, after, _ = shifted("gaussian_noise", severity)
    noise = (after - before)[:, :2]
    assert noise.std().item() == pytest.approx(level, rel=0.03)
    assert noise.mean().abs() < 0.02
    assert torch.equal(after[:, 2:], before[:, 2:])


def test_uniform_noise_is_bounded_and_spares_categories() -> None:
    before, after, _ = shifted("uniform_noise", 4)
    noise = (after - before)[:, :2]
    assert 1.19 < noise.abs().max() <= 1.2001
    assert noise.std().item() == pytest.approx(1.2 / 3**0.5, rel=0.03)
    assert torch.equal(after[:, 2:], before[:, 2:])


def test_scaled_columns_have_one_factor_each_within_bounds() -> None:
    before, after, _ = shifted("scaled", 5)
    factors = after[:, :2] / before[:, :2]
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    assert factors[0, 0] != factors[0, 1]
    assert ((factors > 0.25) & (factors < 4)).all()
    assert torch.equal(after[:, 2:], before[:, 2:])


def test_rounded_numbers_are_multiples_nearest_to_what_they_were() -> None:
    before, after, _ = shifted("rounded", 2)
    assert torch.equal(after[:, :2] * 2, (after[:, :2] * 2).round())
    assert (after - before)[:, :2].abs().max() <= 0.25
    assert torch.equal(after[:, 2:], before[:, 2:])


@pytest.mark.parametrize(("severity", "rate"), [(1, 0.05), (3, 0.2), (5, 0.4)])
def test_swapped_cells_stay_in_their_column_and_categories_together(
    severity: int, rate: float
) -> None:
    before, after, _ = shifted("swapped", severity)
    for column in (0, 1):
        assert torch.equal(before[:, column].sort().values, after[:, column].sort().values)
        moved = (before[:, column] != after[:, column]).float().mean().item()
        assert moved == pytest.approx(rate, abs=0.01)
    for block in (slice(2, 5), slice(5, 7)):
        assert (after[:, block].sum(1) == 1).all()
        assert torch.equal(before[:, block].sum(0), after[:, block].sum(0))


@pytest.mark.parametrize("name", [*TABULAR_SHIFTS, *TABULAR_TUNING_SHIFTS])
def test_a_shift_repeats_with_its_generator_and_changes_with_another(name: str) -> None:
    features, layout = block_features(50)
    shift = TabularShift(name, 5)
    one, same, other = (
        shift(features, layout, torch.Generator().manual_seed(seed)) for seed in (0, 0, 3)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, features)
    assert torch.equal(one, other) == (name == "rounded")  # the only one without a draw


def test_shifts_to_tune_on_are_others_than_those_reported() -> None:
    assert set(TABULAR_SHIFTS).isdisjoint(TABULAR_TUNING_SHIFTS)
    assert TABULAR_SHIFTS == ("zeroed", "missing", "gaussian_noise")


def test_a_shift_of_other_features_than_the_layouts_is_refused() -> None:
    layout = block_features(1)[1]
    for features in (torch.zeros(4, 6), torch.zeros(7)):
        with pytest.raises(ValueError, match=r"Expected features \(N, 7\)"):
            TabularShift("zeroed")(features, layout)


def test_seed_and_severity_change_the_shifted_features() -> None:
    def zeroed(**settings: Any) -> Tensor:
        return gather(small(test_size=60, **settings).test_dataloader()[1])[0] == 0

    assert torch.equal(zeroed(), zeroed())
    assert not torch.equal(zeroed(), zeroed(seed=1))
    assert not torch.equal(zeroed(), zeroed(severity=4))


# --- small examples


def test_a_missing_number_becomes_the_median_of_training() -> None:
    schema = Schema(("age",), {}, None)
    rows = table([[1.0], [3.0], [NAN]], [[]] * 3, schema)
    assert Preprocessing.fit(rows)(rows).flatten().tolist() == [-1, 1, 0]


def test_tenths_of_even_values_are_ten_times_as_frequent() -> None:
    values = torch.arange(200.0)[:, None]
    chosen = values[streamed(tenths(values), "unequal", seed=0), 0].long() // 20
    assert chosen.bincount().sort(descending=True).values.tolist() == [20] * 3 + [2] * 7

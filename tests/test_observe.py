from __future__ import annotations

import io
import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sightline as sl
from sightline.observe import AttentionStats, Observe

FLAGS = [
    "log_normalizer",
    "entropy",
    "max_score",
    "mean_score",
    "max_weight",
    "effective_keys",
    "distance",
    "weighted_value",
    "column_mass",
    "column_max",
    "column_entropy",
]
COUNTS = ["sink_tokens", "top_k", "segments", "map_size"]


def test_nothing_is_requested_by_default() -> None:
    assert Observe().requested() == ()
    assert Observe() == Observe(**dict.fromkeys(FLAGS, False), **dict.fromkeys(COUNTS, 0))


def test_every_field_can_be_requested() -> None:
    everything = Observe(
        **dict.fromkeys(FLAGS, True), **dict.fromkeys(COUNTS, 2), distance_window=0, column_horizon=(-1, 4)
    )
    assert set(everything.requested()) == {field.name for field in fields(Observe)}
    assert Observe(**json.loads(json.dumps(everything.to_dict()))) == everything
    assert hash(Observe(**everything.to_dict())) == hash(everything)


def test_requests_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Observe().entropy = True  # type: ignore[misc]


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_flags_must_be_booleans(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^Observe\.{name}: expected True or False, got "):
        Observe(**{name: value})


@pytest.mark.parametrize("name", [*COUNTS, "distance_window"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("4", TypeError)])
def test_counts_must_be_integers_of_at_least_zero(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^Observe\.{name}: expected .*integer of at least 0, got "):
        Observe(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
def test_counts_cannot_be_none(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        Observe(**{name: None})


def test_top_k_ends_at_sixteen() -> None:
    assert Observe(top_k=16).top_k == 16
    with pytest.raises(ValueError, match=r"top_k.*16.*17"):
        Observe(top_k=17)


@pytest.mark.parametrize(
    ("horizon", "error"),
    [
        ((3, 2), ValueError),
        ((1,), ValueError),
        ((1, 2, 3), ValueError),
        ((1.0, 2), TypeError),
        ((None, 2), TypeError),
        ((False, True), TypeError),
        (8, TypeError),
        ("18", TypeError),
    ],
)
def test_column_horizon_must_be_an_ordered_pair_of_integers(horizon: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^Observe\.column_horizon: expected .*lo <= hi, got "):
        Observe(column_horizon=horizon)


def test_column_horizon_may_be_negative_and_of_one_distance() -> None:
    assert Observe(column_horizon=(-3, -3)).column_horizon == (-3, -3)


class ReportsEntropy(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, AttentionStats]:
        return x + 1, AttentionStats(entropy=2 * x, max_key=x.argmax(-1))


def test_fields_are_the_rows_of_the_table_of_statistics() -> None:
    assert [field.name for field in fields(AttentionStats)] == [
        "log_normalizer",
        "entropy",
        "max_score",
        "mean_score",
        "max_weight",
        "max_key",
        "effective_keys",
        "sink_mass",
        "distance",
        "windowed_distance",
        "weighted_value",
        "top_weights",
        "top_keys",
        "segment_mass",
        "map",
        "column_mass",
        "column_count",
        "column_max",
        "column_entropy",
    ]


def test_statistics_are_a_tree_of_their_tensors() -> None:
    entropy, keys = torch.rand(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.int64)
    stats = AttentionStats(entropy=entropy, max_key=keys)
    leaves, structure = pytree.tree_flatten(stats)
    assert [leaf for leaf in leaves if leaf is not None] == [entropy, keys]
    doubled = pytree.tree_map_only(Tensor, lambda tensor: 2 * tensor, stats)
    assert isinstance(doubled, AttentionStats)
    assert torch.equal(doubled.entropy, 2 * entropy)
    assert doubled.distance is None
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure


def test_statistics_pass_through_vmap_and_functional_gradients() -> None:
    query, key, value = torch.randn(3, 3, 1, 2, 4, 8).unbind()
    observe = Observe(log_normalizer=True)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, AttentionStats]:
        return sl.attention(query, key, value, observe=observe)

    output, stats = torch.vmap(attend)(query, key, value)
    expected, alone = attend(query[1], key[1], value[1])
    torch.testing.assert_close(output[1], expected)
    torch.testing.assert_close(stats.log_normalizer[1], alone.log_normalizer)

    def total(query: Tensor) -> tuple[Tensor, AttentionStats]:
        output, stats = attend(query, key[1], value[1])
        return output.sum(), stats

    _, found = torch.func.grad(total, has_aux=True)(query[1])
    torch.testing.assert_close(found.log_normalizer, alone.log_normalizer)


def test_leaves_are_named_by_their_fields() -> None:
    paths, _ = pytree.tree_flatten_with_path(AttentionStats(entropy=torch.rand(1)))
    assert {pytree.keystr(path) for path, leaf in paths if leaf is not None} == {".entropy"}


def test_compiled_functions_return_statistics() -> None:
    x = torch.rand(1, 2, 3)
    _, stats = torch.compile(ReportsEntropy(), fullgraph=True, backend="eager")(x)
    assert isinstance(stats, AttentionStats)
    assert torch.equal(stats.entropy, 2 * x)
    assert stats.distance is None


def test_exported_programs_with_statistics_can_be_saved_and_loaded() -> None:
    x = torch.rand(1, 2, 3)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(ReportsEntropy(), (x,)), buffer)
    buffer.seek(0)
    output, stats = torch.export.load(buffer).module()(x)
    assert torch.equal(output, x + 1)
    assert isinstance(stats, AttentionStats)
    assert torch.equal(stats.entropy, 2 * x)
    assert torch.equal(stats.max_key, x.argmax(-1))


def test_repr_shows_shapes_instead_of_numbers() -> None:
    stats = AttentionStats(max_key=torch.zeros(2, 8, 128, dtype=torch.int64))
    assert repr(stats) == "AttentionStats(max_key=(2, 8, 128) int64)"
    assert repr(Observe(entropy=True, top_k=2)) == "Observe(entropy=True, top_k=2)"


def test_what_is_saved_beside_weights_is_loaded_as_weights_are() -> None:
    query = torch.randn(1, 2, 4, 8)
    observe = Observe(log_normalizer=True)
    _, stats = sl.attention(query, query, query, observe=observe)
    saved = [observe, sl.LSSAR(3), sl.Softmax(softcap=5)]
    file = io.BytesIO()
    torch.save([*saved, stats], file)
    file.seek(0)
    *loaded, found = torch.load(file, weights_only=True)
    assert loaded == saved
    assert torch.equal(found.log_normalizer, stats.log_normalizer)
    assert found.entropy is None

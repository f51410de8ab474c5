"""The CUDA decoding kernels, run on the host by csrc/cuda/emulation.h, against the fp64 reference.

What runs is the source that nvcc compiles: index arithmetic, operand layouts of the matrix instruction, masks, merging,
re-weighting. What this cannot show is in that header.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import (
    DTYPES,
    LAYOUTS,
    MAIN_WEIGHTINGS,
    OPTION_PAIRS,
    OPTIONS,
    PAIRS,
    SOFTMAX_OPTIONS,
    Problem,
    Sizes,
    by_turn,
    random_problem,
)
from attention_checks import assert_outputs_are_close

import sightline as sl
from sightline.attention import scale_number, weighting_scalars, window_sides

KEY_TILE = 16
SCALARS = (
    "weight_function",
    "length_scale",
    "normalize_qk",
    "softcap",
    "reweight_power",
    "reweight_offset",
    "reweight_exempt_rows",
)
# Options of the kernel: no attn_mask, no dropout, no documents.
TAKEN = ("causal", "window", "key_lengths", "key_mask", "alibi_slopes", "scale", "sinks")

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_pair = pytest.mark.parametrize(("weighting", "dtype"), PAIRS.values(), ids=PAIRS.keys())
main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())
DECODING = Sizes(batch=2, heads=8, key_heads=2, queries=2, keys=150, width=24, value_width=40)
# The kernel reads rows in one piece: the binding copies tensors of any other layout, which test_decode.py is about.
KERNEL_LAYOUTS = [name for name, rearrange in LAYOUTS.items() if rearrange(torch.empty(2, 2, 2, 2)).stride(-1) == 1]

Decode = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def decode(bench: ModuleType) -> Decode:
    """Runs a problem on the emulated kernels; `splits` 0 leaves the choice to the library."""

    def decode_problem(problem: Problem, weighting: Any, splits: int = 3) -> dict[str, torch.Tensor]:
        options = dict(problem.options)
        scale = options.pop("scale", None)
        left, right = window_sides(options.pop("window", None))
        numbers = dict(zip(SCALARS, weighting_scalars(weighting), strict=True))
        numbers |= {"scale": scale_number(scale, weighting, problem.query), "causal": options.pop("causal", False)}
        numbers |= {"window_left": left, "window_right": right}
        arrays = {name: _array(tensor) for name, tensor in options.items()}
        if isinstance(scale, torch.Tensor):
            arrays["scales"] = _array(scale)
        output, log_normalizer, _, _ = bench.attention_decode(
            *(_array(tensor) for tensor in (problem.query, problem.key, problem.value)),
            str(problem.query.dtype).removeprefix("torch."),
            {name: float(number) for name, number in numbers.items()},
            splits,
            **arrays,
        )
        return {
            "output": torch.from_numpy(output).view(problem.query.dtype),
            "log_normalizer": torch.from_numpy(log_normalizer),
        }

    return decode_problem


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own memory; 16-bit floats as integers, since NumPy has no bfloat16."""
    if tensor.dtype == torch.bool or not tensor.is_floating_point():
        return tensor.numpy()
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor.float()).numpy()


def assert_decode_is_close(decode: Decode, problem: Problem, weighting: Any, splits: int = 3) -> None:
    assert_outputs_are_close(problem, weighting, lambda problem: decode(problem, weighting, splits))


@every_pair
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (3, 3), (2, 65), (1, 217)])
def test_every_weighting_at_ragged_sizes(
    decode: Decode, queries: int, keys: int, weighting: Any, dtype: torch.dtype
) -> None:
    # Enough rows for the largest error of a handful not to be a matter of luck.
    sizes = replace(DECODING, batch=4, queries=queries, keys=keys)
    assert_decode_is_close(decode, random_problem(sizes, dtype, causal=True), weighting)


def _taken(options: dict[str, Callable[[Sizes], dict[str, Any]]]) -> list[str]:
    return [name for name, make in options.items() if set(make(DECODING)) <= set(TAKEN)]


@pytest.mark.parametrize(("weighting", "dtype"), OPTION_PAIRS.values(), ids=OPTION_PAIRS.keys())
@pytest.mark.parametrize("option", _taken(OPTIONS))
def test_every_option(decode: Decode, option: str, weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(DECODING, dtype, **OPTIONS[option](DECODING))
    assert_decode_is_close(decode, problem, weighting)


@every_dtype
@pytest.mark.parametrize("option", _taken(SOFTMAX_OPTIONS))
def test_sinks(decode: Decode, option: str, dtype: torch.dtype) -> None:
    problem = random_problem(DECODING, dtype, **SOFTMAX_OPTIONS[option](DECODING))
    assert_decode_is_close(decode, problem, sl.Softmax())


@pytest.mark.parametrize(
    ("dtype", "width", "most"), [(torch.bfloat16, 128, 3), (torch.float16, 192, 2), (torch.float32, 64, 2)]
)
def test_all_blocks_run_at_once(bench: ModuleType, dtype: torch.dtype, width: int, most: int) -> None:
    """As many splits as fill 132 multiprocessors, each of which holds `most` blocks, and no more."""
    heads = 8
    query, key, value = (torch.randn(1, heads, rows, width, dtype=dtype) for rows in (1, 6400, 6400))
    arrays = map(_array, (query, key, value))
    splits = bench.attention_decode(*arrays, str(dtype).removeprefix("torch."), {}, 0)[2]
    assert heads * splits <= 132 * most < heads * (splits + 1)


@by_turn("width", [1, 2, 7, 16, 31, 40, 64, 72, 128, 200, 256])
def test_every_width(decode: Decode, width: int, weighting: Any, dtype: torch.dtype) -> None:
    for value_width in {width, 48}:
        sizes = replace(DECODING, keys=70, width=width, value_width=value_width)
        problem = random_problem(sizes, dtype, causal=True, scale=0.7 if width == 1 else None)
        assert_decode_is_close(decode, problem, weighting)


@by_turn(("heads", "key_heads", "queries"), [(1, 1, 1), (6, 2, 3), (16, 1, 1), (9, 1, 5), (40, 1, 1)])
def test_grouped_heads(
    decode: Decode, heads: int, key_heads: int, queries: int, weighting: Any, dtype: torch.dtype
) -> None:
    sizes = replace(DECODING, heads=heads, key_heads=key_heads, queries=queries, keys=90)
    assert_decode_is_close(decode, random_problem(sizes, dtype, causal=True), weighting)


@by_turn("splits", [0, 1, 2, 7, 40])
def test_any_number_of_splits(decode: Decode, splits: int, weighting: Any, dtype: torch.dtype) -> None:
    lengths = torch.tensor([150, 23])  # fewer tiles than splits
    problem = random_problem(DECODING, dtype, causal=True, key_lengths=lengths)
    assert_decode_is_close(decode, problem, weighting, splits)


@by_turn("layout", KERNEL_LAYOUTS)
def test_inputs_in_any_memory_give_the_same_bits(
    decode: Decode, layout: str, weighting: Any, dtype: torch.dtype
) -> None:
    problem = random_problem(replace(DECODING, width=32), dtype, causal=True)
    rearrange = LAYOUTS[layout]
    elsewhere = Problem(*map(rearrange, (problem.query, problem.key, problem.value)), dict(problem.options))
    expected, actual = decode(problem, weighting), decode(elsewhere, weighting)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@main_weightings
def test_a_long_row_keeps_its_accuracy(decode: Decode, weighting: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sizes = Sizes(batch=1, heads=8, key_heads=1, queries=1, keys=6000, width=16, value_width=16)
        assert_decode_is_close(decode, random_problem(sizes, dtype), weighting, splits=2)


@every_dtype
@pytest.mark.parametrize("shift", [-40.0, 0.0, 3e4])
def test_softplus_of_very_small_and_very_large_scores(decode: Decode, shift: float, dtype: torch.dtype) -> None:
    # fp16 ends at 6e-8 and at 65504: the weights must not go there as they are.
    problem = random_problem(DECODING, dtype)
    problem.query[..., 0] = 1.0
    problem.key[..., 0] = shift
    problem.options["scale"] = 1.0
    weighting = sl.Softplus(length_scale=False, normalize_qk=False)
    assert_decode_is_close(decode, problem, weighting)


@main_weightings
@pytest.mark.parametrize(("queries", "keys"), [(1, 0), (0, 5), (0, 0)])
def test_no_queries_and_no_keys(decode: Decode, queries: int, keys: int, weighting: Any) -> None:
    result = decode(random_problem(replace(DECODING, queries=queries, keys=keys), torch.float16), weighting)
    assert (result["output"] == 0).all()
    assert (result["log_normalizer"] == -torch.inf).all()


@main_weightings
def test_key_lengths_outside_the_tensor_are_cut_off(decode: Decode, weighting: Any) -> None:
    for kind in (torch.int32, torch.int64):
        problem = random_problem(DECODING, torch.float32, key_lengths=torch.tensor([1000, -4], dtype=kind))
        clamped = replace(problem, options={"key_lengths": torch.tensor([150, 0], dtype=kind)})
        assert torch.equal(decode(problem, weighting)["output"], decode(clamped, weighting)["output"])


@every_pair
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_of_unseen_keys_do_not_matter(
    decode: Decode, bad: float, weighting: Any, dtype: torch.dtype
) -> None:
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[:, 20:40] = False
    options = {"causal": True, "key_lengths": torch.tensor([150, 75]), "key_mask": mask}
    problem = random_problem(DECODING, dtype, **options)
    expected = decode(problem, weighting)
    for tensor in (problem.key, problem.value):
        tensor[:, :, 20:40] = bad
        tensor[1, :, 75:] = bad
    # The first of two rows does not see the last key, the second does.
    problem.key[0, :, 149] = bad
    problem.value[0, :, 149] = bad
    actual = decode(problem, weighting)
    for name in expected:
        assert torch.equal(actual[name][1], expected[name][1]), name
        torch.testing.assert_close(actual[name][0, :, 0], expected[name][0, :, 0])


@every_dtype
def test_infinite_values_reach_only_rows_that_weigh_their_key(decode: Decode, dtype: torch.dtype) -> None:
    problem = random_problem(replace(DECODING, queries=1, keys=64), dtype)
    reference_weights = sl.attention_rows(
        problem.query.float(), problem.key.float(), torch.tensor([0]), weighting=sl.LSSAR()
    )
    unweighed = (reference_weights == 0).all(dim=2)[:, ::4] & (reference_weights[:, ::4, 0] == 0)
    assert unweighed.any()
    expected = decode(problem, sl.LSSAR())["output"]
    for key in range(0, 64, 4):
        problem.value[0, 0, key, 3] = math.inf
        actual = decode(problem, sl.LSSAR())["output"]
        problem.value[0, 0, key, 3] = 0.0
        weighed = reference_weights[0, :4, 0, key] > 1e-6
        unseen = reference_weights[0, :4, 0, key] == 0
        assert (actual[0, :4, 0, 3][weighed] == math.inf).all()
        assert actual[0, :4, 0, 3][unseen].isfinite().all()
        torch.testing.assert_close(actual[0, :, 0, 4:], expected[0, :, 0, 4:])


@main_weightings
def test_nan_in_a_visible_key_makes_its_rows_nan(decode: Decode, weighting: Any) -> None:
    problem = random_problem(DECODING, torch.bfloat16)
    problem.key[1, 0, 17, 5] = math.nan
    output = decode(problem, weighting)["output"]
    assert output[1, :4].isnan().all()
    assert output[0].isfinite().all()
    assert output[1, 4:].isfinite().all()


@pytest.mark.parametrize("splits", [1, 2, 3, 17])
def test_splits_take_every_key_once_and_share_the_tiles(bench: ModuleType, splits: int) -> None:
    for _ in range(200):
        first = int(torch.randint(0, 2000, ()))
        last = first + int(torch.randint(-1, 3000, ()))
        ranges = bench.key_splits(first, last, splits)
        taken = [key for begin, end in ranges for key in range(begin, end)]
        assert [key for key in taken if key >= first] == list(range(first, last + 1))
        assert len(taken) - (last + 1 - first) in range(KEY_TILE)
        tiles = [math.ceil((end - begin) / KEY_TILE) for begin, end in ranges]
        assert max(tiles) - min(tiles) <= 1
        assert all(begin % KEY_TILE == 0 for begin, end in ranges if end > begin)


def test_elementary_functions_of_one_thread(bench: ModuleType) -> None:
    x = np.linspace(-100.0, 100.0, 20001, dtype=np.float32)
    exact = x.astype(np.float64)
    power_of_two = bench.scalar_exp2(np.minimum(x, 0.0))
    np.testing.assert_allclose(power_of_two, np.exp2(np.minimum(exact, 0.0)), rtol=3e-7)
    np.testing.assert_allclose(bench.scalar_softplus(x[x > -80]), np.logaddexp(0.0, exact[x > -80]), rtol=8e-6)
    np.testing.assert_allclose(bench.scalar_tanh(x / 10), np.tanh(exact / 10), rtol=6e-7)
    unit = np.linspace(0.05, 1.0, 2001, dtype=np.float32)
    for exponent in (1.0, 2.5, 15.0, 33.25):
        np.testing.assert_allclose(
            bench.scalar_power(unit, exponent), unit.astype(np.float64) ** exponent, rtol=1e-5, atol=1e-37
        )
    special = bench.scalar_exp2(np.array([-np.inf, np.nan, -126.5], dtype=np.float32))
    assert special[0] == 0.0
    assert np.isnan(special[1])
    assert special[2] == 0.0

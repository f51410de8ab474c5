"""Tile skipping of re-weighting: tiles whose weights do not count are left out, and results stay within the bound."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES, OPTIONS, PACKINGS, WEIGHTINGS, Sizes, clustered_problem, random_problem, run
from attention_checks import assert_results_are_close, random_gradients

import sightline as sl
from sightline.triton import launch, skipping
from sightline.triton.compat import INTERPRETED
from sightline.triton.skipping import count_tiles

LOG_TAU = {torch.float32: -24, torch.float16: -14, torch.bfloat16: -12}
SIZES = Sizes(batch=2, heads=2, key_heads=1, queries=70, keys=330, width=20, value_width=24)
PACKED_SIZES = Sizes(batch=1, heads=2, key_heads=1, queries=200, keys=300, width=16, value_width=16)
# The interpreter's tiles have 32 rows. Those of a GPU have up to 128, and are to see keys of one direction just so.
SCALE = 1 if INTERPRETED else 4
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(autouse=True)
def skipping_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LEAST_SKIPPING_TILES", 1)


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_are_skipped_and_outputs_and_gradients_stay_close(causal: bool, dtype: torch.dtype) -> None:
    problem = clustered_problem(dtype, 64 * SCALE, 640 * SCALE, SCALE, causal=causal)
    with count_tiles() as counts:
        run(problem, sl.LSSAR(), "triton")
    assert len(counts.calls) == 1
    assert counts.skipped_share > 0.3
    assert_results_are_close(problem, sl.LSSAR(), "triton", outputs=True)


@every_dtype
def test_what_is_skipped_holds_less_than_its_share(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = clustered_problem(dtype, 64 * SCALE, 640 * SCALE, SCALE)
    with count_tiles() as counts:
        skipping = run(problem, sl.LSSAR(), "triton")["output"].double()
    monkeypatch.setattr(launch, "LEAST_SKIPPING_TILES", 2**31)
    with count_tiles() as none:
        whole = run(problem, sl.LSSAR(), "triton")["output"].double()
    assert counts.skipped_share > 0.3
    assert none.calls == []
    # A share of at most tau moves a weighted mean by at most 2 tau of the largest value; then both are rounded.
    largest = float(problem.value.abs().max())
    rounding = {torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert (skipping - whole).abs().max() <= (2 * 2.0 ** LOG_TAU[dtype] + 2 * rounding) * largest


@every_dtype
def test_waves_and_shared_maxima_change_nothing_but_how_many_tiles_are_visited(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = clustered_problem(dtype, queries=200 * SCALE, keys=1090 * SCALE, scale_of_rows=SCALE, causal=True)
    with count_tiles() as alone:
        run(problem, sl.LSSAR(), "triton")
    planned: list[tuple[skipping.Waves, skipping.Waves]] = []

    def plan(programs: int, key_tiles: int, rows: int, processors: int) -> skipping.Waves:
        # Room for 16 programs that have a maximum for every second tile.
        wanted = skipping.Waves(16, key_tiles, 2)
        monkeypatch.setattr(skipping, "SCRATCH_BYTES", 16 * wanted.program_bytes(rows))
        planned.append((skipping.plan_waves(programs, key_tiles, rows, 1), wanted))
        return planned[-1][0]

    monkeypatch.setattr(launch, "plan_waves", plan)
    monkeypatch.setattr(skipping, "_LEAST_WAVE", 16)
    with count_tiles() as shared:
        assert_results_are_close(problem, sl.LSSAR(), "triton", outputs=True)
    assert planned
    assert all(found == wanted for found, wanted in planned)
    assert 0.1 < shared.skipped_share < alone.skipped_share


def test_scores_that_fp16_cannot_hold_are_not_taken_for_no_scores() -> None:
    """A row of softmax is shifted by its maximum, however far below 0 that lies."""
    weighting = sl.Softmax(reweight=sl.Reweight(3.0))
    query, key = torch.zeros(1, 1, 80, 16), torch.zeros(1, 1, 330, 16)
    value = torch.randn(1, 1, 330, 16)
    query[..., 0], query[..., 1] = 64.0, torch.randint(1, 4, (80,))
    key[..., 1] = torch.randint(-64, 65, (330,)) / 32  # scores of few bits, so that a large one is exact beside them
    expected = sl.attention(query, key, value, weighting=weighting, scale=1.0, backend="reference")
    for far in (-1100.0, 1100.0):
        key[..., 0] = far
        with count_tiles() as counts:
            output = sl.attention(query, key, value, weighting=weighting, scale=1.0, backend="triton")
        assert counts.calls
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [3.0, 15.0])
def test_keys_under_the_bound_hold_less_than_tau_together(power: float) -> None:
    """The proof of MATH.md section 2 on numbers: the worst case, every key but one just under the bound."""
    count, tau = 4096, 2.0**-12
    bound = (tau / count) ** (1 / power)
    weights = torch.full((count,), bound, dtype=torch.float64) ** power
    weights[0] = 1.0
    share = weights[1:].sum() / weights.sum()
    assert share < tau
    assert share > tau / 2


@pytest.mark.parametrize("name", ["lssar", "lssar3", "lssar2.5", "lssar1", "sharp_softmax"])
def test_every_power_stays_close(name: str) -> None:
    dtype = list(DTYPES.values())[len(name) % 3]
    with count_tiles() as counts:
        assert_results_are_close(clustered_problem(dtype, causal=True), WEIGHTINGS[name], "triton", outputs=True)
    assert counts.calls


@pytest.mark.parametrize(
    "option",
    ["causal", "left_window", "window", "lengths", "causal_lengths", "causal_alibi", "scale_per_head", "dropout"],
)
def test_options_that_leave_whole_tiles(option: str) -> None:
    dtype = list(DTYPES.values())[len(option) % 3]
    with count_tiles() as counts:
        assert_results_are_close(
            random_problem(SIZES, dtype, **OPTIONS[option](SIZES)), sl.LSSAR(), "triton", outputs=True
        )
    assert counts.calls


@pytest.mark.parametrize("packing", ["documents", "causal_documents"])
def test_packed_documents(packing: str) -> None:
    problem = random_problem(PACKED_SIZES, torch.float32, **PACKINGS[packing](PACKED_SIZES))
    assert_results_are_close(problem, sl.LSSAR(), "triton", outputs=True)


def test_masks_that_reach_into_every_tile_are_not_skipped() -> None:
    problem = random_problem(SIZES, torch.float32, **OPTIONS["key_mask"](SIZES))
    with count_tiles() as counts:
        assert_results_are_close(problem, sl.LSSAR(), "triton", outputs=True)
    assert counts.calls == []


def test_flat_rows_are_plain_attention_and_skip_nothing() -> None:
    query, key = torch.ones(1, 1, 80, 16), torch.ones(1, 1, 320, 16)
    value = torch.randn(1, 1, 320, 16)
    with count_tiles() as counts:
        output = sl.attention(query, key, value, weighting=sl.LSSAR(), backend="triton")
    assert counts.skipped_share == 0.0
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(output), rtol=1e-5, atol=1e-6)


def test_fewer_tiles_are_skipped_where_gradients_are_wanted() -> None:
    problem = clustered_problem(torch.float32)
    weighting = sl.LSSAR(2.0)
    with count_tiles() as without:
        run(problem, weighting, "triton")
    with count_tiles() as recording:
        run(problem, weighting, "triton", *random_gradients(problem))
    assert recording.skipped_share <= without.skipped_share


def test_a_key_that_is_not_finite_reaches_the_rows_that_see_it() -> None:
    problem = clustered_problem(torch.float32, causal=True)
    clean = run(problem, sl.LSSAR(), "triton")["output"]
    problem.key[0, 0, 630, 3] = math.nan
    output = run(problem, sl.LSSAR(), "triton")["output"]
    assert output[0, :2, -10:].isnan().all()
    assert torch.equal(output[0, 2:], clean[0, 2:])


def test_skipping_twice_gives_the_same_bits() -> None:
    problem = clustered_problem(torch.bfloat16, causal=True)
    gradients = random_gradients(problem)
    first, second = (run(problem, sl.LSSAR(), "triton", *gradients) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name

"""`sightline.position` against the formulas of MATH.md section 4."""

from __future__ import annotations

import copy
import doctest
import importlib
import itertools
import math

import pytest
import torch
from tolerance import Comparison, assert_close_to_reference

import sightline as sl
from sightline.nn import ToeplitzPositions
from sightline.position import grid_positions, lrpe_angles, lrpe_frequencies, md_lrpe, md_tpe


def test_frequencies_of_one_axis():
    expected = [10000 ** (-2 * i / 6) for i in range(6)]
    torch.testing.assert_close(lrpe_frequencies(6), torch.tensor(expected))


@pytest.mark.parametrize(("sizes", "width"), [((7,), 5), ((3, 4), 6), ((3, 4), 7), ((2, 3, 2), 7), ((2, 2, 2, 2), 3)])
def test_angles_are_the_positions_times_the_frequencies_one_axis_after_the_other(sizes, width):
    theta = torch.rand(-(-width // len(sizes)))
    angles = lrpe_angles(grid_positions(*sizes), theta, width)
    cells = list(itertools.product(*map(range, sizes)))
    assert angles.shape == (len(cells), width)
    for row, cell in zip(angles, cells, strict=True):
        expected = [s * float(frequency) for s in cell for frequency in theta][:width]
        torch.testing.assert_close(row.float(), torch.tensor(expected))


def test_leading_tokens_are_not_rotated():
    angles = lrpe_angles(grid_positions(3, 3, leading=2), lrpe_frequencies(8, 2), 8)
    assert not angles[:2].any()
    torch.testing.assert_close(angles[2:], lrpe_angles(grid_positions(3, 3), lrpe_frequencies(8, 2), 8))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("per_entry", [False, True])
def test_scores_carry_the_cosine_of_the_difference(causal, per_entry):
    """o_t = sum_s sum_d q_td w_tsd cos(Theta_td - Theta_sd) v_s, w the softmax over s of the keys' channel d."""
    length = 13
    query = torch.randn(2, 4, length, 6, dtype=torch.float64)
    key, value = torch.randn(2, 2, length, 6, dtype=torch.float64), torch.randn(2, 2, length, 3, dtype=torch.float64)
    positions = torch.randint(0, 9, (2, length, 2)) if per_entry else grid_positions(3, 4, leading=1)
    theta = torch.rand(3)
    rotated, logits, gain = md_lrpe(query, key, positions, theta)
    output = sl.additive_recurrence(rotated, logits, value, key_gain=gain.double(), causal=causal)

    # Angles are computed for what entries share once.
    assert gain.shape == (2, 2, length, 12)
    assert (gain.stride(0) == 0) is not per_entry
    angles = lrpe_angles(positions, theta, 6).expand(2, length, 6)
    cosines = (angles[:, :, None] - angles[:, None]).cos()
    spread = key[:, :, None].expand(-1, -1, length, -1, -1)
    if causal:
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        spread = spread.masked_fill(later[None, None, :, :, None], -math.inf)
    weights = spread.softmax(3) * cosines[:, None]
    scores = torch.einsum("bhtd,bhtsd->bhts", query, weights.repeat_interleave(2, 1))
    torch.testing.assert_close(output, scores @ value.repeat_interleave(2, 1), rtol=1e-5, atol=1e-6)


def test_far_positions_keep_their_angle():
    angle = lrpe_angles(torch.tensor([[1_000_003]]), torch.tensor([0.7]), 1)
    assert abs(float(angle) - 1_000_003 * float(torch.tensor(0.7))) < 1e-6


def test_frequencies_can_be_learned():
    theta = torch.rand(4, requires_grad=True)
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    rotated, logits, gain = md_lrpe(query, key, grid_positions(5, 1), theta)
    sl.additive_recurrence(rotated, logits, value, key_gain=gain).sum().backward()
    assert theta.grad[1:].abs().sum() > 0


def test_bfloat16_stays_bfloat16_and_the_gain_is_float32():
    query, key = torch.randn(2, 1, 2, 5, 8).bfloat16().unbind()
    rotated, logits, gain = md_lrpe(query, key, grid_positions(5))
    assert rotated.dtype == logits.dtype == torch.bfloat16
    assert gain.dtype == torch.float32


@pytest.mark.parametrize("sizes", [(1,), (9,), (4, 5), (3, 1, 6)])
def test_tpe_is_a_decaying_sum_along_every_axis(sizes):
    x = torch.randn(2, *sizes, 6, dtype=torch.float64)
    coefficient, decay = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for axis, size in enumerate(sizes, 1):
        for i in range(size):
            for m in range(i + 1):
                weight = (coefficient * decay ** (i - m)).repeat_interleave(2)
                expected.select(axis, i).add_(weight * x.select(axis, m))
    torch.testing.assert_close(md_tpe(x, coefficient, decay), expected)


def test_tpe_has_gradients():
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    coefficient = torch.randn(2, dtype=torch.float64, requires_grad=True)
    decay = torch.rand(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(md_tpe, (x, coefficient, decay))


@pytest.mark.parametrize("of_decay", ["float32", "that of x"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tpe_is_as_exact_as_its_dtype(dtype, of_decay):
    """A decay of 0.982 rounded to eight bits is off by a tenth after 1,024 positions."""
    x, coefficient = torch.randn(2, 1024, 6).to(dtype), torch.tensor([0.7, -1.2]).to(dtype)
    decay = torch.tensor([3.0, 4.0]).sigmoid().to(torch.float32 if of_decay == "float32" else dtype)
    in_float64 = md_tpe(x.double(), coefficient.double(), decay.double())
    filtered = md_tpe(x, coefficient, decay)
    assert filtered.dtype == dtype
    assert_close_to_reference(Comparison(filtered, in_float64, in_float64.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tpe_module_in_16_bits_is_as_exact_as_its_dtype(dtype):
    module, x = ToeplitzPositions(6, 2).to(dtype), torch.randn(2, 1024, 6).to(dtype)
    exact = copy.deepcopy(module).double()(x.double())
    filtered = module(x)
    assert filtered.dtype == dtype
    assert_close_to_reference(Comparison(filtered, exact, exact.to(dtype)))


def test_tpe_decays_of_zero_and_one():
    x = torch.randn(1, 70, 2)
    filtered = md_tpe(x, torch.ones(2), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(filtered[..., 0], x[..., 0])
    torch.testing.assert_close(filtered[..., 1], x[..., 1].cumsum(1))


HEADS = torch.rand(1, 2, 5, 8)
BAD = [
    (TypeError, lambda: grid_positions(2.0), "sizes: expected a whole number of at least 0, got float"),
    (ValueError, lambda: grid_positions(2, leading=-1), "leading: expected a whole number of at least 0, got -1"),
    (ValueError, lambda: grid_positions(), "sizes: expected the size of at least one axis"),
    (ValueError, lambda: lrpe_frequencies(0), "width: expected a whole number of at least 1, got 0"),
    (TypeError, lambda: lrpe_frequencies(8, True), "axes: expected a whole number of at least 1, got bool"),
    (TypeError, lambda: lrpe_angles([[1]], torch.ones(4), 4), "positions: expected a tensor, got list"),
    (ValueError, lambda: lrpe_angles(torch.arange(3), torch.ones(4), 4), "positions: expected shape (..., N, axes)"),
    (ValueError, lambda: lrpe_angles(torch.ones(3, 2), torch.ones(2), 5), "theta: expected at least 3 frequencies"),
    (ValueError, lambda: lrpe_angles(torch.ones(3, 2), torch.ones(2, 2), 4), "theta: expected one axis"),
    (TypeError, lambda: md_lrpe(None, HEADS, torch.ones(5, 1)), "query: expected a tensor, got NoneType"),
    (ValueError, lambda: md_lrpe(HEADS, HEADS[0], torch.ones(5, 1)), "key: expected 4 axes (B, heads, N, D)"),
    (ValueError, lambda: md_lrpe(HEADS, HEADS[..., :4], torch.ones(5, 1)), "key: expected head width 8 as in query"),
    (
        ValueError,
        lambda: md_lrpe(HEADS, HEADS, torch.ones(4, 1)),
        "positions: expected shape (N, axes) or (B, N, axes)",
    ),
    (
        ValueError,
        lambda: md_lrpe(HEADS, HEADS, torch.zeros(5, 0)),
        "positions: expected shape (N, axes) or (B, N, axes) with N = 5, B = 1 and at least 1 axis, got (5, 0)",
    ),
    (
        ValueError,
        lambda: lrpe_angles(torch.zeros(5, 0), torch.ones(4), 4),
        "positions: expected shape (..., N, axes) with at least 1 axis, got (5, 0)",
    ),
    (TypeError, lambda: md_lrpe(HEADS, HEADS, 5), "positions: expected a tensor, got int"),
    (TypeError, lambda: md_lrpe(HEADS.long(), HEADS, torch.ones(5, 1)), "query: expected a floating dtype, got int64"),
    (
        ValueError,
        lambda: md_lrpe(HEADS, HEADS.repeat(3, 1, 1, 1), torch.ones(5, 1)),
        "key: expected shape (1, Hk, 5, 8) as query has",
    ),
    (ValueError, lambda: md_lrpe(HEADS, HEADS[:, :, :4], torch.ones(5, 1)), "key: expected shape (1, Hk, 5, 8)"),
    (
        ValueError,
        lambda: md_lrpe(HEADS, HEADS, torch.ones(5, 5, 1)),
        "positions: expected shape (N, axes) or (B, N, axes)",
    ),
    (
        TypeError,
        lambda: md_tpe(torch.ones(1, 2, 2).int(), torch.ones(1), torch.ones(1)),
        "x: expected a floating dtype",
    ),
    (ValueError, lambda: md_tpe(torch.ones(2, 2), torch.ones(1), torch.ones(1)), "x: expected shape (B, n_1, ..., n_k"),
    (ValueError, lambda: md_tpe(torch.ones(1, 2, 4), torch.ones(3), torch.ones(3)), "coefficient: expected shape (H,)"),
    (
        ValueError,
        lambda: md_tpe(torch.ones(1, 2, 4), torch.ones(2), torch.ones(1)),
        "decay: expected shape (H,) = (2,)",
    ),
]


@pytest.mark.parametrize(("error", "call", "message"), BAD, ids=[case[2][:40] for case in BAD])
def test_bad_arguments_are_refused_by_name(error, call, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


ELSEWHERE = {
    "key: expected device cpu as query": lambda: md_lrpe(HEADS, HEADS.to("meta"), torch.ones(5, 1)),
    "positions: expected device cpu as query": lambda: md_lrpe(HEADS, HEADS, torch.ones(5, 1, device="meta")),
    "theta: expected device cpu as positions": lambda: md_lrpe(
        HEADS, HEADS, torch.ones(5, 1), torch.ones(8, device="meta")
    ),
    "coefficient: expected device cpu as x": lambda: md_tpe(
        torch.ones(1, 2, 4), torch.ones(2, device="meta"), torch.ones(2)
    ),
    "decay: expected device cpu as x": lambda: md_tpe(torch.ones(1, 2, 4), torch.ones(2), torch.ones(2, device="meta")),
}


@pytest.mark.parametrize("message", ELSEWHERE)
def test_tensors_on_another_device_are_refused_by_name(message):
    with pytest.raises(ValueError, match=f"^{message}, got meta$"):
        ELSEWHERE[message]()


def test_positions_of_tensors_without_data():
    heads = HEADS.to("meta")
    assert md_lrpe(heads, heads, grid_positions(5, device="meta"))[2].shape == (1, 2, 5, 16)
    assert ToeplitzPositions(12, 3).to("meta")(torch.empty(2, 5, 4, 12, device="meta")).shape == (2, 5, 4, 12)


@pytest.mark.parametrize("name", ["position", "nn.position", "nn.lightnet"])
def test_doctests(name):
    failures, tests = doctest.testmod(importlib.import_module(f"sightline.{name}"))
    assert tests > 0
    assert failures == 0


def test_float64_keeps_its_precision():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 7, 6, dtype=torch.float64)
    positions = sl.position.grid_positions(7)
    theta = torch.rand(6, dtype=torch.float64, requires_grad=True)
    wide, _, gain = sl.position.md_lrpe(query, key, positions, theta)
    assert wide.dtype == gain.dtype == torch.float64
    angles = positions.double() * theta
    expected = torch.cat([query * angles.cos(), query * angles.sin()], -1)
    torch.testing.assert_close(wide, expected, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda theta: sl.position.md_lrpe(query, key, positions, theta)[0], theta)
    assert sl.position.md_lrpe(query.bfloat16(), key.bfloat16(), positions)[2].dtype == torch.float32


def test_a_grid_of_one_position_gives_its_decay_a_gradient_of_zero():
    coefficient, decay = torch.rand(2, 1, requires_grad=True).unbind()
    sl.position.md_tpe(torch.randn(2, 1, 1, 4), coefficient, decay).sum().backward()
    found = torch.autograd.grad(sl.position.md_tpe(torch.randn(2, 1, 4), coefficient, decay).sum(), decay)
    assert float(found[0]) == 0.0

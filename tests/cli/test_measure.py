"""How the benchmark measures: rounds, spread, limits, peak memory, and that its rows compute what they claim."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from sightline.cli import limits
from sightline.cli.bench_settings import StackShape, byte_size
from sightline.cli.measure import Spread, attention_flops, interleave, repetitions_within
from sightline.cli.peak_memory import MeasurementError, measure_peak
from sightline.cli.stack import AttentionStack, Cache, attention_rows, eager_attention, sdpa_attention, token_tensor

MEBIBYTE = 2**20


def test_rows_take_turns_and_leave_when_they_had_theirs():
    order = [(turn, name) for turn, name, _ in interleave({"a": int, "b": int, "c": int}, {"a": 3, "b": 1, "c": 2})]
    assert order == [(1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "c"), (3, "a")]


def test_a_row_that_raises_yields_its_error_and_the_others_go_on():
    def failing() -> int:
        raise RuntimeError("no such kernel")

    samples = [(name, sample) for _, name, sample in interleave({"a": failing, "b": int}, {"a": 2, "b": 2})]
    assert [name for name, _ in samples] == ["a", "b", "b"]
    assert isinstance(samples[0][1], RuntimeError)


def test_spread_interpolates():
    spread = Spread.of([float(n) for n in range(11)])
    assert (spread.median, spread.p10, spread.p90) == (5.0, 1.0, 9.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="samples"):
        Spread.of([])


def test_repetitions_stay_between_one_and_the_most():
    assert [repetitions_within(10.0, seconds, most=5) for seconds in (0.1, 3.0, 99.0)] == [5, 3, 1]
    assert repetitions_within(float("inf"), 3.0, most=5) == 5


def test_flops_count_visible_pairs():
    assert attention_flops(2, 3, 5, 7) == 2 * 2 * 6 * (5 + 7)
    assert attention_flops(2, 3, 5, 7, causal=False) == 2 * 2 * 9 * (5 + 7)


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("2KiB", 2048), ("2k", 2048), ("2kB", 2000), ("1.5G", 3 * 2**29), ("1e3", 1000)]
)
def test_sizes_are_read(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "0", "1.2.3G", "5 parsecs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="8GiB"):
        byte_size(text)


def test_only_materialising_rows_need_quadratic_memory():
    shape = StackShape()
    small, large = (limits.expected_memory(shape, tokens, 4, materialises=False) for tokens in (1024, 2048))
    assert large == 2 * small
    assert limits.expected_memory(shape, 2048, 4, materialises=True) - large == 2048**2 * (8 * 8 + 1)


@dataclass(frozen=True)
class Allocation:
    """Holds, for a moment, this many bytes."""

    size: int

    def prepare(self) -> Callable[[], None]:
        torch.set_num_threads(1)
        torch.ones(64 * MEBIBYTE, dtype=torch.uint8)

        def allocate() -> None:
            torch.ones(self.size, dtype=torch.uint8)

        return allocate


@dataclass(frozen=True)
class Failure:
    """Raises, or ends its process, instead of measuring."""

    ends_process: bool

    def prepare(self) -> Callable[[], None]:
        if self.ends_process:
            raise SystemExit(3)
        raise RuntimeError("no such kernel")


def test_peak_memory_sees_what_lives_for_a_moment_and_not_what_was_before():
    peak = measure_peak(Allocation(48 * MEBIBYTE))
    assert peak.extra_bytes == pytest.approx(48 * MEBIBYTE, abs=2 * MEBIBYTE)


def test_a_failing_call_is_reported_with_its_error():
    with pytest.raises(MeasurementError, match="RuntimeError: no such kernel"):
        measure_peak(Failure(ends_process=False))


def test_a_process_that_ends_early_is_reported():
    with pytest.raises(MeasurementError, match="exit code 3"):
        measure_peak(Failure(ends_process=True))


def test_eager_sdpa_and_softmax_rows_compute_the_same():
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, heads, 37, 16, generator=generator) for heads in (4, 2, 2))
    expected = eager_attention(query, key, value)
    assert torch.allclose(sdpa_attention(query, key, value), expected, atol=1e-5)
    assert torch.allclose(attention_rows()["softmax"](query, key, value), expected, atol=1e-5)
    for name in ("lssa", "lssar"):
        weighted = attention_rows()[name](query, key, value)
        assert weighted.shape == expected.shape
        assert not torch.allclose(weighted, expected, atol=1e-2)


@torch.inference_mode()
def test_stack_is_causal_and_ends_at_the_same_states_for_exact_rows():
    stack = AttentionStack(StackShape(2, 4, 2, 8), torch.float32, torch.device("cpu"))
    tokens = token_tensor(b"attention over real text", torch.device("cpu"))
    states = stack.forward(tokens, sdpa_attention)
    assert states.shape == (1, 24, 32)
    assert torch.allclose(stack.forward(tokens, eager_attention), states, atol=1e-4)
    changed = tokens.clone()
    changed[-1] = 0
    assert torch.allclose(stack.forward(changed, sdpa_attention)[:, :-1], states[:, :-1], atol=1e-5)
    assert not torch.allclose(stack.forward(tokens.flip(0), sdpa_attention), states.flip(1), atol=1e-2)


@pytest.mark.parametrize("row", ["eager", "sdpa", "softmax", "lssa", "lssar"])
@torch.inference_mode()
def test_decoding_over_the_cache_continues_what_a_whole_pass_computes(row):
    stack = AttentionStack(StackShape(2, 4, 2, 8, 48), torch.float32, torch.device("cpu"))
    attention = attention_rows()[row]
    tokens = token_tensor(b"attention over real text", torch.device("cpu"))
    whole = stack.forward(tokens, attention)
    cache = Cache(stack.shape, len(tokens), torch.float32, torch.device("cpu"))
    parts = [stack.forward(tokens[:17], attention, cache)]
    parts += [stack.forward(token[None], attention, cache) for token in tokens[17:]]
    assert cache.length == len(tokens)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_feed_forward_part_changes_the_states_and_nothing_before_it():
    tokens = token_tensor(b"attention", torch.device("cpu"))
    without, with_it = (
        AttentionStack(StackShape(1, 2, 1, 8, width), torch.float32, tokens.device) for width in (0, 24)
    )
    assert torch.equal(without.layers[0][0], with_it.layers[0][0])
    states = without.forward(tokens, sdpa_attention)
    assert not torch.allclose(with_it.forward(tokens, sdpa_attention), states, atol=1e-2)

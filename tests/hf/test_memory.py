"""Padding costs a row per entry: no mask over all pairs is made anywhere on the way through a model."""

from __future__ import annotations

from hf.long_context import PaddedForward

from sightline.cli.peak_memory import measure_peak


def test_padded_batch_of_16k_tokens_takes_linear_memory():
    length = 16384
    pairs = 2 * length**2  # bytes of a boolean mask, of which eager and sdpa attention need several or wider ones
    assert measure_peak(PaddedForward(length)).extra_bytes < pairs / 5

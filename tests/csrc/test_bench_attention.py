"""The kernels without torch give what `sightline.attention` gives: the binding adds nothing of its own."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from attention_cases import MAIN_WEIGHTINGS, Problem, Sizes, random_inputs, random_problem, run
from attention_checks import assert_outputs_are_close

from sightline import ops


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS)
def test_attention_equals_the_operator(bench: ModuleType, isa: str, weighting: str, causal: bool) -> None:
    def attend(problem: Problem) -> dict[str, torch.Tensor]:
        arrays = problem.query.numpy(), problem.key.numpy(), problem.value.numpy()
        results = map(torch.from_numpy, bench.attention(isa, *arrays, weighting=weighting, causal=causal))
        return dict(zip(("output", "log_normalizer"), results, strict=True))

    problem = random_problem(Sizes(), torch.float32, causal=causal)
    actual = assert_outputs_are_close(problem, MAIN_WEIGHTINGS[weighting], attend)
    if isa == ops.isa_name():
        # Same kernels, but perhaps not the same build.
        expected = run(problem, MAIN_WEIGHTINGS[weighting], "native")
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS)
def test_threads_of_its_own_give_the_same_bits(bench: ModuleType, isa: str, weighting: str) -> None:
    arrays = [tensor.numpy() for tensor in random_inputs(Sizes(queries=300, keys=300))]
    one, _ = bench.attention(isa, *arrays, weighting=weighting, causal=True, threads=1)
    three, _ = bench.attention(isa, *arrays, weighting=weighting, causal=True, threads=3)
    assert (one == three).all()


def test_wrong_arguments_are_named(bench: ModuleType) -> None:
    query, key, value = (tensor.numpy() for tensor in random_inputs(Sizes()))
    with pytest.raises(ValueError, match="isa: this machine cannot run 'sse9'"):
        bench.attention("sse9", query, key, value)
    with pytest.raises(ValueError, match="weighting: expected 'softmax', 'lssa' or 'lssar', got 'mean'"):
        bench.attention("generic", query, key, value, weighting="mean")
    with pytest.raises(ValueError, match="key and value: expected shapes that fit query"):
        bench.attention("generic", query, key[:1], value)

"""The Triton kernels on a GPU: accuracy at sizes that fill it, true fp32, determinism, graphs, streams, the compiler.

tests/triton/kernels has every option and ragged shape, on a GPU too; here stands what the interpreter cannot show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tolerance
import torch
from attention_cases import DTYPES, MAIN_WEIGHTINGS, Problem, Sizes, random_problem, run
from attention_checks import assert_results_are_close, random_gradients

import sightline as sl

pytest.importorskip("triton")

from sightline.triton import launch, skipping

pytestmark = pytest.mark.gpu

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())
FULL = Sizes(batch=2, heads=16, key_heads=4, queries=2048, keys=2048, width=64, value_width=64)


@pytest.fixture(autouse=True)
def tensors_on_the_gpu() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@every_dtype
@main_weightings
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (128, 128), (80, 48), (256, 256)])
def test_every_width_forward_and_backward(width: int, value_width: int, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes(1, 4, 2, 512, 640, width, value_width)
    assert_results_are_close(random_problem(sizes, dtype, causal=True), weighting, "triton", outputs=True)


@every_dtype
@main_weightings
@pytest.mark.parametrize(("queries", "keys"), [(511, 513), (1000, 1999), (333, 4097)])
def test_ragged_lengths_forward_and_backward(queries: int, keys: int, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes(1, 4, 2, queries, keys, 64, 64)
    assert_results_are_close(random_problem(sizes, dtype, causal=True), weighting, "triton", outputs=True)


@main_weightings
def test_a_missed_rule_is_decided_by_other_draws_on_the_device(weighting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comparisons do where a draw misses a rule by chance has to work where the tensors lie."""
    redrawn: list[Problem] = []
    redraw = Problem.redrawn

    def counting(problem: Problem, turn: int) -> Problem:
        redrawn.append(redraw(problem, turn))
        return redrawn[-1]

    def missed(comparison: Any, *arguments: Any) -> tuple[float, str]:
        return (0.0 if redrawn else 2.0), "missed once"

    monkeypatch.setattr(Problem, "redrawn", counting)
    monkeypatch.setattr(tolerance, "_excess", missed)
    problem = random_problem(Sizes(1, 4, 2, 70, 90, 64, 64), torch.bfloat16, causal=True)
    assert_results_are_close(problem, weighting, "triton", outputs=True)
    assert len(redrawn) >= tolerance.DECISIVE_LEAD
    assert {tensor.device.type for each in redrawn for tensor in (each.query, each.key, each.value)} == {"cuda"}


OPTIONS = {
    "window": {"window": (300, 0)},
    "lengths": {"causal": True, "key_lengths": [700, 300]},
    "alibi": {"alibi_slopes": [0.1] * 4},
    "dropout": {"dropout_p": 0.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@main_weightings
def test_options_at_lengths_of_many_tiles(options: dict[str, Any], weighting: Any) -> None:
    sizes = Sizes(2, 4, 2, 700, 900, 64, 64)
    options = {name: torch.tensor(option) if isinstance(option, list) else option for name, option in options.items()}
    assert_results_are_close(random_problem(sizes, torch.bfloat16, **options), weighting, "triton", outputs=True)


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@main_weightings
def test_fp32_stays_fp32_where_torch_may_use_tf32(weighting: Any, tf32_allowed: None) -> None:
    query, key, value = (torch.randn(1, 2, 700, 64) for _ in range(3))
    output = sl.attention(query, key, value, weighting=weighting, causal=True, backend="triton")
    exact = sl.attention(*(tensor.double() for tensor in (query, key, value)), weighting=weighting, causal=True)
    # tf32 keeps ten bits of an operand: its error is near 3e-4.
    assert (output - exact).norm() <= 1e-4 * exact.norm()


@every_dtype
@main_weightings
def test_results_and_gradients_repeat_bit_by_bit(weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(FULL, dtype, causal=True)
    gradients = random_gradients(problem)
    first = run(problem, weighting, "triton", *gradients)
    for _ in range(5):
        again = run(problem, weighting, "triton", *gradients)
        for name in first:
            assert torch.equal(again[name], first[name]), name


@main_weightings
def test_a_cuda_graph_computes_anew_from_what_its_inputs_hold(weighting: Any) -> None:
    inputs = [torch.randn(1, 8, 512, 64, dtype=torch.bfloat16) for _ in range(3)]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    upstream = torch.randn_like(inputs[0])

    def step() -> tuple[torch.Tensor, ...]:
        output = sl.attention(*leaves, weighting=weighting, causal=True, backend="triton")
        return (output.detach(), *torch.autograd.grad(output, leaves, upstream))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles: nothing may be loaded during the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    torch.cuda.synchronize()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@main_weightings
def test_compiled_by_inductor_forward_and_backward_equal_eager(weighting: Any) -> None:
    def loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return (sl.attention(query, key, value, weighting=weighting, causal=True).float() * 2.0).square().sum()

    inputs = [torch.randn(1, 4, 300, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for actual, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@main_weightings
def test_kernels_run_on_the_current_stream(weighting: Any) -> None:
    query, key, value = (torch.randn(1, 8, 1024, 64, dtype=torch.bfloat16) for _ in range(3))
    expected = sl.attention(query, key, value, weighting=weighting, backend="triton")
    held = key.clone()
    key.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        key.copy_(held)
        actual = sl.attention(query, key, value, weighting=weighting, backend="triton")
    stream.synchronize()
    assert torch.equal(actual, expected)


def test_the_default_backend_of_a_gpu_is_triton_and_native_is_decoding_alone() -> None:
    query, cache = torch.randn(1, 4, 300, 64, dtype=torch.bfloat16), torch.randn(1, 4, 300, 64, dtype=torch.bfloat16)
    assert torch.equal(sl.attention(query, cache, cache), sl.attention(query, cache, cache, backend="triton"))
    with pytest.raises(NotImplementedError, match="decoding kernel is all there is"):
        sl.attention(query, cache, cache, backend="native")


def test_tensors_on_two_devices_are_refused_by_name() -> None:
    query = torch.randn(1, 2, 30, 16)
    with pytest.raises(ValueError, match="key"):
        sl.attention(query, query.cpu(), query)


@main_weightings
def test_memory_is_linear_in_the_length(weighting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    length, heads, width = 16384, 4, 64
    query, key, value = (torch.randn(1, heads, length, width, dtype=torch.bfloat16) for _ in range(3))
    sl.attention(query, key, value, weighting=weighting, causal=True)
    scratch: list[int] = []
    make_scratch = launch.make_scratch

    def making(waves: skipping.Waves, row_tiles: int, rows: int, device: torch.device) -> skipping.Scratch:
        scratch.append(waves.programs * waves.program_bytes(rows))
        return make_scratch(waves, row_tiles, rows, device)

    monkeypatch.setattr(launch, "make_scratch", making)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = sl.attention(query, key, value, weighting=weighting, causal=True)
    extra = torch.cuda.max_memory_allocated() - before
    assert len(scratch) == (weighting.reweight is not None)
    assert sum(scratch) <= skipping.SCRATCH_BYTES
    # The output, a few numbers per row and per program, and what skipping says that it takes; all pairs would be a
    # hundred times the output.
    assert extra <= output.numel() * output.element_size() + 64 * heads * length + sum(scratch)

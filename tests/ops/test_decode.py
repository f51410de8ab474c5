"""`sightline::attention_decode`: when it is chosen, and on a GPU the kernel itself against the fp64 reference."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    LAYOUTS,
    MAIN_WEIGHTINGS,
    OPTIONS,
    SOFTMAX_OPTIONS,
    WEIGHTINGS,
    Problem,
    Sizes,
    random_problem,
    run,
)
from attention_checks import assert_outputs_are_close
from torch._subclasses.fake_tensor import FakeTensorMode

import sightline as sl
from sightline import ops
from sightline.ops import decode, library

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS.keys())
main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())
DECODING = Sizes(batch=4, heads=8, key_heads=2, queries=2, keys=1500, width=64, value_width=64)
NOT_TAKEN = ("attn_mask", "dropout_p", "cu_seqlens_q")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fake tensors on a device "cuda", for which the library seems to be loaded."""
    monkeypatch.setattr(decode, "_LOADED", True)
    monkeypatch.setattr(decode, "_runs_on_device", lambda index: True)
    with FakeTensorMode():
        yield


def make_inputs(
    *, heads: int = 8, queries: int = 1, width: int = 64, value_width: int = 64, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    shapes = ((2, heads, queries, width), (2, 2, 300, width), (2, 2, 300, value_width))
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]


def test_decoding_is_taken(pretended_gpu: None) -> None:
    assert ops.decode_refusal(*make_inputs()) is None
    assert ops.decode_refusal(*make_inputs(heads=8, queries=4, width=256, value_width=1)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"queries": 5}, "at most 16 query rows per key head, this call has 20"),
        ({"width": 257}, "head widths from 1 to 256"),
        ({"value_width": 300}, "head widths from 1 to 256"),
        ({"dtype": torch.float64}, "no kernel for torch.float64"),
    ],
)
def test_what_the_kernel_does_not_take(pretended_gpu: None, change: dict[str, Any], reason: str) -> None:
    refusal = ops.decode_refusal(*make_inputs(**change))
    assert refusal is not None
    assert reason in refusal


def test_options_that_the_kernel_does_not_take(pretended_gpu: None) -> None:
    inputs = make_inputs()
    assert "attn_mask" in str(ops.decode_refusal(*inputs, attn_mask=torch.empty(1, 300, device="cuda")))
    assert "dropout_p" in str(ops.decode_refusal(*inputs, dropout_p=0.1))
    offsets = torch.empty(3, dtype=torch.int32, device="cuda")
    assert "cu_seqlens_q" in str(ops.decode_refusal(*inputs, cu_seqlens_q=offsets))


def test_calls_that_need_a_gradient_are_not_taken(pretended_gpu: None) -> None:
    inputs = make_inputs()
    sinks = torch.empty(8, device="cuda", requires_grad=True)
    assert "derivative" in str(ops.decode_refusal(*inputs, others=(sinks, None)))
    with torch.no_grad():
        assert ops.decode_refusal(*inputs, others=(sinks, 0.5)) is None
    inputs[1].requires_grad_()
    assert "derivative" in str(ops.decode_refusal(*inputs))


def test_a_gpu_without_code_for_it_is_named(pretended_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_runs_on_device", lambda index: False)
    assert ops.decode_refusal(*make_inputs()) == "libsightline_cuda.so was not built for the GPU cuda:0"


@pytest.mark.parametrize(("capability", "built"), [((9, 0), True), ((8, 6), True), ((10, 0), False), ((7, 5), False)])
def test_a_library_for_other_gpus_is_not_launched(
    capability: tuple[int, int], built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(decode, "_LOADED", True)
    monkeypatch.setattr(decode, "_ARCHITECTURES", ("80", "90"))
    with FakeTensorMode():
        refusal = ops.decode_refusal(*make_inputs())
    assert refusal == (None if built else "libsightline_cuda.so was not built for the GPU cuda:0")


def test_the_native_backend_says_why_there_is_no_kernel(pretended_gpu: None) -> None:
    with pytest.raises(NotImplementedError, match=r"decoding kernel is all there is .* at most 16 query rows"):
        sl.attention(*make_inputs(queries=9), backend="native")


def test_fake_outputs_have_the_layout_of_the_others() -> None:
    query, key, value = torch.randn(2, 8, 3, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 24)
    output, log_normalizer = decode.attention_decode_fake(query, key, value)
    real = sl.attention(query, key, value, backend="native")
    assert (output.shape, output.stride(), output.dtype) == (real.shape, real.stride(), real.dtype)
    assert log_normalizer.shape == (2, 8, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_library_says_why_and_nothing_breaks() -> None:
    assert not ops.cuda_library().loaded
    assert ops.cuda_library().reason
    assert ops.cuda_library().reason in ops.backend_status()["native"][1]
    assert ops.decode_refusal(*(torch.randn(1, 1, 1, 8),) * 3) == ops.cuda_library().reason


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["80", "90", "100+"], (8, 0), True),
        (["80", "90", "100+"], (8, 9), True),
        (["80", "90", "100+"], (9, 0), True),
        (["80", "90", "100+"], (7, 5), False),
        (["80", "90", "100+"], (12, 0), True),
        (["80", "90"], (10, 0), False),
        (["86"], (8, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_the_code_runs_on(built: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert library.runs_on(built, capability) is runs


def on_gpu(problem: Problem) -> Problem:
    def move(option: Any) -> Any:
        return option.cuda() if isinstance(option, torch.Tensor) else option

    options = {name: move(option) for name, option in problem.options.items()}
    return replace(
        problem, query=move(problem.query), key=move(problem.key), value=move(problem.value), options=options
    )


def assert_gpu_is_close(problem: Problem, weighting: Any) -> None:
    def decode(problem: Problem) -> dict[str, torch.Tensor]:
        results = run(on_gpu(problem), weighting, "native")
        assert all(result.is_cuda for result in results.values())
        return {name: result.cpu() for name, result in results.items()}

    assert_outputs_are_close(problem, weighting, decode)


def _taken(options: dict[str, Any]) -> list[str]:
    return [name for name, make in options.items() if not set(make(DECODING)) & set(NOT_TAKEN)]


@pytest.mark.gpu
@every_dtype
@every_weighting
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (3, 3), (4, 65), (1, 4097), (2, 33000)])
def test_gpu_every_weighting(queries: int, keys: int, weighting: Any, dtype: torch.dtype) -> None:
    assert_gpu_is_close(random_problem(replace(DECODING, queries=queries, keys=keys), dtype, causal=True), weighting)


@pytest.mark.gpu
@every_dtype
@main_weightings
@pytest.mark.parametrize("width", [1, 7, 40, 64, 72, 128, 192, 256])
def test_gpu_every_width(width: int, weighting: Any, dtype: torch.dtype) -> None:
    for value_width in {width, 48}:
        sizes = replace(DECODING, keys=300, width=width, value_width=value_width)
        assert_gpu_is_close(random_problem(sizes, dtype, scale=0.7 if width == 1 else None), weighting)


@pytest.mark.gpu
@every_dtype
@main_weightings
@pytest.mark.parametrize("option", _taken(OPTIONS))
def test_gpu_every_option(option: str, weighting: Any, dtype: torch.dtype) -> None:
    assert_gpu_is_close(random_problem(DECODING, dtype, **OPTIONS[option](DECODING)), weighting)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("option", _taken(SOFTMAX_OPTIONS))
def test_gpu_sinks(option: str, dtype: torch.dtype) -> None:
    assert_gpu_is_close(random_problem(DECODING, dtype, **SOFTMAX_OPTIONS[option](DECODING)), sl.Softmax())


@pytest.mark.gpu
@every_dtype
@main_weightings
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_any_memory(layout: str, weighting: Any, dtype: torch.dtype) -> None:
    rearrange = LAYOUTS[layout]
    problem = on_gpu(random_problem(DECODING, dtype, causal=True))
    elsewhere = replace(
        problem, query=rearrange(problem.query), key=rearrange(problem.key), value=rearrange(problem.value)
    )
    expected, actual = run(problem, weighting, "native"), run(elsewhere, weighting, "native")
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.gpu
@every_dtype
@main_weightings
def test_gpu_results_repeat_bit_by_bit(weighting: Any, dtype: torch.dtype) -> None:
    problem = on_gpu(random_problem(replace(DECODING, keys=20000), dtype))
    first = run(problem, weighting, "native")
    for _ in range(20):
        again = run(problem, weighting, "native")
        for name in first:
            assert torch.equal(again[name], first[name]), name


@pytest.mark.gpu
@main_weightings
def test_gpu_non_finite_numbers_of_unused_slots_do_not_matter(weighting: Any) -> None:
    lengths = torch.tensor([1500, 700, 3, 0])
    problem = on_gpu(random_problem(DECODING, torch.bfloat16, key_lengths=lengths, causal=True))
    expected = run(problem, weighting, "native")
    for tensor in (problem.key, problem.value):
        for batch, length in enumerate(lengths.tolist()):
            tensor[batch, :, length:] = torch.nan
    actual = run(problem, weighting, "native")
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.gpu
@main_weightings
def test_gpu_lengths_are_read_on_the_device_inside_a_cuda_graph(weighting: Any) -> None:
    lengths = torch.tensor([900, 5, 1500, 31], device="cuda")
    problem = on_gpu(random_problem(DECODING, torch.bfloat16, causal=True))
    problem.options["key_lengths"] = lengths
    run(problem, weighting, "native")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(problem, weighting, "native")
    lengths.copy_(torch.tensor([12, 1499, 0, 640]))
    graph.replay()
    torch.cuda.synchronize()
    expected = run(problem, weighting, "native")
    for name in expected:
        assert torch.equal(captured[name], expected[name]), name


@pytest.mark.gpu
def test_gpu_compiles_without_graph_breaks() -> None:
    problem = on_gpu(random_problem(DECODING, torch.bfloat16))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sl.attention(query, key, value, weighting=sl.LSSA(), causal=True, backend="native")

    inputs = (problem.query, problem.key, problem.value)
    with torch.no_grad():
        assert torch.equal(torch.compile(attend, fullgraph=True)(*inputs), attend(*inputs))


@pytest.mark.gpu
def test_gpu_runs_on_the_current_stream() -> None:
    problem = on_gpu(random_problem(replace(DECODING, keys=20000), torch.bfloat16))
    expected = run(problem, sl.LSSAR(), "native")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    key = problem.key.clone()
    problem.key.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        problem.key.copy_(key)
        actual = run(problem, sl.LSSAR(), "native")
    stream.synchronize()
    assert torch.equal(actual["output"], expected["output"])

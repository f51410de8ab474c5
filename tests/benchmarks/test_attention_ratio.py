"""What attention_ratio.py compares: nothing that is missing or that computes something else, all that was asked for."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import attention_peers
import attention_ratio
import pytest
import render
import torch
from torch.nn import functional

CPU = torch.device("cpu")
CASE = attention_ratio.Case("forward", True, 2, 2, 33, 16, "float32")


@pytest.fixture
def zentorch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A zentorch whose operator is `operator.default`."""
    operator = SimpleNamespace(default=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "zentorch")
    monkeypatch.setitem(sys.modules, "zentorch", ModuleType("zentorch"))
    monkeypatch.setattr(torch.ops, "zentorch", SimpleNamespace(zentorch_sdpa=operator), raising=False)
    return operator


def right_operator(query, key, value, is_causal):
    return functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal), None


def wrong_operator(query, key, value, is_causal):
    return functional.scaled_dot_product_attention(query, key, value, is_causal=not is_causal), None


def test_a_peer_that_is_not_installed_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert attention_peers.forward_peers(causal=True) == ({}, {"zentorch": "not installed"})
    assert "zentorch" not in {result["implementation"] for result in attention_ratio.time_ratios(CASE, CPU, 1)}


def test_a_peer_that_does_not_load_is_named_with_the_reason(
    zentorch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError(f"no {name} for this machine")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert attention_peers.forward_peers(causal=True)[1] == {
        "zentorch": "does not load here: no zentorch for this machine"
    }


@pytest.mark.parametrize("causal", [True, False])
def test_an_installed_peer_is_timed_beside_the_others_forward_only(zentorch: SimpleNamespace, causal: bool) -> None:
    zentorch.default = right_operator
    case = attention_ratio.Case("forward", causal, 2, 2, 33, 16, "float32")
    results = {result["implementation"]: result for result in attention_ratio.time_ratios(case, CPU, 3)}
    assert list(results) == ["sdpa", "softmax", "lssa", "lssar", "zentorch"]
    for result in results.values():
        assert result["error"] is None
        assert result["repetitions"] == 3
        assert result["ratio_to_sdpa"] > 0
        assert (result["causal"], result["batch"]) == (causal, 2)
        beside_zentorch = results["zentorch"]["seconds"]["median"] / result["seconds"]["median"]
        assert result["ratio_to_zentorch"] == pytest.approx(beside_zentorch)
    backward = attention_ratio.Case("backward", causal, 1, 2, 33, 16, "float32")
    assert "zentorch" not in backward.implementations(CPU)
    assert all("ratio_to_zentorch" not in result for result in attention_ratio.time_ratios(backward, CPU, 1))


def test_a_peer_that_computes_something_else_is_not_timed(zentorch: SimpleNamespace) -> None:
    zentorch.default = wrong_operator
    results = {result["implementation"]: result for result in attention_ratio.time_ratios(CASE, CPU, 1)}
    assert "from that of torch SDPA" in results["zentorch"]["error"]
    assert "seconds" not in results["zentorch"]
    assert all("ratio_to_zentorch" not in result for result in results.values())
    assert results["softmax"]["error"] is None


def test_operations_count_every_sequence_of_the_batch_and_the_visible_pairs_alone() -> None:
    def flops(direction: str, causal: bool, batch: int) -> float:
        return attention_ratio.Case(direction, causal, batch, 1, 2, 1, "float32").flops()

    # Two queries and two keys, one column each: 3 visible pairs of 4, 4 operations a pair.
    assert flops("forward", True, 1) == 12
    assert flops("forward", False, 1) == 16
    assert flops("forward", False, 8) == 128
    assert flops("backward", True, 1) == 30


def test_the_backward_pass_is_timed_without_the_forward_pass() -> None:
    forward_passes = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        forward_passes.append(query)
        return functional.scaled_dot_product_attention(query, key, value)

    inputs = attention_peers.random_inputs(2, 33, 16, torch.float32, CPU)
    alone = attention_peers.backward_pass(attend, inputs)
    first, second = alone(), alone()
    assert len(forward_passes) == 1
    both = attention_peers.training_pass(attend, inputs)()
    assert len(forward_passes) == 2
    assert [gradient.shape for gradient in first] == [tensor.shape for tensor in inputs]
    for results in (second, both):
        assert all(torch.equal(*pair) for pair in zip(first, results, strict=True))


def test_an_implementation_without_a_backward_pass_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if query.requires_grad:
            raise RuntimeError("no gradients here")
        return attention_peers.IMPLEMENTATIONS["softmax"](query, key, value)

    known = attention_peers.implementations(True)
    monkeypatch.setattr(attention_ratio, "implementations", lambda causal: known | {"softmax": attend})
    case = attention_ratio.Case("backward", True, 1, 2, 33, 16, "float32")
    errors = {result["implementation"]: result["error"] for result in attention_ratio.time_ratios(case, CPU, 1)}
    assert "no gradients here" in errors.pop("softmax")
    assert errors == {"sdpa": None, "lssa": None, "lssar": None}


def test_both_passes_of_every_length_are_measured_and_float16_is_among_the_dtypes() -> None:
    options = attention_ratio.arguments([])
    assert options.dtypes == ["float32", "bfloat16", "float16"]
    cases = attention_ratio.cases_of(options, "float16", 64)
    causal = [(case.direction, case.length) for case in cases if case.causal and case.batch == 1]
    assert causal == [(d, n) for n in (1024, 2048, 4096, 8192, 16384) for d in ("forward", "backward")]
    assert [case.length for case in cases if not case.causal and case.batch == 1] == [1024, 4096]
    assert {case.length for case in cases if case.batch == 8} == {64, 196, 512}


def test_shares_refer_to_registers_and_without_a_bench_module_to_matrix_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> ModuleType:
        raise FileNotFoundError("build it")

    rates = {"float32": 500.0, "bfloat16": 0.0}
    monkeypatch.setattr(attention_ratio, "bench_module", lambda: ModuleType("_bench"))
    monkeypatch.setattr(attention_ratio, "multiply_rates", lambda bench, isa, threads: rates)
    assert attention_ratio.measured_peaks(CPU, ["float16"]) == {
        "register_gflops": rates,
        "peak_gflops": {"float32": 500.0, "float16": 500.0, "bfloat16": 500.0},
    }
    monkeypatch.setattr(attention_ratio, "bench_module", missing)
    monkeypatch.setattr(attention_ratio, "matmul_peak", lambda dtype, device, seconds: 300.0)
    assert attention_ratio.measured_peaks(CPU, ["float16"]) == {"peak_gflops": {"float16": 300.0}}


def test_page_shows_patterns_and_batches_apart_and_says_what_was_left_out(zentorch: SimpleNamespace) -> None:
    zentorch.default = right_operator
    timings = []
    for causal, batch in ((True, 1), (False, 8)):
        case = attention_ratio.Case("forward", causal, batch, 2, 33, 16, "float32")
        timings += attention_ratio.time_ratios(case, CPU, 1)
    for result in timings:
        result["share_of_peak"] = 0.5
    document = {
        "schema": attention_ratio.SCHEMA,
        "device": {"kind": "cpu", "name": "Test CPU", "threads": 1},
        "instruction_set": {"chosen": "generic"},
        "versions": {"zentorch": None},
        "command": "attention_ratio.py",
        "left_out": {"zentorch": "not installed"},
        "timings": timings,
        "memory": [],
        "import_seconds": {"torch": 1.0, "sightline_after_torch": 0.1, "runs": 1},
        "call_overhead": [],
    }
    text = render.render([document])
    assert "shares of peak refer to the best of a large matrix product" in text
    assert "| x SDPA | x zentorch | GFLOP/s | of matrix product |" in text
    assert "Left out: zentorch (not installed)." in text
    causal, full = text.index("### Forward, causal, B = 1"), text.index("### Forward, over all keys, B = 8")
    assert causal < text.index("| float32, H = 2, D = 16, N = 33 | zentorch |") < full
    assert "| float32, H = 2, D = 16, N = 33 | zentorch |" in text[full:]
    text = render.render([document | {"register_gflops": {"float32": 498.0, "bfloat16": 0.0, "vdpbf16ps": 1025.0}}])
    assert "multiply in registers, before anything else was measured: 498 GFLOP/s of float32, 1,025 GFLOP/s of" in text
    assert "| x SDPA | x zentorch | GFLOP/s | of register peak |" in text
    alone = [{name: value for name, value in result.items() if name != "ratio_to_zentorch"} for result in timings]
    assert "| x SDPA | GFLOP/s |" in render.render([document | {"timings": alone}])

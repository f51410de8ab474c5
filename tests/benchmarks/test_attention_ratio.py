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
    both = attention_ratio.Case("forward+backward", causal, 1, 2, 33, 16, "float32")
    assert "zentorch" not in both.implementations(CPU)


def test_a_peer_that_computes_something_else_is_not_timed(zentorch: SimpleNamespace) -> None:
    zentorch.default = wrong_operator
    results = {result["implementation"]: result for result in attention_ratio.time_ratios(CASE, CPU, 1)}
    assert "from that of torch SDPA" in results["zentorch"]["error"]
    assert "seconds" not in results["zentorch"]
    assert results["softmax"]["error"] is None


def test_operations_count_every_sequence_of_the_batch_and_the_visible_pairs_alone() -> None:
    def flops(direction: str, causal: bool, batch: int) -> float:
        return attention_ratio.Case(direction, causal, batch, 1, 2, 1, "float32").flops()

    # Two queries and two keys, one column each: 3 visible pairs of 4, 4 operations a pair.
    assert flops("forward", True, 1) == 12
    assert flops("forward", False, 1) == 16
    assert flops("forward", False, 8) == 128
    assert flops("forward+backward", True, 1) == 42


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
    assert "Left out: zentorch (not installed)." in text
    causal, full = text.index("### Forward, causal, B = 1"), text.index("### Forward, over all keys, B = 8")
    assert causal < text.index("| float32, H = 2, D = 16, N = 33 | zentorch |") < full
    assert "| float32, H = 2, D = 16, N = 33 | zentorch |" in text[full:]

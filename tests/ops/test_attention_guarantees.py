"""What the kernels promise beyond closeness to the reference: exact cases, repeatability, what does not grow with N."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import required
import torch
from attention_cases import DTYPES, OPTIONS, PAIRS, WEIGHTINGS, Problem, Sizes, random_inputs, random_problem, run
from tolerance import FROBENIUS_BOUND, REWEIGHTED_FLOAT32_BOUND

import sightline as sl

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_pair = pytest.mark.parametrize(("weighting", "dtype"), PAIRS.values(), ids=PAIRS.keys())
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS.keys())


def test_memory_that_kernels_write_to_starts_out_poisoned(poisoned_memory: bool) -> None:
    if not poisoned_memory:
        required.missing("only glibc can fill what malloc hands out")
    torch_cpu = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
    for count in (32, 5000, 10_000_000):
        sizes, strides, tensor, address = (
            (ctypes.c_int64 * 1)(count),
            (ctypes.c_int64 * 1)(1),
            ctypes.c_void_p(),
            ctypes.c_void_p(),
        )
        float32, cpu = ctypes.c_int32(6), ctypes.c_int32(0)
        made = torch_cpu.aoti_torch_empty_strided(
            ctypes.c_int64(1), sizes, strides, float32, cpu, ctypes.c_int32(0), ctypes.byref(tensor)
        )
        assert made == 0
        torch_cpu.aoti_torch_get_data_ptr(tensor, ctypes.byref(address))
        assert address.value is not None
        content = ctypes.string_at(address.value, 4 * count)
        torch_cpu.aoti_torch_delete_tensor_object(tensor)
        assert content == b"\x7f" * (4 * count)


@pytest.mark.isa
@every_pair
def test_values_of_one_give_one(weighting: Any, dtype: torch.dtype) -> None:
    for queries, keys in ((1, 1), (3, 3), (113, 203), (1, 4097)):
        query, key, value = random_inputs(Sizes(queries=queries, keys=keys), dtype)
        output = sl.attention(query, key, torch.ones_like(value), weighting=weighting, causal=True, backend="native")
        # 16-bit outputs are exactly one; in float32 two sums of the same weights differ by a rounding or two.
        bound = 1e-6 if dtype == torch.float32 else 0
        assert (output - 1).abs().max() <= bound


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_weighting
def test_a_row_of_one_key_gives_its_value_bit_for_bit(weighting: Any, dtype: torch.dtype) -> None:
    query, key, value = random_inputs(Sizes(queries=90, keys=90), dtype)
    output = sl.attention(query, key, value, weighting=weighting, window=(0, 0), backend="native")
    assert torch.equal(output, value.repeat_interleave(2, dim=1))
    first = sl.attention(query, key, value, weighting=weighting, causal=True, backend="native")[:, :, 0]
    assert torch.equal(first, value.repeat_interleave(2, dim=1)[:, :, 0])


@pytest.mark.isa
@pytest.mark.parametrize("width", [40, 64, 128])
@pytest.mark.parametrize("weighting", ["softmax", "lssa"])
def test_float16_gradients_lose_no_more_than_rounding_them_does(weighting: str, width: int) -> None:
    # Rounding the results leaves 2.1e-4; weights and score gradients of eight bits alone would leave 1.7e-3.
    sizes = Sizes(queries=170, keys=150, width=width, value_width=width)
    tensors = [tensor.requires_grad_() for tensor in random_inputs(sizes, torch.float16)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = sl.attention(*tensors, weighting=WEIGHTINGS[weighting], backend="native")
    reference = sl.attention(*exact, weighting=WEIGHTINGS[weighting])
    gradient = torch.randn_like(output)
    for actual, wanted in zip(
        torch.autograd.grad(output, tensors, gradient),
        torch.autograd.grad(reference, exact, gradient.double()),
        strict=True,
    ):
        assert (actual - wanted).norm() < 3e-4 * wanted.norm()


@every_dtype
@pytest.mark.parametrize("weighting", ["lssar", "lssar1", "lssar2.5", "lssar3", "sharp_softmax"])
def test_a_flat_row_is_plain_attention(weighting: str, dtype: torch.dtype) -> None:
    query, key, value = random_inputs(Sizes(queries=40, keys=70), dtype)
    key[:] = key[:, :, :1]
    gradient = torch.randn(2, 4, 40, 20).to(dtype)
    problem = Problem(query, key, value, {})
    result = run(problem, WEIGHTINGS[weighting], "native", gradient)
    mean = value.double().mean(2, keepdim=True).repeat_interleave(2, dim=1).expand(2, 4, 40, 20)
    assert (result["output"].double() - mean).norm() <= FROBENIUS_BOUND[dtype] * mean.norm()
    # The plain gradient: every key of a row gets 1 / N of what the row got.
    expected = gradient.double().sum(2, keepdim=True).unflatten(1, (2, 2)).sum(2).expand(2, 2, 70, 20) / 70
    assert (result["value"].double() - expected).norm() <= 3 * FROBENIUS_BOUND[dtype] * expected.norm()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("query", "key"), [(15.375, 3.0), (31.125, 1.5), (30.375, 1.5)])
@pytest.mark.parametrize("keys", [4, 16, 128])
def test_a_flat_row_of_large_scores_is_plain_attention(keys: int, query: float, key: float, dtype: torch.dtype) -> None:
    """Scores near 370: an exponent of a weight that is off by their rounding would not look flat beside its peak."""
    queries = torch.full((1, 1, 70, 64), query, dtype=dtype)
    values = torch.randn(1, 1, keys, 64).to(dtype)
    weighting = sl.Softmax(reweight=sl.Reweight(power=15))  # scale 1 / 8
    output = sl.attention(queries, torch.full((1, 1, keys, 64), key, dtype=dtype), values, weighting=weighting)
    expected = values.double().mean(2, keepdim=True).expand(1, 1, 70, 64)
    assert (output.double() - expected).norm() / expected.norm() < FROBENIUS_BOUND[dtype]


@every_dtype
@pytest.mark.parametrize("weighting", ["lssar", "lssar1", "lssar2.5", "lssar3", "sharp_softmax"])
def test_rows_of_at_most_three_keys_are_exempt_from_the_offset(weighting: str, dtype: torch.dtype) -> None:
    problem = random_problem(Sizes(queries=6, keys=6), dtype, causal=True)
    options = WEIGHTINGS[weighting]
    no_offset = type(options)(
        options.length_scale, options.normalize_qk, reweight=sl.Reweight(options.reweight.power, offset=0.0)
    )
    output, without = run(problem, options, "native")["output"], run(problem, no_offset, "native")["output"]
    assert torch.equal(output[:, :, :3], without[:, :, :3])
    assert not torch.equal(output[:, :, 3:], without[:, :, 3:])


@every_dtype
def test_a_row_does_not_change_a_bit_with_the_scores_of_its_neighbours(dtype: torch.dtype) -> None:
    """The largest score of one row rises within a group of key tiles, and those of all others do not."""
    query, key, value = torch.randn(1, 16, 64, 64), torch.randn(1, 16, 1024, 64), torch.randn(1, 16, 1024, 64)
    key[..., 0] = torch.arange(1024.0) // 64
    query[..., 0] = 0.0
    risen = query.clone()
    risen[:, :, 63, 0] = 60.0
    output, other = (sl.attention(rows.to(dtype), key.to(dtype), value.to(dtype)) for rows in (query, risen))
    assert torch.equal(output[:, :, :63], other[:, :, :63])
    assert not torch.equal(output[:, :, 63], other[:, :, 63])


@every_pair
@pytest.mark.parametrize("option", ["causal", "float_mask", "everything"])  # the last with a mask that rows share
def test_results_are_the_same_bits_every_time_and_on_any_number_of_threads(
    option: str, weighting: Any, dtype: torch.dtype
) -> None:
    sizes = Sizes(queries=200, keys=230)
    problem = random_problem(sizes, dtype, **{**OPTIONS[option](sizes), "scale": torch.rand(4)})
    gradients = torch.randn(2, 4, 200, 20).to(dtype), torch.randn(2, 4, 200)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            results.append(run(problem, weighting, "native", *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(other[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["softmax", "lssa", "lssar"])
def test_the_error_does_not_grow_with_the_number_of_keys(weighting: str, dtype: torch.dtype) -> None:
    errors = []
    for keys in (256, 1024, 4096, 16384):
        sizes = Sizes(batch=1, heads=2, key_heads=2, queries=16, keys=keys, width=32, value_width=32)
        problem = random_problem(sizes, dtype)
        reference = run(problem.to(torch.float64), WEIGHTINGS[weighting], "reference")["output"]
        output = run(problem, WEIGHTINGS[weighting], "native")["output"].double()
        errors.append(float((output - reference).norm() / reference.norm()))
    assert errors[-1] < 2 * max(errors[:2])
    reweighted = dtype == torch.float32 and weighting == "lssar"
    assert max(errors) < (REWEIGHTED_FLOAT32_BOUND if reweighted else FROBENIUS_BOUND[dtype])


PEAK_MEMORY_SCRIPT = """
import sys
from pathlib import Path
import torch
import sightline as sl

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

torch.set_num_threads(2)
weighting = getattr(sl, sys.argv[1])()
with_gradient = sys.argv[2] == "backward"
query = torch.randn(1, 8, 128, 64)
key, value = torch.randn(1, 8, 65536, 64), torch.randn(1, 8, 65536, 64)
small = torch.randn(1, 1, 300, 64, requires_grad=with_gradient)
warm_up = sl.attention(small, small, small, weighting=weighting, backend="native")
if with_gradient:
    warm_up.sum().backward()
    for leaf in (query, key, value):
        leaf.requires_grad_()
before = resident()
Path("/proc/self/clear_refs").write_text("5")
output = sl.attention(query, key, value, weighting=weighting, causal=True, backend="native")
results = output.nbytes
if with_gradient:
    output.backward(torch.ones(()).expand(output.shape))
    results += sum(leaf.grad.nbytes for leaf in (query, key, value))
print(peak() - before - results)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("weighting", ["Softmax", "LSSA", "LSSAR"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_beyond_inputs_and_results_is_small_at_65536_keys(direction: str, weighting: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY_SCRIPT, weighting, direction], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    # The scores would be 256 MiB. Backward keeps keys, values and their gradients of the two heads at work.
    limit = 64 if direction == "forward" else 256
    assert int(child.stdout) < limit * 2**20

"""`sightline::additive_recurrence` as a citizen of PyTorch: opcheck, compile, export, checkpointing, vmap, autocast."""

from __future__ import annotations

import re

import pytest
import torch
from recurrence_modules import (
    assert_export_keeps_the_numbers,
    assert_export_with_documents_keeps_the_numbers,
    make_inputs,
    make_state,
)
from recurrence_raw_calls import REFUSED, REFUSED_BACKWARD, arguments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sightline as sl
from sightline.ops.recurrence import ADDITIVE_RECURRENCE, ADDITIVE_RECURRENCE_BACKWARD

OPCHECK_CASES = {
    "plain": lambda grad: {},
    "unordered": lambda grad: {"causal": False, "output_final_state": False},
    "tensors": lambda grad: {
        "key_gain": torch.randn(2, 2, 9, 8, requires_grad=grad),
        "key_mask": torch.rand(2, 9) < 0.8,
        "initial_log_normalizer": torch.randn(2, 2, 8, requires_grad=grad),
        "initial_memory": torch.randn(2, 2, 8, 6, requires_grad=grad),
    },
}


def operator_arguments(inputs, **options):
    """Arguments of the raw operator, by the names of its schema."""
    given = dict(zip(("query", "key", "value"), inputs, strict=True))
    given |= {"causal": True, "scale": 0.5, "output_final_state": True} | options
    return tuple(given.get(argument.name) for argument in ADDITIVE_RECURRENCE._schema.arguments)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", OPCHECK_CASES)
def test_opcheck_of_forward(case, grad):
    options = OPCHECK_CASES[case](grad)
    torch.library.opcheck(ADDITIVE_RECURRENCE, operator_arguments(make_inputs(grad=grad), **options))


def packed_arguments(grad):
    """Of the raw operator: three documents, one of them empty, with a row before and states of their own."""
    cuts, state = torch.tensor([1, 4, 4, 9], dtype=torch.int32), make_state(3, grad)
    options = {"cu_seqlens": cuts, "initial_log_normalizer": state.log_normalizer, "initial_memory": state.memory}
    return operator_arguments(make_inputs(batch=1, grad=grad), **options)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck_of_packed_documents(grad):
    torch.library.opcheck(ADDITIVE_RECURRENCE, packed_arguments(grad))


def test_opcheck_of_backward_of_packed_documents():
    arguments = packed_arguments(False)
    gradients = tuple(torch.randn_like(part) for part in ADDITIVE_RECURRENCE(*arguments))
    torch.library.opcheck(ADDITIVE_RECURRENCE_BACKWARD, (*gradients, *arguments[:-1], True, True))


@pytest.mark.parametrize("case", OPCHECK_CASES)
def test_opcheck_of_backward(case):
    arguments = operator_arguments(make_inputs(), **OPCHECK_CASES[case](False))
    output, *state = ADDITIVE_RECURRENCE(*arguments)
    given = [torch.randn_like(part) if part.numel() else None for part in state]
    torch.library.opcheck(ADDITIVE_RECURRENCE_BACKWARD, (torch.randn_like(output), *given, *arguments[:-1], True, True))


def test_opcheck_of_backward_without_gradients_that_nobody_asked_for():
    arguments = operator_arguments(make_inputs(), **OPCHECK_CASES["tensors"](False))
    gradients = tuple(torch.randn_like(part) for part in ADDITIVE_RECURRENCE(*arguments))
    torch.library.opcheck(ADDITIVE_RECURRENCE_BACKWARD, (*gradients, *arguments[:-1], False, False))


class _Sizes(TorchDispatchMode):
    """Keeps the number of elements of every output of the backward operator."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function is ADDITIVE_RECURRENCE_BACKWARD:
            self.found.append([result.numel() for result in results])
        return results


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_that_nobody_asks_for_are_not_computed(causal):
    """A rotation by positions is a gain without a gradient, and truncated training has a state without one."""
    inputs, gain, state = make_inputs(grad=True), torch.randn(2, 2, 9, 8), make_state()

    def gradients(gain, state):
        output = sl.additive_recurrence(*inputs, key_gain=gain, initial_state=state, causal=causal)
        with _Sizes() as sizes:
            return torch.autograd.grad(output.square().sum(), inputs), sizes.found[0][3:]

    leaves = [part.clone().requires_grad_() for part in state]
    every, sizes = gradients(gain.requires_grad_(), sl.RecurrenceState(*leaves))
    assert sizes == [288, 32, 192]
    some, sizes = gradients(gain.detach(), state)
    assert sizes == [0, 0, 0]
    for one, other in zip(some, every, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("compiler", [pytest.param("inductor", marks=pytest.mark.inductor), "aot_eager"])
def test_compiled_forward_and_backward_equal_eager(compiler, causal):
    def loss(query, key, value, gain, z, memory, mask):
        output, state = sl.additive_recurrence(
            query,
            key,
            value,
            key_gain=gain,
            key_mask=mask,
            causal=causal,
            initial_state=sl.RecurrenceState(z, memory),
            output_final_state=True,
        )
        return (output * output).sum() + state.log_normalizer.sin().sum() + state.memory.sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    for length in (11, 17):
        inputs = make_inputs(length=length, grad=True)
        leaves = (*inputs, torch.randn(2, 2, length, 8, requires_grad=True), *make_state(grad=True))
        mask = torch.rand(2, length) < 0.8
        expected = torch.autograd.grad(loss(*leaves, mask), leaves)
        actual = torch.autograd.grad(compiled(*leaves, mask), leaves)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("compiler", [pytest.param("inductor", marks=pytest.mark.inductor), "aot_eager"])
def test_compiled_with_documents_forward_and_backward_equal_eager(compiler, causal):
    def loss(query, key, value, z, memory, cuts):
        output, state = sl.additive_recurrence(
            query, key, value, cu_seqlens=cuts, causal=causal, initial_state=(z, memory), output_final_state=True
        )
        return (output * output).sum() + state.log_normalizer.sin().sum() + state.memory.sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    for offsets in ([1, 4, 4, 11], [0, 5, 7, 9, 16]):
        leaves = (*make_inputs(batch=1, length=17, grad=True), *make_state(len(offsets) - 1, grad=True))
        cuts = torch.tensor(offsets, dtype=torch.int32)
        expected = torch.autograd.grad(loss(*leaves, cuts), leaves)
        for one, other in zip(torch.autograd.grad(compiled(*leaves, cuts), leaves), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_float64_compiles_as_one_graph():
    def loss(query, key, value):
        return sl.additive_recurrence(query, key, value).square().sum()

    torch._dynamo.reset()
    inputs = [tensor.double().requires_grad_() for tensor in make_inputs()]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


def test_new_lengths_do_not_recompile():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    function = torch.compile(sl.additive_recurrence, fullgraph=True, dynamic=True, backend=counter)
    for length in (13, 29, 54, 7):
        inputs = make_inputs(length=length)
        torch.testing.assert_close(function(*inputs), sl.additive_recurrence(*inputs))
    assert counter.frame_count == 1


def test_export_and_reload_keep_the_numbers():
    assert_export_keeps_the_numbers("auto", ADDITIVE_RECURRENCE)


def test_export_with_documents_and_reload_keep_the_numbers():
    assert_export_with_documents_keeps_the_numbers("auto", ADDITIVE_RECURRENCE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    inputs = make_inputs(grad=True)
    expected = torch.autograd.grad(sl.additive_recurrence(*inputs).square().sum(), inputs)
    checkpointed = checkpoint(sl.additive_recurrence, *inputs, use_reentrant=reentrant)
    checkpointed.square().sum().backward()
    for tensor, other in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, other)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 2), (None, 0, None)])
def test_vmap_equals_a_loop(in_dims):
    def recur(query, key, value):
        output, state = sl.additive_recurrence(query, key, value, output_final_state=True)
        return output, state.log_normalizer, state.memory

    stacked, single = [], []
    for tensor, axis in zip(make_inputs(), in_dims, strict=True):
        mapped = tensor if axis is None else torch.randn(3, *tensor.shape).movedim(0, axis)
        stacked.append(mapped)
        single.append([tensor if axis is None else mapped.select(axis, index) for index in range(3)])
    looped = [recur(*arguments) for arguments in zip(*single, strict=True)]
    for actual, expected in zip(torch.vmap(recur, in_dims=in_dims)(*stacked), zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


def test_vmap_over_options_and_documents_equals_a_loop():
    inputs = make_inputs()
    gains, masks = torch.randn(3, 2, 2, 9, 8), torch.rand(3, 2, 9) < 0.7
    z, memory = torch.randn(3, 2, 2, 8), torch.randn(3, 2, 2, 8, 6)

    def with_options(gain, mask, z, memory):
        return sl.additive_recurrence(*inputs, key_gain=gain, key_mask=mask, initial_state=(z, memory))

    torch.testing.assert_close(
        torch.vmap(with_options)(gains, masks, z, memory),
        torch.stack([with_options(*one) for one in zip(gains, masks, z, memory, strict=True)]),
    )
    packed = make_inputs(batch=1)
    cuts = torch.tensor([[0, 4, 9], [1, 2, 8]], dtype=torch.int32)

    def with_documents(offsets):
        return sl.additive_recurrence(*packed, cu_seqlens=offsets)

    torch.testing.assert_close(
        torch.vmap(with_documents)(cuts), torch.stack([with_documents(offsets) for offsets in cuts])
    )


def test_function_transforms_of_the_gradient():
    _, key, value = make_inputs()

    def loss(query, gain):
        return sl.additive_recurrence(query, key, value, key_gain=gain).square().sum()

    queries, gains = torch.randn(3, 2, 4, 9, 8), torch.randn(3, 2, 2, 9, 8)
    leaf = queries[0].clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf, gains[0]), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(queries[0], gains[0]), expected)
    gradient = torch.func.grad(loss, argnums=(0, 1))
    looped = [gradient(*one) for one in zip(queries, gains, strict=True)]
    for actual, expected in zip(torch.vmap(gradient)(queries, gains), zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


def test_second_derivatives_say_that_they_are_missing():
    query, key, value = make_inputs(grad=True)
    (gradient,) = torch.autograd.grad(sl.additive_recurrence(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_forward_mode_says_that_it_is_missing():
    query, key, value = make_inputs()
    with pytest.raises(Exception, match=r"jvp|forward"):
        torch.func.jvp(lambda q: sl.additive_recurrence(q, key, value), (query,), (torch.ones_like(query),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_query_key_and_value_only(dtype):
    inputs = make_inputs(grad=True)
    state, gain = make_state(grad=True), torch.randn(2, 2, 9, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        output, final = sl.additive_recurrence(*inputs, key_gain=gain, initial_state=state, output_final_state=True)
        raw = ADDITIVE_RECURRENCE(*operator_arguments(inputs))[0]
    assert output.dtype == raw.dtype == dtype
    assert final.memory.dtype == final.log_normalizer.dtype == torch.float32
    expected = sl.additive_recurrence(*(tensor.to(dtype) for tensor in inputs), key_gain=gain, initial_state=state)
    torch.testing.assert_close(output, expected)
    output.float().sum().backward()
    for leaf in (*inputs, gain, *state):
        assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_gain_may_have_the_dtype_of_the_others(dtype):
    inputs, gain = make_inputs(), torch.randn(2, 2, 9, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        output = sl.additive_recurrence(*inputs, key_gain=gain)
    expected = sl.additive_recurrence(*(tensor.to(dtype) for tensor in inputs), key_gain=gain)
    torch.testing.assert_close(output, expected)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with torch.autocast("cpu", dtype=dtype), pytest.raises(TypeError, match=r"^key_gain: expected dtype"):
        sl.additive_recurrence(*inputs, key_gain=gain.to(other))


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sl.additive_recurrence(*make_inputs(dtype=torch.float64)).dtype == torch.float64


def test_no_grad_and_inference_mode():
    inputs = make_inputs(grad=True)
    with torch.no_grad():
        assert not sl.additive_recurrence(*inputs).requires_grad
    with torch.inference_mode():
        assert sl.additive_recurrence(*inputs).is_inference()


def test_meta_tensors_go_through_the_fake_kernel():
    output, state = sl.additive_recurrence(*(tensor.to("meta") for tensor in make_inputs()), output_final_state=True)
    assert output.is_meta
    assert output.shape == (2, 4, 9, 6)
    assert output.transpose(1, 2).is_contiguous()
    assert state.memory.shape == (2, 2, 8, 6)
    packed = [tensor.to("meta") for tensor in make_inputs(batch=1)]
    cuts = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device="meta")
    output, state = sl.additive_recurrence(*packed, cu_seqlens=cuts, output_final_state=True)
    assert output.shape == (1, 4, 9, 6)
    assert state.log_normalizer.shape == (3, 2, 8)


@pytest.mark.parametrize("name", REFUSED)
def test_raw_operator_refuses_what_would_read_out_of_bounds(name):
    changes, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ADDITIVE_RECURRENCE(*arguments(ADDITIVE_RECURRENCE, **changes))


@pytest.mark.parametrize("name", REFUSED_BACKWARD)
def test_raw_backward_operator_refuses_what_would_read_out_of_bounds(name):
    changes, message = REFUSED_BACKWARD[name]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ADDITIVE_RECURRENCE_BACKWARD(*arguments(ADDITIVE_RECURRENCE_BACKWARD, **changes))

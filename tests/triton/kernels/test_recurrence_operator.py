"""`sightline::additive_recurrence_triton` as a citizen of PyTorch: vmap, autocast, compile, export, checkpointing."""

from __future__ import annotations

import pytest
import torch
from recurrence_cases import (
    CAUSAL,
    PACKINGS,
    Problem,
    Sizes,
    random_gradients,
    random_problem,
    run,
)
from recurrence_modules import (
    assert_export_keeps_the_numbers,
    assert_export_with_documents_keeps_the_numbers,
    make_inputs,
    make_state,
)
from torch.utils.checkpoint import checkpoint

import sightline as sl
from sightline.ops.recurrence import ADDITIVE_RECURRENCE, ADDITIVE_RECURRENCE_BACKWARD
from sightline.ops.triton_recurrence import ADDITIVE_RECURRENCE_TRITON, ADDITIVE_RECURRENCE_TRITON_BACKWARD

pytestmark = pytest.mark.usefixtures("arithmetic_of_a_gpu")

# More rows than a chunk of the backward has (32), and for documents than one of 16-bit inputs has (64).
PACKED = Sizes(batch=1, heads=4, key_heads=2, length=70, width=16, value_width=20)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def recur(query, key, value, **options):
    return sl.additive_recurrence(query, key, value, backend="triton", **options)


def recur_with_state(query, key, value, **options):
    output, state = recur(query, key, value, output_final_state=True, **options)
    return output, state.log_normalizer, state.memory


def loss_of(query, key, value, **options):
    output, z, memory = recur_with_state(query, key, value, **options)
    return output.square().sum() + z.sin().sum() + memory.sin().sum()


def test_schemas_are_those_of_the_native_operators():
    for operator, native in (
        (ADDITIVE_RECURRENCE_TRITON, ADDITIVE_RECURRENCE),
        (ADDITIVE_RECURRENCE_TRITON_BACKWARD, ADDITIVE_RECURRENCE_BACKWARD),
    ):
        assert str(operator._schema).replace("additive_recurrence_triton", "additive_recurrence") == str(native._schema)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 2), (None, 0, None), (None, None, -1)], ids=str)
@CAUSAL
def test_vmap_equals_a_loop(in_dims, causal):
    def mapped(query, key, value):
        return recur_with_state(query, key, value, causal=causal)

    stacked, single = stacked_and_single(in_dims)
    looped = [mapped(*arguments) for arguments in zip(*single, strict=True)]
    for actual, expected in zip(torch.vmap(mapped, in_dims=in_dims)(*stacked), zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, None, 1), (None, 0, None)], ids=str)
@CAUSAL
def test_vmap_of_the_gradient_equals_a_loop_of_autograd(in_dims, causal):
    def loss(query, key, value):
        return loss_of(query, key, value, causal=causal)

    stacked, single = stacked_and_single(in_dims)
    looped = []
    for arguments in zip(*single, strict=True):
        leaves = [tensor.clone().requires_grad_() for tensor in arguments]
        looped.append(torch.autograd.grad(loss(*leaves), leaves))
    gradient = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=in_dims)
    for actual, expected in zip(gradient(*stacked), zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


def test_autograd_through_vmap_equals_a_loop():
    """The gradient is asked for outside of the mapped call, and the key is one for all."""
    query, key, value = make_inputs()
    queries = torch.stack([query, -query, 2 * query]).requires_grad_()
    leaves = (queries, key.requires_grad_())
    mapped = torch.vmap(lambda query: recur(query, key, value))(queries)
    looped = torch.stack([recur(query, key, value) for query in queries])
    weights = torch.randn_like(looped)
    expected = torch.autograd.grad((looped * weights).sum(), leaves)
    for one, other in zip(torch.autograd.grad((mapped * weights).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_vmap_over_options_and_documents_equals_a_loop():
    inputs = make_inputs()
    gains, masks = torch.randn(3, 2, 2, 9, 8), torch.rand(3, 2, 9) < 0.7
    z, memory = torch.randn(3, 2, 2, 8), torch.randn(3, 2, 2, 8, 6)

    def with_options(gain, mask, z, memory):
        return recur(*inputs, key_gain=gain, key_mask=mask, initial_state=(z, memory))

    torch.testing.assert_close(
        torch.vmap(with_options)(gains, masks, z, memory),
        torch.stack([with_options(*one) for one in zip(gains, masks, z, memory, strict=True)]),
    )
    packed = make_inputs(batch=1)
    cuts = torch.tensor([[0, 4, 9], [1, 2, 8]], dtype=torch.int32)

    def with_documents(offsets):
        return recur(*packed, cu_seqlens=offsets)

    torch.testing.assert_close(
        torch.vmap(with_documents)(cuts), torch.stack([with_documents(offsets) for offsets in cuts])
    )


def test_vmap_of_the_gradient_over_documents_equals_a_loop():
    (query, key, value), state = make_inputs(batch=1), make_state(2)
    queries = torch.randn(3, *query.shape)
    cuts = torch.tensor([[0, 4, 9], [1, 2, 8], [3, 3, 3]], dtype=torch.int32)

    def loss(query, z, offsets):
        return loss_of(query, key, value, cu_seqlens=offsets, initial_state=(z, state.memory))

    normalizers = torch.randn(3, *state.log_normalizer.shape)
    gradient = torch.func.grad(loss, argnums=(0, 1))
    looped = []
    for query, z, offsets in zip(queries, normalizers, cuts, strict=True):
        leaves = [query.clone().requires_grad_(), z.clone().requires_grad_()]
        looped.append(torch.autograd.grad(loss(*leaves, offsets), leaves))
    for actual, expected in zip(
        torch.vmap(gradient)(queries, normalizers, cuts), zip(*looped, strict=True), strict=True
    ):
        torch.testing.assert_close(actual, torch.stack(expected))


def stacked_and_single(in_dims):
    """Inputs of a mapped call over three entries, and the same as lists of inputs of single calls."""
    stacked, single = [], []
    for tensor, axis in zip(make_inputs(), in_dims, strict=True):
        mapped = tensor if axis is None else torch.randn(3, *tensor.shape).movedim(0, axis)
        stacked.append(mapped)
        single.append([tensor if axis is None else mapped.select(axis, index) for index in range(3)])
    return stacked, single


@HALVES
@CAUSAL
def test_autocast_casts_query_key_and_value_only(dtype, causal):
    """Bitwise what the call with cast inputs gives, forward and backward."""
    inputs, state = make_inputs(grad=True), make_state(grad=True)
    gain = torch.randn(2, 2, 9, 8, requires_grad=True)
    leaves, options = (*inputs, gain, *state), {"key_gain": gain, "initial_state": state, "causal": causal}
    with torch.autocast(inputs[0].device.type, dtype=dtype):
        results = recur_with_state(*inputs, **options)
        raw = ADDITIVE_RECURRENCE_TRITON(*inputs, gain, None, None, *state, causal, 1.0, True)
    assert [result.dtype for result in results] == [dtype, torch.float32, torch.float32]
    expected = recur_with_state(*(tensor.to(dtype) for tensor in inputs), **options)
    weights = [torch.randn_like(result) for result in expected]
    expected_gradients = torch.autograd.grad(expected, leaves, weights)
    for given in (results, raw):
        for one, other in zip(given, expected, strict=True):
            assert torch.equal(one, other)
        for leaf, one, other in zip(
            leaves, torch.autograd.grad(given, leaves, weights), expected_gradients, strict=True
        ):
            assert one.dtype == leaf.dtype
            assert torch.equal(one, other)


@HALVES
def test_autocast_of_packed_documents_is_the_call_with_cast_inputs(dtype):
    problem = random_problem(PACKED, dtype, **PACKINGS["documents_with_states"](PACKED))
    gradients = {"output": random_gradients(problem)["output"]}
    plain = run(problem, "triton", gradients)
    wide = Problem(problem.query.float(), problem.key.float(), problem.value.float(), problem.options)
    with torch.autocast(problem.query.device.type, dtype=dtype):
        cast = run(wide, "triton", gradients)
    for name, tensor in cast.items():
        assert torch.equal(tensor.to(plain[name].dtype), plain[name]), name


@CAUSAL
def test_compiled_with_every_option_equals_eager(causal):
    def loss(query, key, value, gain, z, memory, mask):
        return loss_of(query, key, value, key_gain=gain, key_mask=mask, initial_state=(z, memory), causal=causal)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (11, 37):
        leaves = (
            *make_inputs(length=length, grad=True),
            torch.randn(2, 2, length, 8, requires_grad=True),
            *make_state(grad=True),
        )
        mask = torch.rand(2, length) < 0.8
        expected = torch.autograd.grad(loss(*leaves, mask), leaves)
        for one, other in zip(torch.autograd.grad(compiled(*leaves, mask), leaves), expected, strict=True):
            torch.testing.assert_close(one, other)


@CAUSAL
def test_compiled_with_documents_forward_and_backward_equal_eager(causal):
    """Other numbers of documents and of rows, and a document that is empty, in one compiled function."""

    def loss(query, key, value, z, memory, cuts):
        return loss_of(query, key, value, cu_seqlens=cuts, initial_state=(z, memory), causal=causal)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length, offsets in ((17, [1, 4, 4, 11]), (37, [0, 5, 7, 9, 36])):
        leaves = (*make_inputs(batch=1, length=length, grad=True), *make_state(len(offsets) - 1, grad=True))
        cuts = torch.tensor(offsets, dtype=torch.int32)
        expected = torch.autograd.grad(loss(*leaves, cuts), leaves)
        for one, other in zip(torch.autograd.grad(compiled(*leaves, cuts), leaves), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_new_lengths_and_documents_do_not_recompile():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    function = torch.compile(recur, fullgraph=True, dynamic=True, backend=counter)
    for length, offsets in ((13, [0, 4, 13]), (37, [2, 2, 9, 30]), (7, [0, 1, 3, 5, 7])):
        inputs, cuts = make_inputs(batch=1, length=length), torch.tensor(offsets, dtype=torch.int32)
        torch.testing.assert_close(function(*inputs, cu_seqlens=cuts), recur(*inputs, cu_seqlens=cuts))
    assert counter.frame_count == 1


def test_export_and_reload_keep_the_numbers():
    assert_export_keeps_the_numbers("triton", ADDITIVE_RECURRENCE_TRITON)


def test_export_with_documents_and_reload_keep_the_numbers():
    assert_export_with_documents_keeps_the_numbers("triton", ADDITIVE_RECURRENCE_TRITON)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "documents"])
def test_gradient_checkpointing_gives_the_same_gradients(packed, reentrant):
    cuts = torch.tensor([1, 4, 4, 37], dtype=torch.int32) if packed else None
    leaves = (
        *make_inputs(batch=1 if packed else 2, length=37, grad=True),
        *make_state(3 if packed else 2, grad=True),
    )
    calls = []

    def counted(query, key, value, z, memory):
        calls.append(None)
        return recur_with_state(query, key, value, initial_state=(z, memory), cu_seqlens=cuts)

    expected = counted(*leaves)
    weights = [torch.randn_like(result) for result in expected]
    expected_gradients = torch.autograd.grad(expected, leaves, weights)
    calls.clear()
    results = checkpoint(counted, *leaves, use_reentrant=reentrant)
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)
    torch.autograd.backward(results, weights)
    assert len(calls) == 2
    for leaf, other in zip(leaves, expected_gradients, strict=True):
        assert torch.equal(leaf.grad, other)


def test_second_derivatives_say_that_they_are_missing():
    query, key, value = make_inputs(grad=True)
    (gradient,) = torch.autograd.grad(recur(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()

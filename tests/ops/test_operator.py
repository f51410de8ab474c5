"""`sightline::attention` as a citizen of PyTorch: opcheck, compile, export, checkpointing, vmap, autocast."""

from __future__ import annotations

import io
import re

import pytest
import required
import torch
from torch.utils.checkpoint import checkpoint

import sightline as sl
from sightline.ops.attention import ATTENTION, ATTENTION_BACKWARD
from sightline.reference.attention import WEIGHT_FUNCTIONS
from sightline.weighting import WEIGHTINGS as WEIGHTING_TYPES

WEIGHTINGS = {
    "softmax": sl.Softmax(),
    "softcap": sl.Softmax(softcap=20.0),
    "lssa": sl.LSSA(),
    "lssar": sl.LSSAR(),
}


def make_inputs(*, batch=2, heads=4, key_heads=2, queries=9, keys=11, width=8, grad=False, dtype=torch.float32):
    shapes = [(batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width)]
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes)


def operator_arguments(query, key, value, *, save=False, **options):
    """Arguments of the raw operator, by the names of its schema."""
    defaults = {
        "causal": True,
        "window_left": -1,
        "window_right": -1,
        "scale": 0.5,
        "dropout_p": 0.0,
        "weight_function": 0,
        "length_scale": False,
        "normalize_qk": False,
        "softcap": 0.0,
        "reweight_power": 0.0,
        "reweight_offset": 1.0,
        "reweight_exempt_rows": 3,
        "save_for_backward": save,
        "row_statistics": 0,
        "sink_tokens": 0,
        "top_k": 0,
        "segments": 0,
        "distance_window": 0,
    }
    given = {"query": query, "key": key, "value": value, **defaults, **options}
    return tuple(given.get(argument.name) for argument in ATTENTION._schema.arguments)


OPCHECK_CASES = {
    "plain": {},
    "lssar": {"weight_function": 1, "length_scale": True, "normalize_qk": True, "reweight_power": 15.0},
    "tensors": {
        "key_lengths": lambda: torch.tensor([5, 11]),
        "key_mask": lambda: torch.rand(2, 11) < 0.8,
        "attn_mask": lambda: torch.randn(1, 4, 9, 11, requires_grad=True),
        "alibi_slopes": lambda: torch.rand(4),
        "sinks": lambda: torch.randn(4, requires_grad=True),
        "scale_per_head": lambda: torch.rand(4, requires_grad=True),
    },
    "dropout": {"dropout_p": 0.25, "dropout_seed": lambda: torch.tensor([7])},
    "window": {"window_left": 3, "window_right": 2, "causal": False},
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", OPCHECK_CASES)
def test_opcheck_of_forward(case, grad):
    options = {name: value() if callable(value) else value for name, value in OPCHECK_CASES[case].items()}
    torch.library.opcheck(ATTENTION, operator_arguments(*make_inputs(grad=grad), **options))


def test_opcheck_of_backward():
    inputs = make_inputs()
    arguments = operator_arguments(*inputs, save=True, attn_mask=torch.randn(1, 4, 9, 11), sinks=torch.randn(4))
    output, _, saved_rows, saved_values, *_ = ATTENTION(*arguments)
    backward = (
        torch.randn_like(output),
        torch.randn(2, 4, 9),
        *inputs,
        output,
        saved_rows,
        saved_values,
        *arguments[3:12],
        *arguments[14:26],
        True,
        True,
        True,
    )
    torch.library.opcheck(ATTENTION_BACKWARD, backward)


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        pytest.param("softmax", "inductor", marks=pytest.mark.inductor),
        ("softcap", "aot_eager"),
        ("lssa", "aot_eager"),
        ("lssar", "aot_eager"),
    ],
)
def test_compiled_forward_and_backward_equal_eager(name, compiler):
    weighting = WEIGHTINGS[name]

    def loss(query, key, value, mask):
        output, stats = sl.attention(
            query, key, value, weighting=weighting, causal=True, key_mask=mask, observe=sl.Observe(log_normalizer=True)
        )
        return (output * output).sum() + stats.log_normalizer.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    torch._dynamo.reset()
    for keys in (11, 17):
        inputs = make_inputs(queries=keys, keys=keys, grad=True)
        mask = torch.ones(2, keys, dtype=torch.bool)
        expected = torch.autograd.grad(loss(*inputs, mask), inputs)
        actual = torch.autograd.grad(compiled(*inputs, mask), inputs)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["softmax", "lssar"])
def test_float64_compiles_as_one_graph(name):
    """The reference computes it; tracing the choice must not look for a library on disk."""

    def loss(query, key, value):
        return sl.attention(query, key, value, weighting=WEIGHTINGS[name], causal=True).square().sum()

    torch._dynamo.reset()
    inputs = [tensor.double().requires_grad_() for tensor in make_inputs()]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


def test_new_lengths_do_not_recompile():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    function = torch.compile(
        lambda query, key, value, window: sl.attention(query, key, value, causal=True, window=(window, None)),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for keys in (13, 29, 54, 7):
        query, key, value = make_inputs(queries=keys, keys=keys)
        torch.testing.assert_close(
            function(query, key, value, keys - 4), sl.attention(query, key, value, causal=True, window=(keys - 4, None))
        )
    assert counter.frame_count == 1


def test_compiled_dropout_and_tensor_options():
    sinks, scale = torch.randn(4, requires_grad=True), torch.rand(4, requires_grad=True)
    bias = torch.randn(1, 4, 9, 11, requires_grad=True)

    def loss(query, key, value):
        return sl.attention(query, key, value, sinks=sinks, scale=scale, attn_mask=bias).square().sum()

    torch._dynamo.reset()
    inputs = make_inputs(grad=True)
    wanted = (*inputs, sinks, scale, bias)
    expected = torch.autograd.grad(loss(*inputs), wanted)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*inputs), wanted)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    dropout = torch.compile(lambda q, k, v: sl.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    dropped = dropout(*make_inputs())
    assert torch.isfinite(dropped).all()


class _Layer(torch.nn.Module):
    def __init__(self, weighting):
        super().__init__()
        self.projection = torch.nn.Linear(32, 96)
        self.weighting = weighting

    def forward(self, hidden):
        query, key, value = self.projection(hidden).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return sl.attention(query, key, value, weighting=self.weighting, causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_export_and_reload_keep_the_numbers(name):
    layer = _Layer(WEIGHTINGS[name])
    hidden = torch.randn(2, 10, 32)
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(layer, (hidden,), dynamic_shapes=({1: length},))
    assert any(node.target is ATTENTION for node in program.graph.nodes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    reloaded = torch.export.load(buffer).module()
    for keys in (10, 33):
        hidden = torch.randn(2, keys, 32)
        torch.testing.assert_close(reloaded(hidden), layer(hidden))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    def block(query, key, value):
        return sl.attention(query, key, value, weighting=sl.LSSAR(), causal=True, dropout_p=0.2)

    inputs = make_inputs(grad=True)
    state = torch.get_rng_state()
    expected = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    torch.set_rng_state(state)
    checkpointed = checkpoint(block, *inputs, use_reentrant=reentrant)
    if reentrant:  # the reentrant form supports backward() only
        checkpointed.square().sum().backward()
        actual = [tensor.grad for tensor in inputs]
    else:
        actual = torch.autograd.grad(checkpointed.square().sum(), inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 2), (None, 0, None)])
def test_vmap_equals_a_loop(name, in_dims):
    def attend(query, key, value):
        return sl.attention(query, key, value, weighting=WEIGHTINGS[name], causal=True)

    stacked, single = [], []
    for tensor, axis in zip(make_inputs(), in_dims, strict=True):
        mapped = tensor if axis is None else torch.randn(3, *tensor.shape).movedim(0, axis)
        stacked.append(mapped)
        single.append([tensor if axis is None else mapped.select(axis, index) for index in range(3)])
    expected = torch.stack([attend(*arguments) for arguments in zip(*single, strict=True)])
    torch.testing.assert_close(torch.vmap(attend, in_dims=in_dims)(*stacked), expected)


def test_vmap_over_masks_lengths_and_sinks_equals_a_loop():
    query, key, value = make_inputs()
    masks = torch.rand(3, 2, 11) < 0.7
    lengths = torch.randint(1, 12, (3, 2))
    biases = torch.randn(3, 2, 1, 9, 11)
    sinks = torch.randn(3, 4)

    def with_masks(mask, length, bias):
        return sl.attention(query, key, value, key_mask=mask, key_lengths=length, attn_mask=bias)

    torch.testing.assert_close(
        torch.vmap(with_masks)(masks, lengths, biases),
        torch.stack([with_masks(*arguments) for arguments in zip(masks, lengths, biases, strict=True)]),
    )

    def with_sinks(sink):
        return sl.attention(query, key, value, sinks=sink)

    torch.testing.assert_close(torch.vmap(with_sinks)(sinks), torch.stack([with_sinks(sink) for sink in sinks]))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_function_transforms_of_the_gradient(name):
    query, key, value = make_inputs()
    bias = torch.randn(1, 4, 9, 11)

    def loss(query, bias):
        return sl.attention(query, key, value, weighting=WEIGHTINGS[name], attn_mask=bias, causal=True).square().sum()

    leaf = query.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf, bias), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(query, bias), expected)
    queries, biases = torch.randn(3, *query.shape), torch.randn(3, *bias.shape)
    for argnums in (0, (0, 1)):
        gradient = torch.func.grad(loss, argnums=argnums)
        mapped = torch.vmap(gradient)(queries, biases)
        looped = [gradient(*arguments) for arguments in zip(queries, biases, strict=True)]
        if argnums == 0:
            torch.testing.assert_close(mapped, torch.stack(looped))
        else:
            for position in range(2):
                torch.testing.assert_close(mapped[position], torch.stack([one[position] for one in looped]))


def test_second_derivatives_say_that_they_are_missing():
    query, key, value = make_inputs(grad=True)
    (gradient,) = torch.autograd.grad(sl.attention(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_forward_mode_says_that_it_is_missing():
    query, key, value = make_inputs()
    with pytest.raises(Exception, match=r"jvp|forward"):
        torch.func.jvp(lambda q: sl.attention(q, key, value), (query,), (torch.ones_like(query),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_query_key_and_value_only(dtype):
    query, key, value = make_inputs(grad=True)
    sinks = torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        output, stats = sl.attention(query, key, value, sinks=sinks, observe=sl.Observe(log_normalizer=True))
        raw = ATTENTION(*operator_arguments(query, key, value))[0]
    assert output.dtype == raw.dtype == dtype
    assert stats.log_normalizer.dtype == torch.float32
    expected = sl.attention(query.to(dtype), key.to(dtype), value.to(dtype), sinks=sinks)
    torch.testing.assert_close(output, expected)
    output.float().sum().backward()
    assert query.grad.dtype == sinks.grad.dtype == torch.float32


def test_autocast_accepts_mixed_dtypes_and_leaves_float64_alone():
    query, key, value = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sl.attention(query, key.bfloat16(), value).dtype == torch.bfloat16
        assert sl.attention(query.double(), key.double(), value.double()).dtype == torch.float64


def test_log_normalizer_alone_can_be_differentiated():
    query, key, value = make_inputs(grad=True)
    _, stats = sl.attention(query, key, value, observe=sl.Observe(log_normalizer=True))
    gradients = torch.autograd.grad(stats.log_normalizer.sum(), (query, key, value), allow_unused=True)
    scores = (query / 8**0.5) @ key.repeat_interleave(2, 1).mT
    expected = torch.autograd.grad(scores.logsumexp(-1).sum(), (query, key))
    torch.testing.assert_close(gradients[0], expected[0])
    torch.testing.assert_close(gradients[1], expected[1])
    assert gradients[2] is None or not gradients[2].any()


def test_inference_mode_and_no_grad_save_nothing():
    query, key, value = make_inputs(grad=True)
    with torch.no_grad():
        assert not sl.attention(query, key, value).requires_grad
    with torch.inference_mode():
        assert sl.attention(query, key, value).is_inference()


def test_deepcopied_and_meta_tensors_go_through_the_fake_kernel():
    query, key, value = (tensor.to("meta") for tensor in make_inputs())
    output, stats = sl.attention(query, key, value, observe=sl.Observe(log_normalizer=True))
    assert output.shape == query.shape
    assert output.is_meta
    assert output.transpose(1, 2).is_contiguous()
    assert stats.log_normalizer.shape == (2, 4, 9)


@pytest.mark.parametrize("problem", ["width", "heads", "dtype", "mask", "no width"])
def test_raw_operator_refuses_what_would_read_out_of_bounds(problem):
    query, key, value = make_inputs()
    options = {}
    if problem == "width":
        key = key[..., :4]
    elif problem == "heads":
        key, value = torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 8)
    elif problem == "dtype":
        value = value.half()
    elif problem == "no width":
        query, key, value = query[..., :0], key[..., :0], value[..., :0]
    else:
        options["key_mask"] = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="expected"):
        ATTENTION(*operator_arguments(query, key, value, **options))


def test_options_reference_and_triton_know_the_same_weight_functions():
    assert list(WEIGHT_FUNCTIONS) == list(WEIGHTING_TYPES)
    required.module("triton")
    from sightline.triton import weights

    assert list(weights.WEIGHT_FUNCTIONS) == list(WEIGHTING_TYPES)


@pytest.mark.parametrize("number", [-1, len(WEIGHTING_TYPES), 2**40])
def test_the_library_names_every_weight_function_and_refuses_others(number):
    with pytest.raises(RuntimeError, match="weight_function: expected ") as refusal:
        ATTENTION(*operator_arguments(*make_inputs(), weight_function=number))
    names = re.findall(r"(\d+) \((\w+)\)", str(refusal.value))
    assert names == [(str(place), name) for place, name in enumerate(WEIGHTING_TYPES)]

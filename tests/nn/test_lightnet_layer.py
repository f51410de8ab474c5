"""LightNet's layer, block and MD-TPE module against the formulas, and what users do with modules."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sightline as sl
from sightline.nn import GatedLinearUnit, LightNetAttention, LightNetBlock, ToeplitzPositions
from sightline.position import grid_positions


def by_formula(layer, hidden, gate, norm_per_head):
    """The layer without positions, one position after the other."""
    heads, width = layer.num_heads, layer.head_dim
    outputs, delta, memory = [], torch.zeros(heads, width), torch.zeros(heads, width, width)
    for x in hidden:
        query = functional.silu(layer.q_proj.weight @ x).view(heads, width)
        weight = (layer.k_proj.weight @ x).view(heads, width).exp()
        value = (layer.v_proj.weight @ x).view(heads, width)
        delta = delta + weight
        share = (weight / delta)[..., None]
        memory = (1 - share) * memory + share * value[:, None]
        output = (query[:, None] @ memory).squeeze(1)
        if not norm_per_head:
            output = output.flatten()
        output = output / (output.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.g_norm.weight
        gated = layer.g_proj[1].weight @ layer.g_proj[0].weight @ x
        gated = gated.sigmoid() if gate == "sigmoid" else gated * gated.sigmoid()
        outputs.append(layer.o_proj.weight @ (output.flatten() * gated))
    return torch.stack(outputs)


@pytest.mark.parametrize("gate", ["sigmoid", "swish"])
@pytest.mark.parametrize("norm_per_head", [True, False])
def test_layer_is_its_formula(gate, norm_per_head):
    layer = LightNetAttention(24, 3, gate=gate, norm_per_head=norm_per_head)
    torch.nn.init.uniform_(layer.g_norm.weight)
    hidden = torch.randn(1, 17, 24)
    expected = by_formula(layer, hidden[0], gate, norm_per_head)
    torch.testing.assert_close(layer(hidden)[0], expected, rtol=1e-4, atol=1e-5)


OPTIONS = {
    "plain": {},
    "grouped": {"num_key_heads": 2},
    "wide_keys": {"key_dim": 20},
    "positions": {"position_axes": 1},
    "whole_sequence": {"causal": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_reach_every_parameter(option):
    block = LightNetBlock(32, 4, **OPTIONS[option])
    block(torch.randn(2, 9, 32)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("option", ["plain", "grouped", "wide_keys"])
def test_a_state_carries_on(option):
    block = LightNetBlock(32, 4, **OPTIONS[option])
    hidden = torch.randn(2, 20, 32)
    first, state = block(hidden[:, :13], output_final_state=True)
    second = block(hidden[:, 13:], initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), block(hidden), rtol=1e-4, atol=1e-5)


def test_positions_of_one_axis_count_by_default():
    layer = LightNetAttention(32, 4, position_axes=1)
    hidden = torch.randn(2, 20, 32)
    torch.testing.assert_close(layer(hidden), layer(hidden, positions=grid_positions(20)))
    first, state = layer(hidden[:, :13], output_final_state=True)
    second = layer(hidden[:, 13:], initial_state=state, positions=torch.arange(13, 20)[:, None])
    torch.testing.assert_close(torch.cat([first, second], 1), layer(hidden), rtol=1e-4, atol=1e-5)


def test_a_grid_is_read_in_any_order_without_causality():
    layer = LightNetAttention(32, 4, position_axes=2, causal=False)
    hidden, positions, order = torch.randn(2, 13, 32), grid_positions(3, 4, leading=1), torch.randperm(13)
    shuffled = layer(hidden[:, order], positions=positions[order])
    torch.testing.assert_close(shuffled, layer(hidden, positions=positions)[:, order], rtol=1e-4, atol=1e-5)
    elsewhere = layer(hidden, positions=positions[order])
    assert (elsewhere - layer(hidden, positions=positions)).abs().max() > 1e-3


def test_padding_and_packing_change_nothing():
    layer = LightNetAttention(32, 4)
    hidden = torch.randn(1, 12, 32)
    mask = torch.arange(12)[None] >= 5
    torch.testing.assert_close(layer(hidden, key_mask=mask)[:, 5:], layer(hidden[:, 5:]), rtol=1e-4, atol=1e-5)
    packed = layer(hidden, cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32))
    apart = torch.cat([layer(hidden[:, :5]), layer(hidden[:, 5:])], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


def test_compile_checkpoint_and_state_dict():
    block, hidden = LightNetBlock(32, 4, position_axes=1), torch.randn(2, 9, 32, requires_grad=True)
    expected = block(hidden)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(hidden), expected)
    torch.testing.assert_close(checkpoint(block, hidden, use_reentrant=False), expected)
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    other = LightNetBlock(32, 4, position_axes=1)
    other.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(other(hidden), expected)


def test_half_precision_and_autocast():
    """Row by row: what rounding the inputs does to the few that are near zero before the norm, that enlarges."""

    def assert_close(actual):
        errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.median() < 0.01
        assert errors.quantile(0.97) < 0.05

    layer, hidden = LightNetAttention(32, 4, position_axes=1), torch.randn(16, 9, 32)
    expected = layer(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(layer(hidden))
    low = layer.bfloat16()(hidden.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close(low.float())


def test_toeplitz_positions_are_a_causal_filter():
    module = ToeplitzPositions(12, 3)
    x = torch.randn(2, 5, 4, 12)
    expected = sl.position.md_tpe(x, (module.query * module.key).sum(-1), module.decay_logits.sigmoid())
    torch.testing.assert_close(module(x), expected)
    later = x.clone()
    later[:, 3, 2] += 1
    changed = (module(later) - module(x)).abs().amax((0, 3)) > 0
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(4), indexing="ij")
    assert torch.equal(changed, ((rows == 3) & (columns >= 2)) | ((rows >= 3) & (columns == 2)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LightNetAttention(30, 4), "num_heads: expected a divisor of embed_dim = 30, got 4"),
        (
            lambda: LightNetAttention(32, 4, num_key_heads=3),
            "num_key_heads: expected a divisor of num_heads = 4, got 3",
        ),
        (lambda: LightNetAttention(32, 4, gate="relu"), "gate: expected one of sigmoid, swish, got 'relu'"),
        (lambda: ToeplitzPositions(32, 5), "num_heads: expected a divisor of embed_dim = 32, got 5"),
        (
            lambda: ToeplitzPositions(12, 3)(torch.randn(2, 5, 4, 6)),
            "x: expected shape (B, n_1, ..., n_k, 12), got (2, 5, 4, 6)",
        ),
        (
            lambda: ToeplitzPositions(12, 3)(torch.randn(2, 12)),
            "x: expected shape (B, n_1, ..., n_k, 12), got (2, 12)",
        ),
        (lambda: GatedLinearUnit(32, 8)(torch.rand(2, 5, 16)), "hidden: expected shape (..., 32), got (2, 5, 16)"),
        (lambda: GatedLinearUnit(32, 8)(torch.tensor(1.0)), "hidden: expected shape (..., 32), got ()"),
        (lambda: LightNetBlock(32, 4)(torch.rand(1, 5, 16)), "hidden: expected shape (B, N, 32), got (1, 5, 16)"),
        (
            lambda: LightNetAttention(32, 4)(torch.rand(1, 5, 32), positions=torch.ones(5, 1)),
            "positions: expected None, because the layer has no position_axes",
        ),
        (
            lambda: LightNetAttention(32, 4, position_axes=2)(torch.rand(1, 5, 32)),
            "positions: expected a tensor (N, 2), got None",
        ),
        (
            lambda: LightNetAttention(32, 4, position_axes=2)(torch.rand(1, 5, 32), positions=torch.ones(5, 3)),
            "positions: expected a tensor (N, 2) or (B, N, 2), got shape (5, 3)",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        build()


LAYERS: dict[str, Callable[..., Any]] = {
    "attention": lambda **sizes: LightNetAttention(**{"embed_dim": 32, "num_heads": 4, **sizes}),
    "block": lambda **sizes: LightNetBlock(**{"embed_dim": 32, "num_heads": 4, **sizes}),
    "unit": lambda **sizes: GatedLinearUnit(**{"embed_dim": 32, "hidden_dim": 8, **sizes}),
    "positions": lambda **sizes: ToeplitzPositions(**{"embed_dim": 32, "num_heads": 4, **sizes}),
}
ATTENTION_SIZES = ["embed_dim", "num_heads", "num_key_heads", "key_dim", "gate_rank", "position_axes"]
LAYER_SIZES = [
    *(("attention", name) for name in ATTENTION_SIZES),
    *(("block", name) for name in [*ATTENTION_SIZES, "hidden_dim"]),
    *(("unit", name) for name in ["embed_dim", "hidden_dim"]),
    *(("positions", name) for name in ["embed_dim", "num_heads", "rank"]),
]


@pytest.mark.parametrize(("layer", "name"), LAYER_SIZES)
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_are_at_least_one(layer: str, name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number of at least 1, got {size}$"):
        LAYERS[layer](**{name: size})


@pytest.mark.parametrize(("layer", "name"), LAYER_SIZES)
@pytest.mark.parametrize("size", ["4", 4.0, True], ids=repr)
def test_sizes_are_whole_numbers(layer: str, name: str, size: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected a whole number of at least 1, got {type(size).__name__}$"):
        LAYERS[layer](**{name: size})


@pytest.mark.parametrize("layer", ["attention", "block"])
@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"key_dim": 513}, "key_dim: expected at most 512, got 513"),
        (
            ValueError,
            {"key_dim": 300, "position_axes": 2},
            "key_dim: expected at most 256, for position_axes doubles it, got 300",
        ),
        (
            ValueError,
            {"embed_dim": 1200, "position_axes": 1},
            "key_dim: expected at most 256, for position_axes doubles it, got 300, that of a value",
        ),
        (
            ValueError,
            {"embed_dim": 1200, "num_heads": 1, "key_dim": 8},
            "embed_dim: expected at most 512 for each of num_heads = 1, got 1200",
        ),
        (ValueError, {"norm_eps": -1e-6}, "norm_eps: expected a number from 0 to 1e+30, got -1e-06"),
        (ValueError, {"scale": float("inf")}, "scale: expected a number from -1e+30 to 1e+30, got inf"),
        (ValueError, {"gate": ["swish"]}, "gate: expected one of sigmoid, swish, got ['swish']"),
        (TypeError, {"norm_eps": "1e-6"}, "norm_eps: expected a number from 0 to 1e+30, got str"),
        (TypeError, {"norm_per_head": "yes"}, "norm_per_head: expected True or False, got str"),
        (TypeError, {"causal": 1}, "causal: expected True or False, got int"),
    ],
)
def test_bad_options_are_refused_by_name(
    layer: str, error: type[Exception], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        LAYERS[layer](**options)


@pytest.mark.parametrize(
    "options",
    [
        {"key_dim": 512},
        {"key_dim": 256, "position_axes": 1},
        {"key_dim": 1, "gate_rank": 1, "hidden_dim": 1, "norm_eps": 0, "scale": -2},
        {"embed_dim": 512, "num_heads": 1},
    ],
    ids=str,
)
def test_what_the_limits_allow_runs(options: dict[str, Any]) -> None:
    hidden = torch.randn(1, 3, options.get("embed_dim", 32))
    assert LAYERS["block"](**options)(hidden).shape == hidden.shape


@pytest.mark.parametrize(
    ("hidden", "positions", "error", "message"),
    [
        (torch.zeros(3, 32), None, ValueError, r"hidden: expected shape \(B, N, 32\), got \(3, 32\)"),
        (torch.zeros(1, 3, 16), None, ValueError, r"hidden: expected shape \(B, N, 32\), got \(1, 3, 16\)"),
        (torch.zeros(1, 3, 32), torch.tensor([5, 6, 7]), ValueError, r"positions: expected a tensor \(N, 1\) or"),
        (torch.zeros(1, 3, 32), [5, 6, 7], TypeError, r"positions: expected a tensor .*, got list"),
    ],
)
def test_wrong_input_of_the_layer_is_refused_by_its_own_name(hidden, positions, error, message):
    layer = sl.nn.LightNetAttention(32, 4, position_axes=1)
    with pytest.raises(error, match=message):
        layer(hidden, positions=positions)


FLOATS = "float32, float16, bfloat16 or float64"


@pytest.mark.parametrize("layer", ["attention", "block", "unit"])
@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (None, "hidden: expected a tensor, got NoneType"),
        ([1], "hidden: expected a tensor, got list"),
        (torch.zeros(1, 3, 32, dtype=torch.int64), f"hidden: expected dtype {FLOATS}, got int64"),
        (torch.zeros(1, 3, 32, dtype=torch.float64), "hidden: expected dtype float32 as the weights, got float64"),
        (torch.zeros(1, 3, 32, dtype=torch.bfloat16), "hidden: expected dtype float32 as the weights, got bfloat16"),
    ],
    ids=["None", "list", "int64", "float64", "bfloat16"],
)
def test_hidden_states_of_another_type_are_refused_by_name(layer: str, hidden: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        LAYERS[layer]()(hidden)


def test_float64_is_refused_under_autocast_too() -> None:
    message = "^hidden: expected dtype float32 as the weights, got float64$"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=message):
        LAYERS["attention"]()(torch.zeros(1, 3, 32, dtype=torch.float64))


def test_positions_take_no_list() -> None:
    with pytest.raises(TypeError, match=r"^x: expected a tensor, got list$"):
        LAYERS["positions"]()([1.0])


@pytest.mark.parametrize("layer", ["attention", "block", "unit"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_mixes_dtypes(layer: str, weights: torch.dtype, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LAYERS[layer]().to(weights)(torch.randn(1, 3, 32).to(dtype)).shape == (1, 3, 32)


def test_a_projection_that_casts_its_input_may_have_another_dtype() -> None:
    def cast(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return arguments[0].bfloat16()

    unit = GatedLinearUnit(32, 8).bfloat16()
    hidden = torch.randn(1, 3, 32)
    expected = unit(hidden.bfloat16())
    for projection in (unit.gate_proj, unit.up_proj):
        projection.register_forward_pre_hook(cast)
    assert torch.equal(unit(hidden), expected)


def test_checks_stay_out_of_the_way_of_transforms() -> None:
    block, hidden = LightNetBlock(32, 4, position_axes=1), torch.randn(3, 2, 5, 32)
    expected = block(hidden.flatten(0, 1)).view_as(hidden)
    torch.testing.assert_close(torch.vmap(block)(hidden), expected)
    torch.testing.assert_close(torch.export.export(block, (hidden[0],)).module()(hidden[0]), expected[0])
    assert block.to("meta")(hidden[0].to("meta")).shape == (2, 5, 32)


def test_parts_of_a_block_can_be_replaced():
    block = sl.nn.LightNetBlock(16, num_heads=2)
    hidden = torch.randn(2, 5, 16)
    expected = block(hidden)
    for part in ("attn", "mlp", "attn_norm", "mlp_norm"):
        own = getattr(block, part)

        class Wrapped(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, *arguments, **options):
                return self.inner(*arguments, **options)

        setattr(block, part, Wrapped(own))
    block.mlp.inner.gate_proj = torch.nn.Sequential(block.mlp.inner.gate_proj)
    assert torch.equal(block(hidden), expected)

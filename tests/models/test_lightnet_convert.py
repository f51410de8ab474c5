"""Checkpoints of flash-linear-attention's LightNet, against a forward written from the formulas in its own names."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sightline.models import convert_fla_lightnet

BASE = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 37, "gate_low_rank_dim": 5, "model_type": "lightnet"}
CONFIGS = {
    "expand_ratio": {**BASE, "expand_ratio": 8, "intermediate_size": 20},
    "num_heads": {**BASE, "num_heads": 2, "expand_ratio": None, "hidden_ratio": 3, "norm_eps": 1e-2},
    "wide_keys": {**BASE, "num_heads": 4, "expand_ratio": 10, "intermediate_size": 20, "tie_word_embeddings": True},
    "plain_norm": {**BASE, "expand_ratio": 12, "intermediate_size": 20, "elementwise_affine": False},
}
INSIDE = {"expand_ratio": 20, "num_heads": 256, "wide_keys": 20, "plain_norm": 20}
HEADS = {"expand_ratio": (3, 8), "num_heads": (2, 12), "wide_keys": (4, 10), "plain_norm": (2, 12)}


def draw(case):
    config, inside, (heads, key_dim) = CONFIGS[case], INSIDE[case], HEADS[case]
    hidden, rank = config["hidden_size"], config["gate_low_rank_dim"]
    shapes = {"model.embeddings.weight": (37, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (37, hidden)
    for layer in range(2):
        own = {
            "attn_norm": (hidden,),
            "attn.q_proj": (heads * key_dim, hidden),
            "attn.k_proj": (heads * key_dim, hidden),
            "attn.v_proj": (hidden, hidden),
            "attn.g_proj.0": (rank, hidden),
            "attn.g_proj.1": (hidden, rank),
            "attn.g_norm": (hidden,),
            "attn.o_proj": (hidden, hidden),
            "mlp_norm": (hidden,),
            "mlp.gate_proj": (inside, hidden),
            "mlp.up_proj": (inside, hidden),
            "mlp.down_proj": (hidden, inside),
        }
        if config.get("elementwise_affine") is False:
            del own["attn.g_norm"]
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return {
        name: 1 + 0.2 * torch.randn(shape) if len(shape) == 1 else torch.randn(shape) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }


def by_formula(case, weights, input_ids):
    """Logits (N, vocab) of one row in float64, a token after the other."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    heads, key_dim = HEADS[case]
    eps = CONFIGS[case].get("norm_eps", 1e-6)

    def swish(x):
        return x / (1 + torch.exp(-x))

    def norm(x, weight, eps):
        return x / torch.sqrt((x * x).mean() + eps) * weight

    deltas, states = [0.0, 0.0], [0.0, 0.0]
    logits = []
    for token in input_ids.tolist():
        x = weights["model.embeddings.weight"][token]
        for layer in range(2):
            own = {
                name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): tensor
                for name, tensor in weights.items()
            }
            y = norm(x, own["attn_norm"], eps)
            query = swish(own["attn.q_proj"] @ y).view(heads, key_dim)
            key = torch.exp(own["attn.k_proj"] @ y).view(heads, key_dim)
            value = (own["attn.v_proj"] @ y).view(heads, -1)
            before, deltas[layer] = deltas[layer], deltas[layer] + key
            decay, share = before / deltas[layer], key / deltas[layer]
            decay = decay * torch.ones_like(key)
            states[layer] = decay[:, :, None] * states[layer] + share[:, :, None] * value[:, None, :]
            read = torch.einsum("hd,hdv->hv", query, states[layer]).flatten() / key_dim**0.5
            gate = swish(own["attn.g_proj.1"] @ (own["attn.g_proj.0"] @ y))
            x = x + own["attn.o_proj"] @ (norm(read, own.get("attn.g_norm", 1.0), 1e-6) * gate)
            y = norm(x, own["mlp_norm"], eps)
            x = x + own["mlp.down_proj"] @ (swish(own["mlp.gate_proj"] @ y) * (own["mlp.up_proj"] @ y))
        head = weights.get("lm_head.weight", weights["model.embeddings.weight"])
        logits.append(head @ norm(x, weights["model.norm.weight"], eps))
    return torch.stack(logits)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_checkpoint_gives_its_logits(case):
    weights, input_ids = draw(case), torch.randint(37, (1, 21))
    model = convert_fla_lightnet(weights, CONFIGS[case])
    expected = by_formula(case, weights, input_ids[0])
    torch.testing.assert_close(model(input_ids).logits[0].double(), expected, rtol=1e-4, atol=1e-4)
    double = convert_fla_lightnet({name: tensor.double() for name, tensor in weights.items()}, CONFIGS[case])
    torch.testing.assert_close(double(input_ids).logits[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["one", "shards", "bin"])
def test_a_folder_is_read_and_saved_as_ours(tmp_path, layout):
    weights, config, input_ids = draw("expand_ratio"), CONFIGS["expand_ratio"], torch.randint(37, (1, 21))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["LightNetForCausalLM"]}))
    if layout == "bin":
        torch.save(weights, source / "pytorch_model.bin")
    else:
        names = sorted(weights)
        cut = len(names) // 2 if layout == "shards" else 0
        for index, part in enumerate((names[:cut], names[cut:])):
            if part:
                save_file({name: weights[name] for name in part}, source / f"model-{index}.safetensors")
    model = convert_fla_lightnet(source)
    expected = by_formula("expand_ratio", weights, input_ids[0])
    torch.testing.assert_close(model(input_ids).logits[0].double(), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_shards_of_an_index_are_read_and_nothing_else(tmp_path, kind):
    """A folder may hold other files of weights, as those of an adapter or of training."""
    weights, config, input_ids = draw("expand_ratio"), CONFIGS["expand_ratio"], torch.randint(37, (1, 21))
    (tmp_path / "config.json").write_text(json.dumps(config))
    write = save_file if kind == "safetensors" else torch.save
    stem = "model" if kind == "safetensors" else "pytorch_model"
    shards = {name: f"{stem}-0000{index % 2 + 1}-of-00002.{kind}" for index, name in enumerate(sorted(weights))}
    for shard in set(shards.values()):
        write({name: weights[name] for name in weights if shards[name] == shard}, tmp_path / shard)
    write({"lora_A.weight": torch.ones(2, 2)}, tmp_path / f"{stem}_adapter.{kind}")
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    expected = by_formula("expand_ratio", weights, input_ids[0])
    torch.testing.assert_close(
        convert_fla_lightnet(tmp_path)(input_ids).logits[0].double(), expected, rtol=1e-4, atol=1e-4
    )
    (tmp_path / f"{stem}-00002-of-00002.{kind}").unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"^source: expected the shards .*{stem}-00002-of-00002\.{kind} missing"
    ):
        convert_fla_lightnet(tmp_path)


def test_a_whole_file_goes_before_the_same_weights_in_other_names(tmp_path):
    weights = draw("expand_ratio")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["expand_ratio"]))
    save_file(weights, tmp_path / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, tmp_path / "model.old.safetensors")
    found = convert_fla_lightnet(tmp_path).state_dict()
    assert torch.equal(found["model.norm.weight"], weights["model.norm.weight"])


class FlaConfig(PreTrainedConfig):
    model_type = "lightnet"


def test_a_config_of_transformers_is_taken_as_its_dict():
    weights, input_ids = draw("expand_ratio"), torch.randint(37, (1, 5))
    config = FlaConfig(**{name: value for name, value in CONFIGS["expand_ratio"].items() if name != "model_type"})
    expected = by_formula("expand_ratio", weights, input_ids[0])
    model = convert_fla_lightnet(weights, config)
    torch.testing.assert_close(model(input_ids).logits[0].double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"^config: expected a dict or a config of transformers, got str"):
        convert_fla_lightnet(weights, "config.json")


def test_both_names_of_tied_embeddings_may_be_stored():
    weights, input_ids = draw("wide_keys"), torch.randint(37, (1, 9))
    weights["lm_head.weight"] = weights["model.embeddings.weight"]
    model = convert_fla_lightnet(weights, CONFIGS["wide_keys"])
    expected = by_formula("wide_keys", weights, input_ids[0])
    torch.testing.assert_close(model(input_ids).logits[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_of_its_own_beside_tied_embeddings_is_refused():
    weights, config = draw("wide_keys"), CONFIGS["wide_keys"]
    embeddings = weights["model.embeddings.weight"]
    with pytest.raises(ValueError, match=r"^lm_head\.weight: expected .* set tie_word_embeddings to false"):
        convert_fla_lightnet({**weights, "lm_head.weight": embeddings + 1}, config)
    with pytest.raises(ValueError, match="^" + re.escape("lm_head.weight: expected shape (37, 24), got (24,)")):
        convert_fla_lightnet({**weights, "lm_head.weight": embeddings[0]}, config)
    stored = {**weights, "model.embeddings.weight": embeddings.bfloat16(), "lm_head.weight": embeddings}
    with pytest.raises(ValueError, match=r"^lm_head\.weight: expected "):
        convert_fla_lightnet(stored, config)
    # The same numbers in another dtype are the same head.
    stored["lm_head.weight"] = stored["model.embeddings.weight"].float()
    assert torch.equal(convert_fla_lightnet(stored, config).lm_head.weight, stored["model.embeddings.weight"])
    free = convert_fla_lightnet({**weights, "lm_head.weight": embeddings + 1}, {**config, "tie_word_embeddings": False})
    assert torch.equal(free.lm_head.weight, embeddings + 1)
    assert torch.equal(free.model.embed_tokens.weight, embeddings)


# What PretrainedConfig of transformers 4.30 and 4.57 writes with its defaults; the later ones leave out generation's.
GENERAL = {
    **dict.fromkeys(("return_dict", "tie_encoder_decoder", "is_decoder", "add_cross_attention", "torchscript"), False),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "use_bfloat16", "tf_legacy_loss"), False),
    **dict.fromkeys(("is_encoder_decoder", "do_sample", "early_stopping", "output_scores"), False),
    **dict.fromkeys(("return_dict_in_generate", "remove_invalid_values"), False),
    **dict.fromkeys(("cross_attention_hidden_size", "bad_words_ids", "forced_bos_token_id"), None),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens"), None),
    **dict.fromkeys(("begin_suppress_tokens", "finetuning_task", "tokenizer_class", "prefix", "sep_token_id"), None),
    **dict.fromkeys(("decoder_start_token_id", "task_specific_params", "problem_type"), None),
    **dict.fromkeys(("diversity_penalty", "temperature", "top_p", "typical_p"), 1.0),
    **dict.fromkeys(("repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("max_length", "min_length", "num_beams", "num_beam_groups", "top_k", "num_return_sequences"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "chunk_size_feed_forward"), 0),
    "pruned_heads": {},
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "torch_dtype": "float32",
    "_attn_implementation_autoset": True,
    "transformers_version": "4.57.1",
}


def test_general_keys_of_transformers_four_change_nothing():
    weights, config = draw("expand_ratio"), CONFIGS["expand_ratio"]
    found = convert_fla_lightnet(weights, {**GENERAL, **config})
    assert found.config.to_dict() == convert_fla_lightnet(weights, config).config.to_dict()
    with pytest.raises(ValueError, match=r"^config: expected options .* got feature_map, window_size$"):
        convert_fla_lightnet(weights, {**GENERAL, **config, "window_size": 4, "feature_map": "relu"})


def test_what_is_no_checkpoint_is_refused_by_name():
    weights, config = draw("expand_ratio"), CONFIGS["expand_ratio"]
    for source, got in ((None, "NoneType"), ([weights], "list"), (weights["model.norm.weight"], "Tensor")):
        with pytest.raises(TypeError, match=f"^source: expected a folder or a state dict, got {got}$"):
            convert_fla_lightnet(source, config)
    with pytest.raises(TypeError, match=r"^source: expected a tensor as model\.norm\.weight, got list$"):
        convert_fla_lightnet({**weights, "model.norm.weight": [1.0] * 24}, config)
    with pytest.raises(TypeError, match=r"^source: expected a tensor as model, got dict$"):
        convert_fla_lightnet({"model": weights}, config)
    with pytest.raises(TypeError, match=r"^source: expected names of weights, got int$"):
        convert_fla_lightnet({0: weights["model.norm.weight"]}, config)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "num_heads: expected a divisor of hidden_size = 24, got 5"),
        (
            {"num_heads": 48, "expand_ratio": None},
            ValueError,
            "num_heads: expected a divisor of hidden_size = 24, got 48",
        ),
        ({"num_heads": 0}, ValueError, "num_heads: expected a whole number of at least 1, got 0"),
        ({"num_heads": "2"}, TypeError, "num_heads: expected a whole number of at least 1, got str"),
        ({"num_heads": 2, "expand_ratio": 0}, ValueError, "expand_ratio: expected a whole number of at least 1, got 0"),
        ({"expand_ratio": -8}, ValueError, "expand_ratio: expected a whole number of at least 1, got -8"),
        ({"expand_ratio": 0.5}, TypeError, "expand_ratio: expected a whole number of at least 1, got float"),
        ({"expand_ratio": 25}, ValueError, "expand_ratio: expected at most hidden_size = 24 without num_heads, got 25"),
        (
            {"hidden_size": 25},
            ValueError,
            "expand_ratio: expected hidden_size // expand_ratio heads to divide hidden_size = 25, got 8 (3 heads)",
        ),
        ({"hidden_size": 0}, ValueError, "hidden_size: expected a whole number of at least 1, got 0"),
        ({"num_heads": 3, "expand_ratio": 513}, ValueError, "expand_ratio: expected at most 512, got 513"),
        (
            {"hidden_size": 1026, "num_heads": 2, "expand_ratio": None},
            ValueError,
            "hidden_size: expected at most 512 for each of num_heads = 2, got 1026",
        ),
        (
            {"hidden_ratio": 0, "intermediate_size": None},
            ValueError,
            "hidden_ratio: expected hidden_size * hidden_ratio * 2 / 3 of at least 1, got 0",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_the_names_of_the_checkpoint(options, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        convert_fla_lightnet(draw("expand_ratio"), {**CONFIGS["expand_ratio"], **options})


COUNT, NUMBER, FLAG = "a whole number of at least 1", "a number from 0 to 1e+30", "True or False"
TOKENS = "None, a whole number or a list of them"


@pytest.mark.parametrize(
    ("name", "value", "error", "expected", "got"),
    [
        *((name, None, TypeError, COUNT, "NoneType") for name in ("hidden_size", "num_hidden_layers", "vocab_size")),
        ("intermediate_size", "20", TypeError, COUNT, "str"),
        ("gate_low_rank_dim", 0, ValueError, COUNT, "0"),
        ("gate_low_rank_dim", None, TypeError, COUNT, "NoneType"),
        ("hidden_ratio", "4", TypeError, NUMBER, "str"),
        ("hidden_ratio", -1, ValueError, NUMBER, "-1"),
        ("hidden_ratio", float("nan"), ValueError, NUMBER, "nan"),
        ("hidden_ratio", float("inf"), ValueError, NUMBER, "inf"),
        ("norm_eps", "x", TypeError, NUMBER, "str"),
        ("norm_eps", -1.0, ValueError, NUMBER, "-1.0"),
        ("initializer_range", None, TypeError, NUMBER, "NoneType"),
        *((name, "false", TypeError, FLAG, "str") for name in ("elementwise_affine", "use_cache")),
        ("tie_word_embeddings", 1, TypeError, FLAG, "int"),
        ("pad_token_id", "0", TypeError, "None or a whole number", "str"),
        ("bos_token_id", "1", TypeError, TOKENS, "str"),
        ("eos_token_id", [2, 0.5], TypeError, TOKENS, "float"),
    ],
)
def test_wrong_values_are_refused_in_the_names_of_the_checkpoint(name, value, error, expected, got):
    config = {**CONFIGS["expand_ratio"], name: value}
    if name == "hidden_ratio":
        del config["intermediate_size"]
    with pytest.raises(error, match="^" + re.escape(f"{name}: expected {expected}, got {got}") + "$"):
        convert_fla_lightnet(draw("expand_ratio"), config)


def test_a_gate_norm_without_weights_leaves_over_those_that_are_given():
    weights, config = draw("plain_norm"), CONFIGS["plain_norm"]
    name = "model.layers.1.attn.g_norm.weight"
    with pytest.raises(ValueError, match="^source: expected .* " + re.escape(f"got [] missing and ['{name}'] besides")):
        convert_fla_lightnet({**weights, name: torch.full((24,), 2.0)}, config)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.g_norm\.weight.*layers\.1\.attn\.g_norm\.weight.* besides"):
        convert_fla_lightnet(draw("expand_ratio"), {**CONFIGS["expand_ratio"], "elementwise_affine": False})


def test_elementwise_affine_of_none_makes_no_weight():
    weights, config, input_ids = draw("plain_norm"), CONFIGS["plain_norm"], torch.randint(37, (1, 21))
    model = convert_fla_lightnet(weights, {**config, "elementwise_affine": None})
    assert torch.equal(model(input_ids).logits, convert_fla_lightnet(weights, config)(input_ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits_make_a_model_of_sixteen_bits(dtype):
    """With norms in float32, as mixed training leaves them."""
    weights = draw("expand_ratio")
    stored = {name: tensor if tensor.dim() == 1 else tensor.to(dtype) for name, tensor in weights.items()}
    model, input_ids = convert_fla_lightnet(stored, CONFIGS["expand_ratio"]), torch.randint(37, (1, 21))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = by_formula("expand_ratio", stored, input_ids[0])
    error = (model(input_ids).logits[0].double() - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_short_conv", True),
        ("attn", {"layers": [1], "num_heads": 2}),
        ("hidden_act", "gelu"),
        ("attnres_block_size", 2),
        ("use_l2warp", True),
        ("model_type", "gla"),
    ],
)
def test_options_that_we_lack_are_refused_by_name(name, value):
    config = {**CONFIGS["expand_ratio"], name: value}
    with pytest.raises(NotImplementedError, match=f"^{name}: expected "):
        convert_fla_lightnet(draw("expand_ratio"), config)


def test_what_does_not_fit_is_refused(tmp_path):
    weights, config = draw("expand_ratio"), CONFIGS["expand_ratio"]
    with pytest.raises(ValueError, match=r"^config: expected options .* got feature_map"):
        convert_fla_lightnet(weights, {**config, "feature_map": "relu"})
    with pytest.raises(ValueError, match=r"^num_heads: expected num_heads or expand_ratio"):
        convert_fla_lightnet(weights, {**config, "expand_ratio": None})
    with pytest.raises(ValueError, match=r"^config: expected the checkpoint's config with a state dict"):
        convert_fla_lightnet(weights)
    name = "model.layers.1.attn.q_proj.weight"
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}: expected shape (24, 24), got (12, 24)")):
        convert_fla_lightnet({**weights, name: torch.ones(12, 24)}, config)
    with pytest.raises(ValueError, match=re.escape("['model.layers.0.attn.q_conv1d.weight'] besides")):
        convert_fla_lightnet({**weights, "model.layers.0.attn.q_conv1d.weight": torch.ones(1)}, config)
    own = {**weights, "model.embed_tokens.weight": weights["model.embeddings.weight"]}
    with pytest.raises(ValueError, match=r"^source: expected model\.embeddings.*got model\.embed_tokens"):
        convert_fla_lightnet(own, config)
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}: expected floating-point weights, got torch.int8")):
        convert_fla_lightnet({**weights, name: torch.ones(24, 24, dtype=torch.int8)}, config)
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        convert_fla_lightnet(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a folder with \*\.safetensors"):
        convert_fla_lightnet(tmp_path, config)

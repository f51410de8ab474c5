"""A trained model: the sentence embeddings of all-MiniLM-L6-v2 are those of the model before the swap."""

from __future__ import annotations

import pytest
import torch

import sightline as sl
from sightline.cli.sentence_model import embed, load_sentence_model

PASSAGES = [
    "Attention weights are what a row of a transformer reads with.",
    "A kernel walks the keys tile by tile and never holds all the pairs at once, which is why a long context fits.",
    "Rain.",
    "The bus to the harbour leaves at a quarter past nine, and the ferry waits for it unless the wind blows.",
]


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_embeddings_are_the_same_after_the_swap(before):
    model, tokenizer = load_sentence_model(before)
    expected = embed(model, tokenizer, PASSAGES)
    actual = embed(sl.swap_attention(model, sl.Softmax()), tokenizer, PASSAGES)
    assert expected.shape == (len(PASSAGES), 384)
    assert torch.nn.functional.cosine_similarity(actual, expected).min() > 0.99999
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_depend_on_the_weighting():
    model, tokenizer = load_sentence_model("sdpa")
    expected = embed(model, tokenizer, PASSAGES)
    actual = embed(sl.swap_attention(model, sl.LSSA()), tokenizer, PASSAGES)
    assert torch.nn.functional.cosine_similarity(actual, expected).min() < 0.99


def test_embedding_of_a_passage_does_not_depend_on_the_batch():
    model, tokenizer = load_sentence_model("sdpa")
    sl.swap_attention(model, sl.Softmax())
    together = embed(model, tokenizer, PASSAGES)
    alone = torch.cat([embed(model, tokenizer, [passage]) for passage in PASSAGES])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

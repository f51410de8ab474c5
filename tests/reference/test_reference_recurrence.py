"""The reference of the additive recurrence against its definition, and what follows from the formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sightline.reference import additive_recurrence


def inputs(length=9, *, batch=2, heads=4, key_heads=2, width=3, value_width=5, spread=1.0):
    return (
        torch.randn(batch, heads, length, width, dtype=torch.float64),
        spread * torch.randn(batch, key_heads, length, width, dtype=torch.float64),
        torch.randn(batch, key_heads, length, value_width, dtype=torch.float64),
    )


def random_state(batch=2, key_heads=2, width=3, value_width=5):
    return (
        torch.randn(batch, key_heads, width, dtype=torch.float64),
        torch.randn(batch, key_heads, width, value_width, dtype=torch.float64),
    )


def by_weights(query, key, value, *, causal, key_gain=None):
    """o = scale q^T sum_s softmax(x over the positions up to t)_s gain_s v_s^T with the whole weight array."""
    length = key.shape[2]
    logits = key[:, :, None].expand(-1, -1, length, -1, -1)
    if causal:
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later[None, None, :, :, None], -math.inf)
    weights = logits.softmax(dim=3)
    if key_gain is not None:
        weights = weights * key_gain[:, :, None]
    memory = torch.einsum("bhtsd,bhse->bhtde", weights, value)
    grouped = query.unflatten(1, (key.shape[1], -1))
    return torch.einsum("bhgtd,bhtde->bhgte", grouped, memory).flatten(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gained", [False, True])
def test_output_is_the_softmax_over_past_keys_applied_to_the_values(causal, gained):
    query, key, value = inputs()
    gain = torch.randn_like(key) if gained else None
    output, _ = additive_recurrence(query, key, value, causal=causal, key_gain=gain, scale=0.5)
    torch.testing.assert_close(output, 0.5 * by_weights(query, key, value, causal=causal, key_gain=gain))


def test_state_is_the_log_of_the_sum_and_the_softmax_of_all_keys():
    query, key, value = inputs()
    _, (z, memory) = additive_recurrence(query, key, value)
    torch.testing.assert_close(z, key.logsumexp(2))
    torch.testing.assert_close(memory, key.softmax(2).mT @ value)


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
@pytest.mark.parametrize("start", ["nothing", "state"])
def test_any_split_gives_the_same(cut, start):
    query, key, value = inputs()
    gain = torch.randn_like(key)
    initial = random_state() if start == "state" else None
    whole, final = additive_recurrence(query, key, value, key_gain=gain, initial_state=initial)
    first, state = additive_recurrence(
        query[:, :, :cut], key[:, :, :cut], value[:, :, :cut], key_gain=gain[:, :, :cut], initial_state=initial
    )
    second, last = additive_recurrence(
        query[:, :, cut:], key[:, :, cut:], value[:, :, cut:], key_gain=gain[:, :, cut:], initial_state=state
    )
    torch.testing.assert_close(torch.cat([first, second], dim=2), whole)
    torch.testing.assert_close(last, final)


def test_initial_state_stands_for_the_keys_that_made_it():
    query, key, value = inputs()
    _, state = additive_recurrence(query, key, value)
    later_query, later_key, later_value = inputs(4)
    everything, _ = additive_recurrence(
        torch.cat([query, later_query], 2), torch.cat([key, later_key], 2), torch.cat([value, later_value], 2)
    )
    output, _ = additive_recurrence(later_query, later_key, later_value, initial_state=state)
    torch.testing.assert_close(output, everything[:, :, 9:])


def test_zero_state_is_the_start_at_one_of_later_code():
    query, key, value = inputs()
    state = (torch.zeros(2, 2, 3, dtype=torch.float64), torch.zeros(2, 2, 3, 5, dtype=torch.float64))
    output, _ = additive_recurrence(query, key, value, initial_state=state)
    delta, memory = torch.ones(2, 2, 3, dtype=torch.float64), state[1]
    for t in range(9):
        before, delta = delta, delta + key[:, :, t].exp()
        weight = key[:, :, t].exp() / delta
        memory = (before / delta)[..., None] * memory + weight[..., None] * value[:, :, t, None]
        expected = query[:, :, t].unflatten(1, (2, 2)) @ memory
        torch.testing.assert_close(output[:, :, t], expected.flatten(1, 2))


@pytest.mark.parametrize("step", [100.0, -100.0])
def test_steep_keys_stay_finite_and_follow_the_largest(step):
    query, key, value = inputs(spread=0.0)
    key = key + step * torch.arange(9.0, dtype=torch.float64)[:, None]
    output, (z, _) = additive_recurrence(query, key, value)
    source = value if step > 0 else value[:, :, :1].expand_as(value)
    grouped = query.sum(-1, keepdim=True).unflatten(1, (2, 2)) * source.unsqueeze(2)
    torch.testing.assert_close(output, grouped.flatten(1, 2))
    torch.testing.assert_close(z, key.amax(2))


@pytest.mark.parametrize("causal", [True, False])
def test_masked_keys_might_as_well_not_be_there(causal):
    query, key, value = inputs()
    mask = torch.tensor([False, True, True, False, True, True, True, False, True]).expand(2, 9)
    rows = mask[0].nonzero().flatten()
    poisoned = [tensor.masked_fill(~mask[:, None, :, None], math.nan) for tensor in (key, value)]
    output, state = additive_recurrence(query, *poisoned, key_mask=mask, causal=causal)
    kept, kept_state = additive_recurrence(*(tensor[:, :, rows] for tensor in (query, key, value)), causal=causal)
    torch.testing.assert_close(output[:, :, rows], kept)
    torch.testing.assert_close(state, kept_state)
    if causal:
        assert not output[:, :, 0].any(), "nothing before the first live key"


def test_nothing_but_masked_keys_gives_zero_and_no_gradient():
    query, key, value = (tensor.requires_grad_() for tensor in inputs())
    output, (z, memory) = additive_recurrence(query, key, value, key_mask=torch.zeros(2, 9, dtype=torch.bool))
    assert not output.any()
    assert not memory.any()
    assert (z == -math.inf).all()
    for gradient in torch.autograd.grad(output.sum() + memory.sum(), (query, key, value)):
        assert not gradient.any()


@pytest.mark.parametrize("causal", [True, False])
def test_documents_are_sequences_of_their_own(causal):
    query, key, value = inputs(12, batch=1)
    cuts = [1, 5, 5, 11]
    initial = random_state(batch=3)
    output, (z, memory) = additive_recurrence(
        query, key, value, cu_seqlens=torch.tensor(cuts), initial_state=initial, causal=causal
    )
    assert not output[:, :, [0, 11]].any()
    for document, (begin, end) in enumerate(pairwise(cuts)):
        own = tuple(part[document : document + 1] for part in initial)
        one, state = additive_recurrence(
            *(tensor[:, :, begin:end] for tensor in (query, key, value)), initial_state=own, causal=causal
        )
        torch.testing.assert_close(output[:, :, begin:end], one)
        torch.testing.assert_close((z[document], memory[document]), (state[0][0], state[1][0]))


def test_order_does_not_matter_without_causality():
    query, key, value = inputs()
    order = torch.randperm(9)
    output, _ = additive_recurrence(query, key, value, causal=False)
    shuffled, _ = additive_recurrence(query, key[:, :, order], value[:, :, order], causal=False)
    torch.testing.assert_close(shuffled, output)


def test_an_empty_sequence_hands_its_state_on():
    query, key, value = inputs(0)
    state = random_state()
    for causal in (True, False):
        output, final = additive_recurrence(query, key, value, initial_state=state, causal=causal)
        assert output.shape == (2, 4, 0, 5)
        torch.testing.assert_close(final, state)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_agree_with_differences(causal):
    query, key, value = inputs(4, batch=1, heads=2, key_heads=1, width=2, value_width=2)
    gain = torch.randn_like(key)
    state = random_state(1, 1, 2, 2)
    mask = torch.tensor([[True, False, True, True]])

    def function(query, key, value, gain, z, memory):
        output, final = additive_recurrence(
            query, key, value, key_gain=gain, key_mask=mask, initial_state=(z, memory), causal=causal
        )
        return output, *final

    leaves = [tensor.requires_grad_() for tensor in (query, key, value, gain, *state)]
    assert torch.autograd.gradcheck(function, leaves)


def test_a_state_that_is_handed_on_is_not_the_one_that_was_given():
    query, key, value = inputs(0)
    state = random_state()
    _, final = additive_recurrence(query, key, value, initial_state=state)
    assert all(
        torch.equal(*pair) and pair[0].data_ptr() != pair[1].data_ptr() for pair in zip(final, state, strict=True)
    )

"""The mask function: descriptions where transformers' pattern is known exactly, complete masks everywhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from sightline.hf import Visibility, sightline_mask

LENGTH = 12


def positions_of_documents():
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]), torch.arange(LENGTH)])
    return positions, masking_utils.find_packed_sequence_indices(positions)


def packed(function):
    return packed_sequence_compatibility_function(function, *positions_of_documents())


DESCRIBED = {
    "causal": lambda: causal_mask_function,
    "bidirectional": lambda: bidirectional_mask_function,
    "window": lambda: sliding_window_causal_mask_function(4),
    "window of one": lambda: sliding_window_causal_mask_function(1),
    "window to both sides": lambda: sliding_window_bidirectional_mask_function(3),
    "packed": lambda: packed(causal_mask_function),
    "packed window": lambda: packed(sliding_window_causal_mask_function(3)),
}
OTHERS = {
    "chunked": lambda: chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    "blockwise": lambda: or_masks(causal_mask_function, blockwise_overlay(torch.arange(LENGTH).expand(2, -1) // 3)),
    "or of functions": lambda: or_masks(causal_mask_function, sliding_window_overlay(2)),
    "and in another order": lambda: and_masks(causal_mask_function, sliding_window_overlay(2)),
    "and of three": lambda: and_masks(sliding_window_overlay(2), causal_mask_function, causal_mask_function),
    "window alone": lambda: sliding_window_overlay(2),
    "user's function": lambda: lambda batch, head, query, key: (key <= query) & (key % 2 == 0),
    "looks like causal": lambda: lambda batch_idx, head_idx, q_idx, kv_idx: kv_idx <= q_idx,
    "packed chunks": lambda: packed(chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))),
}


def padding(length=LENGTH):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :3] = False
    return mask


def both(function, queries=LENGTH, keys=LENGTH, **options):
    arguments = {"batch_size": 2, "q_length": queries, "kv_length": keys, "mask_function": function, **options}
    full = {**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sightline_mask(**arguments), sdpa_mask(**full)


@pytest.mark.parametrize("name", DESCRIBED)
def test_known_patterns_stay_descriptions(name):
    mask, dense = both(DESCRIBED[name]())
    assert isinstance(mask, Visibility)
    assert torch.equal(mask.dense(), dense)


@pytest.mark.parametrize("name", [name for name in DESCRIBED if "packed" not in name])
def test_padding_stays_a_row_per_entry(name):
    mask, dense = both(DESCRIBED[name](), attention_mask=padding())
    assert mask.key_mask.shape == (2, LENGTH)
    assert torch.equal(mask.dense(), dense)


@pytest.mark.parametrize("name", OTHERS)
def test_other_patterns_become_complete_masks(name):
    mask, dense = both(OTHERS[name](), attention_mask=None if "packed" in name else padding())
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(mask, dense)


@pytest.mark.parametrize("name", ["causal", "window", "window of one"])
@pytest.mark.parametrize(
    ("queries", "keys", "offset", "first"), [(1, 9, 8, 0), (3, 9, 6, 0), (3, 9, 8, 2), (4, 9, 0, 0)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_queries_of_a_cache(name, queries, keys, offset, first, padded):
    # Cases: a step, a block, a sliding cache that dropped keys, and a static cache with unused slots.
    mask = padding(offset + queries) if padded else None
    described, dense = both(DESCRIBED[name](), queries, keys, q_offset=offset, kv_offset=first, attention_mask=mask)
    assert isinstance(described, Visibility)
    assert torch.equal(described.dense(), dense)


def test_static_cache_tells_its_length():
    mask, dense = both(causal_mask_function, 3, 10, q_offset=torch.tensor(4))
    assert mask.key_lengths.tolist() == [7, 7]
    assert torch.equal(mask.dense(), dense)


def test_last_slot_of_a_static_cache_tells_its_length_too():
    mask, _ = both(causal_mask_function, 1, 10, q_offset=torch.tensor(9))
    assert mask.key_lengths.tolist() == [10, 10]


def test_full_padding_mask_is_dropped():
    mask, _ = both(causal_mask_function, attention_mask=torch.ones(2, LENGTH, dtype=torch.bool))
    assert mask.key_mask is None


def test_padding_shorter_than_the_keys_hides_the_rest():
    mask, dense = both(bidirectional_mask_function, attention_mask=torch.ones(2, LENGTH - 2, dtype=torch.bool))
    assert not mask.key_mask[:, -2:].any()
    assert torch.equal(mask.dense(), dense)


def test_mask_made_in_advance_is_kept():
    mask, _ = both(causal_mask_function)
    assert sightline_mask(2, LENGTH, LENGTH, attention_mask=mask) is mask


def test_mask_of_three_axes_is_refused_by_name():
    with pytest.raises(ValueError, match=r"attention_mask: expected padding \(B, N\) or .* got shape \(2, 6, 6\)"):
        sightline_mask(2, 6, 6, attention_mask=torch.ones(2, 6, 6, dtype=torch.bool))


def test_functions_that_need_vmap_are_evaluated():
    mask, dense = both(causal_mask_function, use_vmap=True)
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(mask, dense)


@pytest.mark.parametrize(
    ("name", "queries", "keys", "offset"),
    [("causal", 3, 5, 6), ("window to both sides", 3, LENGTH, 4), ("packed", 4, LENGTH, 8)],
)
def test_rows_that_stand_elsewhere_than_at_the_last_keys_get_a_complete_mask(name, queries, keys, offset):
    mask, dense = both(DESCRIBED[name](), queries, keys, q_offset=offset)
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(mask, dense)


def test_description_acts_as_the_mask_it_stands_for():
    mask, dense = both(causal_mask_function, attention_mask=padding())
    assert mask.shape == dense.shape
    assert (mask.ndim, mask.dim(), mask.dtype) == (4, 4, torch.bool)
    assert torch.equal(mask[:, :, :4, :6], dense[:, :, :4, :6])
    assert torch.equal(torch.cat([mask, dense], dim=0), torch.cat([dense, dense], dim=0))
    assert torch.equal(torch.where(mask, 1.0, 0.0), dense.float())
    assert torch.equal(mask & ~dense, dense & ~dense)
    assert torch.equal(dense | mask, dense)
    assert torch.equal(~mask, ~dense)
    assert torch.equal(mask.logical_not(), ~dense)
    assert torch.equal(mask == 0, ~dense)
    assert torch.equal(mask != dense, torch.zeros_like(dense))
    assert torch.equal(1.0 - mask.float(), 1.0 - dense.float())
    assert torch.equal(mask * -2.5, dense * -2.5)
    assert torch.equal(0.5 + mask, 0.5 + dense)
    assert torch.equal(mask > 0, dense)
    assert torch.equal(dense ^ mask, torch.zeros_like(dense))
    assert len(mask) == len(dense)
    assert {mask: 1}[mask] == 1
    with pytest.raises(TypeError, match="whole mask"):
        bool(mask)
    assert torch.equal(mask.to(torch.float32), dense.float())
    assert mask.contiguous() is mask
    assert torch.equal(copy.deepcopy(mask).dense(), dense)


def test_description_moves_to_a_device():
    mask, _ = both(causal_mask_function, 3, 10, q_offset=4, attention_mask=padding(7))
    moved = mask.to("meta")
    assert (moved.key_mask.device.type, moved.key_lengths.device.type, str(moved.device)) == ("meta", "meta", "meta")
    with pytest.raises(AttributeError):
        _ = mask.nothing_of_this_name


def test_long_padded_sequences_need_no_square():
    keys = 1 << 20  # a square mask of this side would be a terabyte
    mask = torch.ones(1, keys, dtype=torch.bool)
    mask[:, :7] = False
    described = sightline_mask(
        1, keys, keys, mask_function=sliding_window_causal_mask_function(4096), attention_mask=mask
    )
    assert described.key_mask.numel() == keys
    positions = torch.arange(keys).remainder(1000)[None]
    documents = packed_sequence_compatibility_function(
        causal_mask_function, positions, masking_utils.find_packed_sequence_indices(positions)
    )
    assert sightline_mask(1, keys, keys, mask_function=documents).document_offsets.numel() == keys // 1000 + 2

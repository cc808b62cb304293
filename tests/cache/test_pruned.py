"""The pruned cache layer alone: logical lengths, bookkeeping under every batch operation, eviction, bytes."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, StaticCache

from vlmaccel.cache import PrunedLayer, PrunedSlidingLayer, Slots, prunable, pruned_layer
from vlmaccel.reduction import Reduction


def filled(layer, index, length, heads=2):
    """`layer` after an update with slots at `index` (B, m) whose keys are their own index."""
    index = torch.tensor(index)
    keys = index[:, None, :, None].float().expand(-1, heads, -1, 3).clone()
    layer.expect(Slots(index[:, None]), length)
    layer.update(keys, keys + 100)
    return layer


def assert_keys_are_their_index(layer):
    index = layer.slots.index.expand(-1, layer.keys.shape[1], -1)
    assert torch.equal(layer.keys[..., 0], index.float())
    assert torch.equal(layer.values[..., 0], index.float() + 100)


def append(layer, start, n=1):
    index = torch.arange(start, start + n).float()[None, None, :, None]
    keys = index.expand(layer.keys.shape[0], layer.keys.shape[1], n, 3)
    layer.update(keys, keys + 100)


def test_lengths_are_logical_and_decoding_appends():
    layer = filled(PrunedLayer(), [[0, 3, 4], [1, 2, 4]], 5)
    assert (layer.get_seq_length(), layer.get_mask_sizes(1)) == (5, (6, 0))
    append(layer, 5)
    append(layer, 6, n=2)
    assert layer.get_seq_length() == 8
    assert layer.slots.index.tolist() == [[[0, 3, 4, 5, 6, 7]], [[1, 2, 4, 5, 6, 7]]]
    assert_keys_are_their_index(layer)


def test_batch_operations_take_the_bookkeeping_along():
    layer = filled(PrunedLayer(), [[0, 3, 4], [1, 2, 4]], 5)
    append(layer, 5)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.slots.index.tolist() == [[[1, 2, 4, 5]]] * 2
    assert_keys_are_their_index(layer)
    layer = filled(PrunedLayer(), [[0, 3, 4], [1, 2, 4]], 5)
    layer.batch_repeat_interleave(2)
    assert layer.slots.index[:, 0, 0].tolist() == [0, 0, 1, 1]
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert layer.slots.index[:, 0, 0].tolist() == [1, 0]
    assert_keys_are_their_index(layer)


def test_crop_forgets_whole_tokens_also_of_a_ragged_prompt():
    layer = filled(PrunedLayer(), [[0, 3, 4], [1, 2, 4]], 5)
    append(layer, 5, n=3)
    layer.crop(-2)
    assert layer.get_seq_length() == 6
    assert layer.slots.index[0, 0].tolist() == [0, 3, 4, 5]
    layer.crop(0)
    assert layer.get_seq_length() == 6
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)
    layer.crop(-3)  # to length 3: one sample has 1 slot before it, the other 2
    assert layer.get_seq_length() == 3
    kept = [
        index[size > 0].tolist() for index, size in zip(layer.slots.index[:, 0], layer.slots.sizes[:, 0], strict=True)
    ]
    assert kept == [[0], [1, 2]]
    append(layer, 3)
    assert_keys_are_their_index(layer)


def test_reset_leaves_an_empty_layer():
    layer = filled(PrunedLayer(), [[0, 2]], 3)
    layer.reset()
    assert layer.slots is None
    assert layer.get_seq_length() == 0
    append(filled(layer, [[0]], 1), 1)
    assert layer.slots.index.tolist() == [[[0, 1]]]


def test_eviction_per_head():
    layer = filled(PrunedLayer(), [[0, 1, 2, 3]], 4)
    layer.reduce(Reduction.select(torch.tensor([[True, False, True, True], [True, True, True, False]])))
    assert layer.slots.index.tolist() == [[[0, 2, 3], [0, 1, 2]]]
    assert_keys_are_their_index(layer)
    append(layer, 4)
    assert layer.slots.index.tolist() == [[[0, 2, 3, 4], [0, 1, 2, 4]]]
    assert_keys_are_their_index(layer)


def test_merging_entries_averages_by_size():
    layer = filled(PrunedLayer(), [[0, 1, 2]], 3)
    layer.reduce(Reduction.merge_into(torch.tensor([[0, 0, 2]])))
    layer.reduce(Reduction.merge_into(torch.tensor([[0, 0]])))
    assert layer.slots.sizes.tolist() == [[[3]]]
    assert layer.keys.flatten().tolist() == pytest.approx([1.0] * 6)  # mean of 0, 1, 2, not of 0.5 and 2


def test_reducing_an_empty_layer_is_an_error():
    with pytest.raises(RuntimeError, match="nothing"):
        PrunedLayer().reduce(Reduction.identity(1, 1))


def test_sliding_layer_forgets_what_no_sample_can_see():
    layer = filled(PrunedSlidingLayer(4), [[0, 3, 4, 5], [1, 2, 4, 5]], 6)
    append(layer, 6)
    # the next query is at 7 and sees 4 to 7; slot 3 of the first sample and 2 of the second have gone by too
    assert layer.slots.index[:, 0].tolist() == [[4, 5, 6]] * 2
    assert layer.get_mask_sizes(1) == (4, 4)
    assert_keys_are_their_index(layer)


def test_sliding_layer_that_records_its_past_can_go_back():
    layer = PrunedSlidingLayer(4)
    layer.activate_past_recording()
    filled(layer, [[0, 3, 4, 5]], 6)
    append(layer, 6, n=3)
    layer.crop(-3)
    assert layer.slots.index[0, 0].tolist() == [0, 3, 4, 5]


def test_taking_over_a_layer_keeps_what_it_holds():
    cache = DynamicCache()
    keys = torch.randn(2, 2, 5, 3)
    cache.update(keys, keys, 0)
    layer = pruned_layer(cache, 0)
    assert cache.layers[0] is layer
    assert layer is pruned_layer(cache, 0)
    assert torch.equal(layer.keys, keys)
    assert layer.slots.index[0, 0].tolist() == [0, 1, 2, 3, 4]
    assert cache.get_seq_length() == 5


def test_which_caches_can_be_pruned():
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    assert prunable(DynamicCache())
    assert prunable(DynamicCache(config=config))
    assert not prunable(StaticCache(config=config, max_cache_len=8))


def test_bytes_include_the_bookkeeping():
    layer = filled(PrunedLayer(), [[0, 3, 4]], 5)
    assert layer.nbytes == layer.keys.nbytes + layer.values.nbytes + 3 * 4

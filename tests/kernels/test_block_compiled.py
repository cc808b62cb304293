"""The compiled form of block_prefill: the formula, by one program for all lengths; and what happens without a compiler."""

import pytest
import timm
import torch
from torch.nn.functional import pad

import vlmaccel
from tests.kernels.test_block_prefill import SCALE, all_blocks, draw, golden
from tests.support.close import assert_close
from vlmaccel.kernels import block_compiled
from vlmaccel.kernels.block_prefill import block_prefill, lists_all


@pytest.fixture
def always_compiled(monkeypatch):
    monkeypatch.setattr(block_compiled, "WORTH", 0)
    monkeypatch.setattr(block_compiled, "_failed", {})
    yield
    assert not block_compiled._failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_form(always_compiled, dtype):
    """All lengths, batches, padding and earlier turns, by one program for a dtype."""
    cases = [
        (90, 0, 1, (4, 2), False, False),
        (200, 0, 3, (3, 1), True, False),
        (77, 40, 2, (4, 4), True, True),
        (33, 16, 2, (2, 1), False, True),
        (64, 5, 2, (4, 2), True, False),
    ]
    for number, (rows, earlier, batch, heads, padded, holes) in enumerate(cases):
        case = draw(heads, rows, earlier, 32, batch, (0, 3), 16, padded, dtype, holes, seed=rows)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            got = block_prefill(*case, SCALE)
        assert got.transpose(1, 2).is_contiguous()
        assert_close(got, golden(*case, SCALE), steps=None if dtype == torch.float32 else 3)


def test_each_head_goes_the_way_that_fits_its_lists(always_compiled):
    """In one call: heads with everything, with blocks alone, and with single keys."""
    query, key, value, blocks, columns, start, block = draw((4, 2), 150, 10, 32, 2, (9, 3), 16, padded=True)
    kind = torch.tensor([[0, 1, 2, 1], [2, 0, 0, 1]])[..., None, None]
    columns = columns.masked_fill(kind < 2, -1)
    everything, _ = all_blocks(query, key, block)
    blocks = torch.where(kind == 0, everything, pad(blocks, (0, everything.shape[3] - blocks.shape[3]), value=-1))
    assert torch.equal(lists_all(blocks, 150, 160, block), kind[..., 0, 0] == 0)
    case = query, key, value, blocks, columns, start, block, SCALE
    assert_close(block_prefill(*case), golden(*case))


def test_without_a_compiler_it_warns_once_and_goes_on(monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler\nand much else")

    monkeypatch.setattr(block_compiled, "WORTH", 0)
    monkeypatch.setattr(block_compiled, "_failed", {})
    monkeypatch.setattr(block_compiled, "_program", lambda: fails)
    case = draw(lines=(0, 2))
    with pytest.warns(RuntimeWarning, match=r"C\+\+ compiler .*: no compiler$"):
        got = block_prefill(*case, SCALE)
    assert_close(got, golden(*case, SCALE))
    assert torch.equal(block_prefill(*case, SCALE), got)


def test_where_compiling_is_switched_off_it_is_not_used(monkeypatch):
    monkeypatch.setattr(block_compiled, "WORTH", 0)
    monkeypatch.setattr(block_compiled, "_failed", {})
    case = draw(rows=100, lines=(0, 2))
    with torch.compiler.set_stance("force_eager"), pytest.warns(RuntimeWarning, match="switched off"):
        got = block_prefill(*case, SCALE)
    assert_close(got, golden(*case, SCALE))


def test_patching_a_model_does_not_compile_it_again(always_compiled):
    case = draw((4, 2), 90, lines=(0, 3), dim=32)
    torch.compiler.reset()
    block_prefill(*case, SCALE)
    with (
        vlmaccel.patched(timm.create_model("vit_tiny_patch16_224"), "tome"),
        torch.compiler.set_stance("fail_on_recompile"),
    ):
        block_prefill(*case, SCALE)

"""The table of cache methods at several budgets."""

import pytest

from tests.support.tiny_vqa import tiny_llava
from vlmaccel.evals.cache_sweep import default_methods, render, run_sweep
from vlmaccel.methods import MixedPrecisionKV, RandomEviction, SnapKV


class Silent:
    def start(self, what, total):
        self.left = total

    def advance(self, count):
        self.left -= count


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llava")
    for part in tiny_llava():
        part.save_pretrained(folder)
    return folder


def test_cells_say_what_was_held(checkpoint):
    progress = Silent()
    methods = [SnapKV(window=4), RandomEviction()]
    sweep = run_sweep(progress, checkpoint, methods, budgets=(0.5, 1.0), questions=5)
    assert progress.left == 0
    cells = {(cell.method, cell.budget): cell for cell in sweep.cells}
    assert set(cells) == {("snapkv", 0.5), ("snapkv", 1.0), ("random-eviction", 0.5), ("random-eviction", 1.0)}
    for method in ("snapkv", "random-eviction"):
        assert cells[method, 1.0].loyalty == 1 and cells[method, 1.0].core == sweep.core
        assert 0.5 < cells[method, 0.5].kv < 0.65  # positions are a sixteenth here, with heads of 8 channels
        assert cells[method, 1.0].kv > cells[method, 0.5].kv
    assert render(sweep).row_count == 2


def test_what_has_no_budget_is_refused_before_the_model_is_loaded():
    with pytest.raises(ValueError, match="no budget"):
        run_sweep(Silent(), "nowhere", [MixedPrecisionKV()])
    with pytest.raises(ValueError, match="budget is a retention ratio"):
        run_sweep(Silent(), "nowhere", default_methods(), budgets=(1.5,))

"""Tables of methods at several budgets."""

import pytest

from tests.support.tiny_vqa import TOKENS, tiny_llava
from vlmaccel.evals import cache_sweep, token_sweep
from vlmaccel.evals.budgets import LAYER, mean_kept
from vlmaccel.evals.sweep import Candidate, render, run_sweep
from vlmaccel.methods import MixedPrecisionKV, Random, RandomEviction, SnapKV, Uniform, VisionZip


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
    chosen = cache_sweep.candidates([SnapKV(window=4), RandomEviction()], (0.5, 1.0))
    sweep = run_sweep(progress, checkpoint, lambda depth, visual: chosen, questions=5)
    assert progress.left == 0
    cells = {(cell.method, cell.budget): cell for cell in sweep.cells}
    assert set(cells) == {("snapkv", 0.5), ("snapkv", 1.0), ("random-eviction", 0.5), ("random-eviction", 1.0)}
    for method in ("snapkv", "random-eviction"):
        assert cells[method, 1.0].loyalty == 1 and cells[method, 1.0].core == sweep.core
        assert 0.5 < cells[method, 0.5].kv < 0.65  # positions are a sixteenth here, with heads of 8 channels
        assert cells[method, 1.0].kv > cells[method, 0.5].kv
    assert render(sweep, "KV cache", "kv").row_count == 2


def test_seeds_are_averaged_and_groups_are_apart(checkpoint):
    chosen = [
        Candidate("random", 0.25, Random(layer=0, ratio=0.25, seed=0), "a"),
        Candidate("random", 0.25, Random(layer=0, ratio=0.25, seed=1), "a"),
        Candidate("uniform", 1.0, Uniform(layer=0, ratio=1.0), "a"),
        Candidate("uniform", 0.25, Uniform(layer=2, ratio=0.25), "b"),
        Candidate("visionzip", 0.25, VisionZip(ratio=0.25), "b"),
    ]
    sweep = run_sweep(Silent(), checkpoint, lambda depth, visual: chosen, questions=5)
    assert [(cell.group, cell.method, len(cell.settings)) for cell in sweep.cells] == [
        ("a", "random", 2),
        ("a", "uniform", 1),
        ("b", "uniform", 1),
        ("b", "visionzip", 1),
    ]
    assert [cell.visual for cell in sweep.cells] == pytest.approx([0.25, 1, (2 + 2 * 0.25) / 4, 0.25])
    assert sweep.cells[1].loyalty == 1
    assert render(sweep, "visual tokens", "visual").row_count == 2 + 4


def test_what_has_no_budget_is_refused():
    with pytest.raises(ValueError, match="no budget"):
        cache_sweep.candidates([MixedPrecisionKV()])
    with pytest.raises(ValueError, match="budget is a retention ratio"):
        cache_sweep.candidates(cache_sweep.default_methods(), (1.5,))


@pytest.mark.parametrize("share", [1 / 2, 1 / 9])
def test_methods_of_a_group_leave_as_much(share):
    chosen = token_sweep.candidates(6, 576, (share,))
    for candidate in chosen:
        stages = getattr(candidate.method, "stages", None)
        if stages is None:
            continue
        wanted = {0: share} if candidate.group == token_sweep.BEFORE else {LAYER: share}
        assert mean_kept(stages(6), 6) == pytest.approx(mean_kept(wanted, 6), abs=2e-4)
    baselines = {"random", "uniform", "pool"}
    for group in (token_sweep.BEFORE, token_sweep.INSIDE):
        names = {candidate.name for candidate in chosen if candidate.group == group}
        assert baselines | {f"{name}, calibrated" for name in baselines} < names


def test_every_method_of_the_default_runs(checkpoint):
    progress = Silent()
    sweep = run_sweep(
        progress, checkpoint, lambda depth, visual: token_sweep.candidates(depth, visual, (0.25,)), questions=5
    )
    assert progress.left == 0
    mean = mean_kept({LAYER: 0.25}, 4)
    for cell in sweep.cells:
        assert cell.visual == pytest.approx(0.25 if cell.group == token_sweep.BEFORE else mean, abs=1.5 / TOKENS + 0.06)

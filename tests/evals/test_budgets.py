import pytest

from vlmaccel.evals import budgets
from vlmaccel.methods import make


def test_methods_are_compared_at_equal_visual_tokens():
    chosen = budgets.variants(6, 576)
    assert [v.kept for v in chosen[:: len(budgets.METHODS)]] == [288, 144, 64]
    for variant in chosen:
        for options in variant.runs:
            stages = make(variant.method, **options).stages(6)
            wanted = budgets.mean_kept({1: variant.kept / 576}, 6)
            assert budgets.mean_kept(stages, 6) == pytest.approx(wanted, abs=2e-4)
    # (1 + 5/2) / 6 of the tokens: a third is dropped before layer 1, more before 3 and 4
    assert budgets.mean_kept({1: 0.5}, 6) == pytest.approx(3.5 / 6)
    assert budgets.mean_kept({1: 0.5, 3: 0.25, 4: 0.125}, 6) == pytest.approx(2.5 / 6)
    random = [v for v in chosen if v.method == "random"]
    assert [[options["seed"] for options in v.runs] for v in random] == [[0, 1, 2]] * 3

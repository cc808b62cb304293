import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.evals.vqa_accuracy import exact_match, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("  two   dogs\n", "2 dogs"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("a cat", "cat"),
        ("The man and an apple", "man and apple"),
        ("A", ""),
        ("dont", "don't"),
        ("Don't", "don't"),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t", "don't"),
        ("isnt there", "isn't there"),
        ("its red", "its red"),
        ("the girl's", "girl's"),
        ("yes.", "yes"),
        ("U.S.A.", "usa"),
        ("2.5", "2.5"),
        (".5 miles.", ".5 miles"),
        ("100,978", "100978"),
        ("1,000,000 people", "1000000 people"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("2:50 pm", "2:50 pm"),
        ("(left) [side]?!", "left side"),
        ("50%", "50%"),
        ("$5", "$5"),
    ],
)
def test_normalise(answer, expected):
    assert normalise(answer) == expected


@given(st.text())
def test_normal_form_of_anything(answer):
    words = normalise(answer).split(" ")
    assert words == [""] or all(words)
    assert not {"a", "an", "the", "one", "dont"} & set(words)
    assert not set(normalise(answer)) & set(';/[]"{}()=+\\_-><@`,?!\n\t')


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_ten_annotators(agree, expected):
    """The values every paper quotes: the average over leave-one-out subsets turns 1/3, 2/3, 1 into 0.3, 0.6, 0.9."""
    answers = ["Cat."] * agree + ["dog"] * (10 - agree)
    assert vqa_accuracy("a cat", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["a cat"], 1),
        (["dog"], 0),
        (["cat", "dog"], 0.5),
        (["cat", "cat"], 1),
        (["cat", "dog", "dog"], 1 / 3),
        (["cat", "cat", "dog"], 2 / 3),
        (["cat", "dog", "dog", "dog"], 0.25),
        (["cat"] * 4, 1),
        (["cat"] * 3 + ["dog"] * 17, 0.95),
    ],
)
def test_other_numbers_of_annotators(answers, expected):
    assert vqa_accuracy("cat", answers) == pytest.approx(expected)


@given(st.integers(1, 12), st.integers(0, 12))
def test_more_agreement_is_never_worse(count, agree):
    agree = min(agree, count)

    def accuracy(n):
        return vqa_accuracy("cat", ["cat"] * n + ["dog"] * (count - n))

    assert 0 <= accuracy(agree) <= 1
    assert accuracy(count) == 1
    assert agree == 0 or accuracy(agree) >= accuracy(agree - 1)


def test_no_answers():
    with pytest.raises(ValueError, match="at least one accepted answer"):
        vqa_accuracy("cat", [])


def test_exact_match():
    assert exact_match(" Cat\n", ["dog", "cat"])
    assert not exact_match("a cat", ["cat"])
    assert not exact_match("2", ["two"])

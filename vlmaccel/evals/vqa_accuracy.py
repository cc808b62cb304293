"""VQA accuracy, the metric of the VQA challenge, with its answer normalisation.

Written from the published description, https://visualqa.org/evaluation.html (VQA, arXiv 1505.00468): an answer is
right to the degree that annotators gave it, `min(annotators that agree / 3, 1)`, averaged over all subsets that leave
one annotator out. The organisers' script differs in two small things: it leaves answers as they are where all
annotators agree, and it joins words around any punctuation mark of an answer that holds a number with a comma.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NEEDED = 3  # annotators that must agree for full marks

# what the metric calls punctuation: marks like % and $ belong to an answer
_PUNCTUATION = re.compile(r'[;/\[\]"{}()=+\\_\-><@`,?!]')
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")  # not the decimal point of 2.5 or .5
_ARTICLES = {"a", "an", "the"}
_DIGITS = {
    word: str(digit)
    for digit, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
_DIGITS["none"] = "0"


# those that are another word without their apostrophe (its, were, well, ill, id) are left out
_CONTRACTIONS = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shouldn't wasn't
weren't won't wouldn't could've i've might've must've should've they've we've who've would've you've it'd that'd
there'd they'd who'd you'd it'll that'll they'll what'll who'll you'll i'm they're what're who're you're he's how's
let's she's somebody's someone's something's that's there's what's when's where's who's why's ma'am o'clock y'all
"""
_CONTRACTION_OF = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}


def normalise(answer: str) -> str:
    """An answer in the form in which the metric compares it.

    Lower case; no periods but decimal points; no punctuation but apostrophes and colons (a comma within a number
    vanishes, other marks become spaces); number words up to ten as digits; no articles; contractions with their
    apostrophe; single spaces.
    """
    answer = answer.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    answer = _COMMA_IN_NUMBER.sub("", answer)
    answer = _PUNCTUATION.sub(" ", _PERIOD.sub("", answer))
    words = (_DIGITS.get(word, word) for word in answer.split())
    return " ".join(_CONTRACTION_OF.get(word.replace("'", ""), word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of a predicted answer, 0 to 1.

    answers: what the annotators gave, ten in the VQA data sets. With other numbers of answers the same average is
    taken, and where a subset holds fewer than three answers all of it must agree for full marks. A single answer must
    be equal after normalisation.

    Raises ValueError if there is no answer.
    """
    if not answers:
        raise ValueError("a question needs at least one accepted answer")
    predicted = normalise(prediction)
    matches = [normalise(answer) == predicted for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    needed = min(NEEDED, len(matches) - 1)
    total = sum(matches)
    return sum(min((total - match) / needed, 1) for match in matches) / len(matches)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the answers, apart from capitals and surrounding white space."""
    return prediction.strip().lower() in {answer.strip().lower() for answer in answers}

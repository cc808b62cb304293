"""The distillation loss against torch's own divergence, its weights by hand, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from vlmaccel.training.distillation import Distillation
from vlmaccel.training.questions import IGNORED, PADDING, SHARED

B, N, V = 2, 7, 11


def tokens(seed=0):
    """Logits of student and teacher, labels, and question numbers of a batch: a prefix of two, two questions, padding."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(B, N, V, generator=generator, requires_grad=True)
    teacher = torch.randn(B, N, V, generator=generator)
    labels = torch.full((B, N), IGNORED)
    labels[0, [3, 5, 6]] = torch.tensor([1, 2, 3])
    labels[1, 4] = 4
    question = torch.tensor([[SHARED, SHARED, 0, 0, 1, 1, 1], [SHARED, SHARED, 0, 0, 0, PADDING, PADDING]])
    return student, teacher, labels, question


ANSWERS = [(0, 2), (0, 4), (0, 5), (1, 3)]  # the tokens before those with labels
TEXT = [(0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 2), (1, 3), (1, 4)]


@given(st.floats(0, 3), st.floats(0, 3), st.sampled_from([0.5, 1.0, 4.0]), st.integers(0, 20))
def test_it_is_torchs_own_divergence(forward, reverse, temperature, seed):
    student, teacher, labels, question = tokens(seed)
    loss = Distillation(forward, reverse, temperature).loss(student, teacher, labels, question)
    mine = torch.stack([student[at] for at in ANSWERS]).div(temperature).log_softmax(-1)
    theirs = torch.stack([teacher[at] for at in ANSWERS]).div(temperature).log_softmax(-1)
    expected = forward * kl_div(mine, theirs, reduction="batchmean", log_target=True)
    expected = expected + reverse * kl_div(theirs, mine, reduction="batchmean", log_target=True)
    assert torch.allclose(loss, expected, atol=1e-5)


@pytest.mark.parametrize("which", ["forward", "reverse"])
@pytest.mark.parametrize("weights", ["uniform", "saliency", "answer"])
def test_weights(which, weights):
    student, teacher, labels, question = tokens()
    student = student.detach()
    options = {"forward": 0.0, "reverse": 0.0, which: 1.0, f"{which}_weights": weights}
    loss = Distillation(**options).loss(student, teacher, labels, question)
    total, norm = 0.0, 0.0
    for at in TEXT if weights == "uniform" else ANSWERS:
        p, q = teacher[at].softmax(-1), student[at].softmax(-1)
        weight = float((p - q).abs().sum()) if weights == "saliency" else 1.0
        p, q = (p, q) if which == "forward" else (q, p)
        total = total + weight * (p * (p.log() - q.log())).sum()
        norm += weight
    assert torch.allclose(loss, total / norm, atol=1e-5)


def test_it_is_zero_for_equals_and_has_no_gradient_into_the_teacher():
    student, teacher, labels, question = tokens()
    both = Distillation(1.0, 1.0)
    assert both.loss(student, student.detach(), labels, question).abs() < 1e-6
    teacher.requires_grad_()
    both.loss(student, teacher, labels, question).backward()
    assert teacher.grad is None
    reached = student.grad.abs().sum(-1) > 0
    assert reached.nonzero().tolist() == [list(at) for at in ANSWERS]


def test_a_batch_without_answers_has_loss_zero():
    student, teacher, labels, question = tokens()
    loss = Distillation().loss(student, teacher, torch.full_like(labels, IGNORED), question)
    assert loss == 0
    loss.backward()


def test_step_down_the_gradient_comes_nearer():
    student, teacher, labels, question = tokens()
    for way in (Distillation(), Distillation(0.0, 1.0), Distillation(1.0, 1.0, 2.0, "saliency", "uniform")):
        loss = way.loss(student, teacher, labels, question)
        (gradient,) = torch.autograd.grad(loss, student)
        assert way.loss(student - 0.1 * gradient, teacher, labels, question) < loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward": -1.0}, "forward weighs a term of the loss, a number, 0 or more, not -1.0"),
        ({"reverse": float("nan")}, "reverse weighs a term"),
        ({"reverse": True}, "not True"),
        ({"temperature": 0}, "temperature is a number more than 0, not 0"),
        ({"forward_weights": "all"}, "forward_weights must be one of 'uniform', 'answer', 'saliency', not 'all'"),
        ({"reverse_weights": None}, "reverse_weights must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**options)

"""Distillation: a patched model learns to say what it says unpatched.

The loss is lambda_fwd sum_i alpha_i KL(teacher_i || student_i) + lambda_rev sum_i beta_i KL(student_i || teacher_i) over the
tokens i of a batch, of probabilities at temperature T, p = softmax(z / T). Forward KL makes the student cover all that the teacher
holds possible, reverse KL keeps it from what the teacher does not (Gu et al., arXiv 2306.08543). Without the factor T^2 of Hinton et al.
(arXiv 1503.02531): it belongs into the two lambdas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmaccel.methods.selection import check_choice
from vlmaccel.training.questions import IGNORED

Weights = Literal["uniform", "answer", "saliency"]


@dataclass(frozen=True)
class Distillation:
    """The distillation loss.

    forward, reverse: lambda_fwd and lambda_rev, 0 or more. temperature: T, more than 0.
    forward_weights, reverse_weights: alpha and beta, which sum to 1: "answer" (default), the same for all tokens that predict one of
        an answer; "uniform", for all text tokens behind the picture; "saliency", for those of an answer in proportion to the total
        variation between student and teacher, half the L1 norm of the gradient of the forward loss by the logits, so that tokens which need
        what was dropped count most.
    Raises ValueError for a value that is not allowed.
    """

    forward: float = 1.0
    reverse: float = 0.0
    temperature: float = 1.0
    forward_weights: Weights = "answer"
    reverse_weights: Weights = "answer"

    def __post_init__(self) -> None:
        for name in ("forward", "reverse"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"{name} weighs a term of the loss, a number, 0 or more, not {value!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature is a number more than 0, not {self.temperature!r}")
        for name in ("forward_weights", "reverse_weights"):
            check_choice(name, getattr(self, name), get_args(Weights))

    @property
    def wanted(self) -> bool:
        """Whether there is anything to learn from the teacher."""
        return self.forward > 0 or self.reverse > 0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor, question: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        student, teacher: (B, N, vocab) logits; no gradient goes into the teacher. labels: (B, N), of answer tokens, else -100.
        question: (B, N), see `vlmaccel.training.questions.Packed`.
        """
        answer = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))  # the token before predicts it
        behind = answer | (question >= 0)
        used = behind if "uniform" in (self.forward_weights, self.reverse_weights) else answer
        answer, student, teacher = answer[used], student[used].float(), teacher.detach()[used].float()
        student, teacher = ((z / self.temperature).log_softmax(-1) for z in (student, teacher))
        total = student.sum() * 0
        if self.forward:
            weights = token_weights(self.forward_weights, answer, student, teacher)
            total = total + self.forward * (weights * divergence(teacher, student)).sum()
        if self.reverse:
            weights = token_weights(self.reverse_weights, answer, student, teacher)
            total = total + self.reverse * (weights * divergence(student, teacher)).sum()
        return total


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """(n,) KL(p || q) of log-probabilities (n, vocab)."""
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def token_weights(kind: Weights, answer: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """(n,) float32 that sum to 1, see `Distillation`. answer: (n,) bool. student, teacher: (n, vocab) log-probabilities."""
    weights = torch.ones_like(student[:, 0]) if kind == "uniform" else answer.float()
    if kind == "saliency":
        weights = weights * (student.exp() - teacher.exp()).abs().sum(-1)
    return weights / weights.sum().clamp(min=1e-12)

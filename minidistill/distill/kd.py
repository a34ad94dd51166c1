"""The three losses of BK-SDM (arXiv 2305.15798, section 3.2).

    L = w_task L_task + w_out L_out + w_feat L_feat

    L_task = || target - eps_S(x_t, t, c) ||^2              the training objective of diffusion models
    L_out  = || eps_T(x_t, t, c) - eps_S(x_t, t, c) ||^2    against the teacher's prediction
    L_feat = sum_l || f_T^l - f_S^l ||^2                    against the teacher's intermediate features f^l

The paper writes squared norms; its code takes the mean over the elements of each feature and the plain sum over
features, as is done here. Differences are squared in float32: features reach 1e3, and in float16 a difference of 256
squares to infinity.

Normalised features, L_feat = sum_l || f_T^l - f_S^l ||^2 / || f_T^l ||^2, are an option, from LAPTOP-Diff (arXiv
2404.11098): otherwise the stages with the largest features dominate. Here each sample is divided by its own norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

Features = Mapping[str, Tensor]


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each sample, in float32: (B, ...), (B, ...) -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def task_loss(student_out: Tensor, target: Tensor) -> Tensor:
    """Diffusion loss against the noise (or velocity) of the data: (B, C, h, w), (B, C, h, w) -> (B,)."""
    return mean_square(student_out, target)


def output_loss(student_out: Tensor, teacher_out: Tensor) -> Tensor:
    """Output distillation: (B, C, h, w), (B, C, h, w) -> (B,). No gradient reaches the teacher."""
    return mean_square(student_out, teacher_out.detach())


def feature_loss(
    student: Features, teacher: Features, pairs: Sequence[tuple[str, str]], normalized: bool = False
) -> Tensor:
    """Feature distillation: the sum over (teacher feature, student feature) pairs -> (B,).

    normalized: divide each pair's loss by the mean square of the teacher's feature, so that all have equal weight.
    ValueError: no pairs, or one that is absent or of two shapes. RuntimeError: one feature alone has no gradient.
    """
    total: Tensor | None = None
    trained = any(student[name].requires_grad for _, name in pairs if name in student)
    for teacher_name, student_name in pairs:
        if teacher_name not in teacher or student_name not in student:
            raise ValueError(f"no features teacher {teacher_name!r} and student {student_name!r} to compare")
        f_teacher, f_student = teacher[teacher_name].detach(), student[student_name]
        if f_teacher.shape != f_student.shape:
            raise ValueError(
                f"teacher {teacher_name} is {tuple(f_teacher.shape)}, student {student_name} {tuple(f_student.shape)}"
            )
        if trained and not f_student.requires_grad:
            raise RuntimeError(f"student {student_name} is detached: a constant, not learned from")
        loss = mean_square(f_student, f_teacher)
        if normalized:
            loss = loss / f_teacher.float().square().flatten(1).mean(1).clamp(min=1e-12)
        total = loss if total is None else total + loss
    if total is None:
        raise ValueError("feature distillation needs at least one pair")
    return total


def check_gradients(losses: Mapping[str, Tensor], student: nn.Module, teacher: nn.Module) -> None:
    """RuntimeError unless the teacher is frozen and every loss has a gradient in the student.

    BK-SDM's released recipe for Tiny logs a feature loss that is detached from the student, as its hook is inside a
    reentrant checkpoint: a constant that nothing is learned from. `feature_loss` checks each of its pairs. No gradient
    is computed: with a frozen teacher, a loss that requires one has it in the student, unless it is at its minimum, 0.
    """
    if any(p.requires_grad for p in teacher.parameters()):
        raise RuntimeError("the teacher's parameters require gradients: freeze it")
    for name, loss in losses.items():
        if not loss.requires_grad:
            raise RuntimeError(f"the {name} loss is detached from the student: it would be logged, not learned from")
        if not loss.any():
            raise RuntimeError(f"the {name} loss has no gradient in the student")

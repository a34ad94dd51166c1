"""The three losses of BK-SDM (arXiv 2305.15798, section 3.2).

    L = w_task L_task + w_out L_out + w_feat L_feat

    L_task = || target - eps_S(x_t, t, c) ||^2              the teacher's own training objective
    L_out  = || eps_T(x_t, t, c) - eps_S(x_t, t, c) ||^2    the teacher's prediction
    L_feat = sum_l || f_T^l - f_S^l ||^2                    the teacher's intermediate features, stage by stage

The paper writes squared norms; its code takes the mean over elements, for each stage, and the plain sum over stages. So
does this. Everything is squared in float32: features reach 1e3, and in float16 a difference of 256 squares to infinity.

Normalised features, L_feat = sum_l || f_T^l - f_S^l ||^2 / || f_T^l ||^2, are an option: the remedy of LAPTOP-Diff
(arXiv 2404.11098) for stages whose large features outweigh all others. Here each sample is divided by its own norm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

Features = Mapping[str, Tensor]


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each sample, in float32: (B, ...), (B, ...) -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def task_loss(student_out: Tensor, target: Tensor) -> Tensor:
    """The ordinary diffusion loss against noise (or velocity): (B, C, h, w) twice -> (B,)."""
    return mean_square(student_out, target)


def output_loss(student_out: Tensor, teacher_out: Tensor) -> Tensor:
    """Output distillation: (B, C, h, w) twice -> (B,). No gradient reaches the teacher."""
    return mean_square(student_out, teacher_out.detach())


def feature_loss(
    student: Features, teacher: Features, pairs: Sequence[tuple[str, str]], normalized: bool = False
) -> Tensor:
    """Feature distillation, summed over (teacher feature, student feature) pairs -> (B,).

    normalized: divide each pair's loss by the mean square of the teacher's feature, so that all stages weigh alike.
    ValueError names a pair that is absent or of two shapes, RuntimeError one that alone is cut off from the student.
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
            raise RuntimeError(f"student {student_name} is cut off from the student: a constant, not learned from")
        loss = mean_square(f_student, f_teacher)
        if normalized:
            loss = loss / f_teacher.float().square().flatten(1).mean(1).clamp(min=1e-12)
        total = loss if total is None else total + loss
    if total is None:
        raise ValueError("feature distillation needs at least one pair")
    return total


def check_gradients(losses: Mapping[str, Tensor], student: nn.Module, teacher: nn.Module) -> None:
    """RuntimeError unless every loss has a gradient in the student and the teacher is frozen.

    BK-SDM's released recipe for Tiny logs a feature term that is cut off from the student, as its hook sits inside a
    reentrant checkpoint: a constant that nothing learns from. `feature_loss` checks each pair by itself. Nothing is
    computed: a loss has a gradient if its graph reaches the student's weights and it is not at its minimum, 0.
    """
    if any(p.requires_grad for p in teacher.parameters()):
        raise RuntimeError("the teacher's parameters require gradients: freeze it")
    weights = {id(p) for p in student.parameters() if p.requires_grad}
    for name, loss in losses.items():
        if not loss.requires_grad:
            raise RuntimeError(f"the {name} loss is cut off from the student: it would be logged, not learned from")
        if not loss.any() or not _graph_reaches(loss, weights):
            raise RuntimeError(f"the {name} loss has no gradient in the student")


def _graph_reaches(loss: Tensor, weights: Collection[int]) -> bool:
    """Whether a backward pass from a loss would arrive at one of these leaf tensors, given by their id."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in weights:  # of an AccumulateGrad, the end of a path
            return True
        waiting += [earlier for earlier, _ in node.next_functions]
    return False

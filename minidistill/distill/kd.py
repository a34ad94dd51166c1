"""The three losses of BK-SDM (arXiv 2305.15798, section 3.2): what the student learns from.

    L = w_task L_task + w_out L_out + w_feat L_feat

    L_task = || target - eps_S(x_t, t, c) ||^2              the teacher's own training objective
    L_out  = || eps_T(x_t, t, c) - eps_S(x_t, t, c) ||^2    imitate the teacher's answer
    L_feat = sum_l || f_T^l - f_S^l ||^2                    imitate its working, stage by stage

The paper writes squared norms; its code takes the mean over elements, for each stage, and the plain sum of stages. So
does this. Everything is squared in float32: features reach 1e3, and in float16 a difference of 256 squares to infinity.

Three options are later than the paper, and off by default:

    normalised features     L_feat = sum_l || f_T^l - f_S^l ||^2 / || f_T^l ||^2
    random conditioning     at timestep t the caption is that of another image, with probability exp(-5 (1 - t/T))
    image-free              x_0 is what the teacher draws from a caption, with guidance, not an encoded image

The first is the remedy of LAPTOP-Diff (arXiv 2404.11098) for stages whose large features outweigh all others: divide by
the norm of the teacher's features; here each sample by its own. The other two are those of Random Conditioning (arXiv
2504.02011): the teacher can answer any caption at any x_t, and at high t, where x_t shows little, asking it costs no
image; so the student sees far more captions than there are images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from minidistill.diffusion.noise import generator_for
from minidistill.pipeline import Pipeline
from minidistill.training.batches import Batches, Latents, captions_of

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

    normalized: each pair's loss is divided by the mean square of the teacher's feature, so that all stages weigh alike.
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
    """RuntimeError unless every loss moves the student and none can move the teacher.

    BK-SDM's released recipe for Tiny logs a feature term that is cut off from the student (its hook sits inside a
    reentrant checkpoint); such a constant is not to be trained on unnoticed. A single pair of the feature loss is
    looked after by `feature_loss`. Keeps the graph.
    """
    if any(p.requires_grad for p in teacher.parameters()):
        raise RuntimeError("the teacher's parameters require gradients: freeze it")
    weights = [p for p in student.parameters() if p.requires_grad]
    for name, loss in losses.items():
        if not loss.requires_grad:
            raise RuntimeError(f"the {name} loss is cut off from the student: it would be logged, not learned from")
        grads = torch.autograd.grad(loss.sum(), weights, retain_graph=True, allow_unused=True)
        if not _any_nonzero(grads):
            raise RuntimeError(f"the {name} loss has no gradient in the student")


def _any_nonzero(grads: Iterable[Tensor | None]) -> bool:
    return any(g is not None and bool((g != 0).any()) for g in grads)


# ---------------------------------------------------------------------------- what is trained on, beyond the paper


def random_caption_probability(t: Tensor, num_train_timesteps: int = 1000) -> Tensor:
    """p(t) = exp(-5 (1 - t/T)) of arXiv 2504.02011, (B,) -> (B,): 0.7 % at t = 0, 8 % half way, nearly 1 at the end."""
    return torch.exp(-5 * (1 - t.float() / num_train_timesteps))


class RandomCaptions(Batches):
    """Batches with random conditioning: the captions of some samples are those of others, drawn by sample number.

    What is trained without a prompt stays so, as in the original, where captions are dropped last.
    """

    def _shown(self, captions: list[str | None], numbers: Sequence[int], t: Tensor) -> list[str | None]:
        chances = random_caption_probability(t, self.pipe.schedule.num_train_timesteps).tolist()
        return [
            caption if caption is None else self._other(n, p) or caption
            for n, p, caption in zip(numbers, chances, captions, strict=True)
        ]

    def _other(self, n: int, chance: float) -> str | None:
        """A caption of the whole data set in place of sample n's, or None: it keeps its own."""
        generator = generator_for(self.seed, "random caption", n)
        if float(torch.rand((), generator=generator)) >= chance:
            return None
        several = captions_of(self.data, int(torch.randint(len(self.data), (), generator=generator)))
        return several[int(torch.randint(len(several), (), generator=generator))]


def sample_latents(
    teacher: Pipeline, captions: Sequence[str], side: int, seed: int, guidance: float, batch_size: int = 16
) -> Latents:
    """Latents that the teacher draws from captions, in place of encoded images; there is no posterior to draw from.

    Sampled as the teacher's checkpoint says, else in 25 steps with this guidance. Latent i depends on (seed, i) alone.
    side: of the square images they stand for, in pixels.
    """
    done = []
    guidance = guidance if teacher.sampling is None else None
    settings = {"seed": seed, "guidance": guidance, "height": side, "width": side}
    with tqdm(total=len(captions), desc="sampling latents", unit="", disable=None, leave=False) as bar:
        for first in range(0, len(captions), batch_size):
            some = captions[first : first + batch_size]
            done.append(teacher(some, first_index=first, batch_size=batch_size, output="latents", **settings).cpu())
            bar.update(len(some))
    mean = torch.cat(done)[:, None] / teacher.vae.config.scaling_factor  # (N, C, h, w) -> (N, 1, C, h, w)
    origins = [(side, side, 0, 0)] * len(captions)
    return Latents(mean, torch.zeros_like(mean), [(caption,) for caption in captions], origins, (side, side))

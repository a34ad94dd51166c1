"""The procedure of SDXL-Lightning as data (arXiv 2402.13929, sections 3.1 to 3.7): stages, and the phases of each.

A stage distils a model of more sampling steps into a student of fewer. Its phases train the student with a LoRA or all
its weights, against the conditional discriminator D or the unconditional D'. Numbers that the paper does not give, such
as the optimizer steps of a phase, are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from minidistill.diffusion.sampling import Sampling
from minidistill.errors import InputError


@dataclass(frozen=True)
class Phase:
    """What trains the student for a number of optimizer steps."""

    steps: int
    learning_rate: float  # of the student and, in the paper, of the discriminator
    lora: bool = False  # train a LoRA, which is merged before the next phase that trains all weights
    # weights of the losses
    mse: float = 0.0  # (16)
    adversarial: float = 0.0  # (21)
    matching: float = 0.0  # distribution matching (DMD2, arXiv 2405.14867)
    convert: float = 0.0  # (29), from the student of the stage before
    # what is seen
    teacher: int | None = None  # sampling steps of a skip-level teacher; None: the stage's
    timesteps: int | None = None  # number of timesteps that the student is trained at; None: those of its own steps
    rollout: bool = False  # x_t on the student's own path from pure noise (DMD2's backward simulation), not noised data
    from_data: bool = False  # the real x_{t-ns} is the data noised to t - ns, not what a teacher makes of x_t
    # the discriminator
    conditional: bool = True  # D (22) or D' (23)
    noise_levels: tuple[int, ...] = ()  # t* - 1 of (25) and (26); empty: D reads clean latents
    noise_weights: tuple[float, ...] = ()  # how often each is drawn; empty: equally
    taps: tuple[str, ...] = ("mid",)
    relativistic: bool = False
    r1: float = 0.0  # weight of the approximated R1
    backbone_rate: float = 1.0  # its learning rate, relative to the student's; 0: frozen
    head_rate: float = 1.0
    head_start: int = 0  # steps at first in which the discriminator trains alone
    fake_rate: float = 1.0  # of distribution matching's network of the student's samples
    # the rest of the optimizer
    schedule: str = "constant"
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.rollout and self.timesteps:
            raise ValueError("a rollout takes the student's own steps: leave out timesteps")

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's: the paper's for the adversarial objective, and the usual ones."""
        return (0.0, 0.99) if self.adversarial else (0.9, 0.999)

    @property
    def label(self) -> str:
        """Such as "D, LoRA"."""
        names = {"convert": "x0", "mse": "MSE", "adversarial": "D" if self.conditional else "D'", "matching": "DM"}
        return " + ".join(text for name, text in names.items() if getattr(self, name)) + ", LoRA" * self.lora


@dataclass(frozen=True)
class Stage:
    """From a model of `teacher` sampling steps to one of `student` steps; 0: as many as the first teacher has."""

    student: int
    teacher: int
    phases: tuple[Phase, ...]
    predicts_x0: bool = False  # the student predicts x0, not what the teacher predicts (section 3.7)
    mixed: tuple[int, ...] = ()  # the student is for all these numbers of steps; `student` is what it is sampled in

    @property
    def name(self) -> str:
        """Of the student's folder."""
        return f"{'any' if self.mixed else self.student}-step{'-x0' * self.predicts_x0}"


class Leg(NamedTuple):
    """A phase in its place."""

    index: int  # of the stage
    stage: Stage
    phase: Phase
    number: int  # of the phase, counted over all stages
    first: int  # optimizer steps before it, over all phases
    last: int  # and after it
    ends_stage: bool


def legs(stages: Sequence[Stage]) -> Iterator[Leg]:
    """All phases in their order."""
    number = done = 0
    for index, stage in enumerate(stages):
        for place, phase in enumerate(stage.phases, start=1):
            yield Leg(index, stage, phase, number, done, done + phase.steps, place == len(stage.phases))
            number, done = number + 1, done + phase.steps


def only_lora(stages: Sequence[Stage]) -> bool:
    """Whether one LoRA is trained throughout, so that the students are LoRAs for the first teacher."""
    return all(phase.lora for stage in stages for phase in stage.phases)


def choose(
    plan: Sequence[Stage], students: Sequence[int] | None, length: float = 1.0, distilled: Sampling | None = None
) -> tuple[Stage, ...]:
    """The stages with these students, each phase `length` times as long. InputError: no such ladder.

    distilled: what the model was distilled for that the ladder starts from, if it was.
    """
    if distilled:
        own = {"student": distilled.steps, "teacher": distilled.steps, "predicts_x0": distilled.prediction == "sample"}
        plan = [stage if stage.student else replace(stage, **own) for stage in plan]
    elif not all(stage.student for stage in plan):
        raise InputError("this plan fine-tunes a distilled model: give one, or its LoRA, as --start-from")
    known = [stage.student for stage in plan]
    if missing := sorted(set(students or ()) - set(known)):
        raise InputError(f"--stages {missing[0]}: this plan has students of {', '.join(map(str, known))} steps")
    stages = [stage for stage in plan if students is None or stage.student in students]
    if not stages:
        raise InputError("--stages names no stage: give students' steps such as 8,4,2")
    chosen: list[Stage] = []
    made = [distilled.steps] if distilled else []  # steps of the models that there are by then
    for stage in stages:
        for phase in stage.phases:
            wanted = phase.teacher or stage.teacher
            if made and wanted not in made:
                given = f"; the ladder starts from one of {made[0]}" * bool(distilled)
                raise InputError(f"--stages: {stage.name} needs the student of {wanted} steps before it{given}")
            if phase.convert and not made:
                raise InputError(f"--stages: {stage.name} is converted from a student, and needs one before it")
        shorter = (replace(phase, steps=max(1, round(length * phase.steps))) for phase in stage.phases)
        chosen.append(replace(stage, phases=tuple(shorter)))
        made.append(stage.student)
    return tuple(chosen)


def stage_rows(stages: Sequence[Stage], guidance: float, started: bool = False) -> list[tuple[str, ...]]:
    """The table of a procedure, the heading first. started: it starts from a student, not from the first teacher."""
    rows = [("stage", "objective", "teacher", "timesteps", "t*", "learning rate", "steps")]
    for leg in legs(stages):
        stage, phase = leg.stage, leg.phase
        steps = stage.mixed or (stage.student,)
        guided = f", guidance {guidance:g}" if leg.index == 0 and guidance > 1 and not started else ""
        levels = ":".join(f"{weight:g}" for weight in phase.noise_weights or (1,) * len(phase.noise_levels))
        stars = " ".join(str(level + 1) for level in phase.noise_levels)
        rows.append(
            (
                f"{stage.teacher} -> {','.join(map(str, steps))}{' (x0)' * stage.predicts_x0}",
                phase.label,
                "data" if phase.from_data else f"{phase.teacher or stage.teacher} steps{guided}",
                f"{phase.timesteps or max(steps)}{', own path' * phase.rollout}",
                f"{stars} at {levels}" if stars else "-",
                f"{phase.learning_rate:g}",
                str(phase.steps),
            )
        )
    return rows


# The procedure of the paper. Steps are ours: it says none.
LEVELS = (9, 249, 499, 749)  # t* = 10, 250, 500, 750
LORA = Phase(4000, 1e-6, lora=True, adversarial=1)
FULL = Phase(4000, 5e-7, adversarial=1, conditional=False)


def adversarial_phases(lora: Phase = LORA, full: Phase | None = FULL, skip: int | None = None) -> tuple[Phase, ...]:
    """LoRA with D, LoRA with D', all weights with D'. skip: sampling steps of the teacher where D' judges."""
    free = replace(lora, conditional=False, teacher=skip)
    return (lora, free) if full is None else (lora, free, replace(full, teacher=skip))


def one_step(lora: Phase, full: Phase | None, skip: int) -> tuple[Phase, ...]:
    """`adversarial_phases` with noise levels: all alike at first, then mostly t* = 10 (section 3.7)."""
    phases = adversarial_phases(replace(lora, timesteps=4, noise_levels=LEVELS), full, skip)
    last = replace(phases[-1], timesteps=4, noise_levels=LEVELS, noise_weights=(5, 1, 1, 1))
    return (*phases[:-1], last)


PAPER = (
    Stage(32, 128, (Phase(10_000, 1e-5, mse=1),)),
    Stage(8, 32, adversarial_phases()),
    Stage(4, 8, adversarial_phases()),
    Stage(2, 4, adversarial_phases(replace(LORA, timesteps=4), replace(FULL, timesteps=4), 8)),
    Stage(1, 2, (Phase(2000, 1e-5, convert=1, timesteps=4), *one_step(LORA, FULL, 4)), predicts_x0=True),
)

# One LoRA throughout, heads on a frozen backbone, which shares the teacher's weights: one U-Net in memory.
SMALL = replace(LORA, taps=("down.1", "mid"), relativistic=True, backbone_rate=0, head_rate=5, learning_rate=2e-5)
ONE_GPU = (
    Stage(8, 32, (Phase(2000, 1e-4, lora=True, mse=1),)),
    Stage(4, 8, adversarial_phases(replace(SMALL, steps=1000, head_start=100), None)),
    Stage(2, 4, adversarial_phases(replace(SMALL, steps=1000, head_start=100, timesteps=4), None, 8)),
)

# The miniature, in minutes. On its own path a student learns to mend its own errors.
MSE = Phase(150, 3e-4, mse=1, schedule="cosine", warmup=10)
OWN_PATH = replace(MSE, rollout=True)
TAPS = ("down.0", "down.1")
GAN = Phase(100, 1e-5, adversarial=1, mse=0.5, taps=TAPS, relativistic=True, backbone_rate=50, head_rate=500)
MATCH = Phase(100, 5e-5, matching=1, mse=0.5, rollout=True, fake_rate=10)
SKIP = replace(OWN_PATH, teacher=8)
DEMO = (
    Stage(8, 8, (replace(MSE, steps=100), replace(OWN_PATH, steps=110))),
    Stage(4, 8, (replace(OWN_PATH, steps=80),)),
    Stage(
        2, 4,
        (
            replace(SKIP, steps=120),
            replace(GAN, steps=60, head_start=35, teacher=8),
            replace(MATCH, steps=80, teacher=8),
        ),
    ),
    Stage(1, 2, (replace(SKIP, steps=90), replace(MATCH, steps=60, learning_rate=1e-4, teacher=8))),
)  # fmt: skip

# The miniature, longer: one LoRA throughout, with distribution matching from 4 steps on.
LONG = replace(SKIP, steps=200, lora=True, learning_rate=1e-3)
MATCHED = replace(LONG, learning_rate=5e-4, mse=0.5, matching=1, fake_rate=1, warmup=0)
BEST = (
    Stage(8, 16, (replace(LONG, steps=100, teacher=16, rollout=False), replace(LONG, steps=300, teacher=16))),
    Stage(4, 8, (LONG, replace(MATCHED, steps=200, head_start=30))),
    Stage(2, 4, (LONG, replace(MATCHED, steps=400, head_start=30))),
    Stage(1, 2, (LONG, replace(MATCHED, steps=400, head_start=30))),
)

# One student for several numbers of steps.
ANY = (DEMO[0], Stage(4, 8, (replace(MSE, steps=300, learning_rate=1e-4),), mixed=(1, 2, 4, 8)))

# A distilled student learns from new images, and keeps its number of steps: D' compares its samples with the data.
KEEP = Phase(
    300, 3e-5, adversarial=1, from_data=True, conditional=False, taps=TAPS, relativistic=True, backbone_rate=30,
    head_rate=150, head_start=60,
)  # fmt: skip
KEEP_LORA = replace(KEEP, lora=True, backbone_rate=0)

# Claims of the paper, each beside its control, in about two minutes of one core: `minidistill.claims` runs them.
HALF = replace(MSE, steps=75)
JUDGED = replace(GAN, steps=75, head_start=35, conditional=False)
SOON = replace(MATCH, steps=60, learning_rate=1e-4, head_start=10)
TRIALS: dict[str, tuple[Stage, ...]] = {
    "8-mse": (Stage(8, 8, (replace(MSE, steps=250),)),),
    "8-own-path": (Stage(8, 8, (HALF, replace(MSE, steps=115, rollout=True))),),
    "2-mse": (Stage(2, 8, (MSE,)),),
    "2-unfixed": (Stage(2, 8, (MSE,)),),
    "2-conditional": (Stage(2, 8, (HALF, replace(JUDGED, conditional=True))),),
    "2-unconditional": (Stage(2, 8, (HALF, JUDGED)),),
    "2-both": (
        Stage(2, 8, (HALF, replace(JUDGED, steps=50, conditional=True), replace(JUDGED, steps=25, head_start=10))),
    ),
    "2-matching": (Stage(2, 8, (HALF, SOON)),),
    "1-mse": (Stage(1, 8, (MSE,)),),
    "1-x0": (Stage(1, 8, (replace(HALF, mse=0, convert=1), HALF), predicts_x0=True),),
    "1-noised": (Stage(1, 8, (HALF, replace(JUDGED, noise_levels=LEVELS))),),
    "1-clean": (Stage(1, 8, (HALF, JUDGED)),),
    "1-matching": (Stage(1, 8, (HALF, SOON)),),
    "4-keep": (Stage(4, 4, (replace(KEEP, steps=150, head_start=40),)),),
    "4-finetune": (Stage(4, 4, (replace(MSE, steps=300, from_data=True),)),),
}

PLANS: dict[str, tuple[Stage, ...]] = {
    "paper": PAPER,
    "one-gpu": ONE_GPU,
    "demo": DEMO,
    "best": BEST,
    "any": ANY,
    "keep": (Stage(0, 0, (KEEP,)),),
    "keep-lora": (Stage(0, 0, (KEEP_LORA,)),),
}

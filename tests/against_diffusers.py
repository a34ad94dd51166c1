"""The work of `python -m minidistill.benchmark --against diffusers`, done there. The command loads this file.

`open_model` samples; `open_ours` and `open_originals` are a training step of block removal and knowledge distillation:
ours, the loop of train_kd, and that of BK-SDM's code (kd_train_text_to_image.py), rebuilt from diffusers' parts. Each
returns the tensors that stay in memory, and the works to be timed by their names.
"""

import itertools
import tempfile
import warnings

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers.training_utils import EMAModel

from minidistill import train_kd
from minidistill.benchmark import PROMPT, Case, Config, Job, Row, unet_facts
from minidistill.diffusion.schedule import add_noise, make_alpha_bar, training_target
from minidistill.distill import kd
from minidistill.errors import InputError
from minidistill.training import optim
from minidistill.training.device import PRECISIONS
from minidistill.weights.folders import find_model

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()  # of image processors, which are not used
warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # dtype is not known to diffusers 0.41
ENDLESS = 10**6  # steps of a training of which a few are done


def load(source, device, dtype, vae_dtype):
    """A pipeline of diffusers, its VAE in a precision of its own."""
    path = find_model(source)
    if path.is_file():
        pipe = diffusers.DiffusionPipeline.from_single_file(path, torch_dtype=dtype)
        pipe.vae.to(vae_dtype)
    else:
        dtypes = {"vae": vae_dtype, "default": dtype}
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=dtypes, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def parameters(*networks):
    return [p for network in networks for p in network.parameters()]


def open_model(job: Job):
    """As in minidistill.benchmark: a U-Net call, and a batch of images from the same noise."""
    pipe, settings = load(job.source, job.device, job.dtype, job.vae_dtype), job.settings
    x, t, context, added = job.inputs
    kind = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}[settings.sampler]
    own = {"timestep_spacing": settings.spacing, "prediction_type": settings.prediction}
    if settings.sampler == "ddim":
        own["clip_sample"] = False
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **own)

    @torch.no_grad()
    def call():
        return pipe.unet(x, t, context, added_cond_kwargs=added).sample

    @torch.no_grad()
    def images():
        latents = pipe(
            [PROMPT] * len(x),
            latents=x,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            height=job.size[0],
            width=job.size[1],
            output_type="latent",  # which leaves the VAE in its precision
        ).images
        pixels = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
        return pipe.image_processor.postprocess(pixels)

    encoders = [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    return parameters(pipe.unet, pipe.vae, *encoders), {"call_ms": call, "batch_ms": images}


def prepare_training(config: Config, case: Case) -> tuple[train_kd.Run, Row]:
    """A run of train_kd that is set up, and size and MACs of its student."""
    few = case.batch_size * (config.rounds + 3)  # scenes: all are rendered and encoded now
    own = {"resolution": case.resolution, "batch_size": case.batch_size, "data": config.data, "images": few}
    own |= {"device": str(case.device), "precision": case.precision, "steps": ENDLESS}
    with tempfile.TemporaryDirectory() as folder:  # which stays empty
        own |= {"teacher": case.model, "recipe": config.recipe, "out": folder}
        run = train_kd.set_up(train_kd.Config(**own), measured=False)
    if run.teacher.is_sdxl:
        raise InputError(f"--recipe: BK-SDM's code trains SD 1.x and 2.x, {case.model} is an SDXL")
    batch = run.batches[0]
    facts = unet_facts(run.student.unet, *batch.x0.shape[2:], batch.context.shape[1])
    return run, {"student": config.recipe, "resolution": run.batches.size[0], **facts}


def open_ours(run: train_kd.Run):
    """train_kd after its first step; all its networks are counted that are on the device."""
    alpha_bar, numbers = make_alpha_bar(run.teacher.schedule).to(run.teacher.device), itertools.count()

    def step():
        our_step(run, alpha_bar, next(numbers))

    step()  # which makes the optimizer's averages
    kept = parameters(run.student.unet, run.teacher.vae, *run.teacher.networks.values())
    return [*kept, *averages(run.optimizer), *run.ema.shadow.values()], {"batch_ms": step}


def our_step(run: train_kd.Run, alpha_bar: torch.Tensor, number: int) -> None:
    """What the loop of train_kd does in one step of one batch, but for its log, images and checkpoints."""
    config, teacher, student, schedule = run.config, run.teacher.unet, run.student.unet, run.teacher.schedule
    batch = run.batches[number]
    inputs = add_noise(batch.x0, batch.eps, batch.t, alpha_bar), batch.t, batch.context, batch.added_cond
    with run.precision.autocast, torch.no_grad():
        teacher_out, teacher_features = teacher(*inputs, return_features=True)
    with run.precision.autocast:
        student_out, student_features = student(*inputs, return_features=True)
    target = training_target(batch.x0, batch.eps, batch.t, alpha_bar, schedule.prediction_type)
    task, output = kd.task_loss(student_out, target), kd.output_loss(student_out, teacher_out)
    feature = kd.feature_loss(student_features, teacher_features, run.pairs, config.feature_norm)
    loss = sum(w * value for w, value in zip(config.loss_weights, (task, output, feature), strict=True))
    optim.check_finite(loss, number + 1, batch.t)
    run.precision.scaler.scale(loss.mean()).backward()
    lr = optim.lr_at(number, config.learning_rate, config.warmup, config.steps, config.lr_schedule)
    clip = config.max_grad_norm
    optim.optimizer_step(student, run.optimizer, run.precision.scaler, lr, clip, number + 1, batch.t)
    run.ema.update()


class Originals:
    """BK-SDM's training: frozen networks in the run's precision, features caught by hooks, nothing cached."""

    def __init__(self, run: train_kd.Run) -> None:
        self.run, config, device = run, run.config, run.teacher.device
        self.dtype = PRECISIONS[config.precision]
        pipe = load(config.teacher, device, self.dtype, self.dtype)
        self.teacher, self.vae, self.text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
        for network in (self.teacher, self.vae, self.text_encoder):
            network.requires_grad_(False)
        self.student = diffusers.UNet2DConditionModel.from_config(run.student.unet.config.to_dict()).to(device)
        self.student.load_state_dict(run.student.unet.state_dict())
        kind = run.teacher.schedule.prediction_type
        self.schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
        self.caught: dict[tuple[str, str], torch.Tensor] = {}
        for theirs, ours in run.pairs:
            self.hook("teacher", self.teacher, theirs)
            self.hook("student", self.student, ours)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-5, weight_decay=config.weight_decay)
        self.ema = EMAModel(self.student.parameters(), decay=config.ema_decay)
        # A batch as their data loader gives it: pixels and tokens, here always the same
        self.pixels = torch.rand(config.batch_size, 3, *run.batches.size[::-1], device=device, dtype=self.dtype) * 2 - 1
        captions = (run.batches.captions(config.batch_size) * config.batch_size)[: config.batch_size]
        padded = {"max_length": pipe.tokenizer.model_max_length, "padding": "max_length", "truncation": True}
        self.tokens = pipe.tokenizer(captions, return_tensors="pt", **padded).input_ids.to(device)

    def hook(self, which: str, unet: torch.nn.Module, name: str) -> None:
        """Keep what a block puts out, under our name of it, such as up.0 or down.2.proj_out, its last transformer's."""
        side, *rest = name.split(".")
        module = unet.mid_block if side == "mid" else getattr(unet, f"{side}_blocks")[int(rest[0])]
        if rest[1:]:
            module = module.attentions[-1].proj_out

        def keep(_module, _inputs, output):
            self.caught[which, name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(keep)

    def losses(self, noisy, t, states, target) -> tuple[torch.Tensor, ...]:
        """Task, output and feature loss."""
        with self.run.precision.autocast:
            out = self.student(noisy, t, states).sample
        with torch.no_grad():
            theirs = self.teacher(noisy, t, states).sample
        pairs = [(self.caught["teacher", a], self.caught["student", b]) for a, b in self.run.pairs]
        feature = sum(F.mse_loss(b.float(), a.float()) for a, b in pairs)
        return F.mse_loss(out.float(), target.float()), F.mse_loss(out.float(), theirs.float()), feature

    def step(self) -> None:
        """One step of their loop."""
        latents = self.vae.encode(self.pixels).latent_dist.sample() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, self.schedule.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.schedule.add_noise(latents, noise, t)
        states = self.text_encoder(self.tokens)[0]
        is_v = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, t) if is_v else noise
        config, scaler = self.run.config, self.run.precision.scaler
        loss = sum(w * part for w, part in zip(config.loss_weights, self.losses(noisy, t, states, target), strict=True))
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), config.max_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()
        self.ema.step(self.student.parameters())
        loss.item()  # for their log


def open_originals(run: train_kd.Run):
    """BK-SDM's loop after its first step."""
    theirs = Originals(run)
    theirs.step()
    kept = parameters(theirs.student, theirs.teacher, theirs.vae, theirs.text_encoder)
    return [*kept, *averages(theirs.optimizer), *theirs.ema.shadow_params], {"batch_ms": theirs.step}


def averages(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


MODELS = {"diffusers": open_model}
TRAININGS = {"minidistill": open_ours, "diffusers": open_originals}

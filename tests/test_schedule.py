"""The noise schedule: golden numbers, conversions in both directions, `move`, time grids, configs."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from minidistill.diffusion.samplers import sigmas_at
from minidistill.diffusion.sampling import default_solver
from minidistill.diffusion.schedule import (
    PREDICTIONS,
    SPACINGS,
    ScheduleConfig,
    add_noise,
    alpha_at,
    final_alpha_bar,
    make_alpha_bar,
    move,
    time_grid,
    to_eps,
    to_x0,
    training_target,
)

ALPHA_BAR = make_alpha_bar(ScheduleConfig())
ZERO_SNR = make_alpha_bar(ScheduleConfig(rescale_betas_zero_snr=True))
T_BATCH = torch.tensor([0, 249, 499, 999])


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, 3, 5, generator=g, dtype=dtype), torch.randn(4, 4, 3, 5, generator=g, dtype=dtype)


def test_golden_alpha_bar_and_sigma_of_stable_diffusion():
    t = torch.tensor([0, 1, 249, 499, 749, 999])
    golden = [0.99914998, 0.99829602, 0.67543209, 0.27766943, 0.05662345, 0.00466010]
    assert ALPHA_BAR.dtype == torch.float32 and ALPHA_BAR.shape == (1000,)
    assert torch.allclose(ALPHA_BAR[t], torch.tensor(golden), rtol=2e-6, atol=0)
    sigma = [0.0291672, 0.0413144, 0.6932049, 1.6128862, 4.0817294, 14.6146412]
    assert torch.allclose(sigmas_at(ALPHA_BAR, t), torch.tensor(sigma), rtol=2e-5, atol=0)  # 1 - abar_0 in float32


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("T", [1000, 100])
def test_alpha_bar_is_diffusers_alpha_bar(beta_schedule, zero_snr, T):
    config = ScheduleConfig(T, beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr)
    scheduler = DDIMScheduler.from_config(config.to_dict())
    assert torch.equal(make_alpha_bar(config), scheduler.alphas_cumprod)
    for to_one in (False, True):
        config = ScheduleConfig(T, set_alpha_to_one=to_one)
        scheduler = DDIMScheduler.from_config(config.to_dict())
        assert final_alpha_bar(config, make_alpha_bar(config)) == scheduler.final_alpha_cumprod.item()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids_are_diffusers_grids(spacing):
    """Except for the additional step at t = -1 that diffusers has for some counts with trailing spacing."""
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    euler = EulerDiscreteScheduler(timestep_spacing=spacing, steps_offset=1)
    surplus = []
    for steps in [*range(1, 51, 3), *range(51, 1000, 53), 61, 103, 128, 206, 999]:
        ours = time_grid(steps, spacing)
        fractional = time_grid(steps, spacing, fractional=True)
        scheduler.set_timesteps(steps)
        euler.set_timesteps(steps)
        if len(scheduler.timesteps) > steps:
            surplus.append(steps)
            assert scheduler.timesteps[-1] == -1
        assert ours.dtype == torch.int64 and torch.equal(ours, scheduler.timesteps[:steps])
        assert fractional.dtype == torch.float32 and torch.equal(fractional, euler.timesteps[:steps])
        assert len(ours) == steps and (ours[1:] < ours[:-1]).all() and ours[-1] >= 0 and ours[0] <= 999
    assert (spacing == "trailing") == bool(surplus)
    assert min(surplus, default=51) > 50


def test_golden_grids():
    assert time_grid(4, "leading").tolist() == [751, 501, 251, 1]
    assert time_grid(4, "leading", offset=0).tolist() == [750, 500, 250, 0]
    assert time_grid(1, "trailing").tolist() == [999]
    assert time_grid(8, "trailing").tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert time_grid(128, "trailing")[:5].tolist() == [999, 991, 983, 976, 968]
    assert time_grid(4, "linspace").tolist() == [999, 666, 333, 0]
    assert time_grid(3, "linspace", fractional=True).tolist() == [999.0, 499.5, 0.0]
    assert time_grid(4, "trailing", num_train_timesteps=100).tolist() == [99, 74, 49, 24]


def test_coarser_lightning_grids_lie_on_the_finer_ones():
    grids = {n: set(time_grid(n, "trailing").tolist()) for n in (128, 32, 8, 4, 2, 1)}
    for fine, coarse in ((128, 32), (32, 8), (8, 4), (4, 2), (2, 1)):
        assert grids[coarse] <= grids[fine], (fine, coarse, grids[coarse] - grids[fine])


def test_invalid_grids_are_refused():
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match=r"steps must be 1 \.\. 1000"):
            time_grid(steps, "trailing")
    with pytest.raises(ValueError, match=r"leave 0 \.\. 999"):
        time_grid(1000, "leading", offset=1)
    with pytest.raises(ValueError, match="leading, trailing, linspace"):
        time_grid(4, "karras")


@pytest.mark.parametrize("t", [T_BATCH, torch.tensor(499, dtype=torch.int32), 499])
def test_every_conversion_recovers_x0_and_eps(t):
    x0, eps = pair()
    x_t = add_noise(x0, eps, t, ALPHA_BAR)
    a = alpha_at(ALPHA_BAR, t, x0)
    v = a.sqrt() * eps - (1 - a).sqrt() * x0
    for prediction in PREDICTIONS:
        out = training_target(x0, eps, t, ALPHA_BAR, prediction)
        assert torch.equal(out, {"epsilon": eps, "sample": x0, "v_prediction": v}[prediction])
        assert torch.allclose(to_x0(out, x_t, t, ALPHA_BAR, prediction), x0, atol=1e-5)
        assert torch.allclose(to_eps(out, x_t, t, ALPHA_BAR, prediction), eps, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_move_with_the_exact_output_gives_the_exact_x_t(prediction):
    """Up, down, to clean, and to the same t."""
    x0, eps = pair()
    for t, t_next in itertools.product((0, 1, 499, 999), (-1, 0, 249, 499, 998)):
        x_t = add_noise(x0, eps, t, ALPHA_BAR)
        out = training_target(x0, eps, t, ALPHA_BAR, prediction)
        expected = x0 if t_next == -1 else add_noise(x0, eps, t_next, ALPHA_BAR)
        for target in (t_next, torch.full((4,), t_next)):
            assert torch.allclose(move(x_t, out, t, target, ALPHA_BAR, prediction), expected, atol=1e-5)


def test_move_takes_a_different_step_for_each_sample():
    x0, eps = pair()
    t, t_next = torch.tensor([999, 749, 499, 249]), torch.tensor([499, 249, 249, -1])
    moved = move(add_noise(x0, eps, t, ALPHA_BAR), eps, t, t_next, ALPHA_BAR)
    for b in range(4):
        one = slice(b, b + 1)
        alone = move(add_noise(x0[one], eps[one], t[one], ALPHA_BAR), eps[one], int(t[b]), int(t_next[b]), ALPHA_BAR)
        assert torch.allclose(moved[one], alone)


def test_golden_coefficients_of_the_lightning_steps():
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for prediction, t, t_next, golden in (
        ("epsilon", 999, -1, (14.649, -14.615)),
        ("epsilon", 999, 499, (7.719, -6.851)),
        ("epsilon", 499, 249, (1.560, -0.756)),
        ("sample", 749, 499, (0.875, 0.319)),
    ):
        of_x = move(one, zero, t, t_next, ALPHA_BAR, prediction).item()
        of_out = move(zero, one, t, t_next, ALPHA_BAR, prediction).item()
        assert (of_x, of_out) == pytest.approx(golden, abs=1.01e-3)


def test_pure_noise_at_the_end_is_exactly_the_noise_and_only_there():
    x0, eps = pair(torch.float32)
    plain, pure = add_noise(x0, eps, T_BATCH, ALPHA_BAR), add_noise(x0, eps, T_BATCH, ALPHA_BAR, True)
    assert torch.equal(pure[:3], plain[:3])
    assert torch.equal(pure[3], eps[3]) and not torch.equal(plain[3], eps[3])
    assert torch.equal(add_noise(x0, eps, 999, ALPHA_BAR, True), eps)
    # conversions keep the original abar, as in the paper, to avoid division by zero
    assert torch.isfinite(to_x0(eps, pure, T_BATCH, ALPHA_BAR, "epsilon")).all()


def test_zero_terminal_snr_is_defined_where_it_can_be_and_refused_where_not():
    x0, eps = pair()
    x_t = add_noise(x0, eps, 999, ZERO_SNR)
    assert torch.equal(x_t, eps)
    assert torch.allclose(to_x0(-x0, x_t, 999, ZERO_SNR, "v_prediction"), x0)
    assert torch.allclose(to_eps(-x0, x_t, 999, ZERO_SNR, "v_prediction"), eps)
    assert torch.allclose(to_eps(x0, x_t, 999, ZERO_SNR, "sample"), eps)
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        to_x0(eps, x_t, T_BATCH, ZERO_SNR, "epsilon")
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        move(x_t, eps, 999, 499, ZERO_SNR)
    assert torch.equal(to_eps(eps, x_t, 999, ZERO_SNR, "epsilon"), eps)


def test_conversions_at_clean_latents():
    x0, eps = pair()
    assert torch.equal(add_noise(x0, eps, -1, ALPHA_BAR), x0)
    assert torch.equal(to_x0(eps, x0, -1, ALPHA_BAR, "epsilon"), x0)
    with pytest.raises(ValueError, match="alpha_bar = 1"):
        to_eps(x0, x0, -1, ALPHA_BAR, "sample")
    assert torch.allclose(move(x0, eps, -1, 499, ALPHA_BAR), add_noise(x0, eps, 499, ALPHA_BAR))


@pytest.mark.parametrize("t", [T_BATCH, 999])
def test_half_precision_latents_are_computed_in_float32(t):
    x0, eps = (z.bfloat16() for z in pair())
    x_t = add_noise(x0, eps, t, ALPHA_BAR)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, add_noise(x0.float(), eps.float(), t, ALPHA_BAR))
    for prediction in PREDICTIONS:
        for convert in (to_x0, to_eps):
            half = convert(eps, x0, t, ALPHA_BAR, prediction)
            assert half.dtype == torch.float32
            assert torch.equal(half, convert(eps.float(), x0.float(), t, ALPHA_BAR, prediction))


def test_invalid_timesteps_and_predictions_are_refused():
    x0, eps = pair()
    for t in (1000, -2, torch.tensor([0, 1, 2, 1000])):
        with pytest.raises(ValueError, match=r"t must be -1 \.\. 999"):
            add_noise(x0, eps, t, ALPHA_BAR)
    with pytest.raises(ValueError, match="t must be integer"):
        add_noise(x0, eps, torch.tensor(499.5), ALPHA_BAR)
    for call in (to_x0, to_eps, training_target):
        with pytest.raises(ValueError, match="epsilon, sample, v_prediction"):
            call(x0, eps, 5, ALPHA_BAR, "eps")


WRITERS = [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler, UniPCMultistepScheduler]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.filterwarnings("ignore:LCMScheduler")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_config_of_any_scheduler_is_read_with_the_defaults_of_its_class(writer, tmp_path):
    scheduler = writer(**BETAS)
    scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    full, short = ScheduleConfig.from_dict(written), ScheduleConfig.from_dict({"_class_name": writer.__name__, **BETAS})
    assert short == replace(full, timestep_spacing=None)
    for name in full.to_dict().keys() & written.keys() - {"clip_sample", "trained_betas", "_class_name"}:
        assert getattr(full, name) == written[name]
    clips = scheduler.config.get("clip_sample", False)
    assert full.ignored == short.ignored == (("clip_sample = True",) if clips else ())
    assert torch.equal(make_alpha_bar(full), scheduler.alphas_cumprod)


@pytest.mark.filterwarnings("ignore:LCMScheduler")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
def test_the_spacing_is_that_of_diffusers_after_a_change_of_the_sampler(writer, spacing, tmp_path):
    """Without a spacing in the file, `from_config` takes the default of the new sampler, not of the writer."""
    config = {"_class_name": writer.__name__, **BETAS} | ({"timestep_spacing": spacing} if spacing else {})
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    theirs, ours = writer.from_pretrained(tmp_path).config, ScheduleConfig.from_dict(config)
    for sampler, kind in (("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler)):
        expected = sampler, kind.from_config(theirs).config.timestep_spacing
        assert default_solver(ours, sampler) == expected
        assert default_solver(ScheduleConfig.from_dict(ours.to_dict()), sampler) == expected


def test_eps_prediction_from_zero_terminal_snr_is_sampled_with_euler():
    schedule = ScheduleConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert default_solver(schedule) == ("euler", "trailing")
    assert default_solver(schedule, "ddim") == ("ddim", "trailing")  # which `ddim` refuses
    assert default_solver(schedule, spacing="leading") == ("ddim", "leading")
    assert default_solver(replace(schedule, timestep_spacing=None)) == ("ddim", "leading")
    assert default_solver(replace(schedule, prediction_type="v_prediction")) == ("ddim", "trailing")
    assert default_solver(replace(schedule, rescale_betas_zero_snr=False)) == ("ddim", "trailing")


def test_settings_of_solvers_do_not_matter_to_the_noise_and_are_named():
    for config, ignored in (
        ({"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True}, ("use_karras_sigmas = True",)),
        ({"final_sigmas_type": "sigma_min", "sigma_min": 0.03}, ("final_sigmas_type = sigma_min", "sigma_min = 0.03")),
        ({"clip_sample": True, "thresholding": True}, ("clip_sample = True", "thresholding = True")),
        ({"thresholding": None, "use_beta_sigmas": False}, ()),
    ):
        schedule = ScheduleConfig.from_dict(ScheduleConfig().to_dict() | config)
        assert schedule == ScheduleConfig() and schedule.ignored == ignored
        assert ScheduleConfig.from_dict(schedule.to_dict()).ignored == ()


@pytest.mark.parametrize("writer", ["LCMScheduler", "TCDScheduler"])
def test_models_of_consistency_sampling_are_named_in_a_warning(writer):
    with pytest.warns(UserWarning, match=f"{writer}.*consistency sampling"):
        schedule = ScheduleConfig.from_dict(ScheduleConfig().to_dict() | {"_class_name": writer})
    assert schedule == ScheduleConfig()


def test_the_official_config_of_stable_diffusion_gives_the_defaults_and_any_round_trips():
    shipped = {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **BETAS, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
        "clip_sample": False,
    }  # fmt: skip
    assert ScheduleConfig.from_dict(shipped) == replace(ScheduleConfig(), timestep_spacing=None)
    config = ScheduleConfig(
        500, 0.001, 0.02, "linear", "v_prediction", 0, True, "trailing", rescale_betas_zero_snr=True
    )
    assert ScheduleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    theirs = DDIMScheduler.from_config(config.to_dict()).config
    assert ScheduleConfig.from_dict(dict(theirs)) == config and theirs["clip_sample"] is False


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "betas 0.5 .. 0.1"),
        ({"num_train_timesteps": 0}, "T = 0"),
    ],
)
def test_settings_that_change_the_noise_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named) as caught:
        ScheduleConfig.from_dict(ScheduleConfig().to_dict() | change)
    assert "\n" not in str(caught.value)

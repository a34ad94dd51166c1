"""The samplers: DDIM and Euler against diffusers and against exact solutions, and guidance.

The previous timestep of diffusers' DDIMScheduler is t - T // steps, which is not on its own grid where the spacing
varies; ours is the next entry of the grid. `oracle_ddim` sets the gaps of our grid in the scheduler, so that its
formulas are compared; with true_gaps=False the scheduler is unmodified.
"""

import math
from fractions import Fraction
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from minidistill.diffusion.samplers import ddim, euler, guide
from minidistill.diffusion.schedule import (
    PREDICTIONS,
    SPACINGS,
    ScheduleConfig,
    final_alpha_bar,
    make_alpha_bar,
    time_grid,
)

ALPHA_BAR = make_alpha_bar(ScheduleConfig())
COUNTS = (1, 2, 3, 4, 5, 7, 8, 13, 20, 25, 30, 50)  # of steps; 3, 7, 13, 30 do not divide 1000
samplers = pytest.mark.parametrize("sampler", [ddim, euler])
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def toy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth, bounded function of x and t."""
    t = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) / 1000
    return 0.8 * torch.tanh(x + 0.3) + 0.2 * torch.sin(5 * t + x)


def noise(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-5) -> None:
    assert torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def oracle_ddim(steps: int, config: ScheduleConfig, x: torch.Tensor, true_gaps: bool = True):
    scheduler = DDIMScheduler.from_config(config.to_dict())
    scheduler.set_timesteps(steps)
    grid = scheduler.timesteps.tolist()
    for t, t_next in zip(grid, [*grid[1:], -1], strict=True):
        if true_gaps:
            scheduler.num_inference_steps = Fraction(config.num_train_timesteps, t - t_next)
        out = toy(x, torch.full((len(x),), t))
        x = scheduler.step(out, t, x).prev_sample
    return x


@predictions
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_equals_diffusers_formulas_on_our_grid(spacing, prediction, to_one):
    config = ScheduleConfig(timestep_spacing=spacing, prediction_type=prediction, set_alpha_to_one=to_one)
    for steps in COUNTS:
        grid, end = time_grid(steps, spacing), final_alpha_bar(config, ALPHA_BAR)
        ours = ddim(toy, noise(), grid, ALPHA_BAR, prediction, final_alpha_bar=end)
        assert_close(ours, oracle_ddim(steps, config, noise()))


@pytest.mark.parametrize(
    ("spacing", "counts", "equal"),
    [
        ("leading", COUNTS, True),
        ("trailing", (1, 2, 4, 5, 8, 10, 20, 25, 50), True),
        ("linspace", (25,), False),
        ("trailing", (30,), False),
    ],
)
def test_ddim_equals_the_unmodified_diffusers_scheduler_where_the_spacing_is_constant_only(spacing, counts, equal):
    for steps in counts:
        ours = ddim(toy, noise(), time_grid(steps, spacing), ALPHA_BAR, final_alpha_bar=float(ALPHA_BAR[0]))
        theirs = oracle_ddim(steps, ScheduleConfig(timestep_spacing=spacing), noise(), true_gaps=False)
        if equal:
            assert_close(ours, theirs)
        else:
            assert (ours - theirs).norm() > 0.005 * theirs.norm()


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_ddim_starts_from_zero_terminal_snr(spacing, prediction):
    config = ScheduleConfig(timestep_spacing=spacing, prediction_type=prediction, rescale_betas_zero_snr=True)
    alpha_bar = make_alpha_bar(config)
    for steps in (2, 7, 25):
        grid = time_grid(steps, spacing)
        ours = ddim(toy, noise(), grid, alpha_bar, prediction, final_alpha_bar=final_alpha_bar(config, alpha_bar))
        assert_close(ours, oracle_ddim(steps, config, noise()))


def oracle_euler(steps: int, config: ScheduleConfig, x: torch.Tensor) -> torch.Tensor:
    scheduler = EulerDiscreteScheduler.from_config(config.to_dict())
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = toy(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(out, t, x).prev_sample
    return x


@predictions
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_equals_diffusers_euler(spacing, prediction):
    config = ScheduleConfig(timestep_spacing=spacing, prediction_type=prediction)
    for steps in COUNTS:
        grid = time_grid(steps, spacing, fractional=True)
        ours = euler(toy, noise(), grid, ALPHA_BAR, prediction, pure_noise=spacing == "leading")
        assert_close(ours, oracle_euler(steps, config, noise()))


@predictions
def test_euler_starts_from_zero_terminal_snr_at_the_sigma_of_diffusers(prediction):
    config = ScheduleConfig(timestep_spacing="trailing", prediction_type=prediction, rescale_betas_zero_snr=True)
    for steps in (1, 4, 25):
        ours = euler(toy, noise(), time_grid(steps, "trailing"), make_alpha_bar(config), prediction)
        # sigma is 4096 here, so x + (sigma' - sigma) d in diffusers loses a factor of 4096 in precision
        assert_close(ours, oracle_euler(steps, config, noise()), relative=1e-3)


@predictions
def test_ddim_to_clean_from_scaled_noise_is_euler(prediction):
    scale = float((1 - ALPHA_BAR[999]).sqrt())
    assert scale == pytest.approx(0.9976672, abs=1e-6)
    for steps in (1, 2, 4, 8, 25):
        grid = time_grid(steps, "trailing")
        assert_close(
            ddim(toy, scale * noise(), grid, ALPHA_BAR, prediction),
            euler(toy, noise(), grid, ALPHA_BAR, prediction),
        )
        assert_close(
            ddim(toy, noise(), grid, ALPHA_BAR, prediction),
            euler(toy, noise(), grid, ALPHA_BAR, prediction, pure_noise=True),
        )
    pure, scaled = ddim(toy, noise(), grid, ALPHA_BAR), euler(toy, noise(), grid, ALPHA_BAR)
    assert (pure - scaled).abs().max() > 1e-4  # the two are distinguishable


MEAN, STD = 0.7, 0.4


def exact_eps(alpha_bar: torch.Tensor):
    """The exact eps(x, t) of Gaussian data N(MEAN, STD^2), whose x_t is Gaussian."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alpha_bar[t].reshape(-1, 1, 1, 1).to(x.dtype)
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)

    return model


def exact_flow(x: torch.Tensor, a: float, a_end: float) -> torch.Tensor:
    """The exact probability flow from x_t: it preserves the number of standard deviations from the mean."""
    deviations = (x - a**0.5 * MEAN) / (a * STD**2 + 1 - a) ** 0.5
    return a_end**0.5 * MEAN + (a_end * STD**2 + 1 - a_end) ** 0.5 * deviations


def orders(errors: list[float]) -> list[float]:
    """Measured orders of convergence, from errors at doubling step counts."""
    return [math.log2(a / b) for a, b in pairwise(errors)]


def test_ddim_converges_with_order_one_on_gaussian_data():
    x, a, a_end = noise(dtype=torch.float64), float(ALPHA_BAR[999]), float(ALPHA_BAR[199])
    errors = []
    for steps in (10, 20, 40, 80, 160):
        grid = torch.arange(999, 199, -800 // steps)
        ours = ddim(exact_eps(ALPHA_BAR), x, grid, ALPHA_BAR, final_alpha_bar=a_end)
        errors.append((ours - exact_flow(x, a, a_end)).abs().max().item())
    assert len(grid) == 160 and errors[-1] < 0.01
    assert all(0.9 < order < 1.1 for order in orders(errors)), (errors, orders(errors))
    # sigma is proportional to sqrt(t) near t = 0, where equal steps in t cost a factor log N.
    for sampler in (ddim, partial(euler, pure_noise=True)):
        errors = []
        for steps in (25, 50, 100, 200):
            ours = sampler(exact_eps(ALPHA_BAR), x, time_grid(steps, "trailing"), ALPHA_BAR)
            errors.append((ours - exact_flow(x, a, 1.0)).abs().max().item())
        assert all(0.75 < order < 1.0 for order in orders(errors)), (errors, orders(errors))


def test_one_step_of_an_x0_model_returns_its_output():
    grid = time_grid(1, "trailing")
    out = toy(noise(), torch.tensor([999, 999]))
    assert torch.equal(ddim(toy, noise(), grid, ALPHA_BAR, "sample"), out)
    assert_close(euler(toy, noise(), grid, ALPHA_BAR, "sample", pure_noise=True), out, 1e-6)


@samplers
def test_half_precision_latents_keep_a_float32_state(sampler):
    dtypes = []

    def model(x, t):
        dtypes.append(x.dtype)
        return toy(x.float(), t)

    x = noise().bfloat16()
    half = sampler(model, x, time_grid(20, "trailing"), ALPHA_BAR)
    full = sampler(toy, x.float(), time_grid(20, "trailing"), ALPHA_BAR)
    assert half.dtype == torch.bfloat16 and set(dtypes) == {torch.bfloat16}
    # A bfloat16 state would lose far more over 20 steps.
    assert_close(half.float(), full, relative=0.03)


@samplers
def test_samplers_refuse_invalid_grids(sampler):
    for grid in ([1, 500], [500, 500], [], [1000, 1], [5, -1]):
        with pytest.raises(ValueError, match="timesteps must"):
            sampler(toy, noise(), torch.tensor(grid), ALPHA_BAR)
    with pytest.raises(ValueError, match="prediction must"):
        sampler(toy, noise(), time_grid(2, "trailing"), ALPHA_BAR, "eps")


def test_ddim_refuses_invalid_settings():
    grid = time_grid(4, "trailing")
    with pytest.raises(ValueError, match="integer timesteps"):
        ddim(toy, noise(), time_grid(4, "linspace", fractional=True), ALPHA_BAR)
    zero = make_alpha_bar(ScheduleConfig(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="undefined at alpha_bar = 0"):
        ddim(toy, noise(), grid, zero)
    assert torch.isfinite(ddim(toy, noise(), time_grid(4, "leading"), zero)).all()


def fake_unet(calls):
    def unet(x, t, context, added_cond=None):
        calls.append((x, t, context, added_cond))
        bias = context.mean((1, 2)) + (added_cond["text_embeds"].mean(1) if added_cond else 0)
        return x * 0 + bias.reshape(-1, 1, 1, 1)

    return unet


def test_guidance_batches_uncond_first_and_extrapolates_and_of_one_or_less_is_off():
    calls, context, uncond = [], torch.full((2, 7, 3), 3.0), torch.full((2, 7, 3), 1.0)
    out = guide(fake_unet(calls), context, uncond, 7.5)(noise(), torch.tensor([9, 8]))
    torch.testing.assert_close(out, torch.full_like(noise(), 1 + 7.5 * 2))
    x, t, both, _ = calls.pop()
    assert torch.equal(x, torch.cat([noise(), noise()])) and t.tolist() == [9, 8, 9, 8]
    assert torch.equal(both, torch.cat([uncond, context]))
    for scale in (1.0, 0.0):  # off, not unconditional
        out = guide(fake_unet(calls), context, None, scale)(noise(), torch.tensor([9, 9]))
        assert torch.allclose(out, torch.full_like(out, 3.0)) and len(calls.pop()[0]) == 2


def test_guidance_duplicates_sdxl_conditions():
    calls, context = [], torch.zeros(2, 7, 3)
    ids = torch.arange(12.0).reshape(2, 6)
    cond, none = ({"text_embeds": value.expand(2, 5), "time_ids": ids} for value in (torch.ones(1), torch.zeros(1)))
    model = guide(fake_unet(calls), context, context, 2.0, added_cond=cond, uncond_added_cond=none)
    assert torch.allclose(model(noise(), torch.tensor(9)), torch.full_like(noise(), 2.0))
    assert torch.equal(calls[0][3]["time_ids"], torch.cat([ids, ids]))
    with pytest.raises(ValueError, match="both halves"):
        guide(fake_unet(calls), context, context, 2.0, added_cond=cond)
    with pytest.raises(ValueError, match="same shape"):
        guide(fake_unet(calls), context, None, 2.0)

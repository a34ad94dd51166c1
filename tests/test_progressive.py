"""Progressive distillation: each equation against a computation by hand, and the time grids against each other."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from minidistill.diffusion.schedule import ScheduleConfig, add_noise, make_alpha_bar, move, time_grid, to_x0
from minidistill.distill.progressive import (
    convert_loss,
    jump_table,
    mixed_jumps,
    on_schedule,
    rollout,
    solve_conv,
    teacher_path,
)

ALPHA_BAR = make_alpha_bar(ScheduleConfig())
T = 999


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def eps_model(x, t):
    """Any function of x and t; each sample has its own t."""
    return torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 1000)


# the grids


@pytest.mark.parametrize(("student", "teacher"), [(32, 128), (8, 32), (4, 8), (2, 4), (2, 8), (1, 2), (1, 4), (8, 8)])
def test_the_ends_of_jumps_are_the_grids_of_both_models(student, teacher):
    table, n = jump_table(student, teacher), teacher // student
    assert table.shape == (student, n + 1) and table.dtype == torch.int64
    assert torch.equal(table[:, 0], time_grid(student, "trailing"))
    assert torch.equal(table[:, :-1].flatten(), time_grid(teacher, "trailing"))
    assert torch.equal(table[1:, 0], table[:-1, -1]), "each jump ends where the next one starts"
    assert table[-1, -1] == -1


def test_further_timesteps_jump_as_far_and_are_clamped_at_clean():
    assert jump_table(2, 4, timesteps=4).tolist() == [[999, 749, 499], [749, 499, 249], [499, 249, -1], [249, -1, -1]]
    assert jump_table(1, 2, timesteps=4).tolist() == [[999, 499, -1], [749, 249, -1], [499, -1, -1], [249, -1, -1]]
    assert jump_table(2, 8, timesteps=4)[1].tolist() == [749, 624, 499, 374, 249]
    assert jump_table(8, 32)[0].tolist() == [999, 968, 937, 905, 874]


def test_jumps_of_several_students_are_in_one_table_equally_many_of_each():
    table = mixed_jumps((1, 2), 4)
    assert table.tolist() == 2 * [[999, 749, 499, 249, -1]] + [[999, 749, 499, 499, 499], [499, 249, -1, -1, -1]]
    assert mixed_jumps((1, 2, 4, 8), 8).shape == (32, 9)
    alone = teacher_path(eps_model, randn(2, 4, 3, 3), jump_table(2, 4), ALPHA_BAR, "epsilon")
    found = teacher_path(eps_model, randn(2, 4, 3, 3), table[2:], ALPHA_BAR, "epsilon")
    assert torch.equal(found, alone), "those that are at their end stay there"


@pytest.mark.parametrize("wrong", [(3, 8, None), (8, 4, None), (2, 4, 3), (4, 8, 2), (6, 32, None)])
def test_grids_that_are_not_nested_are_refused(wrong):
    with pytest.raises(ValueError, match=r"needs a multiple|not among"):
        jump_table(*wrong)


# the teacher's steps


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_teacher_takes_its_steps_one_by_one(prediction):
    table = jump_table(2, 4, timesteps=4)
    x_t = randn(4, 4, 3, 3)
    found = teacher_path(eps_model, x_t, table, ALPHA_BAR, prediction)
    for i, row in enumerate(table.tolist()):
        x = x_t[i : i + 1]
        for t, t_next in pairwise(row):
            if t >= 0:
                x = move(x, eps_model(x, torch.tensor([t])), t, t_next, ALPHA_BAR, prediction)
        assert torch.allclose(found[i : i + 1], x, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32 and not found.requires_grad


def test_a_teacher_that_knows_the_noise_ends_on_the_noised_data():
    x0, eps = randn(4, 4, 3, 3), randn(4, 4, 3, 3, seed=1)
    table = jump_table(4, 8)
    x_t = add_noise(x0, eps, table[:, 0], ALPHA_BAR)
    found = teacher_path(lambda x, t: eps, x_t, table, ALPHA_BAR, "epsilon")
    assert torch.allclose(found, add_noise(x0, eps, table[:, -1], ALPHA_BAR), atol=2e-4)


def test_half_precision_of_the_network_stays_out_of_the_move():
    """Rounded predictions, but float32 states: at t = 999 the error of x0 is 14.6 times that of eps, not more."""
    x_t, times = randn(2, 4, 8, 8), torch.tensor([[T, -1], [T, -1]])
    exact = teacher_path(eps_model, x_t, times, ALPHA_BAR, "epsilon")
    rounded = teacher_path(lambda x, t: eps_model(x, t).bfloat16(), x_t, times, ALPHA_BAR, "epsilon")
    error = (eps_model(x_t, times[:, 0]).bfloat16().float() - eps_model(x_t, times[:, 0])).abs().max()
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() < 14.7 * error


def test_a_model_is_asked_on_another_schedule_where_it_sees_the_same_noise():
    zero = make_alpha_bar(ScheduleConfig(rescale_betas_zero_snr=True))
    x0, eps, t = randn(4, 4, 3, 3), randn(4, 4, 3, 3, seed=1), torch.tensor([999, 749, 300, 0])
    x_t, asked = add_noise(x0, eps, t, zero), []

    def knows_the_noise(x, at):
        asked.append(at)
        return eps

    found = on_schedule(knows_the_noise, ALPHA_BAR, "epsilon", zero)(x_t, t)
    (at,) = asked
    assert at[0] == 999 and at[1] > 749 and (ALPHA_BAR[at] - zero[t]).abs().max() < 0.005
    a = zero[t].view(4, 1, 1, 1)
    v = a.sqrt() * eps - (1 - a).sqrt() * x0
    assert torch.allclose(found[1:], v[1:], atol=0.02)
    assert found[0].abs().max() < 0.1, "pure noise, of which the model says that it is nothing but noise: x0 is 0"


def test_a_rollout_is_the_students_own_way_from_pure_noise():
    noise, grid = randn(4, 4, 3, 3), time_grid(4, "trailing")
    found = rollout(eps_model, noise, grid, grid, ALPHA_BAR, "epsilon")
    x = noise
    for i, (t, t_next) in enumerate(zip(grid.tolist(), [*grid[1:].tolist(), -1], strict=True)):
        assert torch.allclose(found[i], x[i], atol=1e-5)
        x = move(x, eps_model(x, torch.full((4,), t)), t, t_next, ALPHA_BAR)


# one step: prediction of x0


def test_the_loss_of_the_conversion_is_the_distance_to_the_frozen_x0():
    x0, eps, t = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1), torch.tensor([999, 249])
    x_t = add_noise(x0, eps, t, ALPHA_BAR)
    frozen = eps + 0.1
    a = ALPHA_BAR[t].view(2, 1, 1, 1)
    wanted = (x_t - (1 - a).sqrt() * frozen) / a.sqrt()
    out = randn(2, 4, 3, 3, seed=2).requires_grad_()
    loss = convert_loss(out, frozen, x_t, t, ALPHA_BAR, "epsilon")
    assert torch.allclose(loss, (out - wanted).square().flatten(1).mean(1), rtol=1e-5)
    assert convert_loss(wanted, frozen, x_t, t, ALPHA_BAR, "epsilon").max() < 1e-8
    loss.sum().backward()
    assert torch.allclose(out.grad, 2 * (out.detach() - wanted) / 36, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_student_that_is_switched_to_x0_makes_the_same_step(prediction):
    """f and x(x_t, f, t) are one jump, in either parametrisation."""
    x_t, out, t = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1), torch.tensor([749, 249])
    x0 = to_x0(out, x_t, t, ALPHA_BAR, prediction)
    for t_next in (-1, torch.tensor([499, 100])):
        as_x0 = move(x_t, x0, t, t_next, ALPHA_BAR, "sample")
        assert torch.allclose(as_x0, move(x_t, out, t, t_next, ALPHA_BAR, prediction), atol=1e-5)


def test_least_squares_find_the_convolution():
    conv = torch.nn.Conv2d(5, 3, 3, padding=1)
    batches = [randn(4, 5, 6, 6, seed=i) for i in range(3)]
    weight, bias = solve_conv((h, conv(h)) for h in batches)
    assert torch.allclose(weight, conv.weight, atol=1e-4) and torch.allclose(bias, conv.bias, atol=1e-4)
    target = randn(4, 3, 6, 6, seed=9)
    weight, bias = solve_conv([(batches[0], target)])
    error = [(F.conv2d(batches[0], w, bias, padding=1) - target).square().mean() for w in (weight, weight + 0.01)]
    assert error[0] < error[1] and error[0] < target.var()
    with pytest.raises(ValueError, match="one pair"):
        solve_conv([])

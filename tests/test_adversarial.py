"""The adversarial objective: each equation by hand, on logits and small tensors."""

import math

import pytest
import torch

from minidistill.diffusion.schedule import ScheduleConfig, add_noise, make_alpha_bar
from minidistill.distill.adversarial import (
    approximate_r1,
    discriminator_loss,
    draw_levels,
    generator_loss,
    matching_loss,
    ranking_accuracy,
    to_noise_level,
    turn,
    verdict,
)

ALPHA_BAR = make_alpha_bar(ScheduleConfig())
ZERO = torch.zeros(3)


def test_the_losses_are_logs_of_the_probabilities():
    real, fake = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([1.0, -4.0, 0.5])
    p, p_fake = torch.sigmoid(real), torch.sigmoid(fake)
    assert torch.allclose(discriminator_loss(real, fake), -p.log() - (1 - p_fake).log())  # (20)
    assert torch.allclose(generator_loss(real, fake), -p_fake.log())  # (21)
    assert torch.allclose(discriminator_loss(real, fake, True), -torch.sigmoid(real - fake).log())
    assert torch.allclose(generator_loss(real, fake, True), -torch.sigmoid(fake - real).log())


def test_a_discriminator_that_knows_nothing():
    assert torch.allclose(discriminator_loss(ZERO, ZERO), torch.full((3,), 2 * math.log(2)))
    assert torch.allclose(generator_loss(ZERO, ZERO), torch.full((3,), math.log(2)))


def test_far_logits_neither_overflow_nor_lose_their_gradient():
    fake = torch.tensor([-200.0], requires_grad=True)
    generator_loss(ZERO[:1], fake).backward()
    assert fake.grad.item() == pytest.approx(-1), "non-saturating: the worse the student, the stronger the pull"
    assert discriminator_loss(torch.tensor([-200.0]), torch.tensor([200.0])).item() == 400


@pytest.mark.parametrize("relativistic", [False, True])
def test_the_generators_gradient_reaches_the_fake_alone(relativistic):
    real, fake = (torch.tensor([0.5, -1.0], requires_grad=True) for _ in range(2))
    generator_loss(real, fake, relativistic).sum().backward()
    assert real.grad is None and (fake.grad < 0).all()


@pytest.mark.parametrize("relativistic", [False, True])
def test_one_gradient_in_the_fake_serves_both_players(relativistic):
    real = torch.tensor([0.5, -3.0, 40.0, 0.0, 1.0])
    fake = torch.tensor([2.0, -45.0, 0.1, 30.0, 1.0], requires_grad=True)
    of_d, of_g = (
        torch.autograd.grad(loss(real, fake, relativistic).sum(), fake)[0]
        for loss in (discriminator_loss, generator_loss)
    )
    assert torch.allclose(turn(real, fake, relativistic) * of_d, of_g, rtol=1e-4, atol=0)


def test_ranking_and_what_it_says_of_a_discriminator():
    assert ranking_accuracy(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 3.0, 2.0, 0.0])) == 0.625
    assert "blind" in verdict(0.55, 100) and "blind" in verdict(0.5, 10_000)
    assert "collapsed" in verdict(0.3, 100) and "wins" in verdict(1.0, 100)
    assert verdict(0.62, 100) is None and verdict(0.9, 100) is None
    assert "blind" in verdict(0.62, 16), "of few pairs it says little"
    assert "blind" in verdict(0.62, 100, [0.38, 0.6, 0.5, 0.41]), "random heads reach that too"
    assert verdict(0.8, 100, [0.38, 0.6, 0.5, 0.41]) is None and verdict(0.62, 100, [0.5, 0.49]) is None


def test_only_clean_endpoints_are_noised_to_t_star():
    x, eps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t_next, level = torch.tensor([-1, 499, -1]), torch.tensor([9, 749, 249])
    found, at = to_noise_level(x, t_next, eps, level, ALPHA_BAR)  # (25), (26)
    assert at.tolist() == [9, 499, 249]
    assert torch.equal(found[1], x[1])
    for i, t in ((0, 9), (2, 249)):
        a = ALPHA_BAR[t]
        assert torch.allclose(found[i], a.sqrt() * x[i] + (1 - a).sqrt() * eps[i])
        assert torch.allclose(found[i], add_noise(x, eps, t, ALPHA_BAR)[i])
    clean, at = to_noise_level(x, t_next, eps, None, ALPHA_BAR)
    assert torch.equal(clean, x) and at.tolist() == [0, 499, 0]


def test_noise_levels_are_drawn_by_their_weights():
    uniform, levels = torch.rand(40_000, generator=torch.Generator().manual_seed(0)), (9, 249, 499, 749)
    for weights, shares in ((None, (0.25,) * 4), ((5, 1, 1, 1), (0.625, 0.125, 0.125, 0.125))):
        drawn = draw_levels(uniform, levels, weights)
        assert drawn.dtype == torch.int64
        assert [(drawn == level).double().mean().item() for level in levels] == pytest.approx(shares, abs=0.01)
    assert draw_levels(torch.tensor([0.0, 0.9999999]), levels, (5, 1, 1, 1)).tolist() == [9, 749]


def test_the_approximated_r1_is_the_squared_change_of_the_logit():
    assert approximate_r1(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])).tolist() == [0.25, 4.0]


def test_distribution_matching_moves_x0_from_the_fake_score_to_the_real_one():
    x0, real, fake = (torch.randn(2, 4, 3, 3) for _ in range(3))
    x0.requires_grad_()
    loss = matching_loss(x0, real, fake)
    loss.sum().backward()
    scale = (x0.detach() - real).abs().flatten(1).mean(1).view(2, 1, 1, 1)
    assert loss.shape == (2,) and torch.allclose(x0.grad, (fake - real) / scale / 36, atol=1e-6)
    assert matching_loss(x0, real, real).abs().max() < 1e-8, "where both agree there is nothing to move"

"""Seeded random numbers: equal for equal seed and keys, different otherwise."""

import numpy as np
import torch

from minidistill.diffusion.noise import generator_for


def draw(*keys):
    return torch.randn(4, generator=generator_for(*keys))


def test_the_numbers_never_change():
    """Otherwise runs could not be reproduced or resumed with a later version."""
    expected = torch.tensor([-1.176871, -0.31511, 0.989977, -1.543161])
    torch.testing.assert_close(draw(0, "noise", 3), expected, rtol=0, atol=1e-5)


def test_numbers_do_not_depend_on_earlier_draws():
    first = draw(0, "noise", 7)
    torch.randn(100)
    draw(0, "noise", 6)
    assert torch.equal(draw(0, "noise", 7), first)
    assert torch.equal(draw(np.int64(0), "noise", torch.tensor(7)), first)


def test_neighbours_differ():
    keys = [(s, *key) for s in range(4) for key in [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**32,), ("1",)]]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)
    many = {generator_for(seed, step).initial_seed() for seed in range(30) for step in range(300)}
    assert len(many) == 30 * 300


def test_streams_of_neighbours_are_uncorrelated():
    noise = torch.stack([torch.randn(10_000, generator=generator_for(0, "noise", step)) for step in range(8)])
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 0.05

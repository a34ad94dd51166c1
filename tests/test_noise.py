"""Seeded random numbers: equal for equal seed and keys, different otherwise."""

import numpy as np
import torch

from minidistill.diffusion.noise import generator_for, initial_noise


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


def test_noise_of_a_sample_is_standard_normal_and_its_own():
    rows = initial_noise(7, range(20), (4, 16, 16))
    assert torch.equal(initial_noise(7, [13], (4, 16, 16))[0], rows[13])
    assert abs(rows.mean()) < 0.03 and abs(rows.std() - 1) < 0.03
    both = torch.cat([rows, initial_noise(8, range(20), (4, 16, 16))]).flatten(1)
    assert (torch.corrcoef(both) - torch.eye(40)).abs().max() < 0.2, "neighbouring seeds and indices are unrelated"

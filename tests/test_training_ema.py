"""Protects the average: float32, its decay ramp, and that the network always gets its own weights back."""

import pytest
import torch
from torch import nn

from minidistill.training.ema import EMA


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_updates_move_the_average_whatever_the_networks_dtype(dtype):
    """Decay 0.9999 from 1 towards 1.01 goes to 1.00095; kept in bf16 or fp16 the average would stay at 1."""
    net = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.ones_(net.weight)
    ema = EMA(net, 0.9999)
    ema.updates = 10**6  # past its ramp
    nn.init.constant_(net.weight, 1.01)
    target = net.weight.item()
    for _ in range(1000):
        ema.update()
    shadow = ema.shadow["weight"]
    assert shadow.dtype == torch.float32
    assert shadow.item() == pytest.approx(1 + (target - 1) * (1 - 0.9999**1000), abs=2e-5)
    if dtype == torch.float32:
        assert shadow.item() == pytest.approx(1.00095, abs=5e-6)


def test_one_update_is_the_formula_for_the_parameters_that_train_and_the_decay_has_a_ramp():
    net = network()
    net[1].requires_grad_(False)
    ema = EMA(net, 0.5)
    assert list(ema.shadow) == ["0.weight", "0.bias"]
    expected, decays = net[0].weight.detach().clone(), []
    for value in range(10):
        nn.init.constant_(net[0].weight, value)
        decays.append(ema.decay_now())
        expected = decays[-1] * expected + (1 - decays[-1]) * value
        ema.update()
    assert decays[:3] == [1 / 10, 2 / 11, 3 / 12] and decays[8:] == [0.5, 0.5] and ema.updates == 10
    torch.testing.assert_close(ema.shadow["0.weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_shows_the_average_and_gives_the_weights_back_bit_by_bit(dtype):
    net = network(dtype)
    ema = EMA(net)
    for value in ema.shadow.values():
        value.fill_(0.25)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(KeyboardInterrupt), ema.swap():
        assert all((p == 0.25).all() for p in net.parameters())
        raise KeyboardInterrupt
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    with ema.swap():  # and it can be used again, but neither nested nor updated in
        assert (net[0].weight == 0.25).all()
        with pytest.raises(RuntimeError), ema.swap():
            pass
        with pytest.raises(RuntimeError):
            ema.update()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_decay_of_zero_averages_nothing_and_one_is_refused():
    net = network()
    ema = EMA(net, decay=0)
    nn.init.ones_(net[0].weight)
    ema.update()
    with ema.swap():
        assert (net[0].weight == 1).all()
    assert not ema.shadow and (net[0].weight == 1).all()
    with pytest.raises(ValueError, match="decay"):
        EMA(net, decay=1.0)

"""Protects one optimizer step: learning rate, gradient norm, device, precision, the check that the loss is finite."""

import math

import pytest
import torch
from torch import nn

from minidistill.errors import InputError, NonFiniteLoss
from minidistill.models.lora import add_lora
from minidistill.training.device import best_precision, get_device, get_precision, to_precision
from minidistill.training.optim import Muon, adamw, check_finite, lr_at, optimizer_step

CPU = torch.device("cpu")


def test_warm_up_rises_from_the_first_step_to_base_then_cosine_falls_to_zero_at_total():
    assert [lr_at(step, 1.0, warmup=4, total=100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert lr_at(0, 1.0, warmup=0, total=100) == 1
    rates = [lr_at(step, 2.0, warmup=10, total=110, schedule="cosine") for step in range(10, 111)]
    assert rates[0] == 2 and rates[50] == pytest.approx(1) and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 101
    assert lr_at(500, 2.0, 10, 110, "cosine") == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="schedule"):
        lr_at(0, 1.0, 0, 1, "linear")


def test_adamw_is_adamw_and_takes_trained_parameters_only():
    torch.manual_seed(0)
    net, twin = nn.Linear(20, 30), nn.Linear(20, 30)
    twin.load_state_dict(net.state_dict())
    net.bias.requires_grad_(False)
    optimizer = adamw(net.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    plain = torch.optim.AdamW([twin.weight], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, foreach=False)
    x = torch.randn(5, 20)
    for _ in range(3):
        for model, opt in ((net, optimizer), (twin, plain)):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    torch.testing.assert_close(net.weight, twin.weight, rtol=1e-5, atol=1e-6)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [net.weight.shape]
    with pytest.raises(ValueError, match="nothing would be trained"):
        adamw(net.requires_grad_(False).parameters(), lr=0.1)
    for rate in (0.0, -1e-3):
        with pytest.raises(InputError, match="--learning-rate must be above 0"):
            adamw(twin.parameters(), lr=rate)


@pytest.mark.parametrize(("scale", "limit"), [(1.0, 1.0), (2.0**12, 1.0), (1.0, 100.0), (1.0, None)])
def test_a_step_clips_the_unscaled_gradients_and_returns_their_norm(scale, limit):
    net = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(net.weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=123.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(10 * net(torch.ones(1, 3)).sum()).backward()
    norm = optimizer_step(net, optimizer, scaler, lr=0.5, max_grad_norm=limit)
    assert norm.item() == pytest.approx(10 * math.sqrt(3)) and net.weight.grad is None
    assert net.weight.norm().item() == pytest.approx(0.5 * min(norm.item(), limit or math.inf))


def test_a_step_with_an_overflown_gradient_is_skipped_and_the_scale_halved():
    net = nn.Linear(1, 1, bias=False)
    before = net.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(net(torch.full((1, 1), math.inf)).sum()).backward()
    optimizer_step(net, adamw(net.parameters(), lr=0.1), scaler, lr=0.1, max_grad_norm=1.0)
    assert torch.equal(net.weight, before) and scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_a_weight_changes(name):
    net = nn.Linear(1, 2, bias=False)
    before = net.weight.detach().clone()
    net.weight.grad = torch.tensor([[1.0], [math.inf]])
    scaler = get_precision(name, CPU).scaler
    with pytest.raises(NonFiniteLoss, match=r"the gradient norm is inf at step 7 \(timesteps 5\): .* --learning-rate"):
        optimizer_step(net, adamw(net.parameters(), lr=0.1), scaler, 0.1, 1.0, 7, torch.tensor([5]))
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_forward_pass_and_can_be_entered_again(name, dtype):
    net = nn.Linear(4, 4)
    optimizer = adamw(net.parameters(), lr=0.1)
    autocast, scaler = get_precision(name, CPU)
    before = net.weight.detach().clone()
    for _ in range(2):
        with autocast:
            out = net(torch.ones(2, 4))
        assert out.dtype == dtype and net.weight.dtype == torch.float32
        scaler.scale(out.float().square().mean()).backward()
        optimizer_step(net, optimizer, scaler, lr=0.1, max_grad_norm=None)
    assert not torch.equal(net.weight, before) and not scaler.is_enabled()


def test_frozen_weights_are_rounded_once_but_for_those_that_a_copy_trains():
    net = nn.ModuleDict({"frozen": nn.Linear(4, 4), "trained": nn.Linear(4, 4)})
    add_lora(net, ["trained"], rank=2)  # which freezes all others
    net["trained"].weight.requires_grad_(True)
    net["trained"].lora_up.requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    to_precision(net, "bf16")
    after = dict(net.named_parameters())
    rounded = {name for name, weight in after.items() if weight.dtype == torch.bfloat16}
    assert rounded == {"frozen.weight", "frozen.bias", "trained.bias"}
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)


@pytest.mark.parametrize(("capability", "name"), [("AVX512", "bf16"), ("AVX2", "fp32"), ("DEFAULT", "fp32")])
def test_the_best_precision_of_a_cpu_is_what_it_computes_in(monkeypatch, capability, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert best_precision(CPU) == name
    assert best_precision(torch.device("mps")) == "fp32"


def test_a_precision_that_a_device_has_not_is_refused_and_another_named():
    for name, kind, said in (("fp16", "cpu", "bf16"), ("fp16", "mps", "fp32"), ("fp8", "cpu", "fp8")):
        with pytest.raises(InputError, match=said):
            get_precision(name, torch.device(kind))


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"sees 0 {name} devices here; use --device cpu"):
            get_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert get_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="cuda:2"):
        get_device("cuda:2")
    for name in ("gpu", "cuda:x", "cuda:", "cpu:1", "auto:1", ""):
        with pytest.raises(InputError, match="takes cpu, cuda, cuda:N, mps or auto"):
            get_device(name)
    assert get_device("cpu") == CPU


@pytest.mark.parametrize(("gpus", "mps", "taken"), [(2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")])
def test_auto_takes_the_fastest_device_there_is_and_says_so(monkeypatch, capsys, gpus, mps, taken):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert get_device("auto") == torch.device(taken)
    assert capsys.readouterr() == (f"device: {taken}\n", "")
    assert get_device("cpu") == CPU and capsys.readouterr() == ("", "")


def test_deterministic_algorithms_are_used_where_they_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    get_device("cpu")
    assert not asked
    get_device("cpu", deterministic=True)
    assert asked == [True]


def test_a_loss_that_is_not_finite_names_step_and_timesteps():
    t = torch.tensor([999, 3, 500])
    check_finite(torch.tensor(1e30), 5, t)
    check_finite(torch.ones(3), 5, t)
    with pytest.raises(NonFiniteLoss, match=r"nan at step 5 \(timesteps 3, 500, 999\)"):
        check_finite(torch.tensor(math.nan, requires_grad=True), 5, t)
    with pytest.raises(NonFiniteLoss, match=r"inf at step 6 \(timesteps 3\)"):
        check_finite(torch.tensor([1.0, math.inf, 1.0]), 6, t)
    with pytest.raises(InputError, match=r"timesteps 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        check_finite(torch.tensor(math.nan), 6, torch.arange(64))


def test_muon_moves_every_direction_of_a_weight_alike_by_about_a_fifth_of_its_rate():
    torch.manual_seed(0)
    for shape in ((8, 24), (24, 8), (16, 4, 3, 3)):
        matrix = torch.randn(shape).flatten(1) @ torch.diag(torch.logspace(0, -2, math.prod(shape[1:])))
        values = torch.linalg.svdvals(Muon.orthogonal(matrix))
        assert values.min() > 0.6 and values.max() < 1.25, values
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = matrix.view(shape).clone()
        before = Muon.orthogonal(matrix)
        Muon([weight], lr=0.1).step()
        assert torch.allclose(weight.flatten(1) / weight.std(), -before / before.std(), atol=1e-3), (
            "against the gradient"
        )
        assert weight.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.25)


def test_muon_remembers_gradients_and_leaves_weights_without_one():
    weight, idle = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    optimizer = Muon([weight, idle], lr=1.0, momentum=0.5)
    weight.grad = torch.eye(4)
    optimizer.step()
    weight.grad = torch.zeros(4, 4)
    first = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, first), "the average of before goes on"
    assert torch.equal(optimizer.state[weight]["momentum"], 0.5 * torch.eye(4)) and not idle.any()

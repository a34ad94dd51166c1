"""Protects resuming: stopping and resuming gives the same bits as not stopping, with nothing left over."""

import copy
import json

import pytest
import torch
from torch import nn

from minidistill.diffusion.noise import generator_for
from minidistill.errors import InputError
from minidistill.training.ema import EMA
from minidistill.training.log import MetricsLog, read_metrics
from minidistill.training.optim import adamw, lr_at, optimizer_step
from minidistill.training.run_folder import RunFolder
from minidistill.training.state import pack, unpack


def make_parts(seed=0, **adam):
    """A small network with convolutions (in channels_last), a frozen layer, a buffer and a 0-d parameter."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 3, 1))
    student = student.to(memory_format=torch.channels_last)
    student.scale = nn.Parameter(torch.tensor(1.0))
    student[3].bias.requires_grad_(False)
    parts = {
        "student": student,
        "optimizer": adamw(student.parameters(), lr=1e-2, **adam),
        "ema": EMA(student),
    }
    return parts | {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)}


def train(parts, first, last, log=None):
    """Steps first+1 .. last as the real loops take them, everything random addressed by (seed, step)."""
    student, optimizer, scaler = parts["student"], parts["optimizer"], parts["scaler"]
    for step in range(first, last):
        lr = lr_at(step, 1e-2, warmup=2, total=6, schedule="cosine")
        x = torch.randn(2, 3, 6, 6, generator=generator_for(0, "noise", step))
        loss = (student(x) * student.scale - x.flip(1)).square().mean()
        scaler.scale(loss).backward()
        norm = optimizer_step(student, optimizer, scaler, lr, 0.5)
        parts["ema"].update()
        if log:
            log.add({"loss": loss})
            log.end_step(step + 1, lr=lr, grad_norm=norm)


def assert_same_bits(one, other):
    (tensors, meta), (other_tensors, other_meta) = pack(one), pack(other)
    assert tensors.keys() == other_tensors.keys() and meta == other_meta
    for name, tensor in tensors.items():
        assert tensor.dtype == other_tensors[name].dtype, name
        assert torch.equal(tensor, other_tensors[name]), name


def test_three_steps_a_resume_and_three_steps_equal_six_steps_bit_by_bit(tmp_path, capsys):
    straight = make_parts()
    run = RunFolder.find(tmp_path / "straight", {}).begin({})
    with MetricsLog(run.metrics, total=6, every=1) as log:
        train(straight, 0, 6, log)
    straight_metrics = read_metrics(run.metrics)

    run = RunFolder.find(tmp_path / "stopped", {}).begin({})
    parts = make_parts()
    with MetricsLog(run.metrics, total=6, every=1) as log:
        train(parts, 0, 3, log)
        run.save(3, parts)
        train(parts, 3, 5, log)  # then killed: two steps lost
    run = RunFolder.find(tmp_path / "stopped", {}, resume=True).begin({})
    resumed = make_parts(seed=1)  # fresh objects, other weights
    torch.randn(17)  # the global generator is somewhere else
    step = run.restore(resumed)
    assert step == 3
    with MetricsLog(run.metrics, total=6, every=1, start=step) as log:
        train(resumed, step, 6, log)

    assert_same_bits(straight, resumed)
    assert resumed["scaler"].get_scale() != 2.0**10  # it grew, so its state was put to the test
    assert resumed["ema"].updates == 6
    resumed_metrics = read_metrics(run.metrics)
    for line in (*resumed_metrics, *straight_metrics):
        del line["ms_per_step"]
    assert resumed_metrics == straight_metrics


def test_optimizer_states_survive_json_in_the_memory_layout_of_their_weights():
    parts, other = make_parts(), make_parts(seed=1)
    train(parts, 0, 1)
    tensors, meta = pack(parts)
    unpack(tensors, json.loads(json.dumps(meta)), other)
    weight = other["student"][0].weight
    state = other["optimizer"].state[weight]
    assert state["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    assert state["exp_avg"].data_ptr() != tensors["optimizer/student.0.weight/exp_avg"].data_ptr()


def test_a_plain_set_of_tensors_is_a_part_and_can_be_trained():
    lora = {"down": nn.Parameter(torch.ones(2, 3)), "up": nn.Parameter(torch.zeros(3, 2))}
    parts = {"lora": lora, "optimizer": adamw(lora.values(), lr=0.1)}
    (lora["down"].sum() + lora["up"].sum()).backward()
    parts["optimizer"].step()
    tensors, meta = pack(parts)
    assert "optimizer/lora.down/exp_avg" in tensors
    fresh = {name: nn.Parameter(torch.zeros_like(value)) for name, value in lora.items()}
    other = {"lora": fresh, "optimizer": adamw(fresh.values(), lr=0.1)}
    unpack(tensors, meta, other)
    assert_same_bits(parts, other)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t, m: t.pop("student/0.weight"), r"student/0.weight is nothing, not \(torch"),
        (lambda t, m: t.update({"teacher/x": torch.ones(1)}), r"its teacher/x is \(.*, not nothing"),
        (lambda t, m: t.update({"scaler/x": torch.ones(1)}), "its scaler/x is"),
        (lambda t, m: t.update({"student/scale": torch.ones(2)}), "student/scale"),
        (lambda t, m: t.update({"student/scale": torch.tensor(1).half()}), "student/scale"),
        (lambda t, m: t.update({"optimizer/student.3.bias/exp_avg": torch.ones(3)}), "optimizer"),
        (lambda t, m: m["optimizer"]["groups"][0].reverse(), "optimizer trains other parameters"),
        (lambda t, m: m["optimizer"]["settings"][0].pop("lr"), "optimizer"),
        (lambda t, m: m.pop("ema"), "ema"),
        (lambda t, m: m.update({"discriminator": {}}), "discriminator"),
        (lambda t, m: m.update({"scaler": {}}), "fp16"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, named):
    parts = make_parts()
    train(parts, 0, 1)
    tensors, meta = pack(parts)
    tensors, meta = dict(tensors), copy.deepcopy(meta)
    change(tensors, meta)
    with pytest.raises(InputError, match=named):
        unpack(tensors, meta, make_parts())


def test_an_optimizer_before_its_first_step_has_no_state_and_one_over_an_unpacked_network_is_refused():
    parts, other = make_parts(), make_parts(seed=1)
    train(other, 0, 1)
    unpack(*pack(parts), other)
    assert not other["optimizer"].state
    del parts["student"]
    with pytest.raises(ValueError, match="not among the parts"):
        pack(parts)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *[("optimizer", "settings", value) for value in (None, [], [5], [{"lr": 1}])],
        *[("optimizer", "groups", value) for value in (None, [[]])],
        *[("ema", "updates", value) for value in (None, "9", [9])],
        ("scaler", "scale", "large"),
    ],
)
def test_meta_of_another_structure_is_refused(part, key, value):
    tensors, meta = pack(make_parts())
    meta = json.loads(json.dumps(meta))
    for changed in ({**meta[part], key: value}, {k: v for k, v in meta[part].items() if k != key}, 5):
        with pytest.raises(InputError, match="of another kind of run"):
            unpack(tensors, {**meta, part: changed}, make_parts())


@pytest.mark.parametrize(("name", "value"), [("betas", [-0.9, 2]), ("eps", "x"), ("amsgrad", True)])
def test_an_optimizer_keeps_its_own_settings(name, value):
    tensors, meta = pack(make_parts())
    meta = json.loads(json.dumps(meta))
    meta["optimizer"]["settings"][0][name] = value
    unpack(tensors, meta, parts := make_parts())
    assert parts["optimizer"].param_groups[0][name] == make_parts()["optimizer"].param_groups[0][name]
    train(parts, 0, 1)


@pytest.mark.parametrize("change", [lambda t: t[:1], lambda t: t.int(), lambda t: t[None]])
@pytest.mark.parametrize("field", ["exp_avg", "step"])
def test_optimizer_state_of_another_shape_or_type_is_refused(field, change):
    train(parts := make_parts(), 0, 1)
    tensors, meta = pack(parts)
    name = f"optimizer/student.0.weight/{field}"
    tensors[name] = change(tensors[name].reshape(1) if tensors[name].ndim == 0 else tensors[name])
    with pytest.raises(InputError, match=f"its {name} is"):
        unpack(tensors, json.loads(json.dumps(meta)), make_parts())

"""Protects what is checked before a run: settings that train nothing, and which model and images it is resumed on."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minidistill import finetune, train_kd
from minidistill.errors import InputError
from minidistill.models.unet import UNet, random_inputs
from minidistill.pipeline import load_pipeline
from minidistill.training.inputs import check_training, smallest_map, weights_fingerprint


@pytest.mark.parametrize("command", [train_kd, finetune])
def test_a_learning_rate_that_trains_nothing_is_refused_and_one_that_is_not_reached_is_noted(command, recwarn):
    with pytest.raises(InputError, match="--learning-rate must be above 0"):
        check_training(command.Config(learning_rate=0.0))
    check_training(command.Config(steps=40, warmup=40))
    assert not recwarn
    with pytest.warns(UserWarning, match="--warmup 40 is longer than --steps 20: 50% of --learning-rate is all"):
        check_training(command.Config(steps=20, warmup=40))


@pytest.fixture(scope="module")
def pipe(tiny_sd1):
    return load_pipeline(tiny_sd1)


def changed(pipe, part, change):
    """A copy of a pipeline in which one part is changed."""
    other = copy.copy(pipe)
    setattr(other, part, copy.deepcopy(getattr(pipe, part)))
    with torch.no_grad():
        change(getattr(other, part))
    return other


CHANGES = {
    "one weight of the U-Net": ("unet", lambda net: net.conv_in.weight[0, 0, 0, 1].add_(1e-6)),
    "two weights exchanged": ("unet", lambda net: net.conv_in.bias.copy_(net.conv_in.bias.flip(0))),
    "another precision": ("unet", lambda net: net.half()),
    "the VAE": ("vae", lambda net: net.encoder.conv_in.bias[0].add_(1e-6)),
    "the text encoder": ("text_encoders", lambda nets: next(nets[0].parameters()).mul_(1.01)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_fingerprint_changes_with_any_weight(pipe, case):
    assert weights_fingerprint(changed(pipe, *CHANGES[case])) != weights_fingerprint(pipe)


def test_the_fingerprint_is_of_the_content_alone(pipe, tiny_sd1, tmp_path):
    pipe.save(tmp_path / "copy")
    found = weights_fingerprint(pipe)
    assert all(weights_fingerprint(load_pipeline(path)) == found for path in (tmp_path / "copy", tiny_sd1))
    laid_out = changed(pipe, "unet", lambda net: net.to(memory_format=torch.channels_last))
    assert weights_fingerprint(laid_out) == found and len(found) == 16
    laid_out.schedule = SimpleNamespace(prediction_type="v_prediction")
    assert weights_fingerprint(laid_out) != found


@pytest.mark.parametrize("side", [3, 4, 5, 8, 9, 16])
def test_the_smallest_map_is_the_smallest_that_is_downsampled(pipe, side):
    net, seen = UNet(pipe.unet.config), []
    for name, module in net.named_modules():
        if name.endswith("downsamplers.0.conv"):
            module.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape[-1]))
    with torch.no_grad():
        net(*random_inputs(net.config, 1, side, side, 16))
    assert len(seen) == 3 and smallest_map(net.config, side) == min(seen)


def test_bf16_is_not_taken_on_a_cpu_where_its_gradients_are_wrong(tiny_sd1, images, monkeypatch, tmp_path):
    """At 16 pixels the last downsampling of the tiny model reads maps of one pixel, at 32 of two."""
    paths = {"data": str(images), "out": str(tmp_path / "run"), "device": "cpu"}
    kd = train_kd.Config(teacher=str(tiny_sd1), recipe="bk-base", **paths)
    for command, config in ((train_kd, kd), (finetune, finetune.Config(model=str(tiny_sd1), **paths))):
        with pytest.raises(InputError, match=r"--precision bf16: .* use fp32, or a larger --resolution"):
            command.set_up(replace(config, resolution=16, precision="bf16"))

    def taken(name, device, smallest):
        raise InputError(f"{name} where the smallest map is {smallest}")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(train_kd, "get_precision", taken)
    for side, expected in ((16, "fp32 where the smallest map is 1"), (32, "bf16 where the smallest map is 2")):
        with pytest.raises(InputError, match=expected):
            train_kd.set_up(replace(kd, resolution=side))

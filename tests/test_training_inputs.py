"""Protects what is checked before a run: settings that train nothing, and which model and images it is resumed on."""

import copy
from types import SimpleNamespace

import pytest
import torch

from minidistill import finetune, train_kd
from minidistill.errors import InputError
from minidistill.pipeline import load_pipeline
from minidistill.training.inputs import check_training, weights_fingerprint
from minidistill.training.optim import adamw


@pytest.mark.parametrize("command", [train_kd, finetune])
def test_a_learning_rate_that_trains_nothing_is_refused_and_one_that_is_not_reached_is_noted(command, recwarn):
    with pytest.raises(InputError, match="--learning-rate must be above 0"):
        check_training(command.Config(learning_rate=0.0))
    check_training(command.Config(steps=40, warmup=40))
    assert not recwarn
    with pytest.warns(UserWarning, match="--warmup 40 is longer than --steps 20: 50% of --learning-rate is all"):
        check_training(command.Config(steps=20, warmup=40))


@pytest.mark.parametrize("rate", [0.0, -1e-3])
def test_no_optimizer_is_made_with_a_learning_rate_of_zero_or_below(rate):
    with pytest.raises(InputError, match="--learning-rate must be above 0"):
        adamw([torch.nn.Parameter(torch.ones(1))], lr=rate)


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


def test_another_schedule_is_another_model(pipe):
    other = copy.copy(pipe)
    other.schedule = SimpleNamespace(prediction_type="v_prediction")
    assert weights_fingerprint(other) != weights_fingerprint(pipe)

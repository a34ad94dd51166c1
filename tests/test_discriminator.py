"""The discriminator: equations 22 and 23 by hand, who gets a gradient, its size for SDXL, that it learns to rank."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from minidistill.distill.adversarial import discriminator_loss, generator_loss, ranking_accuracy, verdict
from minidistill.models import lora
from minidistill.models.discriminator import Discriminator, Head
from minidistill.models.unet import SD15, SDXL, UNet, random_inputs

SMALL = replace(
    SD15,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    transformer_layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=12,
    attention_head_dim=2,
)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(SMALL).requires_grad_(False)


def inputs(batch=2, seed=0):
    torch.manual_seed(seed)
    x, _, context, _ = random_inputs(SMALL, batch, 8, 8, tokens=5)
    return x, torch.tensor([499, 9] * (batch // 2)), context


def randomise(judge):
    """A head that is not zero any more."""
    for head in judge.heads.values():
        nn.init.normal_(head.out.weight)
    return judge


@pytest.mark.parametrize("taps", [("mid",), ("down.0", "mid")])
def test_both_discriminators_are_the_head_on_the_features_of_the_unet(unet, taps):
    x, t, context = inputs()
    x_t, t_t, _ = inputs(seed=1)
    reference = {at: unet(y, s, context, return_features=True)[1] for at, y, s in (("x", x, t), ("x_t", x_t, t_t))}
    free, judge = (randomise(Discriminator(unet, 8, conditional, taps)) for conditional in (False, True))
    mid, mid_t = reference["x"]["mid"], reference["x_t"]["mid"]
    if taps == ("mid",):
        assert torch.allclose(free(x, t, context), free.heads["mid"](mid), atol=1e-5)  # (23)
        expected = judge.heads["mid"](torch.cat([mid, mid_t], dim=1))  # (22): x_{t-ns} first
        assert torch.allclose(judge(x, t, context, None, judge.features(x_t, t_t, context)), expected, atol=1e-5)
    else:
        found = free.features(x, t, context)
        assert found["down.0"].shape == (2, 16, 8, 8) and found["mid"].shape == (2, 32, 4, 4)
        logits = [free.heads[tap.replace(".", "_")](h) for tap, h in found.items()]
        assert torch.allclose(free(x, t, context), sum(logits) / 2, atol=1e-6)
    together = judge.features_of([x_t, x], [t_t, t], context)
    assert torch.allclose(judge.compare(*together[::-1]), judge(x, t, context, None, together[0]), atol=1e-5)
    for wrong, condition in ((judge, None), (free, free.features(x_t, t_t, context))):
        with pytest.raises(ValueError, match="features of x_t"):
            wrong(x, t, context, None, condition)
    with pytest.raises(ValueError, match=r"reads mid, down\.0, down\.1, not up\.0"):
        Discriminator(unet, 8, True, ("up.0",))


def test_at_first_it_knows_nothing(unet):
    x, t, context = inputs()
    judge = Discriminator(unet, 8, False)
    real, fake = judge(x, t, context), judge(-x, t, context)
    assert torch.allclose(discriminator_loss(real, fake), torch.full((2,), 2 * math.log(2)))
    assert torch.allclose(generator_loss(real, fake), torch.full((2,), math.log(2)))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 5), (5, 3), (8, 8), (32, 32), (32, 64)])
def test_heads_take_maps_of_any_size(shape):
    head = Head(16, 8, min(shape))
    nn.init.normal_(head.out.weight)
    h = torch.randn(3, 16, *shape)
    logits = head(h)
    assert logits.shape == (3,) and logits.dtype == torch.float32 and logits.std() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(h.float()), logits), "heads compute in float32 under autocast too"


def test_random_heads_are_of_the_same_kind_and_know_something_else_each(unet):
    judge, (x, t, context) = Discriminator(unet, 8, False, ("down.0", "mid")), inputs()
    before, (found,) = torch.random.get_rng_state(), judge.features_of([x], [t], context)
    one, again, other = (judge.compare(found, None, judge.random_heads(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, other) and one.std() > 0
    assert torch.equal(before, torch.random.get_rng_state()) and not judge(x, t, context).any()


def test_gradients_reach_only_whom_they_should(unet):
    x, t, context = inputs()
    for train_backbone in (True, False):
        judge = randomise(Discriminator(unet, 8, True, train_backbone=train_backbone))
        x_fake = x.clone().requires_grad_()
        condition = judge.features(-x, t, context)
        (pull,) = torch.autograd.grad(judge(x_fake, t, context, None, condition).sum(), x_fake, retain_graph=True)
        assert pull.abs().min(0).values.max() > 0 and all(weight.grad is None for weight in judge.parameters())
        loss = discriminator_loss(judge(x, t, context, None, condition), judge(x_fake, t, context, None, condition))
        loss.sum().backward(inputs=[weight for weight in judge.parameters() if weight.requires_grad])
        assert x_fake.grad is None and all(weight.grad is None for weight in unet.parameters())
        assert all(weight.grad is not None for weight in judge.heads.parameters())
        reached = [name for name, weight in judge.backbone.named_parameters() if weight.grad is not None]
        assert len(reached) == (len(list(judge.backbone.parameters())) if train_backbone else 0)


def test_a_trained_backbone_is_a_copy_and_a_frozen_one_is_shared(unet):
    own, shared = (Discriminator(unet, 8, True, train_backbone=train).backbone for train in (True, False))
    assert torch.equal(own.conv_in.weight, unet.conv_in.weight)
    assert own.conv_in.weight is not unet.conv_in.weight and shared.conv_in.weight is unet.conv_in.weight
    assert not any(name.startswith(("up_blocks", "conv_out", "conv_norm_out")) for name in own.state_dict())
    assert len(unet.up_blocks) == 2 and not any(weight.requires_grad for weight in unet.parameters())


def test_the_sizes_for_sdxl():
    with torch.device("meta"):
        unet = UNet(SDXL)
        judge = Discriminator(unet, 128, True)
    assert sum(weight.numel() for weight in judge.backbone.parameters()) == 1_243_367_040
    convs = [tuple(block.conv.weight.shape) for block in judge.heads["mid"].blocks]
    assert convs == [(1280, 2560, 4, 4), (1280, 1280, 4, 4), (1280, 1280, 4, 4)]
    assert {block.norm.num_groups for block in judge.heads["mid"].blocks} == {32}
    assert lora.add_lora(unet, lora.ALL, rank=64, alpha=8) == 788
    assert sum(weight.numel() for weight in unet.parameters() if weight.requires_grad) == 196_751_360


# Pairs of which neither latent says which is real: the real one has the sign of x_t, the other one the opposite sign.


def made_up_pairs(count, seed):
    random = torch.Generator().manual_seed(seed)
    sign = torch.randint(2, (count, 1, 1, 1), generator=random) * 2.0 - 1
    x_t, real, fake = (
        s * sign * torch.ones(4, 4, 4) + 0.5 * torch.randn(count, 4, 4, 4, generator=random) for s in (1, 1, -1)
    )
    return x_t, real, fake


def rank(judge, updates):
    """Ranking accuracy on 256 held-out pairs, after some updates on other pairs."""
    context, t = torch.zeros(1, 5, 12), torch.tensor(9)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3, betas=(0.0, 0.99))

    def logits(pairs):
        x_t, real, fake = pairs
        text = context.expand(len(real), -1, -1)
        condition = judge.features(x_t, t, text) if judge.conditional else None
        return judge(real, t, text, None, condition), judge(fake, t, text, None, condition)

    for update in range(updates):
        optimizer.zero_grad()
        discriminator_loss(*logits(made_up_pairs(16, 1000 + update))).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return ranking_accuracy(*logits(made_up_pairs(256, 1)))


def test_it_learns_to_rank_pairs_and_one_that_cannot_is_found_out(unet):
    torch.manual_seed(0)
    judge = Discriminator(unet, 4, True)
    learned = rank(judge, 60)
    assert learned > 0.9 and "blind" not in (verdict(learned, 256) or "")
    for head in judge.heads.values():  # leads away from the teacher
        head.out.weight.data.neg_()
    wrong = rank(judge, 0)
    assert wrong < 0.1 and "collapsed" in verdict(wrong, 256)
    untrained = rank(randomise(Discriminator(unet, 4, True)), 0)
    without_x_t = rank(randomise(Discriminator(unet, 4, False)), 10)
    for blind in (untrained, without_x_t):
        assert 0.35 < blind < 0.65

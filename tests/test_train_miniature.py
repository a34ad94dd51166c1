"""The command that trains the miniature: all three parts from scratch for a few steps, resuming, and its losses."""

import dataclasses
import itertools
import random
import shutil
from collections import Counter

import pytest
import torch
from runs import metrics

from minidistill.distill.sensitivity import zeroed
from minidistill.errors import InputError
from minidistill.miniature.contrast import FLOOR, VALUES, change, contrast_loss, second_captions
from minidistill.miniature.inside_out import (
    LEVEL_0,
    LIMITS,
    PATCHES,
    PHASES,
    OuterDropout,
    X0Heads,
    copy_outer,
    draw,
    excess,
    fading,
    keep_variance,
    p2_weight,
    phase_at,
    squeeze,
    take_level_0,
)
from minidistill.miniature.networks import UNET, VAE, near_colour, new_unet, redraw_places, whiten, words_first
from minidistill.miniature.scenes import SIZES, Scenes, parse
from minidistill.models.clip import CLIPTextModel
from minidistill.models.unet import UNet, random_inputs
from minidistill.models.vae import AutoencoderKL
from minidistill.pipeline import load_pipeline
from minidistill.train_miniature import Config, main
from minidistill.training.batches import to_pixels
from minidistill.training.run_folder import RunFolder
from minidistill.weights import folders
from minidistill.weights.files import read_safetensors

pytestmark = pytest.mark.usefixtures("one_thread")


def few(**settings) -> Config:
    small = {"batch_size": 2, "images": 8, "judged": 1, "precision": "fp32", "log_every": 1}
    return dataclasses.replace(Config(), **{**small, "checkpoint_every": 2, **settings})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All parts trained for four steps."""
    out = tmp_path_factory.mktemp("runs") / "miniature"
    main(few(out=str(out), steps=4))
    return out


def test_all_parts_together_are_a_pipeline_that_samples(made):
    pipe = load_pipeline(made / "pipeline")
    assert pipe(["a red circle"], steps=1)[0].size == (64, 64)
    assert (made / "pipeline" / "clip" / "config.json").is_file()
    assert (made / "unet" / "samples" / "step-000004.png").is_file()


@pytest.mark.parametrize("part", ["clip", "vae", "unet"])
def test_resuming_is_bit_exact(made, tmp_path, monkeypatch, part):
    if part == "unet":
        shutil.copytree(made / "pipeline", tmp_path / "pipeline")
    config = few(out=str(tmp_path), part=part, steps=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save", stop_after(RunFolder.save))  # of step 2
        main(config)
    main(dataclasses.replace(config, resume=True))
    expected, found = (
        read_safetensors(out / part / "checkpoints" / "step-000004" / "state.safetensors") for out in (made, tmp_path)
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def stop_after(save):
    def saved(*args):
        save(*args)
        raise KeyboardInterrupt

    return saved


def test_the_unet_alone_is_trained_on_the_shipped_vae_and_clip(tmp_path):
    main(few(out=str(tmp_path), part="unet", steps=1))
    shipped, trained = load_pipeline("miniature"), load_pipeline(tmp_path / "pipeline")
    assert all(torch.equal(a, b) for a, b in zip(shipped.vae.parameters(), trained.vae.parameters(), strict=True))
    clip = read_safetensors(folders.MINIATURE / "clip" / "model.safetensors")
    copied = read_safetensors(tmp_path / "pipeline" / "clip" / "model.safetensors")
    assert all(torch.equal(tensor, copied[name]) for name, tensor in clip.items())


def test_with_a_teacher_its_predictions_are_the_target_and_its_text_encoder_stays(tmp_path):
    for teacher in ("miniature", None):
        main(few(out=str(tmp_path / str(teacher)), part="unet", steps=1, teacher=teacher))
    taught, untaught = (metrics(tmp_path / name / "unet")[0] for name in ("miniature", "None"))
    assert "contrast" in taught and "contrast" not in untaught
    assert taught["eps"] != pytest.approx(untaught["eps"], rel=0.01), "eps is another target"
    shipped, trained = load_pipeline("miniature"), load_pipeline(tmp_path / "miniature" / "pipeline")
    pairs = zip(shipped.text_encoders[0].parameters(), trained.text_encoders[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    names = read_safetensors(tmp_path / "miniature/unet/checkpoints/step-000001/state.safetensors")
    assert not any("text_encoder" in name for name in names) and any(name.startswith("ema/unet") for name in names)


@pytest.mark.parametrize("what", VALUES)
def test_a_caption_is_changed_in_one_attribute_that_it_states(what):
    rng, scenes, found = random.Random(0), Scenes("train"), Counter()
    for i in range(200):
        before = scenes.caption(i)
        after = change(before, what, rng)
        found[after is None] += 1
        if after is None:
            assert not said(before, what)
            continue
        old, new = said(before, what), said(after, what)
        assert old != new and len(old) == len(new), (before, after)
        others = (name for name in VALUES if name != what)
        assert all(said(before, other) == said(after, other) for other in others), (before, after)
    assert found[False] > 50


def test_a_caption_is_changed_in_the_number_of_its_things():
    for before, *after in (
        ("a red star on a white background", *(f"{n} red stars on a white background" for n in ("two", "three"))),
        ("three red circles", "two red circles"),
        ("a red circle and a small star", "a red circle"),
        ("a red circle above a star and a blue ring", "a red circle above a star"),
        ("a red circle above a star", None),
    ):
        assert {change(before, "count", random.Random(i)) for i in range(20)} == set(after)


def said(caption: str, what: str) -> list[str]:
    """The values of an attribute in a caption."""
    statement = parse(caption)
    if what in ("texture", "ground"):
        return [value for value in [getattr(statement, what)] if value]
    return [value for thing in statement.things if (value := getattr(thing, what))]


def test_second_captions_differ_and_depend_on_the_number_of_the_sample_alone():
    scenes = Scenes("train", 1000)
    captions = [None, *(scenes.caption(i) for i in range(199))]
    others = second_captions(captions, range(200), scenes, 0)
    assert others[7:9] == second_captions(captions[7:9], range(7, 9), scenes, 0)
    assert others != second_captions(captions, range(200), scenes, 1)
    assert sum(a == b for a, b in zip(captions, others, strict=True)) <= 1
    assert others[0] is not None and 10 < others.count(None) < 35


def test_the_contrast_loss_is_the_relative_error_of_differences():
    target = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    same = torch.cat([target[:3], target[:3]])
    difference = (target[:3] - target[3:]).square().mean((1, 2, 3))
    assert torch.allclose(contrast_loss(same, target), difference / (difference + FLOOR))
    shifted = target + torch.cat([target[3:], target[3:]])
    assert contrast_loss(shifted, target).abs().max() < 1e-6, "an error that both predictions share does not count"


def test_a_run_can_start_from_an_earlier_result(made, tmp_path):
    seed = 1  # with which new weights are others
    start = str(made / "pipeline")
    main(few(out=str(tmp_path), part="unet", steps=1, start_from=start, learning_rate=1e-12, seed=seed))
    earlier, trained = (load_pipeline(out / "pipeline").networks for out in (made, tmp_path))
    for name, network in earlier.items():
        pairs = zip(network.parameters(), trained[name].parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in pairs), name


def test_a_start_that_is_not_there_or_another_u_net_is_refused_before_a_run_begins(tmp_path):
    wide = wide_miniature(tmp_path)
    for start, reason in ((tmp_path, "has no folder unet/"), (wide, "blocks and widths: conv_in")):
        with pytest.raises(InputError, match=reason):
            main(few(out=str(tmp_path / "run"), part="unet", start_from=str(start)))
    with pytest.raises(InputError, match="--teacher takes a U-Net of the miniature's blocks and widths: conv_in"):
        main(few(out=str(tmp_path / "run"), part="unet", teacher=str(wide)))
    more = dataclasses.replace(UNET, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    folders.save_unet(tmp_path / "more", UNet(more))
    with pytest.raises(InputError, match=r"--start-from takes .* down_blocks\.0\.attentions\.0\.norm\.weight is"):
        main(few(out=str(tmp_path / "run"), part="unet", start_from=str(tmp_path / "more")))
    with pytest.raises(InputError, match="no such"):
        main(few(out=str(tmp_path / "run"), part="unet", teacher=str(tmp_path / "missing")))
    assert not (tmp_path / "run").exists()


def wide_miniature(folder):
    pipe = load_pipeline("miniature")
    pipe.unet = UNet(dataclasses.replace(UNET, block_out_channels=(64, 96, 96, 96), attention_head_dim=(2, 3, 3, 3)))
    pipe.save(folder / "wide")
    return folder / "wide"


def test_a_missing_run_is_not_resumed(tmp_path):
    with pytest.raises(InputError, match="nothing to resume"):
        main(few(out=str(tmp_path), resume=True))


def test_the_text_encoder_is_trained_with_the_unet_and_clip_is_not(made):
    trained = read_safetensors(made / "unet" / "checkpoints" / "step-000004" / "state.safetensors")
    for name, start in words_first(folders.load_clip(made / "pipeline")).state_dict().items():
        change = (trained[f"networks/text_encoder.{name}"] - start).abs().max()
        assert 0 < change < 1e-3 or "position" in name, name


def test_words_first_increases_the_distance_between_words():
    clip, tokenizer = folders.load_clip(folders.MINIATURE), folders.load_tokenizer(folders.MINIATURE)
    before = CLIPTextModel(clip.config.text_config)
    before.text_model.load_state_dict(clip.text_model.state_dict())
    captions = [[f"a {size} red {shape}" for size in SIZES] for shape in ("circle", "square")]

    @torch.no_grad()
    def apart(encoder):
        """Distance of the states of two words, relative to their variation with the previous word."""
        circle, square = (encoder(tokenizer(some)).last_hidden_state[:, 4] for some in captions)
        return (circle.mean(0) - square.mean(0)).norm() / (circle.var(0).sum() + square.var(0).sum()).sqrt()

    assert apart(words_first(clip)) > 5 * apart(before)


def test_p2_weights():
    alpha_bar = torch.tensor([0.99, 0.5, 0.01])
    expected = [(0.015 + 99) ** -0.5, 1.015**-0.5, (0.015 + 1 / 99) ** -0.5]
    assert torch.allclose(p2_weight(torch.arange(3), alpha_bar, 0.5), torch.tensor(expected))


def test_whitening_changes_the_latents_but_not_the_reconstructions():
    torch.manual_seed(0)
    vae = AutoencoderKL(VAE)
    x = to_pixels([Scenes()[i][0] for i in range(64)])
    with torch.no_grad():
        before = vae.decode(vae.encode(x[:4])[0])
        whiten(vae, x)
        latents = vae.encode(x)[0]
        after = vae.decode(latents[:4])
    assert torch.allclose(before, after, atol=1e-4)
    flat = (latents * vae.config.scaling_factor).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.cov(flat), torch.eye(4), atol=0.02)
    assert flat.mean(1).abs().max() < 0.02


def test_near_colour_is_one_on_things():
    x = to_pixels([Scenes()[1][0]])
    weight = near_colour(x)
    assert weight.shape == (1, 1, 64, 64)
    assert 0.05 < weight.mean() < 0.6 and set(weight.unique().tolist()) == {0.0, 1.0}


def test_redraw_places_reinitialises_nearly_equal_words_and_no_others():
    pipe = load_pipeline("miniature")
    weight = pipe.text_encoders[0].text_model.embeddings.token_embedding.weight
    ids = [int(pipe.tokenizers[0]([word])[0, 1]) for word in ("left", "right", "above", "below")]
    before = weight.detach().clone()
    redraw_places(pipe.text_encoders[0], pipe.tokenizers[0])
    assert torch.equal(weight, before), "those of the miniature differ"
    with torch.no_grad():
        weight[ids[0]] = weight[ids[1]] + 0.1 * weight[ids[2]]
    before = weight.detach().clone()
    torch.manual_seed(0)
    redraw_places(pipe.text_encoders[0], pipe.tokenizers[0])
    changed = (weight != before).any(1).nonzero().flatten().tolist()
    assert changed == sorted(ids)
    distances = torch.cdist(weight[ids], weight[ids])[~torch.eye(4, dtype=torch.bool)]
    assert distances.min() > 1.2 * before.std() * before.shape[1] ** 0.5  # independent: sqrt(2) times


def test_squeeze_rescales_timesteps_into_the_ranges_in_turn():
    t = torch.tensor([0, 0, 0, 500, 999, 999])
    assert squeeze(t, range(6), [(850, 1000)]).tolist() == [850, 850, 850, 925, 999, 999]
    ranges = [(850, 1000), (600, 900), (0, 1000)]
    assert squeeze(t, range(6), ranges).tolist() == [850, 600, 0, 925, 899, 999]
    assert squeeze(t, range(16, 22), ranges).tolist() == [600, 0, 850, 750, 999, 999], "by number, not by place"
    assert squeeze(torch.arange(1000), range(1000), [(0, 1000)]).tolist() == list(range(1000))


def test_nothing_is_dropped_any_more_at_the_end_of_the_last_phase():
    shares = [0.0, 0.5, 0.9, 0.935, 0.97, 1.0]
    for phase, factors in ((PHASES[0], [1] * 6), (PHASES[-1], [1, 1, 1, 0.5, 0, 0])):
        for key, most in phase.dropped.items():
            expected = pytest.approx([factor * most for factor in factors])
            assert [fading(phase, share)[key] for share in shares] == expected, key


def test_each_phase_has_its_share_of_the_steps():
    for steps in (8, 1000):
        found = [phase_at(step, steps, PHASES) for step in range(steps)]
        assert [sum(phase is one for phase, *_ in found) for one in PHASES] == [one.share * steps for one in PHASES]
        begins = [step for step in range(steps) if found[step][2]]
        assert begins == [0, steps // 4, 3 * steps // 4] and all(found[step][1] == 0 for step in begins)
        assert all(0 <= progress < 1 for _, progress, _ in found)
    assert phase_at(5, 20, PHASES[-1:]) == (PHASES[-1], 0.25, False), "alone it is the whole run"
    assert sum(phase_at(step, 10, PHASES)[2] for step in range(10)) == 3, "also where they begin within a step"


@torch.no_grad()
def test_the_outer_levels_start_as_a_teachers():
    torch.manual_seed(0)
    teacher, unet = folders.load_unet(folders.MINIATURE).float(), UNet(UNET)
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    copy_outer(teacher, unet)
    given, now = dict(teacher.named_parameters()), dict(unet.named_parameters())
    level_0 = ("conv_in.weight", "conv_norm_out.weight", "conv_out.bias", "time_embedding.linear_1.weight")
    shortcut, level_1 = "up_blocks.3.resnets.2.conv_shortcut.weight", "down_blocks.1.resnets.1.conv1.weight"
    for name in (*level_0, shortcut, level_1, "up_blocks.2.upsamplers.0.conv.bias"):
        assert torch.equal(now[name], given[name]), name
    levels = ("mid_block", "down_blocks.2", "down_blocks.3", "up_blocks.0", "up_blocks.1")
    inner = [name for name in now if name.startswith(levels)]
    assert inner and all(torch.equal(now[name], before[name]) for name in inner)


@torch.no_grad()
def test_a_teachers_level_0_is_taken_and_the_others_know_the_timestep_as_before():
    torch.manual_seed(0)
    teacher, unet = folders.load_unet(folders.MINIATURE).float(), UNet(UNET)
    copy_outer(teacher, unet)
    for weight in unet.time_embedding.parameters():
        weight.mul_(1 + 0.3 * torch.randn_like(weight))  # as if it had been trained since
    t = torch.arange(0, 1000, 7)

    def embedded():
        return torch.nn.functional.silu(unet.embed(t))

    def at_timesteps():
        return {
            name: module(embedded())
            for name, module in unet.named_modules()
            if name.endswith("time_emb_proj") and not name.startswith(LEVEL_0)
        }

    before, given = at_timesteps(), dict(teacher.named_parameters())
    weights = {name: weight.clone() for name, weight in unet.named_parameters()}
    take_level_0(teacher, unet)
    for name, weight in unet.named_parameters():
        if name.startswith(LEVEL_0):
            assert torch.equal(weight, given[name]), name
        else:
            assert torch.equal(weight, weights[name]) != ("time_emb_proj" in name), name
    after = at_timesteps()
    assert len(after) == 17
    for name, out in after.items():
        error = (out - before[name]).square().mean()
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        as_it_was = (embedded() @ weight.T + bias - before[name]).square().mean()
        assert error < 1e-3 * before[name].var(0).mean() and error < 0.1 * as_it_was, name


def test_the_last_phase_of_a_run_with_a_teacher_begins_with_its_level_0(tmp_path):
    main(few(out=str(tmp_path), part="unet", steps=4, teacher="miniature", learning_rate=1e-12))
    state = read_safetensors(tmp_path / "unet/checkpoints/step-000004/state.safetensors")
    given = {name: weight for name, weight in folders.load_unet(folders.MINIATURE).float().named_parameters()}
    taken = [name for name in given if name.startswith(LEVEL_0) and "down_blocks.0.attentions" not in name]
    assert any("attentions" in name for name in taken)
    for where in ("networks/unet.", "ema/unet."):
        assert all(torch.allclose(state[where + name], given[name], atol=1e-6) for name in taken), where


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(UNET)


@torch.no_grad()
def test_dropout_leaves_out_what_a_sample_does_not_keep_and_nothing_outside_its_block(unet):
    inputs = random_inputs(UNET, 3, 16, 16)[:3]
    plain = unet(*inputs)
    dropout = OuterDropout(unet)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(unet(*inputs), plain), "nothing is dropped outside of the block"
    with dropout.at(fading(PHASES[-1], 1.0), draw(3, generator)):
        assert torch.equal(unet(*inputs), plain), "nor at the end of the run"
    with dropout.at(PHASES[-1].dropped, draw(3, generator)):
        dropout.kept = {key: torch.zeros(3, dtype=torch.bool) for key in PHASES[-1].dropped}
        nothing = unet(*inputs)
        other_text = unet(*inputs[:2], torch.randn_like(inputs[2]), return_features=True)[1]
    inner = UNet(UNET)
    inner.load_state_dict(unet.state_dict())
    last = len(UNET.block_out_channels) - 1
    for level in range(3):
        for block in (inner.down_blocks[level], inner.up_blocks[last - level]):
            for transformer in block.attentions:
                transformer.proj_out.weight.zero_()
                transformer.proj_out.bias.zero_()
    for level in (level for kind, level in PHASES[-1].dropped if kind == "skips"):
        inner.up_blocks[last - level].register_forward_pre_hook(without_skips)
    assert torch.allclose(nothing, inner(*inputs), atol=1e-5)
    assert other_text["down.2.proj_out"].abs().max() == 0
    with dropout.at(PHASES[-1].dropped, draw(3, generator)):
        dropout.kept = {key: torch.tensor([True, False, True]) for key in PHASES[-1].dropped}
        some = unet(*inputs)
    assert torch.allclose(some[[0, 2]], plain[[0, 2]], atol=1e-5)
    assert torch.allclose(some[1], nothing[1], atol=1e-5)


def test_what_an_inner_level_keeps_the_levels_above_it_keep_too(unet):
    dropout = OuterDropout(unet)
    for phase in PHASES:
        with dropout.at(phase.dropped, draw(1000, torch.Generator().manual_seed(0))):
            for kind in ("skips", "attention"):
                levels = sorted(
                    (level for k, level in phase.dropped if k == kind), key=lambda n: phase.dropped[kind, n]
                )
                for likely, less_likely in itertools.pairwise(levels):
                    assert bool((dropout.kept[kind, likely] | ~dropout.kept[kind, less_likely]).all())
            for level in (0, 2):
                dropped = (~dropout.kept["attention", level]).float().mean().item()
                assert dropped == pytest.approx(phase.dropped["attention", level], abs=0.03)


@torch.no_grad()
def test_the_inner_levels_of_a_new_u_net_reach_the_output_at_full_scale():
    torch.manual_seed(0)
    reach = []
    for full in (False, True):
        unet, inputs = UNet(UNET), random_inputs(UNET, 4, 16, 16)[:3]
        if full:
            keep_variance(unet)
        out = unet(*inputs)
        with zeroed(unet.up_blocks[0]):
            reach.append(((out - unet(*inputs)).square().mean() / out.square().mean()).item())
    assert reach[1] > 2 * reach[0], reach


@torch.no_grad()
def test_the_transformers_that_join_in_the_last_phase_change_nothing_at_first():
    torch.manual_seed(0)
    unet, (x, t, context, _) = new_unet(None), random_inputs(UNET, 4, 16, 16)
    assert [key for key, probability in PHASES[0].dropped.items() if probability == 1] == [("attention", 0)]
    with OuterDropout(unet).at({("attention", 0): 1.0}, torch.zeros(2, 4)):
        without = unet(x, t, context)
    assert torch.equal(unet(x, t, context), without)
    assert not torch.equal(unet(x, t, torch.randn_like(context)), without), "the text is read further in"


def without_skips(block, args):
    h, skips, *rest = args
    return (h, [torch.zeros_like(skip) for skip in skips], *rest)


def test_x0_is_predicted_from_the_inner_features_at_any_scale(unet):
    torch.manual_seed(0)
    heads, x0 = X0Heads(UNET), torch.randn(2, 4, 16, 16)
    features = unet(*random_inputs(UNET, 2, 16, 16)[:3], return_features=True)[1]
    losses = heads(features, x0)
    assert list(losses) == [f"x0 from {name}" for name in PATCHES]
    larger = heads({name: 30 * feature for name, feature in features.items()}, x0)
    assert all(torch.allclose(losses[name], larger[name], rtol=1e-3) for name in losses)
    sum(losses.values()).backward()
    assert all(p.grad.any() for p in heads.parameters())
    assert all(p.grad is None or not p.grad.any() for p in unet.up_blocks[3].parameters())
    assert all(p.grad.any() for name, p in unet.up_blocks[0].named_parameters() if "time_emb" not in name)
    with torch.no_grad():  # a head that knows x0: its input is the patches, which have mean 0 and variance 1 by group
        head, patches = torch.nn.Conv2d(16, 16, 1), torch.nn.functional.pixel_unshuffle(x0, 2)
        patches = torch.nn.functional.group_norm(patches, UNET.norm_num_groups)
        head.weight.copy_(torch.eye(16)[..., None, None])
        head.bias.zero_()
        heads.heads[2] = head
        known = torch.nn.functional.pixel_shuffle(patches, 2)
        assert heads({**features, "up.1": patches}, known)["x0 from up.1"] < 1e-6


def test_inner_features_cost_nothing_until_their_mean_square_exceeds_the_limit():
    features = {name: torch.full((2, 4, 2, 2), limit**0.5) for name, limit in LIMITS.items()}
    assert excess(features).item() == pytest.approx(0, abs=1e-4)
    assert excess({**features, "mid": 2 * features["mid"]}).item() == pytest.approx(3 * LIMITS["mid"])

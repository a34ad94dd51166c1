"""Training batches: sample n is sample n, whatever the batch size, the cache, what came before and where a run resumed.

Also that an epoch is an epoch, that captions are dropped as often as asked, and that latents are samples of the
posterior diffusers computes.
"""

from collections import Counter
from concurrent.futures import wait

import diffusers
import numpy as np
import pytest
import torch
from data_files import encoded, fill
from PIL import Image

from minidistill.data.folders import ImageFolder
from minidistill.errors import InputError, Stopped
from minidistill.pipeline import load_pipeline
from minidistill.training import batches as module
from minidistill.training.batches import Batches, at_once, to_pixels

SIDE = 32


class Images:
    """Ten different images with ten different captions; counts how often one is read."""

    def __init__(self, width: int = SIDE):
        numbers = np.random.default_rng(0)
        self.pixels = [numbers.integers(0, 256, (SIDE, width, 3), dtype=np.uint8) for _ in range(10)]
        self.reads = 0

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        self.reads += 1
        return Image.fromarray(self.pixels[index]), f"ring number {index}"


@pytest.fixture(scope="module")
def pipe(tiny_sd1):
    return load_pipeline(tiny_sd1)


def make(pipe, batch_size=4, seed=0, **options) -> Batches:
    return Batches(Images(), pipe, batch_size=batch_size, seed=seed, **options)


def join(batches, numbers):
    """The tensors and captions of several batches as one."""
    found = [batches[k] for k in numbers]
    tensors = (torch.cat([getattr(b, name) for b in found]) for name in ("x0", "context", "eps", "t"))
    return *tensors, [caption for b in found for caption in b.captions]


def assert_same(a, b, exact=True):
    """Draws to the bit. What a network computed too if exact: its last bits may depend on the batch size."""
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        if i < 2 and not exact:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
        elif i < 4:
            assert torch.equal(left, right)
        else:
            assert left == right


def test_a_batch_has_the_shapes_and_dtypes_the_unet_takes(pipe):
    batch = Batches(Images(width=48), pipe, batch_size=3, seed=0, cache=False)[0]
    assert batch.x0.shape == batch.eps.shape == (3, 4, 8, 12)  # (height, width)
    assert batch.context.shape == (3, 16, 16) and batch.t.shape == (3,) and batch.t.dtype == torch.int64
    assert batch.x0.dtype == batch.eps.dtype == batch.context.dtype == torch.float32
    assert len(batch.captions) == 3
    assert pipe.unet(batch.x0, batch.t, batch.context).isfinite().all()
    assert torch.equal(batch.context, pipe.encode_prompts(batch.captions).context)


@pytest.fixture(scope="module")
def whole(pipe):
    """Samples 0 to 23, beyond an epoch of 10."""
    return join(make(pipe, 8, cache=True, caption_dropout=0.3), [0, 1, 2])


@pytest.mark.parametrize("cache", [True, False])
def test_samples_do_not_depend_on_batch_size_and_cache(pipe, cache, whole):
    for size in (1, 4, 8, 12, 24):
        batches = make(pipe, size, cache=cache, caption_dropout=0.3)
        assert_same(join(batches, range(24 // size)), whole, exact=False)


def test_the_cache_reads_every_image_once_and_is_used_as_long_as_it_fits(pipe, monkeypatch):
    def reads_of_two_epochs(cache):
        batches = make(pipe, 5, cache=cache)
        join(batches, range(4))
        return batches.data.reads - 1  # one read tells the size

    monkeypatch.setattr(module, "AHEAD", 0)
    assert reads_of_two_epochs(True) == 10
    assert reads_of_two_epochs(False) == 20
    needed = 10 * 2 * 4 * (4 * 8 * 8)  # images, mean and deviation, bytes, latent
    for limit, reads in ((needed, 10), (needed - 1, 20)):
        monkeypatch.setattr(module, "CACHE_LIMIT", limit)
        assert reads_of_two_epochs(None) == reads


def test_the_next_images_are_read_while_a_batch_trains_and_change_no_bit(pipe, monkeypatch):
    expected = [join(make(pipe, cache=False), [k]) for k in (-1, 0, 1, 2, 7)]
    batches = make(pipe, cache=False)
    for k, wanted in zip((-1, 0, 1, 2, 7), expected, strict=True):  # a probe's number, steps, a jump
        assert_same(join(batches, [k]), wanted)
        ahead = range(4 * (k + 1), 4 * (k + 1 + module.AHEAD))
        assert list(batches._reading) == list(ahead)
    wait([*batches._reading.values()])
    reads = batches.data.reads
    batches[8]
    wait([*batches._reading.values()])
    assert batches.data.reads == reads + 4, "its own images were there already"


def test_an_image_that_disappears_while_training_is_named_when_it_is_needed(pipe, tmp_path):
    fill(tmp_path, {f"{i}.png": encoded(i) for i in range(12)} | {f"{i}.txt": f"image {i}" for i in range(12)})
    batches = Batches(ImageFolder(tmp_path, SIDE), pipe, batch_size=2, seed=0, cache=False)
    batches[0]
    wait([*batches._reading.values()])
    gone = batches.data.name(batches._index(2 * (1 + module.AHEAD)))
    (tmp_path / gone).unlink()
    for k in range(1, 1 + module.AHEAD):
        assert batches[k].x0.isfinite().all()
    with pytest.raises(Stopped, match=f"{gone} was deleted since the command began: put it back"):
        batches[1 + module.AHEAD]


def test_as_many_images_are_encoded_at_once_as_their_size_and_the_device_allow():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = [(64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024)]
    assert [at_once(size, cpu) for size in sizes] == [8, 2, 1, 1, 1]
    assert [at_once(size, gpu) for size in sizes] == [128, 32, 8, 2, 1]


def test_large_images_are_encoded_one_by_one_to_the_same_latents(pipe, monkeypatch):
    encode, seen = pipe.vae.encode, []
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    together = join(make(pipe, cache=False), range(2))
    assert max(seen) > 1
    monkeypatch.setattr(module, "AT_ONCE_ON_CPU", 2 * SIDE**2 - 1)
    for cache in (True, False):
        seen.clear()
        assert_same(join(make(pipe, cache=cache), range(2)), together, exact=False)
        assert set(seen) == {1}


def test_text_states_are_in_memory_too_as_long_as_they_fit(pipe, monkeypatch):
    encoded = make(pipe, 10, caption_dropout=0.3, cache=True)
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "encode_prompts", lambda _: pytest.fail("captions are encoded once only"))
        batch = encoded[0]
    assert None in batch.captions and len(set(batch.captions)) > 2
    torch.testing.assert_close(batch.context, pipe.encode_prompts(batch.captions).context)
    needed = 4 * 11 * 16 * 16  # bytes, ten captions and no caption, (tokens, width)
    for limit, idle in ((needed, [pipe.vae, *pipe.text_encoders]), (needed - 1, [pipe.vae])):
        monkeypatch.setattr(module, "CACHE_LIMIT", limit)
        assert make(pipe, cache=True).idle == idle
        assert torch.equal(make(pipe, 10, caption_dropout=0.3, cache=True)[0].t, batch.t)
    assert make(pipe, cache=True, keep_text=False).idle == [pipe.vae]
    assert make(pipe, cache=False).idle == []


def test_text_states_are_in_the_precision_of_the_run_unless_they_are_kept(pipe):
    plain, kept, rounded = (
        make(pipe, cache=cache, autocast=torch.autocast("cpu", torch.bfloat16, enabled=half))[0]
        for cache, half in ((False, False), (True, True), (False, True))
    )
    torch.testing.assert_close(kept.context, plain.context)
    torch.testing.assert_close(rounded.context, plain.context, rtol=0.05, atol=0.05)
    assert (rounded.context - plain.context).abs().max() > 1e-3 and torch.equal(rounded.x0, plain.x0)


def test_batches_after_a_restart_are_the_same_to_the_bit_in_any_order(pipe):
    options = {"caption_dropout": 0.3}
    straight = make(pipe, **options)
    expected = {k: join(straight, [k]) for k in range(8)}
    resumed = make(pipe, **options)
    for k in (5, 6, 7, 0, 3, -1, 4):
        assert_same(join(resumed, [k]), expected.get(k) or join(make(pipe, **options), [k]))
    a, b = make(pipe, 10)[0], make(pipe, 10, seed=1)[0]  # another seed is another run
    assert a.captions != b.captions and sorted(a.captions) == sorted(b.captions)
    assert not torch.equal(a.t, b.t) and (a.eps - b.eps).flatten(1).abs().amax(1).min() > 1


def test_an_epoch_visits_every_entry_once_in_an_order_of_its_own(pipe):
    captions = join(make(pipe, 4), range(15))[-1]
    epochs = [captions[i : i + 10] for i in range(0, 60, 10)]
    assert all(Counter(epoch) == Counter(f"ring number {i}" for i in range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs[0] != sorted(epochs[0])


def test_latents_are_samples_of_diffusers_posterior_with_a_noise_of_their_own(pipe, tiny_sd1):
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_sd1, subfolder="vae")
    batches = make(pipe, 50)
    batch = batches[0]
    pixels = np.stack([batches.data.pixels[int(caption.split()[-1])] for caption in batch.captions])
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = vae.encode(images).latent_dist
    draw = (batch.x0 / vae.config.scaling_factor - posterior.mean) / posterior.std
    assert abs(draw.mean().item()) < 0.04 and abs(draw.std().item() - 1) < 0.03  # of 12800 numbers
    assert abs(batch.eps.mean().item()) < 0.04 and abs(batch.eps.std().item() - 1) < 0.03
    assert abs((draw * batch.eps).mean().item()) < 0.04
    assert len({tuple(row.flatten().tolist()) for row in batch.eps}) == 50


def test_timesteps_are_uniform_over_the_whole_schedule(pipe):
    t = make(pipe, 3000)[0].t
    assert t.min() >= 0 and t.max() <= 999
    counts = torch.bincount(t // 100, minlength=10)
    assert len(counts) == 10 and (counts - 300).abs().max() < 5 * (300 * 0.9) ** 0.5
    assert t.unique().numel() > 900


def test_captions_are_dropped_as_often_as_asked_and_nothing_else_changes(pipe):
    count, share = 2000, 0.1
    kept, dropped = (make(pipe, count, caption_dropout=p)[0] for p in (0.0, share))
    empty = [caption is None for caption in dropped.captions]
    assert abs(sum(empty) - share * count) < 4 * (count * share * (1 - share)) ** 0.5
    assert None not in kept.captions
    assert all(d == (None if e else k) for k, d, e in zip(kept.captions, dropped.captions, empty, strict=True))
    for name in ("x0", "eps", "t"):
        assert torch.equal(getattr(kept, name), getattr(dropped, name))
    states = dropped.context[torch.tensor(empty)]
    torch.testing.assert_close(states, pipe.encode_prompts([None]).context.expand_as(states), rtol=1e-4, atol=1e-5)
    assert set(make(pipe, 40, caption_dropout=1.0)[0].captions) == {None}


def test_a_batch_of_negative_number_has_draws_that_no_training_batch_has(pipe):
    batches = make(pipe, 10)
    held = batches[-1]
    training = [batches[k] for k in range(20)]
    seen = {tuple(eps.flatten().tolist()) for batch in training for eps in batch.eps}
    assert len(seen) == 200
    assert seen.isdisjoint(tuple(eps.flatten().tolist()) for eps in held.eps)
    assert not any(torch.equal(batch.t, held.t) for batch in training)
    assert Counter(held.captions) == Counter(training[0].captions)  # the same images, once each
    assert_same(join(batches, [0]), join(make(pipe, 10), [0]))  # and asking for it changes nothing


def test_pixels_run_from_minus_one_to_one_in_the_order_of_the_networks():
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 1), (255, 51, 0))
    pixels = to_pixels([image, image])
    assert pixels.shape == (2, 3, 2, 3) and pixels.dtype == torch.float32
    assert pixels[1, :, 0, 0].tolist() == [-1, -1, -1]
    assert pixels[1, :, 1, 2].tolist() == pytest.approx([1, -0.6, -1])


def test_a_vae_that_overflows_is_refused(tiny_sd1):
    pipe = load_pipeline(tiny_sd1)
    with torch.no_grad():
        next(pipe.vae.parameters()).fill_(torch.inf)
    for cache in (True, False):
        with pytest.raises(InputError) as caught:
            make(pipe, cache=cache)[0]
        assert "not finite in torch.float32" in str(caught.value) and "\n" not in str(caught.value)

"""CLIP score: preprocessing and cosines equal transformers, and the accuracy of retrieval."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageFilter

from minidistill.metrics.clip_score import clip_pixels, clip_scores, retrieval
from minidistill.metrics.frechet import frechet_distance, image_features
from minidistill.miniature.scenes import Scenes
from minidistill.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from minidistill.models.tokenizer import train_bpe
from minidistill.weights.folders import MINIATURE, load_clip

# Resized lengths that are whole, round down and up, and are odd; smaller, equal and larger sides.
SIZES = [(64, 64), (64, 97), (97, 64), (100, 151), (40, 70), (70, 41), (128, 96), (63, 64), (65, 64), (333, 500)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of all frequencies: half noise, half gradient."""
    pixels = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    pixels += np.linspace(0, 127, width, dtype=np.int64)[None, :, None]
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", [64, 33])
def test_pixels_are_those_of_transformers_image_processor(size):
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    images = [noise(width, height, seed) for seed, (width, height) in enumerate(SIZES)]
    expected = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
    pixels = clip_pixels(images, size)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_scores_are_transformers_cosines():
    captions = ["a red ring", "two green squares above a ring", "a ring"]
    tokenizer = train_bpe(captions, vocab_size=600, max_length=12)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    text = CLIPTextConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=12, **shape, **ids)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **shape)
    config = CLIPConfig(text, vision, projection_dim=16)
    ours = CLIPModel(config.text_config, config.vision_config)
    theirs = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config.to_dict())).eval()
    own = {name: weight for name, weight in theirs.state_dict().items() if "position_ids" in name}
    theirs.load_state_dict({**own, **ours.state_dict()})  # strict

    images = [noise(32, 32), noise(50, 77, 1)]
    scores = clip_scores(ours, tokenizer, images, captions)
    assert scores.shape == (2, 3) and scores.dtype == torch.float32 and not scores.requires_grad
    with torch.no_grad():
        out = theirs(input_ids=tokenizer(captions), pixel_values=clip_pixels(images, 32))
        expected = out.logits_per_image / theirs.logit_scale.exp()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert scores.abs().max() <= 1 + 1e-5 and scores.std() > 1e-3


class FakeCLIP(torch.nn.Module):
    """Has memorised the held-out scenes: an image's vector is that of its caption, shifted by `turn` captions."""

    COUNT = 250

    def __init__(self):
        super().__init__()
        self.config = CLIPConfig(vision_config=CLIPVisionConfig(image_size=64))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.turn, self.asked = 0, []
        images, captions = zip(*(Scenes("test")[i] for i in range(self.COUNT)), strict=True)
        self.known = clip_pixels(images).flatten(1)
        self.captions = list(dict.fromkeys(captions))  # a caption may belong to several images
        self.ids = self.tokenize(captions)

    def tokenize(self, captions):
        self.asked.append(list(captions))
        return torch.tensor([self.captions.index(caption) for caption in captions])

    def encode_text(self, ids):
        return torch.eye(self.COUNT)[ids]

    def encode_image(self, pixels):
        nearest = torch.cdist(pixels.flatten(1), self.known).argmin(1)
        return torch.eye(self.COUNT)[(self.ids[nearest] + self.turn) % self.COUNT]


def test_retrieval_of_a_perfect_model_is_one_of_a_wrong_one_zero_and_of_a_constant_one_chance():
    clip = FakeCLIP()
    assert retrieval(clip, clip.tokenize, rounds=3, choices=50) == 1
    rounds = clip.asked[1:]
    assert [len(set(captions)) for captions in rounds] == [50, 50, 50]
    assert len({caption for captions in rounds for caption in captions}) > 100  # other scenes each round
    clip.turn = 1
    assert retrieval(clip, clip.tokenize, rounds=1, choices=50) == 0
    clip.encode_image = lambda pixels: torch.ones(len(pixels), FakeCLIP.COUNT)
    assert retrieval(clip, clip.tokenize, rounds=2, choices=20) == 1 / 20


def test_the_frechet_distance_is_that_of_the_gaussians_of_both_sets():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    white = torch.linalg.solve(torch.linalg.cholesky(torch.cov(x.T)), (x - x.mean(0)).T).T  # mean 0, covariance 1
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([0.0, 1.0, 0.0, -2.0]).double()
    assert frechet_distance(white, white) == pytest.approx(0, abs=1e-9)
    expected = shift.square().sum() + (scale - 1).square().sum()
    assert frechet_distance(white, white * scale + shift) == pytest.approx(expected.item())
    a, b = (white @ torch.randn(4, 4, generator=generator).double() for _ in range(2))  # do not commute
    crossed = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.sqrt().sum()
    expected = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * crossed
    assert frechet_distance(a, b) == pytest.approx(expected.item()) == frechet_distance(b, a)
    with pytest.raises(ValueError, match="4 samples do not have a covariance in 4 dimensions"):
        frechet_distance(a, b[:4])


def test_the_more_images_are_blurred_the_further_they_are_from_their_scenes():
    clip, scenes = load_clip(MINIATURE), Scenes("test")
    images = [scenes[i][0] for i in range(140)]
    features = image_features(clip, images, 16)
    assert features.shape == (140, 128) and torch.allclose(features.norm(dim=1), torch.ones(140), atol=1e-5)
    torch.testing.assert_close(features[:32], image_features(clip, images[:32], 32), rtol=0, atol=1e-5)
    near, far = (
        frechet_distance(
            features, image_features(clip, [image.filter(ImageFilter.GaussianBlur(r)) for image in images])
        )
        for r in (0.75, 1.5)
    )
    assert far > 2 * near > 0, (far, near)

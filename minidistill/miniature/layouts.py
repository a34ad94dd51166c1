"""Scenes with captions that state positions, on which the miniature's U-Net learns layout first."""

from PIL import Image

from minidistill.miniature.scenes import Scenes, describe, describe_places, render


class Layouts:
    """The scenes of split "train" that `describe_places` can describe: `layouts[i]` is (PIL image 64x64, caption).

    Scenes of one thing have the caption of `describe_places`; scenes of two related things have it for odd indices,
    and their usual caption else.
    """

    def __init__(self, length: int) -> None:
        self.scenes, self.numbers = Scenes("train", length=10**9), []
        number = 0
        while len(self.numbers) < length:
            if describe_places(self.scenes.scene(number)):
                self.numbers.append(number)
            number += 1

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        scene = self.scenes.scene(self.numbers[index])
        places = index % 2 or len(scene.stated.things) == 1
        return Image.fromarray(render(scene)), describe_places(scene) if places else describe(scene.stated)

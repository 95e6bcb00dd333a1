"""The whole Moondream2 model: vision, text and region."""

from torch import nn

from pipeline.moondream.config import MoondreamConfig
from pipeline.moondream.region import RegionModel
from pipeline.moondream.text import TextModel
from pipeline.moondream.vision import VisionModel


class Moondream(nn.Module):
    """Parameter names equal the checkpoint's keys under `model.`."""

    def __init__(self, config: MoondreamConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionModel(config.vision)
        self.text = TextModel(config.text)
        self.region = RegionModel(config.region)

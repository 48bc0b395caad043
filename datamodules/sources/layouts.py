"""The published layouts that can be converted, by name."""

from datamodules.sources.captions import Captions
from datamodules.sources.instructpix2pix import InstructPix2Pix
from datamodules.sources.interleaved import Mmc4, Obelics
from datamodules.sources.layout import Layout
from datamodules.sources.openimages import OpenImages
from datamodules.sources.released_tsv import ReleasedTsv
from datamodules.sources.text import Text

LAYOUTS: dict[str, type[Layout]] = {
    "captions": Captions,
    "instructpix2pix": InstructPix2Pix,
    "mmc4": Mmc4,
    "obelics": Obelics,
    "openimages": OpenImages,
    "text": Text,
    "tsv": ReleasedTsv,
}

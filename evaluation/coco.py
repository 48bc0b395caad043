"""MS-COCO 2014 validation: captions to draw, real images to compare with; the official folder layout.

`annotations/captions_val2014.json` and `val2014/<file_name>`.
"""

import json
import random
from pathlib import Path

from evaluation.protocol import CocoProtocol
from evaluation.requests import SHOWN_PROBLEMS, DataSetError, Request, ScoredImage, image_seed

ANNOTATIONS = "annotations/captions_val2014.json"
IMAGES = "val2014"


class Coco:
    """The data set under a protocol.

    Args:
        folder: holds `annotations/` and `val2014/`.

    Raises:
        DataSetError: annotations or images are missing; the first ten are named.
    """

    def __init__(self, protocol: CocoProtocol, folder: Path):
        self.protocol, self.folder = protocol, folder
        file = folder / ANNOTATIONS
        if not file.is_file():
            raise DataSetError(
                f"there is no COCO at '{folder}': '{ANNOTATIONS}' is missing; set data.coco to its folder."
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            self.file_names = {image["id"]: image["file_name"] for image in content["images"]}
            self.annotations = [(row["image_id"], row["caption"]) for row in content["annotations"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataSetError(f"'{file}' is not of COCO's structure: {type(error).__name__}: {error}") from error
        self.check()

    def check(self) -> None:
        """See the class for what is raised."""
        there = {path.name for path in (self.folder / IMAGES).iterdir()} if (self.folder / IMAGES).is_dir() else set()
        missing = sorted(name for name in self.file_names.values() if name not in there)
        if missing:
            shown = ", ".join(missing[:SHOWN_PROBLEMS])
            raise DataSetError(
                f"COCO at '{self.folder}': {len(missing)} of {len(self.file_names)} images are missing in {IMAGES}/: "
                + shown
                + (" …" if len(missing) > SHOWN_PROBLEMS else "")
            )
        unknown = sorted({str(image) for image, _ in self.annotations if image not in self.file_names})
        if unknown:
            raise DataSetError(
                f"COCO at '{self.folder}': captions of {len(unknown)} images that are not listed: "
                + ", ".join(unknown[:SHOWN_PROBLEMS])
            )
        if self.protocol.captions > len(self.annotations):
            raise DataSetError(
                f"COCO at '{self.folder}' has {len(self.annotations)} captions but the protocol draws "
                f"{self.protocol.captions}; set coco.captions to at most that."
            )

    def requests(self) -> list[Request]:
        """The drawn captions, each once."""
        drawn = random.Random(self.protocol.caption_seed).sample(self.annotations, self.protocol.captions)
        sampling = self.protocol.sampling
        return [
            Request(
                index=index,
                prompt=caption,
                text=caption,
                inputs=(),
                seed=image_seed(sampling.seed, index, period=sampling.noise_period),
                unit=str(index),
            )
            for index, (_, caption) in enumerate(drawn)
        ]

    def scored(self, request: Request, file: Path) -> ScoredImage:
        """A made image with its caption."""
        return ScoredImage(file, request.unit, request.text)

    def references(self) -> list[Path]:
        """The real side of FID: all images, or one half."""
        return self._halves()[0] if self.protocol.references == "half" else self._images()

    def held_out_images(self) -> list[ScoredImage]:
        """The other half's images, one caption each, as many as captions are drawn; none where all are references."""
        if self.protocol.references == "all":
            return []
        captions = {self.folder / IMAGES / self.file_names[image]: caption for image, caption in self.annotations}
        images = [file for file in self._halves()[1] if file in captions][: self.protocol.captions]
        return [ScoredImage(file, str(index), captions[file]) for index, file in enumerate(images)]

    def files(self) -> list[Path]:
        """Every file that a number depends on."""
        return [self.folder / ANNOTATIONS, *self._images()]

    def _images(self) -> list[Path]:
        return [self.folder / IMAGES / name for name in sorted(self.file_names.values())]

    def _halves(self) -> tuple[list[Path], list[Path]]:
        images = self._images()
        random.Random(self.protocol.caption_seed).shuffle(images)
        return images[: len(images) // 2], images[len(images) // 2 :]

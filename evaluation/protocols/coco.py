"""MS-COCO 2014 validation: captions, and real images for FID.

The layout is the official one: `annotations/captions_val2014.json` and `val2014/<file_name>`.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from evaluation.protocols.benchmark import REAL_IMAGES, Benchmark, DataSetError, Item, Prompt, list_problems
from evaluation.protocols.protocol import CocoProtocol

ANNOTATIONS = "annotations/captions_val2014.json"
IMAGES = "val2014"


class Coco(Benchmark):
    """MS-COCO under a protocol.

    Args:
        folder: folder with `annotations/` and `val2014/`.

    Raises:
        DataSetError: annotations or images are missing; names the first ten.
    """

    tables: ClassVar = {"coco": "Captions (MS-COCO)"}
    protocol_type = CocoProtocol

    def __init__(self, protocol: CocoProtocol, folder: Path):
        super().__init__(protocol, folder)
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
            raise DataSetError(f"'{file}' does not have COCO's structure: {type(error).__name__}: {error}") from error
        self._check_annotations()
        self.captions = self._read_captions()
        self.prompts = [
            Prompt(caption, caption, (), Item(Path(), str(index), caption))
            for index, (_, caption) in enumerate(self.captions)
        ]
        self._check_images()

    def _check_images(self) -> None:
        needed = [path.name for path in self._images()]
        existing = {path.name for path in (self.folder / IMAGES).glob("*")}
        if missing := [name for name in needed if name not in existing]:
            count = f"{len(missing)} of {len(needed)} images are missing in {IMAGES}/"
            raise DataSetError(f"COCO at '{self.folder}': {count}: {list_problems(missing)}")
        size = 0 if self.protocol.kid is None else self.protocol.kid.subset_size
        for side, images in {"real": self.references(), "held-out": self.held_out_images()}.items():
            if 0 < len(images) < size:
                raise DataSetError(
                    f"COCO at '{self.folder}' has {len(images)} {side} images but coco.kid.subset_size={size}; set it "
                    "to at most the number of images."
                )

    def _check_annotations(self) -> None:
        if unknown := sorted({str(image) for image, _ in self.annotations if image not in self.file_names}):
            count = f"captions of {len(unknown)} images that are not listed"
            raise DataSetError(f"COCO at '{self.folder}': {count}: {list_problems(unknown)}")
        if self.protocol.caption_list is None and self.protocol.captions > len(self.annotations):
            raise DataSetError(
                f"COCO at '{self.folder}' has {len(self.annotations)} captions but the protocol draws "
                f"{self.protocol.captions}; set coco.captions to at most that."
            )

    def _read_captions(self) -> list[tuple[str, str]]:
        """Return (file name, caption) of the captions that are used, in order."""
        if self.protocol.caption_list is None:
            drawn = random.Random(self.protocol.caption_seed).sample(self.annotations, self.protocol.captions)
            return [(self.file_names[image], caption) for image, caption in drawn]
        file = self.folder / self.protocol.caption_list
        try:
            captions = [(row["file_name"], row["caption"]) for row in json.loads(file.read_text(encoding="utf-8"))]
        except FileNotFoundError as error:
            raise DataSetError(
                f"COCO at '{self.folder}': coco.caption_list={self.protocol.caption_list} does not exist; it must be a "
                "JSON list of {file_name, caption}."
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise DataSetError(
                f"'{file}' is not a JSON list of {{file_name, caption}}: {type(error).__name__}: {error}"
            ) from error
        if len(captions) != self.protocol.captions:
            count = f"lists {len(captions)} captions but coco.captions={self.protocol.captions}"
            raise DataSetError(f"'{file}' {count}; the numbers must be equal.")
        return captions

    def baselines(self) -> dict[str, list[Item]]:
        """Return the held-out photos, if the protocol splits the images into halves."""
        return {REAL_IMAGES: self.held_out_images()}

    def references(self) -> list[Path]:
        """Return the real images of FID: all, one half, or those of the captions, with repetition."""
        if self.protocol.references == "listed":
            return [self.folder / IMAGES / name for name, _ in self.captions]
        return self._halves()[0] if self.protocol.references == "half" else self._images()

    def held_out_images(self) -> list[Item]:
        """Return the other half's images with a caption each, at most as many as captions; empty without halves."""
        if self.protocol.references != "half":
            return []
        captions = {self.folder / IMAGES / self.file_names[image]: caption for image, caption in self.annotations}
        images = [file for file in self._halves()[1] if file in captions][: self.protocol.captions]
        return [Item(file, str(index), captions[file], real=True) for index, file in enumerate(images)]

    def files(self) -> list[Path]:
        """Return the annotations, the caption list and all images that are used."""
        listed = [] if self.protocol.caption_list is None else [self.folder / self.protocol.caption_list]
        return [self.folder / ANNOTATIONS, *listed, *self._images()]

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """Return notes on FID, KID and their intervals."""
        notes = [
            f"FID against {len(self.references())} real images; it depends on n, so compare rows of equal n only. "
            f"Intervals: {bootstrap.fid_replicates} draws of generated images, centred on the value; "
            f"{bootstrap.replicates} of captions for CLIP-T."
        ]
        if (kid := self.protocol.kid) is not None:
            notes.append(
                f"KID: the mean over {kid.subsets} subsets of {kid.subset_size} images of each side; what stands in "
                "place of its interval is ±1.96 standard deviations over them, so how it varies at that size, not at n."
            )
        return notes

    def _images(self) -> list[Path]:
        """Return all images that are used, each once."""
        listed = {name for name, _ in self.captions}
        names = listed if self.protocol.references == "listed" else set(self.file_names.values())
        return [self.folder / IMAGES / name for name in sorted(names)]

    def _halves(self) -> tuple[list[Path], list[Path]]:
        images = self._images()
        random.Random(self.protocol.caption_seed).shuffle(images)
        return images[: len(images) // 2], images[len(images) // 2 :]

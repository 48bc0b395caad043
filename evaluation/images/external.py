"""Images that another model made for our requests, scored by the same code as ours.

`evaluate.py requests evaluation.yaml` writes what is to be drawn to `<output>/requests/<table>.jsonl`: index, prompt
with `<i>`, text, input files, seed. A folder answers with images named after the index, `<table>/000000.png` (any
number of leading zeros; .jpg, .jpeg and .webp, too; `000000-7.png` of seed 7, as `kosmosg generate` names the images of
`<output>/requests/<table>.generate.jsonl`), or with `<table>/manifest.jsonl`, a line for each index:

    {"index": 0, "file": "backpack/jungle.png", "prompt": "backpack in the jungle"}

`file` is relative to the manifest. `prompt` may be left out; given, it must be the request's prompt or text. Where one
table alone is scored, the images may lie in the folder itself.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.images.generation import MANIFEST
from evaluation.images.provenance import hash_files
from evaluation.images.systems import TABLE_ORDER
from evaluation.protocols.benchmark import EvaluationError, Request, read_all, read_rows
from kosmosg.files import write_text
from kosmosg.image_processing import FORMATS

NAMED = re.compile(r"[0-9]+(-[0-9]+)?\.(png|jpe?g|webp)")


@dataclass(frozen=True)
class External:
    """A model's images of one table, whole: the file of every request by index, and their hash."""

    name: str
    files: dict[int, Path]
    model: str


def write_requests(table: str, requests: Sequence[Request], folder: Path, data: Path) -> Path:
    """`<folder>/<table>.jsonl`, and beside it `<table>.generate.jsonl`, a manifest of `kosmosg generate`.

    Args:
        data: the folder that holds the input images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{table}.jsonl"
    write_text(file, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in requests))
    manifest = [
        {
            "prompt": request.prompt,
            "images": [str((data / name).resolve()) for name in request.inputs],
            "seed": request.seed,
            "name": f"{request.index:06d}",
        }
        for request in requests
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in manifest)
    write_text(file.with_suffix(".generate.jsonl"), text)
    return file


def read_external(
    name: str, folder: Path, table: str, requests: Sequence[Request], size: int, alone: bool
) -> External | None:
    """A model's images of `table`; None where its folder has no such table.

    Args:
        size: side of the images in pixels.
        alone: whether the images may lie in `folder` itself.

    Raises:
        EvaluationError: no folder, a name of ours, or an image that is missing, given twice, of an unknown index, of
            another prompt or another size; names the first ten, and counts the others.
    """
    if name in TABLE_ORDER:
        raise EvaluationError(f"models.external has '{name}', which is the name of a row of ours; choose another.")
    if not folder.is_dir():
        raise EvaluationError(f"models.external.{name}: there is no folder '{folder}'.")
    place = folder / table
    if not place.is_dir():
        if not alone:
            return None
        place = folder
    manifest = place / MANIFEST
    wanted = {request.index: request for request in requests}
    files: dict[int, Path] = {}

    def take(row: dict[str, Any]) -> None:
        index, file, prompt = row["index"], place / row["file"], row.get("prompt")
        if type(index) is not int or index not in wanted:
            raise ValueError(f"index {index!r} is no request's")
        if index in files:
            raise ValueError(f"index {index} is given twice")
        if prompt not in (None, wanted[index].prompt, wanted[index].text):
            raise ValueError(f"index {index} is of {prompt!r}, but {wanted[index].prompt!r} was asked for")
        found = image_size(file)
        if found != (size, size):
            raise ValueError(f"'{file}' has {found[0]}×{found[1]} pixels where {size}×{size} were asked for")
        files[index] = file

    if manifest.is_file():
        read_all(read_rows(manifest, lines=True), take, f"'{manifest}'")
    else:
        names = sorted(file for file in place.iterdir() if NAMED.fullmatch(file.name.lower()))
        rows = [{"index": int(re.split("[-.]", file.name)[0]), "file": file.name} for file in names]
        read_all(rows, take, f"'{place}'", "image")
    if missing := sorted(set(wanted) - set(files)):
        raise EvaluationError(f"'{place}': {len(missing)} of {len(wanted)} images are missing, as index {missing[0]}.")
    read = [manifest] if manifest.is_file() else []
    return External(name, files, hash_files(place, [*read, *(files[index] for index in sorted(files))]))


def image_size(file: Path) -> tuple[int, int]:
    """By the file's header. Raises ValueError: there is no such image."""
    if not file.is_file():
        raise ValueError(f"'{file}' does not exist")
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except Exception as error:  # decoders of Pillow raise many kinds on damaged files
        raise ValueError(f"'{file}' cannot be read as an image ({error})") from error

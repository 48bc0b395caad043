"""Read images that another model made for our requests; they are scored by the same code as ours.

`evaluate.py requests evaluation.yaml` writes the requests to `<output>/requests/<table>.jsonl`: index, prompt with
`<i>`, text, input files, seed. The other model's folder holds images named after the index, `<table>/000000.png`, with
any number of leading zeros and any of .png, .jpg, .jpeg and .webp; `000000-7.png` (seed 7) works too, as `kosmosg
generate` names the images of `<output>/requests/<table>.generate.jsonl`. Or it holds `<table>/manifest.jsonl` with a
line for each index:

    {"index": 0, "file": "backpack/jungle.png", "prompt": "backpack in the jungle"}

`file` is relative to the manifest. `prompt` is optional and must equal the request's prompt or text. If only one table
is scored, the images may be in the folder itself.
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
from evaluation.protocols.benchmark import EvaluationError, Request, parse_rows, read_rows
from kosmosg.files import write_text
from kosmosg.image_processing import FORMATS

IMAGE_NAME = re.compile(r"[0-9]+(-[0-9]+)?\.(png|jpe?g|webp)")


@dataclass(frozen=True)
class External:
    """A model's complete images of one table: files by request index, and their hash."""

    name: str
    files: dict[int, Path]
    model: str


def write_requests(table: str, requests: Sequence[Request], folder: Path, data: Path) -> Path:
    """Write `<folder>/<table>.jsonl`, and `<table>.generate.jsonl` as a manifest of `kosmosg generate`.

    Args:
        data: folder of the input images.
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
    name: str, folder: Path, table: str, requests: Sequence[Request], size: int, only_table: bool
) -> External | None:
    """Read a model's images of `table`; None if its folder has no such table.

    Args:
        size: side of the images in pixels.
        only_table: whether the images may be in `folder` itself.

    Raises:
        EvaluationError: the folder is missing, the name is one of ours, or images are missing, duplicated, of an
            unknown index, of another prompt or of another size. Lists the first ten problems.
    """
    if name in TABLE_ORDER:
        raise EvaluationError(f"models.external has '{name}', which is the name of a row of ours; choose another.")
    if not folder.is_dir():
        raise EvaluationError(f"models.external.{name}: there is no folder '{folder}'.")
    if (folder / table).is_dir():
        folder = folder / table
    elif not only_table:
        return None
    manifest = folder / MANIFEST
    by_index = {request.index: request for request in requests}
    files: dict[int, Path] = {}

    def add(row: dict[str, Any]) -> None:
        index, file, prompt = row["index"], folder / row["file"], row.get("prompt")
        if type(index) is not int or index not in by_index:
            raise ValueError(f"index {index!r} is no request's")
        if index in files:
            raise ValueError(f"index {index} is given twice")
        if prompt not in (None, by_index[index].prompt, by_index[index].text):
            raise ValueError(f"index {index} is of {prompt!r}, but the request is {by_index[index].prompt!r}")
        if (actual := image_size(file)) != (size, size):
            raise ValueError(f"'{file}' has {actual[0]}×{actual[1]} pixels but must have {size}×{size}")
        files[index] = file

    if manifest.is_file():
        parse_rows(read_rows(manifest, lines=True), add, f"'{manifest}'")
    else:
        images = sorted(file for file in folder.iterdir() if IMAGE_NAME.fullmatch(file.name.lower()))
        rows = [{"index": int(re.split("[-.]", file.name)[0]), "file": file.name} for file in images]
        parse_rows(rows, add, f"'{folder}'", "image")
    if missing := sorted(set(by_index) - set(files)):
        raise EvaluationError(
            f"'{folder}': {len(missing)} of {len(by_index)} images are missing, as index {missing[0]}."
        )
    listed = [manifest] if manifest.is_file() else []
    return External(name, files, hash_files(folder, [*listed, *(files[index] for index in sorted(files))]))


def image_size(file: Path) -> tuple[int, int]:
    """Return the size given in the file's header. Raises ValueError if there is no readable image."""
    if not file.is_file():
        raise ValueError(f"'{file}' does not exist")
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise ValueError(f"'{file}' cannot be read as an image ({error})") from error

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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.images.generation import MANIFEST
from evaluation.images.provenance import hash_files
from evaluation.images.systems import TABLE_ORDER
from evaluation.protocols.benchmark import EvaluationError, Request, named_problems
from kosmosg.files import decode_text, write_text
from kosmosg.image_processing import FORMATS

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NAMED = re.compile(r"[0-9]+(-[0-9]+)?")


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
    problems: list[str] = []
    answers = listed(manifest, problems) if manifest.is_file() else named(place)
    files: dict[int, Path] = {}
    for where, index, file, prompt in answers:
        request = wanted.get(index)
        if request is None:
            problems.append(f"{where} has index {index!r}, which is no request's")
        elif index in files:
            problems.append(f"index {index} is given twice")
        elif prompt not in (None, request.prompt, request.text):
            problems.append(f"index {index} is of {prompt!r}, but {request.prompt!r} was asked for")
        elif wrong := unlike(file, size):
            problems.append(f"index {index}: '{file}' {wrong}")
        else:
            files[index] = file
    if missing := sorted(set(wanted) - set(files)) if not problems else []:
        problems = [f"{len(missing)} of {len(wanted)} images are missing, as index {missing[0]}"]
    if problems:
        raise EvaluationError(f"'{manifest if manifest.is_file() else place}': {named_problems(problems)}")
    read = [manifest] if manifest.is_file() else []
    return External(name, files, hash_files(place, [*read, *(files[index] for index in sorted(files))]))


def listed(manifest: Path, problems: list[str]) -> Iterator[tuple[str, Any, Path, str | None]]:
    """(line, index, file, prompt) of a manifest's lines; what is wrong with others goes into `problems`."""
    # Lines end at "\n" alone: a string of JSON may hold other line separators.
    for number, line in enumerate(manifest.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(decode_text(line))
            index, file, prompt = row["index"], manifest.parent / row["file"], row.get("prompt")
            if type(index) is not int:
                raise TypeError(f"index is {index!r}, which is no integer")
            yield f"line {number}", index, file, prompt
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"line {number} is no object with index and file ({type(error).__name__}: {error})")


def named(folder: Path) -> Iterator[tuple[str, int, Path, None]]:
    """(file name, index, file, None) of the images that are named after an index."""
    for file in sorted(folder.iterdir()):
        if NAMED.fullmatch(file.stem) and file.suffix.lower() in SUFFIXES:
            yield file.name, int(file.stem.partition("-")[0]), file, None


def unlike(file: Path, size: int) -> str | None:
    """What is wrong with an image file, by its header."""
    if not file.is_file():
        return "does not exist"
    try:
        with Image.open(file, formats=FORMATS) as image:
            found = image.size
    except Exception as error:  # decoders of Pillow raise many kinds on damaged files
        return f"cannot be read as an image ({error})"
    return None if found == (size, size) else f"has {found[0]}×{found[1]} pixels where {size}×{size} were asked for"

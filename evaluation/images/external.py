"""Rivals: images that another model made for our requests, scored by the same code as ours.

`evaluate.py requests evaluation.yaml` writes what is to be drawn to `<output>/requests/<table>.jsonl`: index, prompt
with `<i>`, text, input files, seed. A rival's folder answers with `<table>/manifest.jsonl`, a line for each index:

    {"index": 0, "file": "000000.png", "prompt": "backpack in the jungle"}

`file` is relative to the manifest. `prompt` may be left out; given, it must be the request's prompt or text.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation.images.manifest import MANIFEST
from evaluation.images.provenance import hash_files
from evaluation.images.systems import TABLE_ORDER
from evaluation.protocols.requests import SHOWN_PROBLEMS, EvaluationError, Request
from kosmosg.files import decode_text, write_text


@dataclass(frozen=True)
class External:
    """A rival's images of one table, whole: the file of every request by index, and their hash."""

    name: str
    files: dict[int, Path]
    model: str


def write_requests(table: str, requests: Sequence[Request], folder: Path) -> Path:
    """`<folder>/<table>.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{table}.jsonl"
    write_text(file, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in requests))
    return file


def read_external(name: str, folder: Path, table: str, requests: Sequence[Request]) -> External | None:
    """A rival's images of `table`; None where its folder has no such table.

    Raises:
        EvaluationError: no folder, a name of ours, or an image that is missing, given twice, of an unknown index or of
            another prompt; all are told (the first ten, then a count).
    """
    if name in TABLE_ORDER:
        raise EvaluationError(f"models.external has '{name}', which is the name of a row of ours; choose another.")
    if not folder.is_dir():
        raise EvaluationError(f"models.external.{name}: there is no folder '{folder}'.")
    manifest = folder / table / MANIFEST
    if not manifest.is_file():
        return None
    wanted = {request.index: request for request in requests}
    files: dict[int, Path] = {}
    problems = []
    # Lines end at "\n" alone: a string of JSON may hold other line separators.
    for number, line in enumerate(manifest.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(decode_text(line))
            index, file = row["index"], manifest.parent / row["file"]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"line {number} is no object with index and file ({type(error).__name__}: {error})")
            continue
        request = wanted.get(index)
        if request is None:
            problems.append(f"line {number} has index {index!r}, which is no request's")
        elif index in files:
            problems.append(f"index {index} is given twice")
        elif row.get("prompt", request.prompt) not in (request.prompt, request.text):
            problems.append(f"index {index} is of {row['prompt']!r}, but {request.prompt!r} was asked for")
        elif not file.is_file():
            problems.append(f"index {index}: '{file}' does not exist")
        else:
            files[index] = file
    if missing := sorted(set(wanted) - set(files)) if not problems else []:
        problems = [f"{len(missing)} of {len(wanted)} images are missing, as index {missing[0]}"]
    if problems:
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise EvaluationError(f"'{manifest}': " + "; ".join(problems[:SHOWN_PROBLEMS]) + more + ".")
    return External(name, files, hash_files(manifest.parent, [manifest, *files.values()]))

"""How far a conversion has come: written after every complete shard, so that a killed one goes on there.

FOLDER/PREFIX.conversion.json also tells afterwards what was read, what was left out and why.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.sources.layout import Layout
from kosmosg.files import write_text

VERSION = 1
SUFFIX = ".conversion.json"
EXECUTION = ("processes", "max_bad_share", "min_bad_count")
"""Settings on which the shards do not depend."""


@dataclass
class Journal:
    """The record of one conversion.

    Attributes:
        identity: layout, input and settings: what the shards depend on.
        unit, record, part: the next one to write: part of the input, record in it, sample of the record.
        shards: records of the complete shards, as ShardWriter makes them.
        counts: of the SampleCounter; `left_out` counts parts of samples.
    """

    identity: dict[str, Any]
    unit: int = 0
    record: int = 0
    part: int = 0
    shards: list[dict] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=lambda: {"reads": 0, "failed": 0, "dropped": {}, "filtered": {}})
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    complete: bool = False
    version: int = VERSION

    @property
    def samples(self) -> int:
        """Samples in the complete shards."""
        return sum(shard["samples"] for shard in self.shards)

    def save(self, file: Path) -> None:
        """Write it so that a crash leaves the old one or the new one."""
        write_text(file, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def open_journal(file: Path, layout_name: str, layout: Layout, files: list[Path]) -> Journal:
    """The journal that stands, or a new one.

    Raises:
        DataError: the one that stands is of another conversion, or shards stand without one.
    """
    identity = _identity(layout_name, layout, files)
    if not file.exists():
        prefix = file.name.removesuffix(SUFFIX)
        if there := sorted(path.name for path in file.parent.glob(f"{prefix}-*.tar")):
            raise DataError(
                f"'{file.parent}' holds {there[0]} but no {file.name}, so this command did not write it; give another "
                "folder or another prefix=…"
            )
        return Journal(identity)
    try:
        found = Journal(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"'{file}' is not readable ({error}); remove it and its shards.") from error
    before, now = _flat(found.identity), _flat(identity)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if found.version != VERSION or changed:
        told = ", ".join(f"{key} was {before.get(key)!r:.60} and is now {now.get(key)!r:.60}" for key in changed[:3])
        raise DataError(
            f"'{file.parent}' was converted from something else: {told or 'another version'}. Remove it, or give "
            "another folder or another prefix=…"
        )
    return found


def add_examples(journal: Journal, errors: list, most: int = 5) -> None:
    """Keep the first few errors of each reason, to be read in the report."""
    for error in errors:
        listed = journal.examples.setdefault(error.reason, [])
        if len(listed) < most:
            listed.append(str(error))


def count_left_out(journal: Journal, left_out: Counter[str]) -> None:
    """Add to the counts of parts."""
    for reason, count in left_out.items():
        journal.left_out[reason] = journal.left_out.get(reason, 0) + count


def _identity(name: str, layout: Layout, files: list[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size if file.exists() else 0
        digest.update(f"{layout.name_of(file)} {size}\n".encode("utf-8", "surrogateescape"))
    settings = {key: value for key, value in asdict(layout.config).items() if key not in EXECUTION}
    return {"layout": name, "input": f"{len(files)} files {digest.hexdigest()[:16]}", "settings": settings}


def _flat(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{place}{key}.") if isinstance(value, dict) else {place + key: value}
    return flat

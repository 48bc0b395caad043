"""The output folder of a curation.

    FOLDER/PREFIX-000012-0003.tar              samples of chunk 3 of source 12, if any remain
    FOLDER/curation/plan.json                  everything that the shards depend on; another plan is refused
    FOLDER/curation/records/000012-0003.json   results of its images; written last, so that it marks a finished chunk
    FOLDER/curation/counts.json                images by reason; written last, so that it marks a finished curation
    FOLDER/curation/report.md sheet.png config.yaml

An interrupted chunk is processed again and gives the same bytes.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datamodules.curation.config import EXECUTION, Curation
from datamodules.curation.rows import Batch, Row
from datamodules.curation.stages import Chunk
from datamodules.errors import DataError
from datamodules.shard_writer import ShardWriter
from kosmosg.files import clear_leftovers, flush, write_json, write_text

Record = dict[str, Any]
DROP_FIELDS = ("shard", "key", "reason", "detail")


class Output:
    """Writes to the output folder. Every worker has its own instance for the same folder."""

    def __init__(self, config: Curation):
        self.config, self.folder = config, Path(config.output)
        self.own = self.folder / "curation"
        self.records, self.temporary = self.own / "records", self.own / "temporary"
        self.counts = self.own / "counts.json"

    def prepare(self, fingerprint: str) -> None:
        """Create the folders, or check that their plan is the same, and remove partial files.

        Raises:
            DataError: the folder contains shards of another program or of another plan.
        """
        file, plan = self.own / "plan.json", self._plan(fingerprint)
        if not any(self.records.glob("*.json")):  # no chunk of an earlier plan is finished
            shards = sorted(self.folder.glob("*.tar"))
            if shards and not file.is_file():
                raise DataError(f"'{self.folder}' contains shards of another program ({shards[0].name}).")
            for shard in shards:  # whose record was not written
                shard.unlink()
            write_json(file, plan)
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [key for key in sorted(before.keys() | plan.keys()) if before.get(key) != plan.get(key)]:
            text = ", ".join(f"{key} was {before.get(key)!r:.80} and is now {plan.get(key)!r:.80}" for key in changed)
            raise DataError(f"'{self.folder}' was begun with another configuration: {text}. Set another output=…")
        shutil.rmtree(self.temporary, ignore_errors=True)
        for folder in (self.records, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.records)

    def _plan(self, fingerprint: str) -> dict[str, Any]:
        """Return everything that the shards depend on, as a flat dict."""
        values = _flat({name: value for name, value in asdict(self.config).items() if name not in EXECUTION})
        values = {key: value for key, value in values.items() if ".pool." not in key}
        return json.loads(json.dumps(values | {"input": fingerprint}))

    def done(self) -> Iterator[Record]:
        """Yield the records of the finished chunks."""
        for path in sorted(self.records.glob("*.json")):
            yield json.loads(path.read_text(encoding="utf-8"))

    def publish(self, chunk: Chunk) -> Record:
        """Write a chunk's shard, then its record.

        Raises:
            DataError: a stage failed on so many images of the chunk that the stage itself must be broken.
        """
        self._refuse_broken_stage(chunk)
        record = describe(chunk)
        kept = [row for row in chunk.rows if "dropped" not in row]
        if kept:
            record["shard"] = self._write_shard(chunk.name, kept)
        write_json(self.records / f"{chunk.name}.json", record)
        return record

    def _refuse_broken_stage(self, chunk: Chunk) -> None:
        drops = [row["dropped"] for row in chunk.rows if "dropped" in row]
        failed = [drop for drop in drops if drop["reason"].endswith("_failed")]
        if len(failed) > max(self.config.max_bad_share * len(chunk.rows), self.config.min_bad_count - 1):
            reason, count = Counter(drop["reason"] for drop in failed).most_common(1)[0]
            detail = next(drop["detail"] for drop in failed if drop["reason"] == reason)
            raise DataError(
                f"chunk {chunk.name}: {reason} for {count} of {len(chunk.rows)} images, e.g. {detail}. The chunk was "
                f"not written, because more than max_bad_share={self.config.max_bad_share:g} failed."
            )

    def _write_shard(self, name: str, rows: Batch) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.temporary) as folder:
            with ShardWriter(folder, self.config.prefix, len(rows)) as writer:
                for row in rows:
                    sample = SimpleNamespace(encode=partial(encode_row, row, self.config.image.format))
                    # The keys of the source are not used, because they may contain dots or be paths.
                    writer.write(sample, f"{name}-{row['number']:06d}")  # type: ignore[arg-type]
            (shard,) = writer.shards
            final = self.folder / f"{self.config.prefix}-{name}.tar"
            Path(folder, shard["name"]).replace(final)
            flush(self.folder)
        return shard | {"name": final.name}

    def finish(self, shards: list[dict[str, Any]], counts: dict[str, Any]) -> None:
        """Write the listing of the shards, then the counts."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        ShardWriter(self.folder, self.config.prefix, 1, shards).close()
        write_text(self.counts, json.dumps(counts, indent=2, sort_keys=True) + "\n")


def encode_row(row: Row, suffix: str) -> dict[str, bytes]:
    """Encode a finished row as the members of a constructed sample (datamodules/sample.py)."""
    fields = ("text", "box", "area", "iou")
    record = {
        "kind": "constructed",
        "caption": row["caption"],
        "entities": [{name: entity[name] for name in fields if name in entity} for entity in row["entities"]],
        "source": {"shard": row["shard"], "key": row["key"]},
    }
    text = json.dumps(record, ensure_ascii=False, sort_keys=True)
    members = {"json": text.encode("utf-8", "replace"), f"target.{suffix}": row["image"]}
    for i, entity in enumerate(row["entities"]):
        members |= {f"{i}.{name}.{suffix}": entity[name] for name in ("background", "white")}
    return members


def describe(chunk: Chunk) -> Record:
    """Return the record of a chunk: counts of its images, and the dropped ones by name."""
    drops = [row | row["dropped"] for row in chunk.rows if "dropped" in row]
    entities = [entity for row in chunk.rows if "dropped" not in row for entity in row["entities"]]
    return {
        "source": chunk.source,
        "part": chunk.part,
        "last": chunk.last,
        "images": len(chunk.rows),
        "written": len(chunk.rows) - len(drops),
        "failed": Counter(drop["reason"] for drop in drops if not drop["filtered"]),
        "filtered": Counter(drop["reason"] for drop in drops if drop["filtered"]),
        "entities": len(entities),
        "skipped_entities": sum((row["skipped_entities"] for row in chunk.rows), Counter()),
        "iou": [entity["iou"] for entity in entities if "iou" in entity],
        "shard": None,
        # File names may contain bytes that are not UTF-8.
        "dropped": [
            {name: drop[name].encode("utf-8", "backslashreplace").decode() for name in DROP_FIELDS} for drop in drops
        ],
        "timing": chunk.timing,
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and name != "template_options"
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat

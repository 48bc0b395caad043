"""The output folder: shards, what became of every image, and who may write.

    FOLDER/PREFIX-000123.tar            the samples of chunk 123, if any is left; with its index beside
    FOLDER/PREFIX.manifest.json         counts, checksums, losses by reason; written last
    FOLDER/curation/plan.json           what the shards are made from; another plan is refused
    FOLDER/curation/records/000123.json what became of chunk 123's images; written after its shard: the chunk is done
    FOLDER/curation/report.md sheet.png config.yaml

A chunk is done when its record is there. One that was cut off is done again, to the same bytes.
"""

import json
import shutil
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.curation.chunks import Plan
from datamodules.curation.config import EXECUTION, Curation
from datamodules.curation.rows import Batch, Row
from datamodules.curation.work import Work
from datamodules.errors import DataError
from datamodules.storage.shards import MANIFEST_SUFFIX, ShardWriter, sync_folder
from datamodules.storage.tar_index import index_path
from datamodules.toyland.data_sets import world_hash
from kosmosg.files import write_bytes

Record = dict[str, Any]


@dataclass
class EncodedSample:
    """A constructed sample whose images are encoded already; what ShardWriter needs of a sample."""

    members: dict[str, bytes]
    key: str

    def encode(self) -> dict[str, bytes]:
        """As they are."""
        return self.members


class Output:
    """Where one curation goes. Workers on other machines have one each, of the same folder."""

    def __init__(self, config: Curation):
        self.config, self.folder = config, Path(config.output)
        self.own = self.folder / "curation"
        self.records = self.own / "records"
        self.scratch = self.own / "scratch"

    def prepare(self, plan: Plan) -> None:
        """Make the folders, or check that they are of the same plan; leave nothing half-written.

        Raises:
            DataError: the folder holds other shards, or they were made from something else.
        """
        wanted = self._content(plan)
        file = self.own / "plan.json"
        if not any(self.records.glob("*.json")):  # nothing was made of an earlier plan
            self._clear(file)
            self.records.mkdir(parents=True, exist_ok=True)
            write_bytes(file, _json(wanted))
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
        if changed:
            told = ", ".join(f"{key} was {found.get(key)!r:.80} and is now {wanted.get(key)!r:.80}" for key in changed)
            raise DataError(f"'{self.folder}' was begun from something else: {told}. Set another output=…")
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _clear(self, plan_file: Path) -> None:
        """Remove the shards whose record was never written; those of somebody else are refused."""
        shards = sorted(self.folder.glob("*.tar"))
        if shards and not plan_file.is_file():
            raise DataError(f"'{self.folder}' holds shards of somebody else ({shards[0].name}); set another output=…")
        for shard in shards:
            index_path(shard).unlink(missing_ok=True)
            shard.unlink()

    def _content(self, plan: Plan) -> dict[str, Any]:
        """All that the shards depend on, flat."""
        values = _flat({name: value for name, value in asdict(self.config).items() if name not in EXECUTION})
        values = {key: value for key, value in values.items() if ".pool." not in key}
        uses_toyland = "toyland" in (self.config.caption.by, self.config.entities.by, self.config.masks.by)
        world = {"world": world_hash()} if uses_toyland else {}
        return json.loads(_json(values | world | {"input": plan.identity, "chunks": len(plan.chunks)}))

    def done(self) -> dict[int, Record]:
        """The records that are there, by chunk."""
        return {int(path.stem): json.loads(path.read_text(encoding="utf-8")) for path in self.records.glob("*.json")}

    def publish(self, work: Work) -> Record:
        """Write a chunk's shard, then its record.

        Raises:
            DataError: a stage failed on so many of the chunk's images that the images cannot be at fault.
        """
        self._refuse_broken_stage(work)
        record = describe(work)
        written = [row for row in work.rows if "dropped" not in row]
        if written:
            record["shard"] = self._write_shard(work.chunk.number, written)
        write_bytes(self.records / f"{work.chunk.number:06d}.json", _json(record))
        return record

    def _refuse_broken_stage(self, work: Work) -> None:
        failed = [row["dropped"] for row in work.rows if row.get("dropped", {}).get("reason", "").endswith("_failed")]
        limit = max(self.config.max_bad_share * len(work.rows), self.config.min_bad_count - 1)
        if len(failed) > limit:
            reason, count = Counter(drop["reason"] for drop in failed).most_common(1)[0]
            detail = next(drop["detail"] for drop in failed if drop["reason"] == reason)
            raise DataError(
                f"chunk {work.chunk.number}: {reason} for {count} of {len(work.rows)} images, e.g. {detail}. So many "
                f"are no fault of the images (max_bad_share={self.config.max_bad_share:g}); the chunk was not written."
            )

    def _write_shard(self, number: int, rows: Batch) -> dict[str, Any]:
        folder = self.scratch / f"{number:06d}-{uuid.uuid4().hex}"
        with ShardWriter(folder, self.config.prefix, len(rows)) as writer:
            for row in rows:
                key = f"{number:06d}{row['number']:06d}"  # its own: the source's may hold dots, or lead out of a folder
                writer.write(EncodedSample(encode_row(row, self.config.image.format), key))  # type: ignore[arg-type]
        (shard,) = writer.shards
        made, final = folder / shard["name"], self.folder / f"{self.config.prefix}-{number:06d}.tar"
        index_path(made).replace(index_path(final))
        made.replace(final)
        sync_folder(self.folder)
        shutil.rmtree(folder)
        return shard | {"name": final.name}

    def manifest(self) -> Path:
        """The manifest's path; it is there when the curation is finished."""
        return self.folder / (self.config.prefix + MANIFEST_SUFFIX)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        write_bytes(self.manifest(), _json(manifest))


def encode_row(row: Row, suffix: str) -> dict[str, bytes]:
    """A finished row as the members of a constructed sample (datamodules/sample.py)."""
    listed = [
        {name: entity[name] for name in ("text", "box", "area", "iou") if name in entity} for entity in row["entities"]
    ]
    record = {
        "kind": "constructed",
        "caption": row["caption"],
        "entities": listed,
        "source": {"shard": row["shard"], "key": row["key"]},
    }
    members = {
        "json": json.dumps(record, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace"),
        f"target.{suffix}": row["image"],
    }
    for i, entity in enumerate(row["entities"]):
        members[f"{i}.background.{suffix}"] = entity["background"]
        members[f"{i}.white.{suffix}"] = entity["white"]
    return members


def describe(work: Work) -> Record:
    """What became of a chunk's images."""
    drops = [row for row in work.rows if "dropped" in row]
    written = [row for row in work.rows if "dropped" not in row]
    entities = [entity for row in written for entity in row["entities"]]
    lost = sum((row["lost_entities"] for row in work.rows), Counter())
    return {
        "chunk": work.chunk.number,
        "read": len(work.rows),
        "written": len(written),
        "failed": _count(row["dropped"]["reason"] for row in drops if not row["dropped"]["filtered"]),
        "filtered": _count(row["dropped"]["reason"] for row in drops if row["dropped"]["filtered"]),
        "entities": {"written": len(entities), "left_out": dict(sorted(lost.items()))},
        "iou": [entity["iou"] for entity in entities if "iou" in entity],
        "shard": None,
        "drops": [
            {"shard": row["shard"], "key": row["key"], **{name: row["dropped"][name] for name in ("reason", "detail")}}
            for row in drops
        ],
        "timing": work.timing,
    }


def _count(reasons) -> dict[str, int]:
    return dict(sorted(Counter(reasons).items()))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and name != "template_options"
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _json(record: Any) -> bytes:
    return (json.dumps(record, indent=1, ensure_ascii=True) + "\n").encode()

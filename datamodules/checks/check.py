"""Reading every sample of some shards as training would, down to the last pixel, and counting."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from datamodules.checks.findings import Findings
from datamodules.checks.tokens import TokenCounter
from datamodules.errors import SampleError, ShardError
from datamodules.images import Limits, SampleImage, load
from datamodules.processes import ordered_map
from datamodules.sample import (
    SCHEMA_VERSION,
    CaptionSample,
    ConstructedSample,
    EditSample,
    ImageSample,
    InstructionSample,
    InterleavedSample,
    Sample,
    TextSample,
    decode,
)
from datamodules.storage.shards import MANIFEST_SUFFIX, IndexedShards, expand_pattern

TASK = 64
"""Samples of one task of a process."""


@dataclass
class CheckConfig:
    """How shards are checked."""

    kind: str | None = None
    """What every sample must be; null takes any."""
    captions_only: bool = False
    """Captions need no image, and images of captions are not looked at: enough for stage 2."""
    checksums: bool = True
    """Compare shards with the checksums of their manifest."""
    processes: int | None = None
    """Processes that decode; null takes one for each CPU core."""
    limits: Limits = field(default_factory=Limits)
    """What one sample may cost."""


@dataclass(frozen=True)
class _Task:
    shard: str
    begin: int
    end: int


@dataclass
class Checked:
    """Findings, and what concerns whole shards.

    Attributes:
        unreadable: shard → why none of its samples can be read.
        changed: shards whose bytes are not those of the manifest.
    """

    findings: Findings
    shards: int = 0
    bytes: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    def record(self) -> dict:
        """Plain values for JSON."""
        shards = {"count": self.shards, "bytes": self.bytes, "unreadable": self.unreadable, "changed": self.changed}
        return self.findings.record() | {"shards": shards}


def check(pattern: str, config: CheckConfig, tokens: TokenCounter) -> Checked:
    """Check all shards of a pattern. The result does not depend on the number of processes.

    A shard that cannot be read at all counts as the samples that its manifest lists, as one if there is none; one that
    the manifest lists and that is not there counts likewise.

    Raises:
        ShardError: there are no shards, or they are of a newer schema.
    """
    paths = expand_pattern(pattern)
    listed = _manifests({path.parent for path in paths})
    done = Checked(Findings(tokens.unit))
    for path in sorted(path for path in listed if path not in paths and fnmatch(str(path), pattern)):
        done.unreadable[path.name] = "it is in its manifest but is missing"
        done.findings.drop(SampleError("missing_shard", path.name, "", str(path)), listed[path]["samples"])
    tasks = _tasks(paths, listed, config, done)
    for findings in ordered_map(partial(_check_task, config=config, tokens=tokens), tasks, config.processes):
        done.findings += findings
    return done


def _tasks(paths: list[Path], listed: dict[Path, dict], config: CheckConfig, done: Checked) -> Iterator[_Task]:
    for path in paths:
        done.shards += 1
        done.bytes += path.stat().st_size
        record = listed.get(path, {})
        if config.checksums and "sha256" in record:
            with open(path, "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != record["sha256"]:
                    done.changed.append(path.name)
        try:
            count = len(IndexedShards(str(path), config.limits))
        except ShardError as error:
            done.unreadable[path.name] = str(error)
            missed = SampleError("unreadable_shard", path.name, "", str(error))
            done.findings.drop(missed, record.get("samples", 1))
            continue
        yield from (_Task(str(path), begin, min(begin + TASK, count)) for begin in range(0, count, TASK))


def _manifests(folders: set[Path]) -> dict[Path, dict]:
    """Shards as their manifests list them.

    Raises:
        ShardError: a manifest of a newer schema.
    """
    listed = {}
    for manifest in sorted(path for folder in folders for path in folder.glob(f"*{MANIFEST_SUFFIX}")):
        try:
            record = json.loads(manifest.read_text(encoding="utf-8"))
            schema, shards = record["schema"], {manifest.parent / shard["name"]: shard for shard in record["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"'{manifest}' is not a manifest of shards ({error!r}).") from error
        if schema > SCHEMA_VERSION:
            raise ShardError(f"'{manifest}' is of schema {schema}, this software reads up to {SCHEMA_VERSION}.")
        listed |= shards
    return listed


def _check_task(task: _Task, config: CheckConfig, tokens: TokenCounter) -> Findings:
    findings, shards = Findings(tokens.unit), IndexedShards(task.shard, config.limits)
    for number in range(task.begin, task.end):
        try:
            shard, key, members = shards.read(number)
            sample = decode(members, shard, key, kind=config.kind, limits=config.limits)
            sizes = [load(image).size for image in images_of(sample, config.captions_only)]
        except SampleError as error:
            findings.drop(error)
            continue
        findings.samples += 1
        findings.good += 1
        findings.kinds[sample.kind] += 1
        findings.images += len(sizes)
        for size in sizes:
            findings.sides.add(min(size))
        texts = findings.documents if isinstance(sample, TextSample | InterleavedSample) else findings.captions
        if not isinstance(sample, ImageSample):
            texts.add(tokens(text_of(sample)))
    return findings


def images_of(sample: Sample, captions_only: bool = False) -> list[SampleImage]:
    """All images of a sample.

    Raises:
        SampleError: `missing_member` - a caption without an image.
    """
    if isinstance(sample, CaptionSample):
        if captions_only:
            return []
        if sample.image is None:
            raise SampleError("missing_member", sample.shard, sample.key, "no jpg, png or webp")
        return [sample.image]
    if isinstance(sample, InterleavedSample | InstructionSample):
        targets = [sample.target] if isinstance(sample, InstructionSample) else []
        return [*(segment for segment in sample.segments if not isinstance(segment, str)), *targets]
    if isinstance(sample, ConstructedSample):
        return [sample.target, *(crop for entity in sample.entities for crop in (entity.background, entity.white))]
    if isinstance(sample, EditSample):
        return [image for pair in sample.pairs for image in pair]
    return [sample.image] if isinstance(sample, ImageSample) else []


def text_of(sample: Sample) -> str:
    """All words of a sample."""
    if isinstance(sample, TextSample):
        return sample.text
    if isinstance(sample, InterleavedSample | InstructionSample):
        return " ".join(segment for segment in sample.segments if isinstance(segment, str))
    if isinstance(sample, EditSample):
        return f"{sample.caption} {sample.instruction}".strip()
    return "" if isinstance(sample, ImageSample) else sample.caption

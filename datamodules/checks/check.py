"""Read every sample of some shards as training would, decode every image, and count what is usable."""

import hashlib
import random
import tarfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import exp, lgamma
from pathlib import Path

import numpy as np

from datamodules.checks.sheet import parts_of
from datamodules.data_config import DataConfig
from datamodules.errors import DataError, SampleError
from datamodules.images import Limits, load
from datamodules.order import Block, Mixture, SampleOrder, shuffled
from datamodules.processes import ordered_map
from datamodules.sample import SCHEMA_VERSION, CaptionSample, InterleavedSample, Sample, TextSample, decode
from datamodules.shards import find_listed, find_tars, read_listing
from datamodules.tar import GZIP, OpenFiles, Tar

EXAMPLES = 5  # unusable samples named per reason
CHOSEN = 12  # random usable samples of each kind for the contact sheet
BATCHES = 32  # over which the number of shards in a batch is averaged
# 75, 85 and 128 tokens and 384 pixels are limits of the released code (released-code.md, "Caption rows").
TOKEN_EDGES = (0, 5, 10, 15, 20, 30, 40, 50, 60, 76, 86, 129, 257, 513, 1025, 2049, 8193)
SIDE_EDGES = (0, 32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096)
# Files by which tokenizers are recognised: ours, and CLIP's of older and newer versions of transformers.
TOKENIZERS = {"sentencepiece.bpe.model": "pieces", "vocab.json": "CLIP tokens", "tokenizer.json": "CLIP tokens"}


@dataclass
class CheckConfig:
    """How shards are checked.

    Args:
        kind: required kind of every sample; None accepts any.
        captions_only: captions need no image and their images are not decoded, as in stage 2.
        checksums: compare the shards with the checksums in their listing.
        tokenizer: model folder, or folder of one of our tokenizers or a CLIP tokenizer; None counts words.
        processes: number of processes, each of which checks one shard at a time; None: one per CPU core.
    """

    kind: str | None = None
    captions_only: bool = False
    checksums: bool = True
    tokenizer: str | None = None
    processes: int | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass
class Findings:
    """Results for some shards; the results of several shards can be added.

    Attributes:
        unit: unit of the text lengths.
        sizes: samples of each shard, including unusable ones.
        kinds, dropped: usable samples by kind; unusable ones by the reason that training counts.
        captions, documents: numbers of texts by length.
        sides: numbers of images by shorter side in pixels.
        unreadable: shard → why none of its samples can be read.
        changed: shards that differ from their listing.
        examples: the first unusable samples of each reason.
        chosen: random usable samples of each kind: random number, path, begin and end in the tar.
    """

    unit: str
    bytes: int = 0
    sizes: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)
    documents: Counter[int] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    examples: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))
    chosen: dict[str, list[tuple[float, str, int, int]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def samples(self) -> int:
        """Number of usable and unusable samples."""
        return self.kinds.total() + self.dropped.total()

    def drop(self, error: SampleError, count: int = 1) -> None:
        """Count unusable samples."""
        self.dropped[error.reason] += count
        if len(self.examples[error.reason]) < EXAMPLES:
            self.examples[error.reason].append({"shard": error.shard, "key": error.key, "detail": error.detail})

    def __iadd__(self, other: "Findings") -> "Findings":
        self.bytes += other.bytes
        for name in ("sizes", "kinds", "dropped", "captions", "documents", "sides", "unreadable", "changed"):
            mine = getattr(self, name)
            mine.extend(getattr(other, name)) if isinstance(mine, list) else mine.update(getattr(other, name))
        for reason, listed in other.examples.items():
            self.examples[reason] = [*self.examples[reason], *listed][:EXAMPLES]
        for kind, chosen in other.chosen.items():
            self.chosen[kind] = sorted([*self.chosen[kind], *chosen])[:CHOSEN]
        return self

    def record(self) -> dict:
        """Return the results as plain values for JSON. `samples` is `good` plus the sum of `dropped`."""
        return {
            "schema": SCHEMA_VERSION,
            "samples": self.samples,
            "good": self.kinds.total(),
            "dropped": dict(self.dropped.most_common()),
            "kinds": dict(self.kinds.most_common()),
            "images": self.sides.total(),
            "caption_tokens": histogram(self.captions, TOKEN_EDGES, self.unit),
            "document_tokens": histogram(self.documents, TOKEN_EDGES, self.unit),
            "image_sides": histogram(self.sides, SIDE_EDGES, "pixels of the shorter side"),
            "examples": dict(self.examples),
            "shards": {
                "count": len(self.sizes),
                "bytes": self.bytes,
                "unreadable": self.unreadable,
                "changed": self.changed,
            },
        }


def check(pattern: str, config: CheckConfig) -> Findings:
    """Check the local shards of a pattern. The result does not depend on the number of processes.

    Samples that are listed but missing from a shard are counted as dropped, as in training. A truncated shard without a
    listing counts as missing one sample.

    Raises:
        DataError: no shard matches, or there is no tokenizer.
    """
    tokenizer, unit = _find_tokenizer(config.tokenizer)
    paths, listed = _find_shards(pattern)
    findings = Findings(unit)
    for path in sorted(listed.keys() - set(paths)):
        findings.unreadable[path.name] = "it is listed but missing"
        findings.drop(SampleError("missing_shard", path.name, "", str(path)), listed[path]["samples"])
    tasks = [(path, listed.get(path)) for path in paths]
    task = partial(_check_shard, config=config, tokenizer=tokenizer, unit=unit)
    for part in ordered_map(task, tasks, config.processes):
        findings += part
    return findings


def _find_shards(pattern: str) -> tuple[list[Path], dict[Path, dict]]:
    """Return the existing shards, and the records of all listed shards, including missing ones."""
    if pattern.endswith(".json"):
        listing = Path(pattern).expanduser()
        listed = {listing.parent / record["name"]: record for record in read_listing(str(listing))}
        return sorted(path for path in listed if path.is_file()), listed
    return find_tars(pattern), find_listed(pattern)


def _check_shard(task: tuple[Path, dict | None], config: CheckConfig, tokenizer: str | None, unit: str) -> Findings:
    path, listed = task
    findings, tar, damage = Findings(unit), Tar(path, OpenFiles()), None
    rng, tokenize = random.Random(path.name), _tokenize(tokenizer, unit)
    try:
        findings.bytes = tar.size
        wrong_size = listed is not None and findings.bytes != listed["bytes"]
        if listed and (wrong_size or (config.checksums and _differs(path, listed.get("sha256")))):
            findings.changed = [path.name]
        if tar.files.read(tar.path, 0, 2) == GZIP:
            raise SampleError("damaged_tar", path.name, "", "the file is compressed; decompress it")
        for group in tar.groups():
            try:
                key, members = tar.read(group.begin, group.end, config.limits)
                sample = decode(members, path.name, key, kind=config.kind, limits=config.limits)
                sides = image_sides(sample, config.captions_only)
            except SampleError as error:
                findings.drop(error)
                continue
            findings.kinds[sample.kind] += 1
            findings.sides.update(sides)
            if text := text_of(sample):
                is_document = isinstance(sample, TextSample | InterleavedSample)
                (findings.documents if is_document else findings.captions)[len(tokenize(text))] += 1
            chosen = findings.chosen[sample.kind]
            chosen.append((rng.random(), str(path), group.begin, group.end))
            if len(chosen) > CHOSEN:
                chosen.remove(max(chosen))
    except SampleError as error:
        damage = error
    except OSError as error:
        damage = SampleError("unreachable_shard", path.name, "", str(error))
    read = findings.samples
    if listed and read > listed["samples"]:
        findings.changed = [path.name]
    empty = damage is None and findings.bytes <= tarfile.RECORDSIZE
    size = listed["samples"] if listed else read + (damage is not None or not (read or empty))
    if size > read:
        damage = damage or SampleError("truncated_tar", path.name, "", f"ends after {read} samples")
        findings.drop(damage, size - read)
        if not read:
            findings.unreadable[path.name] = f"{damage.reason}: {damage.detail}"
    findings.sizes = [findings.samples]
    return findings


def _differs(path: Path, sha256: str | None) -> bool:
    if not sha256:
        return False
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() != sha256


def image_sides(sample: Sample, captions_only: bool = False) -> list[int]:
    """Decode the images of a sample and return the shorter side of each in pixels.

    Raises:
        SampleError: an image cannot be decoded, or a caption has no image (`missing_member`).
    """
    if isinstance(sample, CaptionSample) and captions_only:
        return []
    if isinstance(sample, CaptionSample) and sample.image is None:
        raise SampleError("missing_member", sample.shard, sample.key, "no jpg, png or webp")
    return [min(load(part.image).size) for part in parts_of(sample) if part.image is not None]


def text_of(sample: Sample) -> str:
    """Return all texts of a sample, joined."""
    fields = (getattr(sample, name, "") for name in ("text", "caption", "instruction"))
    return " ".join(text for text in getattr(sample, "segments", fields) if isinstance(text, str) and text)


def chosen_samples(findings: Findings, limits: Limits) -> dict[str, list[Sample]]:
    """Read the randomly chosen samples, by kind."""
    samples, files = defaultdict(list), OpenFiles()
    for kind in sorted(findings.chosen):
        for _, path, begin, end in findings.chosen[kind]:
            key, members = Tar(path, files).read(begin, end, limits)
            samples[kind].append(decode(members, Path(path).name, key, limits=limits))
    return samples


def histogram(values: Counter[int], edges: Sequence[int], unit: str) -> dict:
    """Return a histogram as plain values for JSON: bin `i` counts edges[i] ≤ value < edges[i+1]; the last has no upper
    edge."""
    counts, total = [0] * len(edges), values.total()
    for value, count in values.items():
        counts[bisect_right(edges, value) - 1] += count
    mean = round(sum(value * count for value, count in values.items()) / total, 2) if total else None
    bounds = {"min": min(values, default=None), "max": max(values, default=None)}
    return {"unit": unit, "edges": list(edges), "counts": counts, "values": total, "mean": mean} | bounds


def shuffle_quality(sizes: Sequence[int], config: DataConfig, rows: int) -> dict:
    """Mean number of shards in a batch of `rows` rows if training reads only these shards, and with a full shuffle.

    Args:
        sizes: samples of each shard.
        config: lanes, lane_rows, window and block.
    """
    counts = np.array([size for size in sizes if size])
    order = SampleOrder(counts, config.seed, config.lanes, config.lane_rows, config.window, config.block)
    mixture, rows = Mixture(config.seed, [1], config.lanes, config.lane_rows), min(rows, order.total)

    @lru_cache(2 * config.lanes)
    def shards(block: Block) -> np.ndarray:
        unshuffled = np.repeat([part.shard for part in block.slices], [part.end - part.begin for part in block.slices])
        return unshuffled[shuffled(len(block), *block.key)]

    def shard(row: int) -> int:
        draw = mixture(row)
        block, place = order(draw.lane, draw.row)
        return int(shards(block)[place])

    begins = np.linspace(0, order.total - rows, BATCHES).astype(int).tolist()
    in_batch = [len({shard(row) for row in range(begin, begin + rows)}) for begin in begins]
    full = sum(1 - _absence(int(size), order.total, rows) for size in counts)
    settings = {name: getattr(config, name) for name in ("lanes", "window", "block")}
    return settings | {"batch": rows, "shards_in_batch": float(np.mean(in_batch)), "full_shuffle": full}


def _absence(size: int, total: int, rows: int) -> float:
    """Probability that `rows` of `total` samples contain none of a shard: C(total - size, rows) / C(total, rows)."""
    others = total - size
    if others < rows:
        return 0.0
    return exp(lgamma(others + 1) - lgamma(others - rows + 1) - lgamma(total + 1) + lgamma(total - rows + 1))


def _find_tokenizer(folder: str | None) -> tuple[str | None, str]:
    if folder is None:
        return None, "words"
    for place in (Path(folder) / "tokenizer", Path(folder)):
        for name, unit in TOKENIZERS.items():
            if (place / name).is_file():
                return str(place), unit
    raise DataError(f"'{folder}' holds no tokenizer, neither ours nor CLIP's; looked for {', '.join(TOKENIZERS)}.")


@lru_cache(1)
def _tokenize(folder: str | None, unit: str) -> Callable[[str], list]:
    """Return a function from texts to tokens, without start and end. Each process loads the tokenizer once."""
    if folder is None:
        return str.split
    if unit == "pieces":
        from kosmosg.tokenizer import Tokenizer

        return Tokenizer.from_pretrained(folder).encode
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer.from_pretrained(folder)
    return lambda text: clip(text, add_special_tokens=False).input_ids

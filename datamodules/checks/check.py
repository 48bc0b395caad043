"""Reading every sample of some shards as training would, down to the last pixel, and counting."""

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

EXAMPLES = 5  # unusable samples of each reason that are named
DRAWN = 12  # usable samples of each kind that are kept to look at
BATCHES = 32  # over which the shards in a batch are averaged
# 75, 85 and 128 tokens and 384 pixels are limits of the released code (released-code.md, "Caption rows").
TOKEN_EDGES = (0, 5, 10, 15, 20, 30, 40, 50, 60, 76, 86, 129, 257, 513, 1025, 2049, 8193)
SIDE_EDGES = (0, 32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096)
# By which a tokenizer is known: ours, and CLIP's of older and newer versions of transformers.
TOKENIZERS = {"sentencepiece.bpe.model": "pieces", "vocab.json": "CLIP tokens", "tokenizer.json": "CLIP tokens"}


@dataclass
class CheckConfig:
    """How shards are checked.

    Args:
        kind: what every sample must be; None takes any.
        captions_only: captions need no image, and theirs are not decoded, as for stage 2.
        checksums: compare shards with the checksums of their listing.
        tokenizer: folder of a tokenizer of ours, of a model that holds one, or of a CLIP tokenizer; None counts words.
        processes: that decode, a shard at a time; None takes one for each CPU core.
    """

    kind: str | None = None
    captions_only: bool = False
    checksums: bool = True
    tokenizer: str | None = None
    processes: int | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass
class Findings:
    """What some shards hold. Those of several shards add up.

    Attributes:
        unit: of texts.
        sizes: samples of each shard, unusable ones included.
        kinds, dropped: usable samples by kind, others by the reason that training counts.
        captions, documents: texts by their tokens.
        sides: images by the pixels of their shorter side.
        unreadable: shard → why none of its samples can be read.
        changed: shards that are not those of their listing.
        examples: the first unusable samples by reason.
        drawn: random usable samples by kind: draw, path, begin and end in the tar.
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
    drawn: dict[str, list[tuple[float, str, int, int]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def samples(self) -> int:
        """Usable and unusable ones."""
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
        for kind, drawn in other.drawn.items():
            self.drawn[kind] = sorted([*self.drawn[kind], *drawn])[:DRAWN]
        return self

    def record(self) -> dict:
        """Plain values for JSON; `samples` is `good` and the sum of `dropped`."""
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

    Samples that a listing counts and a shard lacks are counted as training counts them; a shard that is not listed and
    breaks off lacks one.

    Raises:
        DataError: there are no shards, or no tokenizer.
    """
    tokenizer, unit = _find_tokenizer(config.tokenizer)
    paths, listed = _find_shards(pattern)
    found = Findings(unit)
    for path in sorted(listed.keys() - set(paths)):
        found.unreadable[path.name] = "it is listed but missing"
        found.drop(SampleError("missing_shard", path.name, "", str(path)), listed[path]["samples"])
    tasks = [(path, listed.get(path)) for path in paths]
    task = partial(_check_shard, config=config, tokenizer=tokenizer, unit=unit)
    for part in ordered_map(task, tasks, config.processes):
        found += part
    return found


def _find_shards(pattern: str) -> tuple[list[Path], dict[Path, dict]]:
    """Shards that are there, and the records of these and of missing ones, as far as they are listed."""
    if pattern.endswith(".json"):
        listing = Path(pattern).expanduser()
        listed = {listing.parent / record["name"]: record for record in read_listing(str(listing))}
        return sorted(path for path in listed if path.is_file()), listed
    return find_tars(pattern), find_listed(pattern)


def _check_shard(task: tuple[Path, dict | None], config: CheckConfig, tokenizer: str | None, unit: str) -> Findings:
    path, listed = task
    found, tar, lost = Findings(unit), Tar(path, OpenFiles()), None
    draws, tokenize = random.Random(path.name), _tokenize(tokenizer, unit)
    try:
        found.bytes = tar.size
        if listed and (found.bytes != listed["bytes"] or (config.checksums and _differs(path, listed.get("sha256")))):
            found.changed = [path.name]
        if tar.files.read(tar.path, 0, 2) == GZIP:
            raise SampleError("damaged_tar", path.name, "", "the file is compressed; decompress it")
        for group in tar.groups():
            try:
                key, members = tar.read(group.begin, group.end, config.limits)
                sample = decode(members, path.name, key, kind=config.kind, limits=config.limits)
                sides = image_sides(sample, config.captions_only)
            except SampleError as error:
                found.drop(error)
                continue
            found.kinds[sample.kind] += 1
            found.sides.update(sides)
            if words := words_of(sample):
                texts = found.documents if isinstance(sample, TextSample | InterleavedSample) else found.captions
                texts[len(tokenize(words))] += 1
            drawn = found.drawn[sample.kind]
            drawn.append((draws.random(), str(path), group.begin, group.end))
            if len(drawn) > DRAWN:
                drawn.remove(max(drawn))
    except SampleError as error:
        lost = error
    except OSError as error:
        lost = SampleError("unreachable_shard", path.name, "", str(error))
    read = found.samples
    if listed and read > listed["samples"]:
        found.changed = [path.name]
    empty = lost is None and found.bytes <= tarfile.RECORDSIZE
    size = listed["samples"] if listed else read + (lost is not None or not (read or empty))
    if size > read:
        lost = lost or SampleError("truncated_tar", path.name, "", f"ends after {read} samples")
        found.drop(lost, size - read)
        if not read:
            found.unreadable[path.name] = f"{lost.reason}: {lost.detail}"
    found.sizes = [found.samples]
    return found


def _differs(path: Path, sha256: str | None) -> bool:
    if not sha256:
        return False
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() != sha256


def image_sides(sample: Sample, captions_only: bool = False) -> list[int]:
    """Pixels of the shorter side of each image of a sample, decoded.

    Raises:
        SampleError: one cannot be decoded; or `missing_member`, a caption without an image.
    """
    if isinstance(sample, CaptionSample) and captions_only:
        return []
    if isinstance(sample, CaptionSample) and sample.image is None:
        raise SampleError("missing_member", sample.shard, sample.key, "no jpg, png or webp")
    return [min(load(part.image).size) for part in parts_of(sample) if part.image is not None]


def words_of(sample: Sample) -> str:
    """All texts of a sample."""
    named = (getattr(sample, name, "") for name in ("text", "caption", "instruction"))
    return " ".join(text for text in getattr(sample, "segments", named) if isinstance(text, str) and text)


def drawn_samples(found: Findings, limits: Limits) -> dict[str, list[Sample]]:
    """The samples that were drawn, by kind."""
    samples, files = defaultdict(list), OpenFiles()
    for kind in sorted(found.drawn):
        for _, path, begin, end in found.drawn[kind]:
            key, members = Tar(path, files).read(begin, end, limits)
            samples[kind].append(decode(members, Path(path).name, key, limits=limits))
    return samples


def histogram(values: Counter[int], edges: Sequence[int], unit: str) -> dict:
    """Plain values for JSON: bar `i` counts edges[i] ≤ value < edges[i+1], the last all that are larger."""
    counts, total = [0] * len(edges), values.total()
    for value, count in values.items():
        counts[bisect_right(edges, value) - 1] += count
    mean = round(sum(value * count for value, count in values.items()) / total, 2) if total else None
    bounds = {"min": min(values, default=None), "max": max(values, default=None)}
    return {"unit": unit, "edges": list(edges), "counts": counts, "values": total, "mean": mean} | bounds


def shuffle_quality(sizes: Sequence[int], config: DataConfig, rows: int) -> dict:
    """Shards in a batch of `rows` rows when training reads these shards alone, and with a full shuffle of all samples.

    Args:
        sizes: samples of each shard.
        config: lanes, lane_rows, window and block.
    """
    counts = np.array([size for size in sizes if size])
    order = SampleOrder(counts, config.seed, config.lanes, config.lane_rows, config.window, config.block)
    mixture, rows = Mixture(config.seed, [1], config.lanes, config.lane_rows), min(rows, order.total)

    @lru_cache(2 * config.lanes)
    def shards(block: Block) -> np.ndarray:
        each = np.repeat([part.shard for part in block.slices], [part.end - part.begin for part in block.slices])
        return each[shuffled(len(block), *block.key)]

    def shard(row: int) -> int:
        draw = mixture(row)
        block, place = order(draw.lane, draw.row)
        return int(shards(block)[place])

    begins = np.linspace(0, order.total - rows, BATCHES).astype(int).tolist()
    found = [len({shard(row) for row in range(begin, begin + rows)}) for begin in begins]
    full = sum(1 - _absence(int(size), order.total, rows) for size in counts)
    settings = {name: getattr(config, name) for name in ("lanes", "window", "block")}
    return settings | {"batch": rows, "shards_in_batch": float(np.mean(found)), "full_shuffle": full}


def _absence(size: int, total: int, rows: int) -> float:
    """Probability that `rows` of `total` samples hold none of a shard: C(total - size, rows) / C(total, rows)."""
    left = total - size
    if left < rows:
        return 0.0
    return exp(lgamma(left + 1) - lgamma(left - rows + 1) - lgamma(total + 1) + lgamma(total - rows + 1))


def _find_tokenizer(folder: str | None) -> tuple[str | None, str]:
    if folder is None:
        return None, "words"
    for place in (Path(folder) / "tokenizer", Path(folder)):
        for name, unit in TOKENIZERS.items():
            if (place / name).is_file():
                return str(place), unit
    raise DataError(f"'{folder}' holds no tokenizer, ours or CLIP's; looked for {', '.join(TOKENIZERS)}.")


@lru_cache(1)
def _tokenize(folder: str | None, unit: str) -> Callable[[str], list]:
    """Text → its tokens, start and end left out. Each process reads the tokenizer once."""
    if folder is None:
        return str.split
    if unit == "pieces":
        from kosmosg.tokenizer import Tokenizer

        return Tokenizer.from_pretrained(folder).encode
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer.from_pretrained(folder)
    return lambda text: clip(text, add_special_tokens=False).input_ids

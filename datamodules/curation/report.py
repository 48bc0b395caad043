"""The report of a curation: counts, checks of their limits, throughput of each stage, and a contact sheet."""

import random
import statistics
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from datamodules.curation.config import Curation
from datamodules.curation.output import Record
from datamodules.curation.reading import read_shard
from datamodules.errors import DataError
from datamodules.images import Limits, load
from datamodules.sample import ConstructedSample, decode

CELL, GAP, TEXT, LINE, LETTERS = 128, 8, 210, 16, 30  # pixels; letters of a line
ENTITIES = 3  # shown per sample


class Counts:
    """Adds up the records of all chunks.

    Args:
        sources: number of sources.
    """

    def __init__(self, config: Curation, sources: int):
        self.config, self.sources = config, sources
        self.images = self.written = self.entities = 0
        self.failed, self.filtered, self.skipped_entities = Counter[str](), Counter[str](), Counter[str]()
        self.timing: dict[str, tuple[int, float]] = {}
        self.iou: list[float] = []
        self._shards: dict[tuple[int, int], dict[str, Any]] = {}  # by source and part
        self.parts: defaultdict[int, set[int]] = defaultdict(set)  # finished chunks by source
        self.finished: set[int] = set()  # sources of which all chunks are finished
        self._sizes: dict[int, int] = {}

    def add(self, record: Record) -> None:
        """Add the record of a chunk. Raises DataError if too many images or shards failed."""
        source, part = record["source"], record["part"]
        self.parts[source].add(part)
        if record["shard"]:
            self._shards[source, part] = record["shard"]
        if record["last"]:
            self._sizes[source] = part + 1
        if len(self.parts[source]) == self._sizes.get(source):
            self.finished.add(source)
        self.images += record["images"]
        self.written += record["written"]
        self.entities += record["entities"]
        self.iou += record["iou"]
        for name in ("failed", "filtered", "skipped_entities"):
            getattr(self, name).update(record[name])
        for stage, (rows, seconds) in record["timing"].items():
            before = self.timing.get(stage, (0, 0.0))
            self.timing[stage] = before[0] + rows, before[1] + seconds
        self._refuse_too_many()

    def _refuse_too_many(self) -> None:
        share, failed = self.config.max_bad_share, self.failed.total()
        remedy = (
            f"max_bad_share is {share:g}. They are listed in curation/records. Correct the input or increase "
            "max_bad_share, and start again; finished chunks are kept."
        )
        if (unreadable := self.failed["unreadable_shard"]) > share * self.sources:
            raise DataError(f"{unreadable} of {self.sources} shards cannot be read; {remedy}")
        if failed >= self.config.min_bad_count and failed > share * self.images:
            raise DataError(f"{failed} of {self.images} images failed ({listed(self.failed)}); {remedy}")

    def shards(self) -> list[dict[str, Any]]:
        """Return the records of all shards in order. Raises DataError if there are none."""
        if not self._shards:
            losses = f"failed: {listed(self.failed)}; filtered: {listed(self.filtered)}"
            raise DataError(f"nothing is left of {self.images} images ({losses}); a set must not be empty.")
        return [self._shards[place] for place in sorted(self._shards)]

    def summary(self) -> dict[str, Any]:
        """Return the counts for counts.json, which do not depend on the number or order of workers."""
        return {
            "images": self.images,
            "written": self.written,
            "failed": self.failed,
            "filtered": self.filtered,
            "entities": self.entities,
            "skipped_entities": self.skipped_entities,
            "mask_iou": self.mask_iou(),
        }

    def mask_iou(self) -> dict[str, float]:
        """Return statistics of the IoU of recovered and true masks, if the true masks are known."""
        scores = sorted(self.iou)
        if not scores:
            return {}
        mean = round(statistics.fmean(scores), 4)
        return {"n": len(scores), "mean": mean, "tenth_percentile": scores[len(scores) // 10], "min": scores[0]}


def listed(counts: Counter[str]) -> str:
    """Format counts as `reason count, reason count`, or `none`."""
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items())) or "none"


def report(counts: Counts) -> str:
    """Return the text of curation/report.md: counts and throughput."""
    shards = counts.shards()
    size = sum(shard["bytes"] for shard in shards)
    lines = [
        f"- {counts.written:,} of {counts.images:,} images became samples ({counts.written / counts.images:.1%}), with "
        f"{counts.entities:,} entities; {len(shards):,} shards, {size / 1e9:.3f} GB.",
        f"- Failed: {listed(counts.failed)}.",
        f"- Filtered: {listed(counts.filtered)}.",
        f"- Entities skipped: {listed(counts.skipped_entities)}.",
    ]
    if iou := counts.mask_iou():
        lines.append("- IoU of recovered and true masks: " + ", ".join(f"{k} {v:,}" for k, v in iou.items()) + ".")
    lines += ["", "## Throughput", "", "Seconds are summed over workers, without the loading of models.", ""]
    lines += ["| stage | images | seconds | images/s per worker |", "|---|---:|---:|---:|"]
    for stage, (rows, seconds) in counts.timing.items():
        rate = f"{rows / seconds:,.1f}" if rows and seconds else "–"
        lines.append(f"| {stage} | {rows:,} | {seconds:,.1f} | {rate} |")
    return "\n".join(lines) + "\n"


def write_sheet(counts: Counts, folder: Path, file: Path) -> None:
    """Draw a PNG of `sheet` samples, chosen by the seed: target, and each entity with its background and on white."""
    count = min(counts.config.sheet, counts.written)
    chosen = set(random.Random(counts.config.seed).sample(range(counts.written), count))
    width = GAP + TEXT + (1 + 2 * ENTITIES) * (CELL + GAP)
    page = Image.new("RGB", (width, GAP + count * (CELL + LINE + GAP)), (236, 238, 241))
    begin, top = 0, GAP
    for shard in counts.shards():
        end = begin + shard["samples"]
        if not chosen.isdisjoint(range(begin, end)):
            for number, item in enumerate(read_shard(str(folder / shard["name"]), Limits()), begin):
                if number in chosen and not isinstance(item, Exception):
                    _draw(page, top, decode(item[1], shard["name"], item[0], kind="constructed"))  # type: ignore[arg-type]
                    top += CELL + LINE + GAP
        begin = end
    page.save(file)


def _draw(page: Image.Image, top: int, sample: ConstructedSample) -> None:
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    draw.multiline_text((GAP, top), "\n".join(textwrap.wrap(sample.caption, LETTERS)[:6]), fill="black", font=font)
    draw.text((GAP, top + CELL - LINE), sample.key, fill="grey", font=font)
    cells = [("", sample.target)]
    for entity in sample.entities[:ENTITIES]:
        cells += [(entity.text, entity.background), ("", entity.white)]
    for column, (text, stored) in enumerate(cells):
        left, image = GAP + TEXT + column * (CELL + GAP), load(stored)
        kernel = Image.Resampling.NEAREST if max(image.size) <= CELL // 2 else Image.Resampling.LANCZOS
        page.paste(image.resize((CELL, CELL), kernel), (left, top))
        draw.text((left, top + CELL + 1), text, fill="black", font=font)

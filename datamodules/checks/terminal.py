"""What a check found and what a sample holds, for people at a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from datamodules.checks.check import Checked
from datamodules.checks.histogram import Histogram
from datamodules.checks.sheet import parts_of
from datamodules.images import StoredImage, load
from datamodules.sample import decode

BAR = 40
LETTERS = 400


def show_findings(checked: Checked, console: Console) -> None:
    """Counts, what was dropped with an example of each reason, and histograms."""
    found = checked.findings
    size = f"{checked.bytes / 1e9:,.2f} GB" if checked.bytes >= 1e8 else f"{checked.bytes / 1e6:,.2f} MB"
    _print(console, f"{checked.shards:,} shard(s), {size}: {found.samples:,} samples, {found.good:,} good")
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in found.kinds.most_common())
    _print(console, f"{kinds or 'nothing'}; {found.images:,} images")
    for name, why in checked.unreadable.items():
        _print(console, f"unreadable: {name}: {why}")
    for name in checked.changed:
        _print(console, f"changed since it was written (checksum): {name}")
    if found.dropped:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
        for head in ("dropped", "samples", "for example"):
            table.add_column(head, justify="right" if head == "samples" else "left", overflow="fold")
        for reason, count in found.dropped.most_common():
            first = found.examples[reason][0]
            told = f"{first['shard']} {first['key']}: {first['detail']}"
            table.add_row(Text(reason), f"{count:,}", Text(printable(told)[:LETTERS]))
        console.print(table)
    for name, histogram in (
        ("captions and instructions", found.captions),
        ("documents", found.documents),
        ("images", found.sides),
    ):
        if len(histogram):
            _show_histogram(name, histogram, console)


def show_sample(console: Console, shard: str, key: str, index: int, members: dict[str, bytes]) -> None:
    """Members, then what they mean.

    Raises:
        SampleError: the members are no usable sample; they are printed all the same.
    """
    _print(console, f"{shard}, sample {index}, key '{key}'")
    for name, content in members.items():
        _print(console, f"  {name:<18} {len(content):>9,} bytes")
    sample = decode(members, shard, key)
    _print(console, sample.kind)
    for part in parts_of(sample, whole=True):
        if part.image is not None:
            pixels = load(part.image)
            name = part.image.name if isinstance(part.image, StoredImage) else "image"
            _print(console, f"  [{name} {pixels.width}×{pixels.height}] {part.text}")
        else:
            _print(console, f"  {part.text}")


def printable(text: str) -> str:
    """Names and captions are the data's: they must not steer the terminal that they are read in."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _show_histogram(name: str, histogram: Histogram, console: Console) -> None:
    record, rows = histogram.record(), histogram.rows()
    _print(console, f"\n{name}: {histogram.unit}, mean {record['mean']:g}, {record['min']} … {record['max']}", raw=True)
    most = max(count for _, count in rows)
    for label, count in rows:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        _print(console, f"{label:>11} {count:>10,} {bar}")


def _print(console: Console, text: str, raw: bool = False) -> None:
    console.print(Text(text if raw else printable(text)), soft_wrap=True)

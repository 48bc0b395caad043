"""Check shards: read every sample, decode every image, and count what is usable.

    kosmosg data check data/edit
    kosmosg data check 'laion/{00000..00099}.tar' --tokenizer models/kosmosg --sheet laion.png
    kosmosg data check 'data/**/*.tar' --json

SHARDS is a folder, a path, a glob, a brace list or a shards.json; tars need not be listed. In the output of --json,
samples = good + the sum of dropped, which is counted by reason. --batch, --lanes and --window set how training would
read the shards; the number of shards that contribute to a batch is reported. The exit status is 1 if more than
--max-bad-share of the samples are dropped.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH, MAX_EXAMPLE = 40, 400  # characters
TABLE_STYLE = {"box": None, "header_style": "", "padding": (0, 2, 0, 0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="folder, path, glob, brace list or shards.json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also draw a contact sheet with a row per kind")
    parser.add_argument("--kind", help="treat samples of other kinds as bad")
    parser.add_argument("--captions-only", action="store_true", help="captions need no image, as in stage 2")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="count tokens with that of a model folder, or a "
                        "tokenizer folder of ours or of CLIP; default: count words")  # fmt: skip
    parser.add_argument(
        "--max-bad-share", type=float, default=1.0, metavar="SHARE", help="0 … 1; exit status 1 above it; default: 1"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="default: one per CPU core")
    parser.add_argument("--no-checksums", action="store_true", help="do not compare with the listed checksums")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="rows of a batch; default: 256")
    for name in ("lanes", "window"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"as data.{name}")


def run(arguments: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from datamodules.checks.check import CheckConfig, check, chosen_samples, shuffle_quality
    from datamodules.checks.sheet import draw_sheet
    from datamodules.data_config import DataConfig
    from datamodules.sample import KINDS

    if not 0 <= arguments.max_bad_share <= 1:
        raise ValueError(f"--max-bad-share is {arguments.max_bad_share}; allowed: 0 … 1")
    for name in ("processes", "batch", "lanes", "window"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}; allowed: at least 1")
    if arguments.sheet and arguments.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet is '{arguments.sheet}'; allowed: a file that ends in .png")
    if arguments.kind not in (None, *KINDS):
        raise ValueError(f"--kind is '{arguments.kind}'; allowed: {', '.join(KINDS)}")
    if arguments.sheet:
        arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
    reading = DataConfig(**{name: getattr(arguments, name) for name in ("lanes", "window") if getattr(arguments, name)})
    config = CheckConfig(arguments.kind, arguments.captions_only, not arguments.no_checksums, arguments.tokenizer,
                         arguments.processes)  # fmt: skip
    findings = check(arguments.shards, config)
    record = findings.record()
    if any(findings.sizes):
        record["shuffle"] = shuffle_quality(findings.sizes, reading, arguments.batch)
    if arguments.sheet:
        draw_sheet(chosen_samples(findings, config.limits), arguments.sheet)
    if arguments.json:
        print(json.dumps(record, indent=1, ensure_ascii=False))
    else:
        show(record, Console())
    return 1 if record["samples"] - record["good"] > arguments.max_bad_share * record["samples"] else 0


def show(record: dict, console: "Console") -> None:
    """Print the counts, an example of each reason for dropping, histograms and the quality of the shuffle."""
    from rich.table import Table
    from rich.text import Text

    from datamodules.errors import printable

    def say(text: str) -> None:
        console.print(Text(printable(text)), soft_wrap=True)

    shards = record["shards"]
    size = f"{shards['bytes'] / 1e6:,.2f} MB"
    say(f"{shards['count']:,} shard(s), {size}: {record['samples']:,} samples, {record['good']:,} good")
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in record["kinds"].items())
    say(f"{kinds or 'nothing'}; {record['images']:,} images")
    for name, why in shards["unreadable"].items():
        say(f"unreadable: {name}: {why}")
    for name in shards["changed"]:
        say(f"differs from its listing (size, checksum or samples): {name}")
    if record["dropped"]:
        table = Table("dropped", "samples", "example", **TABLE_STYLE)
        for reason, count in record["dropped"].items():
            first = record["examples"][reason][0]
            example = printable(f"{first['shard']} {first['key']}: {first['detail']}")
            table.add_row(reason, f"{count:,}", Text(example[:MAX_EXAMPLE]))
        console.print(table)
    for name in ("caption_tokens", "document_tokens", "image_sides"):
        if not (bars := record[name])["values"]:
            continue
        title = name.replace("_", " ")
        console.print(
            f"\n{title}: {bars['unit']}, mean {bars['mean']:g}, {bars['min']} … {bars['max']}", soft_wrap=True
        )
        table = Table("from", "count", **TABLE_STYLE)
        filled = [i for i, count in enumerate(bars["counts"]) if count]
        for i in range(filled[0], filled[-1] + 1):
            count = bars["counts"][i]
            bar = "█" * round(BAR_WIDTH * count / max(bars["counts"])) or "▏" * bool(count)
            table.add_row(f"{bars['edges'][i]:,}", f"{count:,}", bar)
        console.print(table)
    if quality := record.get("shuffle"):
        console.print()
        say(f"a batch of {quality['batch']} rows comes from {quality['shards_in_batch']:.1f} shards, with a full "
            f"shuffle from {quality['full_shuffle']:.1f} "
            f"(lanes {quality['lanes']}, window {quality['window']}, block {quality['block']})")  # fmt: skip

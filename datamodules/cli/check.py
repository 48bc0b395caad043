"""Check shards: read every sample down to the last pixel and count what is good.

    kosmosg data check 'data/edit/train-*.tar'
    kosmosg data check 'laion/{00000..00099}.tar' --tokenizer models/kosmosg --sheet laion.png
    kosmosg data check 'data/**/*.tar' --json

SHARDS is a path, a glob or a brace list. With --json: samples = good + the sum of dropped, which counts by reason. The
exit status is 1 where more than --max-bad-share of the samples are dropped.
"""

import argparse
from pathlib import Path

KINDS = ("text", "caption", "interleaved", "constructed", "edit", "instruction", "image")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="path, glob or brace list of tars")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also draw a contact sheet, a row for each kind")
    parser.add_argument("--kind", choices=KINDS, help="drop samples of other kinds")
    parser.add_argument("--captions-only", action="store_true", help="captions need no image, as for stage 2")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="count its tokens: a model folder, our tokenizer's or "
                        "CLIP's; without it words are counted")  # fmt: skip
    parser.add_argument("--max-bad-share", type=float, default=1.0, metavar="SHARE", help="0 … 1; default: 1")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one for each CPU core")
    parser.add_argument("--no-checksums", action="store_true", help="do not compare with the manifest's checksums")


def run(arguments: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from datamodules.checks.check import CheckConfig, check
    from datamodules.checks.sheet import draw_sheet
    from datamodules.checks.terminal import show_findings
    from datamodules.checks.tokens import TokenCounter

    if not 0 <= arguments.max_bad_share <= 1:
        raise ValueError(f"--max-bad-share is {arguments.max_bad_share}; allowed: 0 … 1")
    if arguments.processes is not None and arguments.processes < 1:
        raise ValueError(f"--processes is {arguments.processes}; allowed: at least 1")
    if arguments.sheet and arguments.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet is '{arguments.sheet}'; allowed: a file that ends in .png")
    config = CheckConfig(
        arguments.kind, arguments.captions_only, not arguments.no_checksums, processes=arguments.processes
    )
    checked = check(arguments.shards, config, TokenCounter(arguments.tokenizer))
    if arguments.sheet:
        draw_sheet(arguments.shards, arguments.sheet)
    if arguments.json:
        print(json.dumps(checked.record(), indent=1, ensure_ascii=False))
    else:
        show_findings(checked, Console())
        if arguments.sheet:
            print(f"contact sheet: '{arguments.sheet}'")
    bad = checked.findings.samples - checked.findings.good
    return 1 if bad > arguments.max_bad_share * checked.findings.samples else 0

"""Show the content of a model folder, run folder or released checkpoint without loading its weights.

kosmosg inspect models/kosmosg
kosmosg inspect checkpoint_final.pt --json
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="model folder, run folder or released checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from kosmosg.conversion import inspect_model
    from kosmosg.conversion.record import inspection_text

    content = inspect_model(arguments.path)
    print(json.dumps(content, indent=2, ensure_ascii=False) if arguments.json else inspection_text(content))
    return 0

"""Export the model of a model folder or run folder to a checkpoint file for the released code.

kosmosg export models/kosmosg kosmosg.pt
kosmosg export runs/toyland/instruction_tuning toyland.pt
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="model folder or run folder")
    parser.add_argument("file", metavar="OUT.pt", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.pt once the new file is complete")


def run(arguments: argparse.Namespace) -> int:
    from kosmosg.conversion import export_checkpoint
    from kosmosg.conversion.checkpoint import STAGES

    exported = export_checkpoint(arguments.folder, arguments.file, overwrite=arguments.overwrite)
    parts = ", ".join(f"{part} ({tensors:,} tensors)" for part, tensors in exported["parts"].items())
    print(f"{STAGES[exported['stage']]}: {parts}")
    if exported["left_out"]:
        print(f"not in released checkpoints of this stage: {', '.join(exported['left_out'])}")
    print(f"written to '{arguments.file}'")
    return 0

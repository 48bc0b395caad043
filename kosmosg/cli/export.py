"""Export a model folder or run folder to one file that the released code reads.

kosmosg export models/kosmosg kosmosg.pt
kosmosg export runs/toyland/instruction_tuning toyland.pt
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="model folder, or run folder that holds one")
    parser.add_argument("file", metavar="OUT.pt", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.pt once the new file is complete")


def run(arguments: argparse.Namespace) -> int:
    from kosmosg.conversion import export_checkpoint
    from kosmosg.conversion.checkpoint import STAGES

    done = export_checkpoint(arguments.folder, arguments.file, overwrite=arguments.overwrite)
    held = ", ".join(f"{part} ({tensors:,} tensors)" for part, tensors in done["parts"].items())
    print(f"{STAGES[done['stage']]}: {held}")
    if done["left_out"]:
        print(f"not in released checkpoints of this stage: {', '.join(done['left_out'])}")
    print(f"written to '{arguments.file}'")
    return 0

"""Upload a model or run to the Hugging Face hub with a model card, optionally with smaller weights.

    kosmosg push runs/instruction_tuning owner/name --license mit --evaluation runs/evaluation
    kosmosg push runs/instruction_tuning --license mit --dtype int8 --output export      # only write the folder
    kosmosg push runs/instruction_tuning owner/name --license mit --base owner/aligned   # without weights of the base

Uploading needs OWNER/NAME and a token of the hub. KosmosGPipeline.from_pretrained and `kosmosg generate` load the
result by its folder or id.
"""

import argparse
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="folder of a run, a model or a pipeline")
    parser.add_argument("repository", nargs="?", metavar="OWNER/NAME", help="repository on the hub; created if missing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the folder without uploading it")
    parser.add_argument("--license", required=True, metavar="ID", help="such as mit, openrail, other")
    parser.add_argument("--dtype", help="float32, float16, bfloat16 or int8; default: unchanged")
    parser.add_argument("--base", metavar="ID", help="folder or hub id; weights equal to those of the base are omitted")
    parser.add_argument("--evaluation", type=Path, metavar="DIR", help="evaluation to add to the model card")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier --output")


def run(arguments: argparse.Namespace) -> int:
    """Write or upload the model. Raises ValueError or FileNotFoundError with a message for the user."""
    from kosmosg.hub import prepare, push

    if (arguments.repository is None) == (arguments.output is None):
        raise ValueError("give either OWNER/NAME to upload the model, or --output to write it to a folder")
    options = {"licence": arguments.license, "name": arguments.repository or "", "dtype": arguments.dtype}
    options |= {"base": arguments.base, "evaluation": arguments.evaluation, "overwrite": arguments.overwrite}
    if arguments.output is not None:
        prepare(arguments.model, arguments.output, **options)
        print(f"written to '{arguments.output}'")
        return 0
    with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:
        prepare(arguments.model, Path(folder) / "model", **options)
        print(push(Path(folder) / "model", arguments.repository, arguments.private))
    return 0

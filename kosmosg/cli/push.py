"""A model or run to the Hugging Face hub, with a model card, smaller if wanted.

    kosmosg push runs/instruction_tuning owner/name --license mit --evaluation runs/evaluation
    kosmosg push runs/instruction_tuning --license mit --dtype int8 --output export      # the folder alone
    kosmosg push runs/instruction_tuning owner/name --license mit --base owner/aligned   # what that does not have

Nothing is sent without an OWNER/NAME and a token. KosmosGPipeline.from_pretrained and `kosmosg generate` load what was
written, by its folder or id.
"""

import argparse
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="of a run, a model or a pipeline")
    parser.add_argument("repository", nargs="?", metavar="OWNER/NAME", help="on the hub; created if it is not there")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the folder, and send nothing")
    parser.add_argument("--license", required=True, metavar="ID", help="as mit, openrail, other")
    parser.add_argument("--dtype", help="float32, float16, bfloat16 or int8; default: as it is")
    parser.add_argument("--base", metavar="ID", help="folder or hub id; weights that are the same there are left out")
    parser.add_argument("--evaluation", type=Path, metavar="DIR", help="whose tables go into the model card")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier --output wrote")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0. Raises ValueError and FileNotFoundError with a message for the user."""
    from kosmosg.hub import prepare, push

    if (arguments.repository is None) == (arguments.output is None):
        raise ValueError("give either OWNER/NAME, to send it, or --output, to look at it first")
    named = {"licence": arguments.license, "name": arguments.repository or "", "dtype": arguments.dtype}
    named |= {"base": arguments.base, "evaluation": arguments.evaluation, "overwrite": arguments.overwrite}
    if arguments.output is not None:
        prepare(arguments.model, arguments.output, **named)
        print(f"written to '{arguments.output}'")
        return 0
    with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:
        prepare(arguments.model, Path(folder) / "model", **named)
        print(push(Path(folder) / "model", arguments.repository, arguments.private))
    return 0

"""Try a model in a browser: prompts with images in them, steered, previewed, repeated.

    kosmosg app kosmos-g
    kosmosg app toyland                 # the trained miniature in a clone of the repository, with examples
    kosmosg app runs/instruction_tuning --beside runs/alignment models/step-20000

It needs gradio: pip install 'kosmosg[app]'. The page is served on this machine alone; --host 0.0.0.0 lets others in,
who may then draw with this machine. Nothing is sent elsewhere.
"""

import argparse
from pathlib import Path

from kosmosg.cli.generate import MINIATURE, add_loading_arguments, load, miniature, model_name, placement

EXAMPLES = ("<1> on the beach", "<1> in the snow", "<1> in the jungle", "<1> at night")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_loading_arguments(parser)
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="MODEL", help="models to draw the same with, to compare"
    )
    parser.add_argument(
        "--segmenter", metavar="ID", help="folder or hub id of a CLIPSeg, which finds subjects by words"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; default: this machine alone")
    parser.add_argument("--port", type=int, help="default: the first that is free from 7860 on")


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted. Raises ValueError and FileNotFoundError with a message for the user."""
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("kosmosg app needs gradio; install it by: pip install 'kosmosg[app]'") from error
    from kosmosg.app import Served, serve

    loading = {"--image-decoder": arguments.image_decoder, "--dtype": arguments.dtype, "--device": arguments.device}
    given = [word for flag, value in loading.items() if value for word in (flag, value)]
    own = [arguments.model, *given]
    options, examples = {}, []
    if arguments.model == MINIATURE and not Path(MINIATURE).is_dir():
        arguments.model, shipped = miniature()
        arguments.image_decoder = arguments.image_decoder or shipped
        options = {"guidance_scale": 4.0, "steps": 20}
        files = sorted((Path(arguments.model).parent / "examples").glob("*.png"))
        examples = [(EXAMPLES[number % len(EXAMPLES)], str(file)) for number, file in enumerate(files)]
    device, dtype = placement(arguments)
    identity = {"model": model_name(arguments), "dtype": dtype}
    beside = []
    for model in arguments.beside:
        other = argparse.Namespace(**{**vars(arguments), "model": model})
        own_decoder = ["--image-decoder", other.image_decoder] if other.image_decoder else []
        named = [model, *(own_decoder if "--image-decoder" not in given else []), *given]
        beside.append(Served(load(other, device, dtype), named, {"model": model_name(other), "dtype": dtype}))
    if arguments.segmenter:
        from kosmosg.looking import Segmenter

        options["segmenter"] = Segmenter(arguments.segmenter, device)
    served = Served(load(arguments, device, dtype), own, identity, examples=examples, beside=beside, **options)
    serve(served, arguments.host, arguments.port)
    return 0

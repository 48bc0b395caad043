"""Draw images with a model in the browser, with prompts that contain images.

    kosmosg app kosmos-g
    kosmosg app toyland                             # the trained miniature, in a clone of the repository
    kosmosg app runs/instruction_tuning --beside runs/alignment models/step-20000
    kosmosg app --run runs/instruction_tuning       # image grids and losses of a training run

This needs gradio: pip install 'kosmosg[app]'. By default the page is reachable only from this machine; with
--host 0.0.0.0 others can use it too. No data is sent elsewhere.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kosmosg.cli.generate import (
    MINIATURE,
    add_loading_arguments,
    added_networks,
    load,
    miniature,
    model_name,
    placement,
)

EXAMPLES = ("<1> on the beach", "<1> in the snow", "<1> in the jungle", "<1> at night")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_loading_arguments(parser, nargs="?")
    parser.add_argument("--run", type=Path, dest="training_run", metavar="RUN", help="show a training run's folder")
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="further models that draw the same prompts, for comparison",
    )
    parser.add_argument(
        "--segmenter", metavar="ID", help="folder or hub id of a CLIPSeg, which segments subjects by words"
    )
    scores = "folder or hub id, for scores below the images; the miniature has its own"
    parser.add_argument("--clip", metavar="ID", help=f"a CLIP: {scores}")
    parser.add_argument("--dino", metavar="ID", help=f"a DINO of transformers: {scores}")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; default: only this machine")
    parser.add_argument("--port", type=int, help="default: the first free port from 7860")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted. Raises ValueError or FileNotFoundError with a message for the user."""
    if find_spec("gradio") is None:
        raise ValueError("kosmosg app needs gradio; install it with: pip install 'kosmosg[app]'")
    from kosmosg.app.page import serve
    from kosmosg.app.run import check_run

    if arguments.training_run is not None:
        check_run(arguments.training_run)
    elif arguments.model is None:
        raise ValueError("give a model, or the folder of a training run with --run")
    served = None if arguments.model is None else load_served(arguments)
    serve(served, arguments.host, arguments.port, arguments.training_run)
    return 0


def load_served(arguments: argparse.Namespace) -> Any:
    """Load the models and networks that the command line names."""
    from kosmosg.app.requests import Served
    from kosmosg.drawing import load_controlnet, load_loras
    from kosmosg.looking import CLIPEncoder, DinoEncoder, Segmenter

    loading = {"--image-decoder": arguments.image_decoder, "--dtype": arguments.dtype, "--device": arguments.device}
    flags = [word for flag, value in loading.items() if value for word in (flag, value)]
    command = [arguments.model, *flags]
    options: dict[str, Any] = {}
    examples = []
    if arguments.model == MINIATURE and not Path(MINIATURE).is_dir():
        arguments.model, image_decoder = miniature()
        arguments.image_decoder = arguments.image_decoder or image_decoder
        options = {"guidance_scale": 4.0, "steps": 20}
        weights = Path(image_decoder).parent
        arguments.clip, arguments.dino = arguments.clip or weights / "clip", arguments.dino or weights / "dino"
        files = sorted((Path(arguments.model).parent / "examples").glob("*.png"))
        examples = [(EXAMPLES[number % len(EXAMPLES)], str(file)) for number, file in enumerate(files)]
    device, dtype = placement(arguments)
    added = {"dtype": dtype, **added_networks(arguments)}
    if arguments.segmenter:
        options["segmenter"] = Segmenter(arguments.segmenter, device)

    networks = {"clip": (CLIPEncoder, arguments.clip), "dino": (DinoEncoder, arguments.dino)}
    options["scores"] = {name: kind(source, device) for name, (kind, source) in networks.items() if source}

    def load_one(model: argparse.Namespace, command: list[str], **options: Any) -> Served:
        pipeline = load(model, device, dtype)
        load_loras(pipeline, arguments.lora)
        if arguments.controlnet:
            options["controlnet"] = arguments.controlnet, load_controlnet(arguments.controlnet, pipeline)
        return Served(pipeline, command, {"model": model_name(model), **added}, loras=arguments.lora, **options)

    beside = []
    for model in arguments.beside:
        other = argparse.Namespace(**{**vars(arguments), "model": model})
        decoder = ["--image-decoder", other.image_decoder] if other.image_decoder else []
        beside.append(load_one(other, [model, *(decoder if "--image-decoder" not in flags else []), *flags]))
    return load_one(arguments, command, examples=examples, beside=beside, **options)

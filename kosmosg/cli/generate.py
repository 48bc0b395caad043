"""Generate images for a prompt, or for a file of prompts.

    kosmosg generate kosmos-g "<i> in the suit of <i>" --images dog.png hero.png --count 4
    kosmosg generate kosmos-g --manifest prompts.jsonl --output drawn
    kosmosg generate toyland "<i> on the beach" --images datamodules/toyland/examples/boot.png
    kosmosg generate kosmos-g "<i> at night" --images dog.png --controlnet canny --control-image edges.png
    kosmosg generate kosmos-g "<i> at night" --images dog.png --init-image sketch.png --lora style.safetensors

`toyland` is the trained miniature in a clone of the repository; its images are 32 pixels wide.

The manifest has one JSON object per line. Only the prompt is required; paths are relative to the manifest:

    {"prompt": "<i> in the snow", "images": ["dog.png"], "negative_prompt": "", "seed": 0, "count": 4, "name": "dog"}

Image k of a prompt uses seed + k. Each PNG file stores its parameters. Repeat the command to continue after an
interrupt.
"""

import argparse
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

MINIATURE = "toyland"


def add_loading_arguments(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Add the arguments that select a model and how to load it."""
    parser.add_argument(
        "model", nargs=nargs, help="pipeline folder or hub id, the folder of a training run, or toyland"
    )
    parser.add_argument("--image-decoder", metavar="ID", help="diffusers folder or hub id; default: that of the model")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32; bfloat16 on a GPU"
    )
    parser.add_argument("--device", help="such as cuda:1; default: a GPU if there is one")
    parser.add_argument("--controlnet", metavar="ID", help="folder or hub id of a ControlNet for the image decoder")
    parser.add_argument("--lora", nargs="+", default=[], metavar="FILE", help="LoRA files for the image decoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_loading_arguments(parser)
    parser.add_argument("prompt", nargs="?", help="text with one <i> per image")
    parser.add_argument("--images", nargs="+", metavar="FILE", help="one image per <i>, in order")
    parser.add_argument(
        "--image-weights", nargs="+", type=float, metavar="W", help="factor on each image; default: 1 each"
    )
    parser.add_argument(
        "--image-masks", nargs="+", metavar="FILE", help="mask of each image, white on its subject; - for none"
    )
    parser.add_argument("--control-image", metavar="FILE", help="input of the ControlNet, such as edges or depth")
    parser.add_argument("--control-scale", type=float, metavar="W", help="strength of the ControlNet; default: 1")
    parser.add_argument("--init-image", metavar="FILE", help="image to start from instead of noise")
    parser.add_argument("--strength", type=float, help="how much the initial image is changed, up to 1; default: 0.7")
    parser.add_argument("--lora-scales", nargs="+", type=float, default=[], metavar="W", help="default: 1 each")
    parser.add_argument("--manifest", type=Path, metavar="JSONL", help="file of prompts, instead of a prompt")
    parser.add_argument(
        "--skip-bad", action="store_true", help="draw the valid lines of the manifest even if others are invalid"
    )
    parser.add_argument("--output", type=Path, default=Path("images"), metavar="DIR", help="default: images/")
    parser.add_argument("--lint", action="store_true", help="print hints about the prompts and exit")
    parser.add_argument("--overwrite", action="store_true", help="replace files that were drawn with other parameters")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="text to steer away from")
    parser.add_argument("--seed", type=int, help="seed of the first image; default: 0")
    parser.add_argument("--count", type=int, help="images per prompt; default: 1")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps; default: 50")
    parser.add_argument("--guidance", type=float, default=6.0, help="guidance scale; default: 6")
    parser.add_argument("--sampler", help="dpm, ddim, pndm, or a scheduler of diffusers; default: the pipeline's own")
    parser.add_argument("--height", type=int, help="pixels; default: training size of the image decoder")
    parser.add_argument("--width", type=int, help="pixels; default as --height")
    parser.add_argument("--batch-size", type=int, default=4, help="images per batch; default: 4")


def run(arguments: argparse.Namespace) -> int:
    """Generate the images; returns 1 if lines of the manifest were skipped, else 0. Raises ValueError or
    FileNotFoundError with a message for the user."""
    from rich.progress import track

    from kosmosg import generation
    from kosmosg.drawing import generate, load_controlnet, load_loras
    from kosmosg.sampling import check_numbers

    if arguments.model == MINIATURE and not Path(MINIATURE).is_dir():
        arguments.model, decoder = miniature()
        arguments.image_decoder = arguments.image_decoder or decoder
    settings = generation.Settings(
        arguments.steps, arguments.guidance, arguments.sampler, arguments.height, arguments.width
    )
    if arguments.batch_size < 1:
        raise generation.GenerationError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    requests, errors = read_requests(arguments)
    report(arguments, errors, len(requests))
    if arguments.lint:
        return lint(requests)
    device, dtype = placement(arguments)
    identity = {"model": model_name(arguments), "dtype": dtype, **added_networks(arguments, arguments.lora_scales)}
    jobs = generation.plan(requests, settings, arguments.output, identity)
    remaining = generation.outstanding(jobs, arguments.overwrite)
    if len(remaining) < len(jobs):
        print(f"{len(jobs) - len(remaining)} of {len(jobs)} images exist already.")
    if remaining:
        pipeline = load(arguments, device, dtype)
        load_loras(pipeline, arguments.lora, arguments.lora_scales)
        pipeline.image_decoder.image_size(settings.height, settings.width)
        pipeline.sampler.scheduler(settings.sampler)
        timesteps = pipeline.scheduler.config.num_train_timesteps
        check_numbers(settings.num_inference_steps, settings.guidance_scale, timesteps=timesteps)
        too_long = generation.check_lengths(pipeline, dict.fromkeys(job.request for job in remaining))
        if too_long:
            remaining = [
                job for job in remaining if not any(line.startswith(f"{job.request.place}:") for line in too_long)
            ]
            report(arguments, too_long, len(remaining))
            errors += too_long
        controlnet = load_controlnet(arguments.controlnet, pipeline) if "controlnet" in identity else None
        drawn = generate(pipeline, remaining, settings, arguments.batch_size, controlnet)
        for _ in track(drawn, total=len(remaining), description="generate"):
            pass
    count = sum(job.file.is_file() for job in jobs)
    print(
        f"{f'{count} images are' if count != 1 else '1 image is'} in '{arguments.output}'"
        + (f"; {len(errors)} lines were skipped." if errors else ".")
    )
    return 1 if errors else 0


def miniature() -> tuple[str, str]:
    """Return the folders of the trained miniature and of its image decoder.

    Raises:
        ValueError: the package is installed without the repository.
    """
    try:
        world = Path(str(resources.files(f"datamodules.{MINIATURE}")))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"'{MINIATURE}' needs a clone of the repository (there: pip install -e .); the installed package contains "
            "no weights."
        ) from error
    return str(world / "model"), str(world / "weights" / "stable-diffusion")


def report(arguments: argparse.Namespace, errors: list[str], valid: int) -> None:
    """Print the errors of manifest lines. Raises GenerationError unless the lines can be skipped."""
    from kosmosg import generation

    if errors and arguments.manifest is None:
        raise generation.GenerationError(errors[0])
    for error in errors:
        print(error)
    if errors and not (arguments.skip_bad and valid):
        raise generation.GenerationError(
            f"{len(errors)} lines of '{arguments.manifest}' are invalid, {valid} valid; nothing was drawn. "
            "--skip-bad draws the valid ones."
        )


def read_requests(arguments: argparse.Namespace) -> tuple[list, list[str]]:
    """Return the requests of the command line or manifest, and the errors of invalid lines."""
    from kosmosg import generation

    if (arguments.prompt is None) == (arguments.manifest is None):
        raise generation.GenerationError("give either a prompt or --manifest")
    names = ("images", "image_weights", "image_masks", "negative_prompt", "seed", "count")
    names += ("control_image", "control_scale", "init_image", "strength")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.manifest is not None:
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise generation.GenerationError(f"{flags} belong to a prompt; with --manifest they are keys of its lines")
        return generation.read_manifest(arguments.manifest)
    if arguments.skip_bad:
        raise generation.GenerationError("--skip-bad belongs to --manifest")
    lists = {name: tuple(given.get(name, ())) for name in ("images", "image_weights")}
    masks = tuple(None if mask == "-" else mask for mask in given.get("image_masks", ()))
    request = generation.Request(arguments.prompt, **{**given, **lists, "image_masks": masks, "name": "image"})
    generation.check_images(request)
    return [request], []


def lint(requests: list) -> int:
    """Print hints about the prompts; returns 1 if there are any, else 0."""
    from kosmosg.image_processing import read_image
    from kosmosg.steering import hints

    lines = [
        f"{request.place}: {hint}"
        for request in requests
        for hint in hints(request.prompt, [read_image(name).size for name in request.images])
    ]
    print("\n".join(lines) or "No hints.")
    return int(bool(lines))


def model_name(arguments: argparse.Namespace) -> str:
    """Return the model's name in image metadata: the fingerprint of a local folder, or the hub id."""
    from kosmosg.generation import fingerprint
    from kosmosg.models.storage import find_model
    from kosmosg.pipeline import decoder_of_run

    local = Path(arguments.model).is_dir()
    model = fingerprint(find_model(arguments.model)) if local else arguments.model
    decoder = arguments.image_decoder or decoder_of_run(arguments.model)
    if decoder is None:
        return model
    return f"{model} + {fingerprint(Path(decoder)) if Path(decoder).is_dir() else decoder}"


def added_networks(arguments: argparse.Namespace, lora_scales: Sequence[float] = ()) -> dict[str, Any]:
    """Return the metadata of ControlNet and LoRA. Raises ValueError if scales and files differ in number."""
    from kosmosg.generation import file_record, fingerprint

    networks: dict[str, Any] = {}
    if arguments.controlnet:
        local = Path(arguments.controlnet).is_dir()
        networks["controlnet"] = fingerprint(Path(arguments.controlnet)) if local else arguments.controlnet
    scales = lora_scales or [1.0] * len(arguments.lora)
    if len(scales) != len(arguments.lora):
        raise ValueError(f"{len(scales)} --lora-scales for {len(arguments.lora)} files of --lora; give one each")
    if arguments.lora:
        networks["loras"] = [
            {**file_record(file), "scale": scale} for file, scale in zip(arguments.lora, scales, strict=True)
        ]
    return networks


def placement(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return device and dtype, by default those that suit this machine. Raises GenerationError for a missing device."""
    import torch

    from kosmosg.generation import GenerationError

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch raises either, depending on the device
        raise GenerationError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device, arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def load(arguments: argparse.Namespace, device: str, dtype: str):
    """Load the pipeline and move it to the device."""
    import torch

    from kosmosg.pipeline import KosmosGPipeline

    pipeline = KosmosGPipeline.from_pretrained(
        arguments.model, arguments.image_decoder, torch_dtype=getattr(torch, dtype)
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

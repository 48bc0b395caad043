"""Requests → images: by the pipeline itself; with a ControlNet or from an initial image by diffusers' own pipelines of
the image decoder's family, which are fed its prompt embeddings (paper section 4.4)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
from PIL import Image

from kosmosg.generation import Job, Settings, store
from kosmosg.image_processing import cropped, read_image
from kosmosg.models.storage import load_network
from kosmosg.sampling import seeded

LORA = "lora_{}"  # adapters' names, by their files' number


def generate(
    pipeline: Any, jobs: Sequence[Job], settings: Settings, batch_size: int, controlnet: Any = None
) -> Iterator[Job]:
    """Draw and store the jobs, batched across requests; yields each when its file is there.

    Args:
        pipeline: a KosmosGPipeline.
    """
    for _, alike in groupby(jobs, drawn_by):
        group = list(alike)
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            for job, image in zip(batch, draw(pipeline, batch, settings, controlnet), strict=True):
                store(image, job.file, job.parameters)
                yield job


def drawn_by(job: Job) -> tuple[Any, ...]:
    """Jobs that can be drawn together have the same."""
    request = job.request
    control, initial = bool(request.control_image), bool(request.init_image)
    return control, control and request.control_scale, initial, initial and request.strength


def draw(
    pipeline: Any, jobs: Sequence[Job], settings: Settings, controlnet: Any = None, **options: Any
) -> list[Image.Image]:
    """The images of some jobs, drawn together. All have a control image or none, at one scale; so with initial images.

    Args:
        pipeline: a KosmosGPipeline.
        options: of its call, as callback_on_step_end=.

    Raises:
        ValueError: as the pipeline does; or diffusers has no such pipeline of the family.
    """
    requests, read = [job.request for job in jobs], cache(read_image)
    prompts = {
        "prompt": [request.prompt for request in requests],
        "images": [[read(name) for name in request.images] for request in requests],
        "negative_prompt": [request.negative_prompt for request in requests],
        "image_weights": [request.image_weights or (1.0,) * len(request.images) for request in requests],
        "image_masks": [
            [mask and read(mask) for mask in request.image_masks or (None,) * len(request.images)]
            for request in requests
        ],
    }
    seeds, sampling, first = [job.seed for job in jobs], asdict(settings), requests[0]
    if not (first.control_image or first.init_image):
        return pipeline(**prompts, seeds=seeds, **sampling, **options).images
    size = height, width = pipeline.image_decoder.image_size(sampling.pop("height"), sampling.pop("width"))
    fitted = cache(lambda name: cropped(read(name), size, Image.Resampling.BICUBIC))
    control = [fitted(request.control_image) for request in requests if first.control_image]
    initial = [fitted(request.init_image) for request in requests if first.init_image]
    parts, sampler = {}, sampling.pop("sampler")
    if sampler is not None:
        parts["scheduler"] = pipeline.sampler.scheduler(sampler)
    if initial:
        options |= {"image": initial, "strength": first.strength}
    if control:
        parts["controlnet"] = controlnet
        # diffusers calls it image where it is the only one, but for Sana.
        name = "image" if not initial and pipeline.config["family"].startswith("Stable") else "control_image"
        options |= {name: control, "controlnet_conditioning_scale": first.control_scale}
        options |= {"height": height, "width": width}
    drawing = pipeline.compose(composed_kind(pipeline.config["family"], bool(control), bool(initial)), **parts)
    drawing.set_progress_bar_config(disable=True)
    generators = seeded(seeds, len(seeds), None, None)
    options |= pipeline.decoder_class.call_options
    return drawing(**pipeline.embeddings(**prompts), generator=generators, **sampling, **options).images


def composed_kind(family: str, control: bool, initial: bool) -> Callable[..., Any]:
    """diffusers' pipeline with a ControlNet, of an initial image, or both.

    Raises:
        ValueError: there is none for the image decoder's family.
    """
    name = f"{family.removesuffix('Pipeline')}{'ControlNet' * control}{'Img2Img' * initial}Pipeline"
    if not hasattr(diffusers, name):
        raise ValueError(f"diffusers has no {name}, which this image decoder would need for an initial image.")
    return getattr(diffusers, name)


def load_controlnet(source: str, pipeline: Any) -> Any:
    """The ControlNet in a folder or of a hub id, where the pipeline's denoiser is.

    Raises:
        ValueError: its weights are not those of its sizes, or it reads conditions or images of another size.
    """
    sana = pipeline.config["family"].startswith("Sana")
    kind = diffusers.SanaControlNetModel if sana else diffusers.ControlNetModel
    network: Any = load_network(kind, source, dtype=pipeline.denoiser.dtype)
    key = "caption_channels" if sana else "cross_attention_dim"
    if network.config[key] != (wanted := pipeline.image_decoder.spec.width):
        raise ValueError(f"--controlnet '{source}' has {key}={network.config[key]}; the image decoder's is {wanted}.")
    channels = network.config.get("conditioning_embedding_out_channels")  # it halves the image at each but one
    if channels and (factor := 2 ** (len(channels) - 1)) != (wanted := pipeline.image_decoder.downscale):
        raise ValueError(f"--controlnet '{source}' reads images {factor} times the latents' size; here: {wanted}.")
    return network.eval().requires_grad_(False).to(pipeline.denoiser.device)


def load_loras(pipeline: Any, files: Sequence[str], scales: Sequence[float] = ()) -> None:
    """Load LoRA files into the pipeline's denoiser, each at its scale; 1 if none are given.

    Raises:
        ValueError: a file that is none or does not fit.
    """
    for number, file in enumerate(files):
        if not Path(file).is_file():
            raise ValueError(f"--lora '{file}' is no file.")
        try:
            pipeline.load_lora_weights(str(file), adapter_name=LORA.format(number))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--lora '{file}' does not fit the image decoder: {error}") from error
    scale_loras(pipeline, scales)


def scale_loras(pipeline: Any, scales: Sequence[float]) -> None:
    """Set how much each of the loaded LoRA files counts."""
    if scales:
        pipeline.set_adapters([LORA.format(number) for number in range(len(scales))], list(scales))

"""Generate images for requests, with ControlNet, LoRA and image-to-image (paper, section 4.4).

ControlNet and image-to-image use diffusers' own pipelines of the image decoder's family, with our prompt embeddings.
"""

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

LORA = "lora_{}"  # adapter name of each LoRA file, by number


def generate(
    pipeline: Any, jobs: Sequence[Job], settings: Settings, batch_size: int, controlnet: Any = None
) -> Iterator[Job]:
    """Draw the jobs in batches across requests, and store the images; yields each job when its file is written.

    Args:
        pipeline: a KosmosGPipeline.
    """
    for _, compatible in groupby(jobs, batch_key):
        group = list(compatible)
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            for job, image in zip(batch, draw(pipeline, batch, settings, controlnet), strict=True):
                store(image, job.file, job.parameters)
                yield job


def batch_key(job: Job) -> tuple[Any, ...]:
    """Return a key that is equal for jobs that can share a batch."""
    request = job.request
    control, initial = bool(request.control_image), bool(request.init_image)
    return control, control and request.control_scale, initial, initial and request.strength


def draw(
    pipeline: Any, jobs: Sequence[Job], settings: Settings, controlnet: Any = None, **options: Any
) -> list[Image.Image]:
    """Draw jobs with the same `batch_key` as one batch, and return their images.

    Args:
        pipeline: a KosmosGPipeline.
        options: further arguments of the pipeline's call, such as callback_on_step_end.

    Raises:
        ValueError: the pipeline does not accept the jobs, or diffusers has no pipeline for them.
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
        # Without an initial image, Stable Diffusion pipelines call the control image `image`.
        name = "image" if not initial and pipeline.config["family"].startswith("Stable") else "control_image"
        options |= {name: control, "controlnet_conditioning_scale": first.control_scale}
        options |= {"height": height, "width": width}
    composed = pipeline.compose(composed_kind(pipeline.config["family"], bool(control), bool(initial)), **parts)
    composed.set_progress_bar_config(disable=True)
    generators = seeded(seeds, len(seeds), None, None)
    options |= pipeline.decoder_class.call_options
    return composed(**pipeline.embeddings(**prompts), generator=generators, **sampling, **options).images


def composed_kind(family: str, control: bool, initial: bool) -> Callable[..., Any]:
    """Return the diffusers pipeline class of a family with a ControlNet, for an initial image, or both.

    Raises:
        ValueError: diffusers has none.
    """
    name = f"{family.removesuffix('Pipeline')}{'ControlNet' * control}{'Img2Img' * initial}Pipeline"
    if not hasattr(diffusers, name):
        raise ValueError(f"diffusers has no {name}, which an initial image needs with this image decoder.")
    return getattr(diffusers, name)


def load_controlnet(source: str, pipeline: Any) -> Any:
    """Load a ControlNet from a folder or hub id, onto the device of the pipeline's denoiser and in its dtype.

    Raises:
        ValueError: its weights do not match its configuration, or its condition width or image scale does not fit.
    """
    sana = pipeline.config["family"].startswith("Sana")
    kind = diffusers.SanaControlNetModel if sana else diffusers.ControlNetModel
    network: Any = load_network(kind, source, dtype=pipeline.denoiser.dtype)
    key = "caption_channels" if sana else "cross_attention_dim"
    if network.config[key] != (wanted := pipeline.image_decoder.spec.width):
        raise ValueError(f"--controlnet '{source}' has {key}={network.config[key]}; the image decoder needs {wanted}.")
    channels = network.config.get("conditioning_embedding_out_channels")  # each level but one halves the image
    if channels and (factor := 2 ** (len(channels) - 1)) != (wanted := pipeline.image_decoder.downscale):
        raise ValueError(f"--controlnet '{source}' downscales images by {factor}; the image decoder needs {wanted}.")
    return network.eval().requires_grad_(False).to(pipeline.denoiser.device)


def load_loras(pipeline: Any, files: Sequence[str], scales: Sequence[float] = ()) -> None:
    """Load LoRA files into the pipeline's denoiser, with one scale each; by default 1.

    Raises:
        ValueError: a file does not exist or does not fit.
    """
    for number, file in enumerate(files):
        if not Path(file).is_file():
            raise ValueError(f"--lora '{file}' is not a file.")
        try:
            pipeline.load_lora_weights(str(file), adapter_name=LORA.format(number))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--lora '{file}' does not fit the image decoder: {error}") from error
    scale_loras(pipeline, scales)


def scale_loras(pipeline: Any, scales: Sequence[float]) -> None:
    """Set the scales of the loaded LoRA files, in their order."""
    if scales:
        pipeline.set_adapters([LORA.format(number) for number in range(len(scales))], list(scales))

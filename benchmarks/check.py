"""Check a machine: compare each stage's optimizer step with its dry run, and sampling with diffusers.

Micro-batches are each stage's `fake_batch` with random values, which has the shapes that the dry run assumes.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Limit, interval, peak_bytes, ratio, time_alternately
from benchmarks.setting import Setting, backward
from kosmosg.condition import Condition
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.sampling import DiffusionSampler, build_scheduler, seeded
from lightning_modules.dry_run import GIB, estimate, size_up
from lightning_modules.parallelize import apply_compile
from lightning_modules.trainer import batch_layout
from train import STAGES

GUIDANCE_SCALE = 7.5
MEMORY_SHARE = 0.9  # share of the device's memory that the dry run may use
Rows = Iterator[dict[str, Any]]


def check_stage(setting: Setting, part: str, limit: Limit) -> Rows:
    """Measure forward, backward, clipping and optimizer step, in eager mode and, for stages, with compiled layers."""
    config, device, experiment = setting.config, setting.device, setting.experiment(part)
    on_gpu = device.type == "cuda"
    if on_gpu:
        memory = torch.cuda.get_device_properties(device).total_memory / GIB
        experiment = replace(experiment, hardware=replace(experiment.hardware, memory_gib=MEMORY_SHARE * memory))
    sized, options, hardware = size_up(experiment), experiment.trainer, experiment.hardware
    predicted = estimate(sized, experiment, batch_layout(experiment.data.micro_batch_size, options))
    rows = min(experiment.data.micro_batch_size, predicted.largest_micro_batch(experiment.data.micro_batch_size))
    if rows < 1:
        raise ValueError(f"by the dry run no micro-batch fits into {predicted.available / GIB:.1f} GiB")
    predicted = estimate(sized, experiment, batch_layout(rows, options))
    module = setting.build(experiment)
    optimizer: Any = module.configure_optimizers()
    batch = setting.fill(module.fake_batch(rows, sized.shape, experiment.model.image_size))

    def step() -> None:
        backward(module, batch, options.precision)
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], experiment.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    for variant in ("eager", "compiled") if config.compile and part in STAGES else ("eager",):
        if variant == "compiled":
            apply_compile(module)
        seconds = time_alternately({part: step}, config.repetitions, config.warmup, device, limit, config.clock)[part]
        states = [value for state in optimizer.state.values() for value in state.values()]
        yield {
            "part": part,
            "variant": variant,
            "micro_batch": rows,
            "tokens_per_row": sized.shape.tokens,
            "peak_bytes": peak_bytes(step, module, states),
            "dry_run_bytes": predicted.total - hardware.reserve_gib * GIB,
            "seconds": interval(seconds),
            "rows_per_second": rows / interval(seconds)["median"],
            "flops_per_second": sized.flops(rows) / interval(seconds)["median"],
        }


def check_sampling(setting: Setting, limit: Limit) -> Rows:
    """Compare `DiffusionSampler` with diffusers' own pipeline, with the same networks, conditions and noise.

    Channels last is used only with compilation: in eager mode on CUDA, GroupNorm always returns contiguous tensors
    (pytorch#111824), so that the next convolution would have to convert its input back.
    """
    config, options, device = setting.config, setting.config.sampling, setting.device
    with torch.device(device):
        decoder = setting.load_decoder(setting.model.image_decoder, "images").to(getattr(torch, options.dtype))
    decoder = decoder.to(device)
    spec = decoder.spec
    noise = torch.Generator(device).manual_seed(config.seed)
    states = torch.randn(options.images + 1, spec.tokens, spec.width, generator=noise, device=device)
    pooled = None
    if spec.pooled is not None:
        pooled = torch.randn(options.images + 1, spec.pooled, generator=noise, device=device)
    conditions = Condition(states, pooled=pooled).to(decoder.denoiser.dtype)
    condition, null = conditions.rows(slice(1, None)), conditions.rows(slice(0, 1))
    shared = {
        "num_inference_steps": options.steps,
        "guidance_scale": GUIDANCE_SCALE,
        "output_type": "pt",
        "height": setting.model.image_size,
        "width": setting.model.image_size,
    }
    pipeline = decoder.diffusers_pipeline()
    pipeline.scheduler = build_scheduler("dpm", decoder.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    seeds = range(options.images)

    def theirs() -> Any:
        arguments = decoder.pipeline_arguments(condition, null.repeat_interleave(options.images))
        generators = seeded(seeds, options.images, None, None)
        return pipeline(**arguments, **shared, **decoder.call_options, generator=generators, return_dict=False)[0]

    def ours(decoder: ImageDecoder) -> Any:
        sampler = DiffusionSampler(decoder)
        return lambda: sampler(condition, null, **shared, seeds=seeds)

    for variant in ("eager", "compiled, channels last") if config.compile else ("eager",):
        network = decoder
        if variant != "eager":
            network = copy.deepcopy(decoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            network.denoiser.compile()
        variants = {"ours": ours(network), "diffusers": theirs}
        seconds = time_alternately(variants, config.repetitions, min(1, config.warmup), device, limit, config.clock)
        yield {
            "part": "sampling",
            "variant": f"{options.dtype}, {variant}",
            "micro_batch": options.images,
            "peak_bytes": peak_bytes(variants["ours"], network),
            "seconds": interval(seconds["ours"]),
            "rows_per_second": options.images / interval(seconds["ours"])["median"],
            "diffusers_rows_per_second": options.images / interval(seconds["diffusers"])["median"],
            "ratio": ratio(seconds["diffusers"], seconds["ours"]),
            "largest_difference": float((variants["ours"]() - theirs()).abs().max()),
        }

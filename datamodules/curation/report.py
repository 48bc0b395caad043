"""What is told of a finished curation: counts, losses, masks, and the cost sheet; as Markdown."""

import platform
from importlib.metadata import version

import torch

from datamodules.curation.config import Curation
from datamodules.curation.tally import Tally, listed

HOUR = 3600


def report(config: Curation, tally: Tally) -> str:
    """The text of curation/report.md."""
    share = tally.written / tally.read
    stored = sum(shard["bytes"] for shard in tally.shards.values())
    lines = [
        f"# Curation of `{config.input.images or config.input.shards}`",
        "",
        f"- {tally.written:,} of {tally.read:,} images became samples ({share:.1%}), with {tally.entities:,} entities; "
        f"{len(tally.shards):,} shards, {stored / 1e9:.3f} GB.",
        f"- Failed: {listed(tally.failed)}.",
        f"- Filtered: {listed(tally.filtered)}.",
        f"- Entities left out: {listed(tally.left_out)}.",
    ]
    if iou := tally.mask_iou():
        lines.append(
            f"- Recovered against true masks, IoU of {iou['n']:,} entities: mean {iou['mean']:.3f}, median "
            f"{iou['median']:.3f}, tenth percentile {iou['tenth_percentile']:.3f}, least {iou['least']:.3f}."
        )
    return "\n".join([*lines, "", *cost_sheet(config, tally)]) + "\n"


def cost_sheet(config: Curation, tally: Tally) -> list[str]:
    """Measured rates of every stage, and what they would mean for `report.images` images."""
    share = tally.written / tally.read
    stored = sum(shard["bytes"] for shard in tally.shards.values())
    rows, total = [], 0.0
    for step, (given, seconds) in tally.timing.items():
        hours = seconds / tally.read * config.report.images / HOUR
        total += hours
        rate = f"{given / seconds:,.1f}" if seconds > 0 and given else "–"
        rows.append(f"| {step} | {given:,} | {seconds:,.1f} | {rate} | {hours:,.1f} |")
    models = {
        name: getattr(config, name).model
        for name, asked in (
            ("safety", config.safety.enabled),
            ("caption", config.caption.by == "blip2"),
            ("entities", config.entities.by == "language_model"),
            ("masks", config.masks.by == "clipseg"),
        )
        if asked
    }
    told = ", ".join(f"{name} `{model}`" for name, model in models.items()) or "none (ground truth)"
    return [
        "## Cost sheet",
        "",
        f"Measured in this curation (n = {tally.read:,} images, engine {config.engine}, {machine()}); models: {told}. "
        "Loading the models is not counted.",
        "",
        f"| stage | images given | seconds | images/s of one worker | worker-hours for {config.report.images:,} |",
        "|---|---:|---:|---:|---:|",
        *rows,
        f"| all | {tally.read:,} | | | {total:,.1f} |",
        "",
        "The last column is an extrapolation, not a measurement: the measured seconds times "
        f"{config.report.images:,} / {tally.read:,}, on the same hardware, with the same models, losses and images. "
        "Divide a stage's hours by the workers of its pool; under Ray the slowest stage sets the pace. "
        f"By the same rule: {config.report.images * share:,.0f} samples, "
        f"{stored / tally.read * config.report.images / 1e9:,.1f} GB.",
    ]


def machine() -> str:
    """Where it ran: this process's machine, which a cluster's workers may differ from."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return f"{device}, torch {version('torch')}, transformers {version('transformers')}"

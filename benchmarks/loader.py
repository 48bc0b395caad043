"""The loader beside what it cannot do without: decoding for stage 3, tokenising for stage 2; and its memory.

    python -m benchmarks.loader [--json]             # about a minute on one core; also as `python -m benchmarks loader`
    python -m benchmarks.loader memory_captions=1000000
    python -m benchmarks.loader tokenizer=folder clip=folder

Samples are made for the purpose: pictures of noise whose spectrum falls off as photographs' do, at the sizes that the
sources have (512 px; pairs of unequal sides), and Toyland's captions. One process, one core, CPU seconds: what others
do on the machine meanwhile does not count. Loader and bare decoding take turns over the same batches.
"""

import gc
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from transformers import CLIPTokenizer

from datamodules.alignment import AlignmentData, AlignmentDataConfig
from datamodules.data_config import Source
from datamodules.images import StoredImage
from datamodules.instruction import InstructionData, InstructionDataConfig
from datamodules.mixture import MixtureDataset
from datamodules.sample import CaptionSample, ConstructedSample, EditSample, Entity, Sample
from datamodules.storage.shards import ShardWriter
from kosmosg.config import load_config
from kosmosg.image_processing import ClipImageTransform, TargetTransform
from kosmosg.prompt import PromptEncoder
from kosmosg.tokenizer import Tokenizer
from kosmosg.toyland.language import caption
from kosmosg.toyland.scene import sample_scene

WEIGHTS = Path(__file__).resolve().parent.parent / "kosmosg" / "toyland" / "weights"
SPECTRUM = 1.1  # exponent of the amplitude's fall; photographs lie near 1
REPLICATES = 2000
Generator = np.random.Generator
READINGS = 10


@dataclass
class LoaderBenchmark:
    samples: int = 120
    """Stage 3 samples written, 2 : 2 : 1."""
    batches: int = 24
    """Batches of stage 3 that are timed."""
    batch_size: int = 16
    """Samples of a stage 3 batch."""
    quality: int = 95
    """Of the JPEGs."""
    crops: str = "png"
    """How entity crops are stored: png, as the curation writes them, or jpg."""
    captions: int = 20_000
    """Captions written."""
    caption_batches: int = 400
    """Batches of stage 2 that are timed."""
    caption_batch_size: int = 56
    """Captions of a stage 2 batch."""
    memory_captions: int = 200_000
    """Captions read while the memory is watched."""
    tokenizer: str = str(WEIGHTS / "tokenizer")
    """Folder of the MLLM's tokenizer."""
    clip: str = str(WEIGHTS / "stable-diffusion" / "tokenizer")
    """Folder of the CLIP text model's tokenizer."""
    folder: str | None = None
    """Where to put the temporary folder."""
    seed: int = 0
    """Of pictures, captions and order."""

    def __post_init__(self) -> None:
        for name in ("samples", "batches", "batch_size", "captions", "caption_batches", "caption_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1.")
        if self.crops not in ("png", "jpg"):
            raise ValueError(f"crops={self.crops} is not allowed; it is png or jpg.")


def measure(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Stage 3 (`ratio`: how fast the loader is beside bare decoding), stage 2 and the memory."""
    config = load_config(arguments, LoaderBenchmark)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        stage3 = measure_stage3(config, Path(folder))
        stage2 = measure_stage2(config, Path(folder))
    gc.unfreeze()
    machine = {"cores": 1, "clock": "cpu seconds", "torch": torch.__version__, "pillow": Image.__version__}
    result = {"benchmark": "loader", "size": "one core", "ratio": stage3["of_bare_decode"]}
    return {**result, **stage3, **stage2, "machine": machine}


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""

    def share(name: str) -> str:
        found = result[name]
        return f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"

    spent, memory = result["stage3_share_of_time"], result["memory"]
    rows = [
        ("stage 3 beside decoding its images and nothing else", share("of_bare_decode")),
        ("stage 3 beside decoding and bringing to size", share("of_decode_and_transforms")),
        ("stage 3, samples a second", f"{result['stage3_samples_per_second_and_core']:.0f}"),
        ("its time: decoding, bringing to size, all else", ", ".join(f"{100 * v:.0f} %" for v in spent.values())),
        ("stage 2, captions a second", f"{result['stage2_captions_per_second_and_core']:,.0f}"),
        ("its share of the two tokenizers", f"{100 * result['stage2_share_of_tokenising']:.0f} %"),
        (
            f"resident memory, from the first tenth to the last of {memory['captions']:,} captions",
            f"{memory['growth_bytes_after_first_tenth'] / 1000:+,.0f} kB",
        ),
    ]
    lines = ["### loader", "", "One core, its CPU seconds.", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows), ""])


def print_result(result: dict[str, Any]) -> None:
    """To the terminal."""
    Console().print(Markdown(markdown(result)))


def measure_stage3(config: LoaderBenchmark, folder: Path) -> dict[str, Any]:
    """Samples a second of the loader, of decoding its images alone, and of decoding and bringing them to size."""
    module = stage3_module(config, folder)
    dataset = module.train_dataset
    assert dataset is not None
    batches = [range(i * config.batch_size, (i + 1) * config.batch_size) for i in range(config.batches)]
    seconds: dict[str, list[float]] = {"loader": [], "decode": [], "transforms": []}
    for positions in batches:
        prompts, targets = stored_images(dataset, positions)
        decoded = [(image.load(), transform) for image, transform in pictures(prompts, targets, module)]
        seconds["loader"].append(cpu_seconds(lambda p=positions: dataset[p]))
        seconds["decode"].append(cpu_seconds(lambda p=prompts, t=targets: [bare(image) for image in [*p, *t]]))
        seconds["transforms"].append(cpu_seconds(lambda d=decoded: [transform(image) for image, transform in d]))
    both = [a + b for a, b in zip(seconds["decode"], seconds["transforms"], strict=True)]
    total = sum(seconds["loader"])
    return {
        "of_bare_decode": ratio(seconds["decode"], seconds["loader"], config.seed),
        "of_decode_and_transforms": ratio(both, seconds["loader"], config.seed),
        "stage3_samples_per_second_and_core": config.batch_size * config.batches / total,
        "stage3_share_of_time": {
            "decode": sum(seconds["decode"]) / total,
            "resize_and_normalise": sum(seconds["transforms"]) / total,
            "everything_else": 1 - sum(both) / total,
        },
    }


def measure_stage2(config: LoaderBenchmark, folder: Path) -> dict[str, Any]:
    """Captions a second of the loader and of tokenising them alone, and resident memory over many of them."""
    module = stage2_module(config, folder)
    dataset, size = module.train_dataset, config.caption_batch_size
    assert dataset is not None
    gc.freeze()  # as the loader's workers do
    for step in range(config.captions // size + 1):  # the words of one epoch are known then, as in a long run
        dataset[range(step * size, (step + 1) * size)]
    loader, tokenise = [], []
    for step in range(config.caption_batches):
        positions = range(step * size, (step + 1) * size)
        samples = [dataset.builders[0].source.caption(dataset.order(p).index) for p in positions]
        texts = [sample.caption for sample in samples if isinstance(sample, CaptionSample)]
        loader.append(cpu_seconds(lambda p=positions: dataset[p]))
        tokenise.append(cpu_seconds(lambda t=texts: (module.clip(t), module.encoder.tokenizer.encode_batch(t))))
    return {
        "stage2_captions_per_second_and_core": size / statistics.median(loader),
        "stage2_share_of_tokenising": sum(tokenise) / sum(loader),
        "memory": measure_memory(config, dataset),
    }


def measure_memory(config: LoaderBenchmark, dataset: MixtureDataset) -> dict[str, Any]:
    """Resident bytes at `READINGS` even points over `memory_captions` captions."""
    size, readings = 1024, []
    steps = max(1, config.memory_captions // size)
    for step in range(steps):
        if step % max(1, steps // READINGS) == 0:
            readings.append(resident_bytes())
        dataset[range(step * size, (step + 1) * size)]
    readings.append(resident_bytes())
    growth = readings[-1] - readings[1]
    return {"captions": steps * size, "resident_bytes": readings, "growth_bytes_after_first_tenth": growth}


def stored_images(dataset: MixtureDataset, positions: Sequence[int]) -> tuple[list[StoredImage], list[StoredImage]]:
    """The encoded images that a batch takes: those of its prompts, and its targets."""
    prompts, targets = [], []
    for position in positions:
        draw = dataset.order(position)
        request = dataset._request(position, draw, 0)
        builder: Any = dataset.builders[draw.source]
        segments, target = builder.segments(builder.source[request.index], request.random)
        prompts += [segment for segment in segments if isinstance(segment, StoredImage)]
        targets.append(target)
    return prompts, targets


def pictures(
    prompts: Sequence[StoredImage], targets: Sequence[StoredImage], module: InstructionData
) -> Iterator[tuple[StoredImage, Callable[[Image.Image], torch.Tensor]]]:
    for image in prompts:
        yield image, module.encoder.image_transform
    for image in targets:
        yield image, module.target_transform


def bare(image: StoredImage) -> Image.Image:
    """Bytes → RGB pixels, by Pillow and nothing else."""
    return Image.open(io.BytesIO(image.data)).convert("RGB")


def stage3_module(config: LoaderBenchmark, folder: Path) -> InstructionData:
    rng = np.random.default_rng(config.seed)
    words = np.random.default_rng(config.seed + 1)
    parts: dict[str, tuple[int, Callable[[], Sample]]] = {
        "constructed": (2, lambda: constructed(rng, config)),
        "edit": (2, lambda: edit(rng, words, config)),
        "captions": (1, lambda: CaptionSample(text(words), photograph(rng, *pair_sides(rng), config))),
    }
    sources = {}
    for name, (weight, make) in parts.items():
        with ShardWriter(folder / name, name) as writer:
            for number in range(config.samples * weight // 5 + 1):
                writer.write(make(), f"{number:06d}")
        sources[name] = Source(str(folder / name / "*.tar"), weight)
    data = InstructionDataConfig(**sources, batch_size=config.batch_size, seed=config.seed)
    module = InstructionData(data, encoder(config), TargetTransform(512))
    module.setup()
    return module


def stage2_module(config: LoaderBenchmark, folder: Path) -> AlignmentData:
    words = np.random.default_rng(config.seed + 1)
    stand_in = photograph(np.random.default_rng(0), 64, 64, config)
    with ShardWriter(folder / "text", "captions", 10_000) as writer:
        for number in range(config.captions):
            writer.write(CaptionSample(text(words), stand_in), f"{number:09d}")
    tokenizer = CLIPTokenizer.from_pretrained(config.clip)

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor(tokenizer(texts, padding="max_length", truncation=True, max_length=77).input_ids)

    data = AlignmentDataConfig(captions=Source(str(folder / "text" / "*.tar")), seed=config.seed)
    module = AlignmentData(data, encoder(config), tokenize)
    module.setup()
    return module


def encoder(config: LoaderBenchmark) -> PromptEncoder:
    return PromptEncoder(Tokenizer.from_pretrained(config.tokenizer), ClipImageTransform(224), 64)


def constructed(rng: Generator, config: LoaderBenchmark) -> ConstructedSample:
    """As the curation writes them: everything 512 px; one to three entities."""
    names = rng.choice(["cat", "dog", "boat", "hat", "garden", "car"], int(rng.integers(1, 4)), replace=False).tolist()
    picture = photograph(rng, 512, 512, config)
    crops = [photograph(rng, 512, 512, config, config.crops) for _ in names]
    entities = [Entity(name, crop, crop) for name, crop in zip(names, crops, strict=True)]
    return ConstructedSample("a picture of " + " and ".join(f"a {name}" for name in names), entities, picture)


def edit(rng: Generator, words: Generator, config: LoaderBenchmark) -> EditSample:
    before, after = (photograph(rng, 512, 512, config) for _ in range(2))
    return EditSample(text(words), "make it a painting in watercolour", before, after)


def pair_sides(rng: Generator) -> tuple[int, int]:
    """Shorter side 512, as img2dataset resizes; aspect ratios up to 3 : 2, lying or standing."""
    longer = int(512 * rng.uniform(1, 1.5))
    return (512, longer) if rng.random() < 0.5 else (longer, 512)


def text(words: Generator) -> str:
    return caption(sample_scene(words), words, told=True)


def photograph(rng: Generator, width: int, height: int, config: LoaderBenchmark, kind: str = "jpg") -> StoredImage:
    """Coloured noise with the spectrum of photographs, encoded."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    shape = (3, *frequency.shape)
    waves = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / frequency**SPECTRUM
    luminance, *colour = np.fft.irfft2(waves, s=(height, width))
    channels = np.stack([luminance, luminance + 0.3 * colour[0], luminance + 0.3 * colour[1]], axis=-1)
    pixels = 120 + 55 * (channels - channels.mean()) / channels.std()
    stream = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(stream, {"jpg": "JPEG", "png": "PNG"}[kind], **({"quality": config.quality} if kind == "jpg" else {}))
    return StoredImage(stream.getvalue(), kind, "", "")


def cpu_seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def ratio(least: Sequence[float], ours: Sequence[float], seed: int) -> dict[str, float]:
    """Speed of ours beside the least possible: the median over batches with a 95 % bootstrap interval."""
    found = [a / b for a, b in zip(least, ours, strict=True)]
    source = random.Random(seed)
    medians = sorted(statistics.median(source.choices(found, k=len(found))) for _ in range(REPLICATES))
    edge = round(0.025 * REPLICATES)
    return {"median": statistics.median(found), "low": medians[edge], "high": medians[-1 - edge]}


def resident_bytes() -> int:
    """Of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def main(arguments: Sequence[str]) -> int:
    result = measure([argument for argument in arguments if argument != "--json"])
    if "--json" in arguments:
        print(json.dumps(result, indent=1))
    else:
        print_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

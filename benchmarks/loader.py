"""Compare data loaders with their unavoidable work (decoding in stage 3, tokenising in stage 2) and with webdataset's
and Hugging Face's readers of the same shards; measure start-up and memory on large data sets.

Samples are synthetic: noise with the spectrum of photographs at realistic sizes, and Toyland's captions. All variants
alternate in one process on one core, and CPU seconds are measured.
"""

import gc
import importlib.util
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer
from webdataset.compat import WebDataset

from benchmarks.measure import Limit, interval, ratio, time_alternately
from datamodules.alignment import AlignmentData, AlignmentDataConfig, ClipTokens
from datamodules.data_config import DataConfig, Source
from datamodules.images import Limits, StoredImage
from datamodules.instruction import InstructionData, InstructionDataConfig
from datamodules.order import Mixture, SampleOrder
from datamodules.reader import SampleReader
from datamodules.remote import RemoteConfig
from datamodules.sample import CaptionSample, ConstructedSample, EditSample, Entity, TextSample
from datamodules.shard_writer import ShardWriter
from datamodules.shards import find_tars, list_shards, save_listing
from datamodules.toyland.language import caption
from datamodules.toyland.scene import sample_scene
from kosmosg.config import load_config
from kosmosg.image_processing import ClipImageTransform, TargetTransform
from kosmosg.prompt import PromptEncoder
from kosmosg.tokenizer import Tokenizer

WEIGHTS = Path(__file__).resolve().parent.parent / "datamodules" / "toyland" / "weights"
SPECTRUM = 1.1  # amplitudes fall with frequency to this power; photographs are near 1
SIDE, CLIP_TOKENS, LARGE_BATCH = 512, 77, 1024


@dataclass
class LoaderBenchmark:
    samples: int = 24
    """Number of samples of each source of stage 3."""
    batches: int = 16
    """Number of repetitions."""
    batch_size: int = 20
    """Samples per batch of stage 3, a multiple of 5: 2 constructed, 2 edits, 1 pair."""
    crops: str = "png"
    """Format of entity crops: png, as written by the curation, or jpg."""
    captions: int = 20_000
    """Number of captions; batches of stage 2 have 56."""
    memory_captions: int = 200_000
    """Number of captions read while memory is measured."""
    real_captions: int = 1_000_000
    """Number of captions of the written data set for the start-up measurement."""
    listed_shards: int = 200_000
    """Number of shards with 10,000 samples each, 2·10⁹ in all, of the data set that is listed but not written."""
    tokenizer: str = str(WEIGHTS / "tokenizer")
    """Folder of the MLLM's tokenizer."""
    clip: str = str(WEIGHTS / "stable-diffusion" / "tokenizer")
    """Folder of the CLIP text model's tokenizer."""

    def __post_init__(self) -> None:
        for name in ("samples", "batches", "batch_size", "captions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.crops not in ("png", "jpg") or self.batch_size % 5:
            raise ValueError(f"crops is {self.crops}, batch_size {self.batch_size}; allowed: png or jpg; 5, 10, 15, …")


def measure(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Measure speed and memory of the loaders of stages 2 and 3, and their start-up."""
    config = load_config(arguments, LoaderBenchmark)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        starts = measure_starts(config, Path(folder))  # first, while little memory is in use
        return measure_stage3(config, Path(folder)) | measure_stage2(config, Path(folder)) | starts


def measure_stage3(config: LoaderBenchmark, folder: Path) -> dict[str, Any]:
    """Measure stage 3's loader. Constructed samples have two entities, so that all batches have equally many images."""
    rng = np.random.default_rng(0)
    pair, edits, crops = ([] for _ in range(3))
    per_shard = -(-config.samples // 4)
    with (
        ShardWriter(folder / "constructed", "shard", per_shard) as constructed,
        ShardWriter(folder / "edit", "shard", per_shard) as edit,
        ShardWriter(folder / "captions", "shard", per_shard) as captions,
    ):
        for number in range(config.samples):
            key = f"{number:06d}"
            pair.append(photograph(rng, SIDE, int(SIDE * rng.uniform(1, 1.5))))
            edits += [photograph(rng, SIDE, SIDE) for _ in range(2)]
            crops += [photograph(rng, SIDE, SIDE, config.crops) for _ in range(2)]
            entities = [Entity(name, crop, crop) for name, crop in zip(("cat", "boat"), crops[-2:], strict=True)]
            constructed.write(ConstructedSample("a picture of a cat and a boat", entities, edits[-1]), key)
            edit.write(EditSample("a boat on a lake", "make it a painting in watercolour", edits[-2], edits[-1]), key)
            captions.write(CaptionSample("a boat on a lake", pair[-1]), key)
    weights = {"constructed": 2, "edit": 2, "captions": 1}
    sources: dict[str, Any] = {name: Source(str(folder / name / "*.tar"), weight) for name, weight in weights.items()}
    clip, target = ClipImageTransform(224), TargetTransform(SIDE)
    words = Tokenizer.from_pretrained(Path(config.tokenizer))
    module: Any = InstructionData(InstructionDataConfig(**sources), PromptEncoder(words, clip, 64), target)
    module.setup()
    # Of 5 samples the MLLM reads 2 × 2 crops and 2 images to edit; the targets are 2 constructed, 2 edited and 1 pair.
    fifth = config.batch_size // 5
    images = {clip: [*crops, *edits[: len(crops) // 2]], target: [*edits, *pair[: len(edits) // 4]]}
    counts = {clip: 6 * fifth, target: 5 * fifth}
    images = {transform: [of[i % len(of)] for i in range(counts[transform])] for transform, of in images.items()}
    decoded = [(transform, decode(image.data)) for transform, chosen in images.items() for image in chosen]
    begins = iter(range(0, 10**9, config.batch_size))

    def read() -> None:
        begin = next(begins)
        module.train_dataset[range(begin, begin + config.batch_size)]

    read_by_mllm = {"constructed": [f"{i}.background.{config.crops}" for i in range(2)], "edit": ["source.jpg"]}

    def prepare(name: str, sample: dict[str, Any]) -> tuple[list[int], list[torch.Tensor], torch.Tensor]:
        """Prepare a row: token ids, images for the MLLM (crops or the image to edit), and the target."""
        text = sample["txt"].decode() if name == "captions" else json.loads(sample["json"])["caption"]
        images = [clip(decode(sample[member])) for member in read_by_mllm.get(name, [])]
        return words.encode(text), images, target(decode(sample["jpg" if name == "captions" else "target.jpg"]))

    def peer(open_set: Callable[[Path], Iterator[dict[str, Any]]]) -> Callable[[], None]:
        samples = {name: open_set(folder / name) for name in weights}

        def read_theirs() -> None:
            rows = [
                prepare(name, next(samples[name])) for name, weight in weights.items() for _ in range(weight * fifth)
            ]
            torch.stack([image for _, images, _ in rows for image in images])
            torch.stack([targets for *_, targets in rows])

        return read_theirs

    peers = {name: peer(open_set) for name, open_set in peer_readers().items()}
    variants = peers | {
        "loader": read,
        "decode": lambda: [decode(image.data) for chosen in images.values() for image in chosen],
        "transforms": lambda: [transform(image) for transform, image in decoded],
    }
    seconds = time_variants(variants, config)
    decode_and_transform = [sum(pair) for pair in zip(seconds["decode"], seconds["transforms"], strict=True)]
    return {
        "stage 3, relative to decoding": ratio(seconds["decode"], seconds["loader"]),
        "stage 3, relative to decoding and transforms": ratio(decode_and_transform, seconds["loader"]),
        **{f"stage 3, relative to {name}": ratio(seconds[name], seconds["loader"]) for name in peers},
        "stage 3, samples per second": interval([config.batch_size / elapsed for elapsed in seconds["loader"]]),
    }


def measure_stage2(config: LoaderBenchmark, folder: Path) -> dict[str, Any]:
    """Measure stage 2's loader, after one epoch has filled the tokenizers' caches, as in a long run."""
    rng = np.random.default_rng(1)
    texts = [caption(sample_scene(rng), rng, with_looks=True) for _ in range(config.captions)]
    image = photograph(rng, 64, 64)
    with ShardWriter(folder / "text", "captions", -(-config.captions // 20)) as writer:
        for number, text in enumerate(texts):
            writer.write(CaptionSample(text, image), f"{number:09d}")
    clip, words = CLIPTokenizer.from_pretrained(config.clip), Tokenizer.from_pretrained(Path(config.tokenizer))

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor(clip(texts, padding="max_length", truncation=True, max_length=CLIP_TOKENS).input_ids)

    data = AlignmentDataConfig(captions=Source(str(folder / "text" / "*.tar")))
    module: Any = AlignmentData(data, PromptEncoder(words, ClipImageTransform(224), 64), ClipTokens(tokenize))
    module.setup()
    gc.freeze()  # as in the loader's workers
    resident = []
    for begin in range(0, max(config.memory_captions, config.captions), LARGE_BATCH):
        module.train_dataset[range(begin, begin + LARGE_BATCH)]
        resident.append(resident_bytes())
    gc.unfreeze()
    begins = iter(range(0, 10**9, 56))

    def read() -> None:
        for _ in range(10):
            begin = next(begins)
            module.train_dataset[range(begin, begin + 56)]

    def tokens() -> None:
        for begin in range(0, 560, 56):
            chosen = [texts[(begin + i) % len(texts)] for i in range(56)]
            module.clip(chosen)
            words.encode_batch(chosen)

    def peer(samples: Iterator[dict[str, Any]]) -> Callable[[], None]:
        def read_theirs() -> None:
            for _ in range(10):
                chosen = [next(samples)["txt"].decode() for _ in range(56)]
                module.clip(chosen)
                words.encode_batch(chosen)

        return read_theirs

    peers = {name: peer(open_set(folder / "text")) for name, open_set in peer_readers().items()}
    seconds = time_variants(peers | {"loader": read, "tokens": tokens}, config)
    return {
        "stage 2, relative to the two tokenizers alone": ratio(seconds["tokens"], seconds["loader"]),
        **{f"stage 2, relative to {name}": ratio(seconds[name], seconds["loader"]) for name in peers},
        "stage 2, captions per second": interval([560 / elapsed for elapsed in seconds["loader"]]),
        "stage 2, kB of memory added after the first tenth": (resident[-1] - resident[len(resident) // 10]) / 1000,
    }


def peer_readers() -> dict[str, Callable[[Path], Iterator[dict[str, Any]]]]:
    """Return endless readers of the same tars by other libraries: member name → bytes. `datasets` is optional."""
    readers = {"webdataset": read_by_webdataset}
    if importlib.util.find_spec("datasets") is not None:
        readers["Hugging Face datasets"] = read_by_datasets
    return readers


def read_by_webdataset(folder: Path) -> Iterator[dict[str, Any]]:
    """Read with webdataset, with shuffled shards and a shuffle buffer of 1,000 samples."""
    files = [str(path) for path in find_tars(str(folder))]
    stream: Any = WebDataset(files, shardshuffle=len(files), seed=0).shuffle(1000)
    while True:
        yield from stream


def read_by_datasets(folder: Path) -> Iterator[dict[str, Any]]:
    """Stream with Hugging Face datasets, with encoded images and the same shuffle buffer."""
    import datasets  # type: ignore[import-not-found]

    files = [str(path) for path in find_tars(str(folder))]
    stream = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    assert stream.features is not None
    for name, feature in stream.features.items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(name, datasets.Image(decode=False))
    while True:
        for sample in stream.shuffle(0, buffer_size=1000):
            yield {name: as_bytes(value) for name, value in sample.items()}


def as_bytes(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"]
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def measure_starts(config: LoaderBenchmark, folder: Path) -> dict[str, Any]:
    """Measure the seconds until a batch in the middle of a run is located, and the growth of resident memory."""
    record = {"samples": 10_000, "bytes": 2**30}
    urls = [f"https://store.example/laion-{number:06d}.tar" for number in range(config.listed_shards)]
    save_listing(folder / "laion.json", [record | {"name": url} for url in urls])
    urls.clear()
    with ShardWriter(folder / "real", "captions", 10_000) as writer:
        for number in range(config.real_captions):
            writer.write(TextSample(f"a boat on lake number {number}"), f"{number:09d}")
    results: dict[str, Any] = {}
    listed = 10_000 * config.listed_shards
    sets = {f"{listed:,} samples, listed": folder / "laion.json", f"{config.real_captions:,} texts": folder / "real"}
    for name, place in sets.items():
        before, began = resident_bytes(), time.monotonic()
        shards = list_shards(str(place), RemoteConfig(["https"]))
        data = DataConfig()
        order = SampleOrder(shards.samples, 0, data.lanes, data.lane_rows, data.window, data.block)
        mixture = Mixture(0, [1], data.lanes, data.lane_rows)
        reader = SampleReader(shards, order, TextSample.kind, Limits())
        for position in range(len(shards) // 3, len(shards) // 3 + 64):
            draw = mixture(position)
            if shards.store is None:
                reader(draw.lane, draw.row)
            else:
                order(draw.lane, draw.row)
        results[f"start on {name}, seconds"] = {key: time.monotonic() - began for key in ("median", "low", "high")}
        results[f"start on {name}, kB of resident memory"] = (resident_bytes() - before) / 1000
    return results


def time_variants(variants: dict[str, Any], config: LoaderBenchmark) -> dict[str, list[float]]:
    return time_alternately(variants, config.batches, 1, torch.device("cpu"), Limit(600), "cpu")


def decode(data: bytes) -> Image.Image:
    """Decode an image with Pillow."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def photograph(rng: np.random.Generator, width: int, height: int, kind: str = "jpg") -> StoredImage:
    """Return encoded coloured noise with the spectrum of photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    shape = (3, *frequency.shape)
    waves = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / frequency**SPECTRUM
    luminance, *colour = np.fft.irfft2(waves, s=(height, width))
    channels = np.stack([luminance, luminance + 0.3 * colour[0], luminance + 0.3 * colour[1]], axis=-1)
    pixels = 120 + 55 * (channels - channels.mean()) / channels.std()
    stream = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(stream, {"jpg": "JPEG", "png": "PNG"}[kind], **({"quality": 95} if kind == "jpg" else {}))
    return StoredImage(stream.getvalue(), kind, "", "")


def resident_bytes() -> int:
    """Return the resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def markdown(result: dict[str, Any]) -> str:
    """Format the result as a Markdown table."""
    lines = ["### loader", "", "CPU seconds on one core.", "", "| | |", "|---|---|"]
    for name, value in result.items():
        text = (
            f"{value:+,.0f}" if isinstance(value, float) else "{median:,.3g} ({low:,.3g}–{high:,.3g})".format(**value)
        )
        lines.append(f"| {name} | {text} |")
    return "\n".join([*lines, ""])

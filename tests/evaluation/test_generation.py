"""Images are generated once, despite kills, and never mixed with images of other parameters."""

import fcntl
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from evaluation.images.generation import LOCK, MANIFEST, Batch, System, generate
from evaluation.processes import Processes
from evaluation.protocols.benchmark import EvaluationError, Request, image_seed
from evaluation.protocols.protocol import Sampling
from kosmosg import files

SAMPLING = Sampling(steps=2, guidance_scale=3.0, image_size=8)
COUNT, BATCH = 10, 4


class Killed(BaseException):
    """A signal, which no code catches."""


def draw(batch: Batch, sampling: Sampling) -> list[Image.Image]:
    """Return pixels that depend on prompt, input images and seed."""
    images = []
    for prompt, inputs, seed in zip(batch.prompts, batch.images, batch.seeds, strict=True):
        generator = torch.Generator().manual_seed(seed + len(prompt) + sum(image.size[0] for image in inputs))
        side = sampling.image_size
        images.append(Image.fromarray(torch.randint(0, 256, (side, side, 3), generator=generator).byte().numpy()))
    return images


SYSTEM = System("double", lambda: draw, "m", reads_images=True)


def recording(seen: list[Batch], **changes) -> System:
    """Return the fake system, which appends its batches to `seen`."""
    return replace(SYSTEM, load=lambda: lambda batch, sampling: seen.append(batch) or draw(batch, sampling), **changes)


@pytest.fixture
def requests(tmp_path: Path) -> list[Request]:
    Image.new("RGB", (5, 5)).save(tmp_path / "input.png")
    return [
        Request(i, f"<i> number {i}", f"a dog number {i}", ("input.png",), image_seed(0, i), "dog")
        for i in range(COUNT)
    ]


def run(folder: Path, requests: list[Request], system: System = SYSTEM, processes: Processes | None = None) -> Path:
    """Generate the images and return their folder."""
    options = {"inputs_folder": folder, "batch_size": BATCH, "processes": processes, "console": Console(quiet=True)}
    files = generate(system, requests, SAMPLING, folder / "made", **options)
    assert files == {i: folder / "made" / "images" / f"{i:06d}.png" for i in range(len(requests))}
    return folder / "made"


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(("storage", "suffix"), [("memory", "png"), ("png", "png"), ("jpeg", "jpg")])
def test_storage(tmp_path: Path, requests: list[Request], storage, suffix: str) -> None:
    """Only JPEG changes pixels; files are recognized by their parameters without a manifest."""
    sampling, seen = replace(SAMPLING, storage=storage, image_size=64), []
    (drawn,) = draw(Batch([requests[0].prompt], [[Image.new("RGB", (5, 5))]], [requests[0].seed]), sampling)
    for _ in range(2):
        options = {"inputs_folder": tmp_path, "batch_size": 1}
        file = generate(recording(seen), requests[:1], sampling, tmp_path / "stored", **options)[0]
        (tmp_path / "stored" / MANIFEST).unlink()
    assert len(seen) == 1
    with Image.open(file) as image:
        assert file.suffix == f".{suffix}" and image.format == ("JPEG" if storage == "jpeg" else "PNG")
        assert (image.tobytes() == drawn.tobytes()) == (storage != "jpeg")


def test_manifest_has_all_parameters(tmp_path: Path, requests: list[Request]) -> None:
    folder = run(tmp_path, requests)
    rows = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(COUNT))
    assert rows[3] == {
        "index": 3,
        "prompt": "<i> number 3",
        "inputs": ["input.png"],
        "seed": requests[3].seed,
        "sampler": "dpm",
        "steps": 2,
        "guidance_scale": 3.0,
        "model": "m",
        "file": "images/000003.png",
        "sha256": hashlib.sha256((folder / "images/000003.png").read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [0, 2, 5, 8])
def test_killed_at_any_point(
    tmp_path: Path, requests: list[Request], monkeypatch: pytest.MonkeyPatch, after: bool, number: int
) -> None:
    """While an image is written, or after it. Interrupted batches are recomputed as a whole, because results depend on
    the batch in their last bits."""
    whole, seen = content(run(tmp_path, requests)), []
    shutil.rmtree(tmp_path / "made")
    flush = files.flush

    def kill(path: Path) -> None:
        if not after and path.name.startswith(f".{number:06d}"):
            path.write_bytes(path.read_bytes()[:20])
            raise Killed
        flush(path)
        if after and path.name == "images" and (path / f"{number:06d}.png").is_file():
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files, "flush", kill)
        patch.setattr(files, "remove", lambda path: None)  # a signal prevents clean-up
        run(tmp_path, requests)
    left = [path for path in (tmp_path / "made" / "images").iterdir() if not path.name.startswith(".")]
    assert len(left) == number + after and not (tmp_path / "made" / MANIFEST).exists()
    assert content(run(tmp_path, requests, recording(seen))) == whole
    assert [batch.seeds for batch in seen] == [
        [request.seed for request in requests[start : start + BATCH]]
        for start in range((number + after) // BATCH * BATCH, COUNT, BATCH)
    ]


def test_complete_folder_loads_no_model(tmp_path: Path, requests: list[Request]) -> None:
    def fail():
        raise AssertionError("no image is missing")

    before = content(run(tmp_path, requests))
    assert content(run(tmp_path, requests, replace(SYSTEM, load=fail))) == before


CHANGES = {
    "deleted": lambda file, row: file.unlink(),
    "drawn over": lambda file, row: Image.new("RGB", (8, 8)).save(file),
    "another's": lambda file, row: shutil.copy(file.with_name("000003.png"), file),
} | {
    key: lambda file, row, key=key, value=value: row.update({key: value})
    for key, value in (("prompt", "a cat"), ("inputs", ["b.png"]), ("seed", 99), ("steps", 99), ("model", "n"))
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_are_regenerated(tmp_path: Path, requests: list[Request], change: str) -> None:
    folder, seen = run(tmp_path, requests), []
    whole = content(folder)
    rows = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    CHANGES[change](folder / "images" / "000005.png", rows[5])
    (folder / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert content(run(tmp_path, requests, recording(seen))) == whole
    assert [batch.seeds[1] for batch in seen] == [requests[5].seed]


def test_a_damaged_manifest_is_rewritten(tmp_path: Path, requests: list[Request]) -> None:
    folder, seen = run(tmp_path, requests), []
    whole = content(folder)
    (folder / MANIFEST).write_text('{"index": 0}\n[]\n{"torn')
    assert content(run(tmp_path, requests, recording(seen))) == whole and not seen


@pytest.mark.parametrize("change", [{"model": "n"}, {"reads_images": False}])
def test_images_of_another_model_are_not_reused(tmp_path: Path, requests: list[Request], change: dict) -> None:
    seen: list[Batch] = []
    run(tmp_path, requests)
    run(tmp_path, requests, recording(seen, **change))
    assert len(seen) == 3
    if "reads_images" in change:
        assert seen[0].prompts[0] == "a dog number 0" and seen[0].images[0] == []


def test_a_folder_is_locked_by_one_launch(tmp_path: Path, requests: list[Request]) -> None:
    """Also if rank 0 of the other launch is dead but another rank still writes."""
    folder = run(tmp_path, requests)
    with (folder / LOCK).open("a+") as left_behind:
        fcntl.flock(left_behind, fcntl.LOCK_SH)
        with pytest.raises(EvaluationError, match="another process is generating"):
            run(tmp_path, requests)
    run(tmp_path, requests)


def test_seeds() -> None:
    seeds = [image_seed(0, index, repeat) for index in range(200) for repeat in range(2)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**53
    assert image_seed(1, 0) != image_seed(0, 0)
    assert image_seed(0, 7, 1, period=5) == image_seed(0, 2, 1, period=5) != image_seed(0, 2, 0, period=5)

"""Images are made once, whatever kills the process, and never mixed with images that were made otherwise."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.images.generation import Batch, System, generate, row_of
from evaluation.images.manifest import LOCK, Manifest, ManifestError
from evaluation.parallel.processes import Processes
from evaluation.protocols.protocol import Sampling
from evaluation.protocols.requests import Request, image_seed

IDENTITY = {"system": "double", "protocol": "p@1#0", "model": "m"}
SAMPLING = Sampling(steps=2, guidance_scale=3.0, image_size=8)
COUNT, BATCH = 10, 4


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def draw(batch: Batch, sampling: Sampling) -> list[Image.Image]:
    """Pixels that depend on prompt, input images and seed."""
    images = []
    for prompt, inputs, seed in zip(batch.prompts, batch.images, batch.seeds, strict=True):
        generator = torch.Generator().manual_seed(seed + len(prompt) + sum(image.size[0] for image in inputs))
        side = sampling.image_size
        images.append(Image.fromarray(torch.randint(0, 256, (side, side, 3), generator=generator).byte().numpy()))
    return images


SYSTEM = System("double", lambda: draw, "m", reads_images=True)


@pytest.fixture
def requests(tmp_path: Path) -> list[Request]:
    Image.new("RGB", (5, 5)).save(tmp_path / "input.png")
    return [
        Request(i, f"<i> number {i}", f"a dog number {i}", ("input.png",), image_seed(0, i), "dog")
        for i in range(COUNT)
    ]


def run(folder: Path, requests: list[Request], system: System = SYSTEM, identity: dict | None = None) -> Manifest:
    manifest = Manifest(folder / "images-of-double", identity or IDENTITY)
    generate(system, requests, SAMPLING, manifest, inputs_folder=folder, batch_size=BATCH)
    return manifest


def content(manifest: Manifest) -> dict[str, bytes]:
    files = [path for path in manifest.folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(manifest.folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("storage", "suffix"), [("memory", "png"), ("png", "png"), ("jpeg", "jpg")])
def test_storage(tmp_path: Path, requests: list[Request], storage, suffix: str) -> None:
    """Only JPEG changes pixels."""
    manifest = Manifest(tmp_path / "stored", IDENTITY)
    sampling = replace(SAMPLING, storage=storage, image_size=64)
    generate(SYSTEM, requests[:1], sampling, manifest, inputs_folder=tmp_path, batch_size=1)
    (drawn,) = draw(Batch([requests[0].prompt], [[Image.new("RGB", (5, 5))]], [requests[0].seed]), sampling)
    file = manifest.image_file(0)
    with Image.open(file) as image:
        assert file.suffix == f".{suffix}" and image.format == ("JPEG" if storage == "jpeg" else "PNG")
        assert (image.tobytes() == drawn.tobytes()) == (storage != "jpeg")


def test_rows_tell_everything(tmp_path: Path, requests: list[Request]) -> None:
    manifest = run(tmp_path, requests)
    rows = [json.loads(line) for line in manifest.file.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(COUNT))
    first = rows[3]
    digest = hashlib.sha256((manifest.folder / first["file"]).read_bytes()).hexdigest()
    assert first == {
        "index": 3,
        "prompt": "<i> number 3",
        "inputs": ["input.png"],
        "seed": requests[3].seed,
        "sampler": "dpm",
        "steps": 2,
        "guidance_scale": 3.0,
        "model": "m",
        "file": "images/000003.png",
        "sha256": digest,
    }


@pytest.mark.parametrize("point", ["image", "rename", "line"])
@pytest.mark.parametrize("number", [0, 2, 5, 9])
def test_killed_at_any_point(
    tmp_path: Path, requests: list[Request], monkeypatch: pytest.MonkeyPatch, point: str, number: int
) -> None:
    """While an image is written, before its line is, and in the middle of its line."""
    whole = content(run(tmp_path, requests))
    shutil.rmtree(tmp_path / "images-of-double")
    store, replace_, write = Manifest.store, Path.replace, Path.write_bytes

    def kill_writing(path: Path, data: bytes) -> int:
        if path.name.startswith(f".{number:06d}"):
            write(path, data[: len(data) // 2])
            raise Killed
        return write(path, data)

    def kill_after_rename(path: Path, target: Path) -> Path:
        moved = replace_(path, target)
        if target.name == f"{number:06d}.png":
            raise Killed
        return moved

    def kill_in_line(manifest: Manifest, image: Image.Image, storage: str, **values):
        row = store(manifest, image, storage, **values)
        if values["index"] == number:
            with manifest.file.open("r+b") as stream:
                stream.truncate(manifest.file.stat().st_size - 20)
            raise Killed
        return row

    with monkeypatch.context() as patch:
        if point == "image":
            patch.setattr(Path, "write_bytes", kill_writing)
        elif point == "rename":
            patch.setattr(Path, "replace", kill_after_rename)
        else:
            patch.setattr(Manifest, "store", kill_in_line)
        with pytest.raises(Killed):
            run(tmp_path, requests)
    assert len(Manifest(tmp_path / "images-of-double", IDENTITY).rows) == number
    resumed = run(tmp_path, requests)
    assert content(resumed) == whole


def test_resumed_batches_are_the_same(tmp_path: Path, requests: list[Request]) -> None:
    """Results depend on the batch in their last bits, so an interrupted batch is asked again as a whole."""
    seen: list[tuple[int, ...]] = []

    def record(batch: Batch, sampling: Sampling) -> list[Image.Image]:
        seen.append(tuple(batch.seeds))
        return draw(batch, sampling)

    system = replace(SYSTEM, load=lambda: record)
    manifest = run(tmp_path, requests, system)
    lines = manifest.file.read_bytes().splitlines(keepends=True)
    manifest.file.write_bytes(b"".join(lines[:6]))
    run(tmp_path, requests, system)
    assert seen[3:] == seen[1:3]


def test_nothing_missing_loads_no_model(tmp_path: Path, requests: list[Request]) -> None:
    def fail():
        raise AssertionError("no image is missing")

    run(tmp_path, requests)
    run(tmp_path, requests, replace(SYSTEM, load=fail))


def test_deleted_image_is_made_again_in_its_place(tmp_path: Path, requests: list[Request]) -> None:
    manifest = run(tmp_path, requests)
    whole = content(manifest)
    manifest.image_file(4).unlink()
    assert content(run(tmp_path, requests)) == whole


def test_changed_image_is_noticed(tmp_path: Path, requests: list[Request]) -> None:
    manifest, asked = run(tmp_path, requests), [row_of(SYSTEM, request, SAMPLING) for request in requests]
    manifest.verify(asked)
    Image.new("RGB", (8, 8)).save(manifest.image_file(7))
    with pytest.raises(ManifestError, match=r"000007\.png"):
        manifest.verify(asked)


@pytest.mark.parametrize("key", ["prompt", "inputs", "seed", "steps", "guidance_scale", "model", "index", "file"])
def test_changed_row_is_noticed(tmp_path: Path, requests: list[Request], key: str) -> None:
    """An image is scored against the request that it was made for, whatever somebody has written into the manifest."""
    manifest = run(tmp_path, requests)
    rows = [json.loads(line) for line in manifest.file.read_text().splitlines()]
    if key == "index":
        rows[3][key], rows[4][key] = 4, 3
    other = {"prompt": "a cat", "model": "n", "inputs": ["other.png"], "file": rows[3]["file"]}
    rows[5][key] = other.get(key, rows[5][key] if key == "index" else 99)
    manifest.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ManifestError, match=r"is not (what was asked for|the image that was generated)"):
        Manifest(manifest.folder, IDENTITY).verify([row_of(SYSTEM, request, SAMPLING) for request in requests])


@pytest.mark.parametrize("key", ["model", "protocol"])
def test_other_model_or_protocol_is_refused(tmp_path: Path, requests: list[Request], key: str) -> None:
    run(tmp_path, requests)
    with pytest.raises(ManifestError, match=rf"{key} was '.*' and is now 'another'"):
        run(tmp_path, requests, identity={**IDENTITY, key: "another"})


def test_damaged_line_is_named(tmp_path: Path, requests: list[Request]) -> None:
    manifest = run(tmp_path, requests)
    lines = manifest.file.read_text().splitlines()
    lines[4] = lines[4][:30]
    manifest.file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ManifestError, match="line 5"):
        run(tmp_path, requests)


def test_two_processes_do_not_share_a_folder(tmp_path: Path, requests: list[Request]) -> None:
    other = Manifest(tmp_path / "images-of-double", IDENTITY)
    with other.locked(Processes()), pytest.raises(ManifestError, match="another process"):
        run(tmp_path, requests)


def test_system_that_reads_text_alone(tmp_path: Path, requests: list[Request]) -> None:
    seen: list[Batch] = []

    def record(batch: Batch, sampling: Sampling) -> list[Image.Image]:
        seen.append(batch)
        return draw(batch, sampling)

    manifest = run(tmp_path, requests, replace(SYSTEM, load=lambda: record, reads_images=False))
    assert seen[0].prompts[0] == "a dog number 0" and seen[0].images[0] == []
    assert manifest.rows[0].prompt == "a dog number 0" and manifest.rows[0].inputs == ()


def test_seeds() -> None:
    seeds = [image_seed(0, index, repeat) for index in range(200) for repeat in range(2)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**53
    assert image_seed(1, 0) != image_seed(0, 0)
    assert image_seed(0, 7, 1, period=5) == image_seed(0, 2, 1, period=5) != image_seed(0, 2, 0, period=5)

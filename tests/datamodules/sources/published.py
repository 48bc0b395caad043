"""Small copies of the published layouts, written as their authors' code writes them, and their conversion."""

import base64
import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path
from pkgutil import resolve_name

import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw
from rich.console import Console

from datamodules.checks.check import CheckConfig, check
from datamodules.sample import Sample, decode
from datamodules.shards import list_shards
from datamodules.sources import CONVERTERS, conversion
from datamodules.tar import read_shard
from kosmosg.config import load_config
from tests.datamodules.worlds import add

SIDE = 64  # what the tiny model reads
CAPTIONS = ("a red fish", "a small dog", "a green bird", "a cat")
COLOURS = ("firebrick", "goldenrod", "seagreen", "steelblue", "orchid", "sienna")


def picture(number: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    image = Image.new("RGB", (width, height), COLOURS[number % len(COLOURS)])
    box = (8 + number % 5 * 4, 10, width - 10, height - 8 - number % 3 * 6)
    ImageDraw.Draw(image).ellipse(box, fill="white", outline="black")
    return image


def jpeg(number: int, width: int = SIDE, height: int = SIDE) -> bytes:
    stream = io.BytesIO()
    picture(number, width, height).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows: list[dict], **options) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream, **options)
    return stream.getvalue()


def img2dataset(folder: Path, good: int = 12, failed: int = 3) -> Path:
    """`00000.tar`, `.parquet` and `_stats.json`; an image that failed is in the parquet alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(good + failed):
            key, caption = f"{i:09d}", CAPTIONS[i % 4]
            row = {"caption": caption, "url": f"https://example.org/{i}.jpg", "key": key, "status": "success",
                   "error_message": None, "width": SIDE, "height": SIDE, "original_width": 640, "original_height": 480,
                   "exif": "{}", "sha256": hashlib.sha256(jpeg(i)).hexdigest()}  # fmt: skip
            if i % 5 == 4 and failed:
                failed -= 1
                row |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found", "width": None}
            else:
                add(tar, f"{key}.jpg", jpeg(i))
                add(tar, f"{key}.txt", caption.encode())
                add(tar, f"{key}.json", json.dumps(row, indent=4).encode())
            rows.append(row)
    write(folder / "00000.parquet", parquet(rows))
    write(folder / "00000_stats.json", json.dumps({"count": len(rows), "successes": good, "failed_to_download": 3}))
    return folder


def mmc4(folder: Path, documents: int = 6) -> Path:
    rows = []
    for i in range(documents):
        names = [f"{i:06x}{j:06x}.jpg" for j in (0, 1)]
        for j, name in enumerate(names):
            write(folder / "images" / name, jpeg(2 * i + j))
        rows.append(
            {
                "url": f"http://example.org/{i}.html",
                "text_list": ["Look at the fish.", "A dog is beside it.", "The boat swims away!"],
                "image_info": [
                    {"image_name": name, "raw_url": f"http://example.org/{name}", "matched_text_index": 2 * j,
                     "matched_sim": 0.2 + 0.1 * j, "face_detections": None}
                    for j, name in enumerate(names)
                ],
                "similarity_matrix": [[0.2, 0.1, 0.0], [0.1, 0.2, 0.3]],
                "could_have_url_duplicate": i % 2,
            }
        )  # fmt: skip
    write(folder / "docs_no_face_shard_0_v3.jsonl", jsonl(rows))
    return folder


def obelics_rows(documents: int = 6) -> list[dict]:
    return [
        {
            "images": [f"https://example.org/{i}/a.jpg", None, f"https://example.org/{i}/b.jpg", None],
            "texts": [None, "Look. A dog.\n\nIt swims.", None, "The end."],
            "metadata": "[]",
            "general_metadata": "{}",
        }
        for i in range(documents)
    ]


def obelics(folder: Path, documents: int = 6) -> Path:
    """The documents as Parquet, the images as img2dataset fetched them: tars whose json tells the URL."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = obelics_rows(documents)
    write(folder / "train-00000.parquet", parquet(rows, row_group_size=2))
    with tarfile.open(folder / "00000.tar", "w") as tar:
        urls = [url for row in rows for url in row["images"] if url]
        for i, url in enumerate(urls):
            add(tar, f"{i:09d}.jpg", jpeg(i))
            add(tar, f"{i:09d}.json", json.dumps({"url": url, "status": "success"}).encode())
    return folder


def instructpix2pix(folder: Path, prompts: int = 8) -> Path:
    seeds = []
    for i in range(prompts):
        name, drawn = f"shard-00/{i:07d}", [str(1000 + 10 * i + j) for j in range(1 + i % 3)]
        prompt = {"caption": CAPTIONS[i % 4], "edit": "make it night", "output": f"{CAPTIONS[i % 4]} at night"}
        write(folder / name / "prompt.json", json.dumps(prompt))
        for seed in drawn:
            for j in (0, 1):
                write(folder / name / f"{seed}_{j}.jpg", jpeg(int(seed) + j))
        write(folder / name / "metadata.jsonl", jsonl([{"seed": seed, "sim_0": 0.3} for seed in drawn]))
        seeds.append([name, drawn])
    write(folder / "seeds.json", json.dumps(seeds))
    return folder


LIST = ("ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title",
        "OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation")  # fmt: skip


def image_id(number: int) -> str:
    return f"{0xA000 + number:016x}"


def open_images_rows(count: int, server: str = "https://example.org") -> list[dict]:
    rows = []
    for i in range(count):
        content = jpeg(i, SIDE + 16)
        md5 = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        values = (image_id(i), "train", f"{server}/{i}_o.jpg", f"https://flickr.example/{i}",
                  "https://creativecommons.org/licenses/by/2.0/", "https://flickr.example/people/1", "A, B",
                  'The "title"', str(len(content)), md5, "", "90.0" if i == 1 else "0.0")  # fmt: skip
        rows.append(dict(zip(LIST, values, strict=True)))
    return rows


def open_images_list(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, LIST)
        writer.writeheader()
        writer.writerows(rows)
    return file


def open_images(folder: Path, count: int = 8, packed: bool = False) -> Path:
    """The list, the images in a folder or in a tar as the CVDF hosts them, and Localized Narratives."""
    open_images_list(folder / "train-images-boxable-with-rotation.csv", open_images_rows(count))
    if packed:
        with tarfile.open(folder / "train_0.tar", "w") as tar:
            for i in range(count):
                add(tar, f"train_0/{image_id(i)}.jpg", jpeg(i, SIDE + 16))
    else:
        for i in range(count):
            write(folder / "images" / f"{image_id(i)}.jpg", jpeg(i, SIDE + 16))
    narratives = [
        {"dataset_id": "open_images_train", "image_id": image_id(i), "annotator_id": 1, "caption": CAPTIONS[i % 4]}
        for i in range(count)
    ]
    write(folder / "narratives" / "open_images_train_v6_captions.jsonl", jsonl(narratives))
    return folder


def instructions(folder: Path, count: int = 6) -> Path:
    """X2I2's layout: JSON lines of an instruction, the paths of input images, and the path of an output image."""
    rows = []
    for i in range(count):
        names = [f"images/{i}_{j}.jpg" for j in range(3)]
        for j, name in enumerate(names):
            write(folder / name, jpeg(i + j))
        rows.append({"instruction": "Both at sea", "input_images": names[:2], "output_image": names[2]})
    write(folder / "train.jsonl", jsonl(rows))
    return folder


def encoded(number: int) -> str:
    return base64.b64encode(jpeg(number)).decode()


def tsv(file: Path, kind: str, count: int = 6) -> Path:
    makers = {
        "openimage": lambda i: ["a fish and a dog in the garden", "fish,dog", *(encoded(i + j) for j in range(5))],
        "instructpix2pix": lambda i: ["a fish", "make it night", *(encoded(i + j) for j in range(4))],
        "laion": lambda i: [f"id{i}", CAPTIONS[i % 4], encoded(i), "512", "400", "end"],
    }
    return write(file, "".join("\t".join(makers[kind](i)) + "\n" for i in range(count)))


QUIET = Console(quiet=True)


def convert(layout: str, source: Path, output: Path, *settings: str) -> conversion.Conversion:
    kind = resolve_name(CONVERTERS[layout])
    store = [f"store={source}/images"] if (source / "images").is_dir() else []
    config = load_config(["processes=1", *store, *settings], kind.schema)
    return conversion.convert(layout, kind(source, config), output, QUIET)


def samples(folder: Path) -> list[Sample]:
    return [decode(members, name, key) for name, key, members in stored(folder)]


def stored(folder: Path) -> list[tuple[str, str, dict[str, bytes]]]:
    """Shard, key and members of every sample."""
    shards = list_shards(str(folder / "train-*.tar"))
    found = [(path.name, *read) for path in shards.paths for read in read_shard(path)]
    assert len(found) == len(shards)
    return found


def checked(folder: Path, **options) -> dict:
    found = check(str(folder / "train-*.tar"), CheckConfig(processes=1, **options)).record()
    assert found["samples"] == found["good"] + sum(found["dropped"].values())
    return found

"""A run or model folder → one for the hub with a model card, smaller if wanted (`models/packing.py`); its upload."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import HfApi

from kosmosg.config import RUN_CONFIG
from kosmosg.conversion import inspect_model
from kosmosg.files import replaced, write_text
from kosmosg.models.packing import PACKED, pack, read_record
from kosmosg.models.storage import find_model

CARD = """---
license: {licence}
library_name: diffusers
pipeline_tag: text-to-image
tags: [kosmos-g]
{base_model}---

# {name}

A checkpoint of [KOSMOS-G](https://arxiv.org/abs/2310.02992) ({stage}): prompts of text and images that steer an image
decoder.

| part | parameters | stored as |
|---|---:|---|
{parts}

```python
from kosmosg.pipeline import KosmosGPipeline

pipe = KosmosGPipeline.from_pretrained("{name}"{decoder})
pipe("<i> in the snow", images=[image]).images
```

## Training

{training}

## Scores

{scores}

## Limits

- It follows prompts like those it was trained on. The image decoder's limits and biases remain; nothing is filtered.
- It can reproduce the appearance of a person or a brand from one photo: ask for permission first.
{limits}"""


def prepare(
    source: str | Path,
    folder: str | Path,
    *,
    licence: str,
    name: str = "",
    dtype: str | None = None,
    base: str | None = None,
    evaluation: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write `folder`, which `KosmosGPipeline.from_pretrained` loads as `source`.

    Args:
        source: a run's folder, or a model's or pipeline's.
        name: what the card calls it; the source's name if not given.
        dtype, base: see `pack`.
        evaluation: the folder of a finished evaluation, whose tables become part of the card.

    Raises:
        ValueError, FileNotFoundError: what is missing or not allowed.
    """
    target, model = Path(folder), find_model(source)
    if target.exists() and not (overwrite and (target / "README.md").is_file()):
        raise ValueError(f"'{target}' exists; --overwrite replaces a folder that this command wrote.")
    results = None if evaluation is None else Path(evaluation) / "results.md"
    if results is not None and not results.is_file():
        raise FileNotFoundError(f"--evaluation '{evaluation}' holds no {results.name}.")
    run = {}
    if (file := Path(source) / RUN_CONFIG).is_file():
        run = yaml.safe_load(file.read_text(encoding="utf-8"))
    decoder = run.get("model", {}).get("image_decoder")
    with replaced(target) as temporary:
        pack(model, temporary, dtype, base)
        if decoder and not Path(decoder).exists() and "$" not in decoder:  # an id, which others can read
            write_text(temporary / RUN_CONFIG, yaml.safe_dump({"model": {"image_decoder": decoder}}))
        text = card(source, name or Path(source).name, licence, run, dtype, base, results)
        write_text(temporary / "README.md", text)


def card(
    source: str | Path,
    name: str,
    licence: str,
    run: dict[str, Any],
    dtype: str | None,
    base: str | None,
    results: Path | None,
) -> str:
    """README.md: only what the files say."""
    found = inspect_model(source)
    decoder = run.get("model", {}).get("image_decoder")
    public = decoder if decoder and not Path(decoder).exists() and "$" not in decoder else None
    training = "This folder does not say how it was trained."
    if run:
        finished = Path(source) / "finished.json"
        steps = json.loads(finished.read_text())["step"] if finished.is_file() else "not recorded"
        data = [
            f"  - {key}, weight {value.get('weight', 1)}"
            for key, value in run.get("data", {}).items()
            if isinstance(value, dict) and value.get("shards")
        ]
        facts = {
            "stage": run.get("stage"),
            "steps": steps,
            "seed": run.get("seed"),
            "image decoder": public or "a local folder",
        }
        training = "\n".join([*(f"- {key}: {value}" for key, value in facts.items()), "- data:", *data])
    scores = "It was not evaluated."
    if results is not None:
        tables = re.split(r"\n## (?:By |The paper)", results.read_text(encoding="utf-8"))[0]  # the rest is breakdowns
        scores = tables.replace("\n#", "\n##").removeprefix("# Results").strip()
    limits = ""
    if dtype == "int8":
        limits = "- Matrices are rounded to 8 bits with one scale per row; the scores were measured before rounding.\n"
    limits += f"- Weights equal to those of `{base}` are not stored here and are loaded from there.\n" if base else ""
    return CARD.format(
        licence=licence,
        name=name,
        base_model=f"base_model: {public}\n" if public else "",
        stage=found["stage"],
        parts="\n".join(
            f"| {part} | {known['parameters']:,} | {dtype or known['dtype']} |"
            for part, known in found["parts"].items()
        ),
        decoder="" if public or "unet" in found["parts"] else ', "PATH OR ID OF ITS IMAGE DECODER"',
        training=training,
        scores=scores,
        limits=limits,
    )


def push(folder: str | Path, repository: str, private: bool = False) -> str:
    """Create the repository if it is not there, upload the folder; its address.

    Raises:
        ValueError: no token, or a base that others cannot read.
    """
    file = Path(folder) / PACKED
    base = read_record(file.parent)["base"] if file.is_file() else None
    if base and Path(base).is_dir():
        raise ValueError(f"the base '{base}' is a folder, which others do not have; push it first, and name its id.")
    if huggingface_hub.get_token() is None:
        raise ValueError("there is no token for the hub; run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    address = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="kosmosg push")
    return str(address)

"""Export a run or model as a folder with a model card, packed if requested (`models/packing.py`), and upload it."""

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

A [KOSMOS-G](https://arxiv.org/abs/2310.02992) checkpoint ({stage}). It generates images from prompts that contain text
and images, by conditioning an image decoder.

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

- It works best with prompts like those it was trained on. It inherits the limits and biases of its image decoder, and
  its outputs are not filtered.
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
    """Write `folder` with the model of `source` and a model card; `KosmosGPipeline.from_pretrained` loads it.

    Args:
        source: folder of a run, a model or a pipeline.
        name: model name in the card; by default the name of `source`.
        dtype, base: see `pack`.
        evaluation: folder of a finished evaluation, whose tables are copied into the card.

    Raises:
        ValueError: `folder` exists, or `dtype` or `base` is not allowed.
        FileNotFoundError: `source` has no model, or `evaluation` no results.
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
    if decoder and (Path(decoder).exists() or "$" in decoder):
        decoder = None  # a local folder, which others cannot load
    with replaced(target) as temporary:
        pack(model, temporary, dtype, base)
        if decoder:
            write_text(temporary / RUN_CONFIG, yaml.safe_dump({"model": {"image_decoder": decoder}}))
        text = card(source, name or Path(source).name, licence, run, decoder, dtype, base, results)
        write_text(temporary / "README.md", text)


def card(
    source: str | Path,
    name: str,
    licence: str,
    run: dict[str, Any],
    decoder: str | None,
    dtype: str | None,
    base: str | None,
    results: Path | None,
) -> str:
    """Return the model card, which states only what the files record; `decoder` is a hub id."""
    model = inspect_model(source)
    training = "The training configuration was not recorded."
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
            "image decoder": decoder or "a local folder",
        }
        training = "\n".join([*(f"- {key}: {value}" for key, value in facts.items()), "- data:", *data])
    scores = "This checkpoint was not evaluated."
    if results is not None:
        tables = re.split(r"\n## (?:By |The paper)", results.read_text(encoding="utf-8"))[0]  # without breakdowns
        scores = tables.replace("\n#", "\n##").removeprefix("# Results").strip()
    limits = ""
    if dtype == "int8":
        limits = "- Matrices are rounded to 8 bits with one scale per row; the scores were measured before rounding.\n"
    limits += f"- Weights identical to those of `{base}` are not stored here but loaded from there.\n" if base else ""
    return CARD.format(
        licence=licence,
        name=name,
        base_model=f"base_model: {decoder}\n" if decoder else "",
        stage=model["stage"],
        parts="\n".join(
            f"| {name} | {part['parameters']:,} | {dtype or part['dtype']} |" for name, part in model["parts"].items()
        ),
        decoder="" if decoder or "unet" in model["parts"] else ', "PATH OR ID OF ITS IMAGE DECODER"',
        training=training,
        scores=scores,
        limits=limits,
    )


def push(folder: str | Path, repository: str, private: bool = False) -> str:
    """Upload a folder to a hub repository, which is created if necessary; returns its URL.

    Raises:
        ValueError: there is no token, or the base is a local folder.
    """
    file = Path(folder) / PACKED
    base = read_record(file.parent)["base"] if file.is_file() else None
    if base and Path(base).is_dir():
        raise ValueError(f"the base '{base}' is a local folder, which others do not have; push it and pass its id.")
    if huggingface_hub.get_token() is None:
        raise ValueError("no Hugging Face token found; run `hf auth login` or set HF_TOKEN.")
    api = HfApi()
    url = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="kosmosg push")
    return str(url)

"""MkDocs hook that generates the page of all configuration keys from the schemas."""

import re

from mkdocs.structure.files import File, Files

from evaluation.config import EvaluationConfig
from kosmosg.config import describe_schema
from train import STAGES

LINE = re.compile(r"(?P<key>[\w.]+): (?P<kind>.+?)(?: = (?P<default>.+?))?  # (?P<text>.*)", re.DOTALL)
INTRODUCTION = """# Configuration keys

Every argument of `train.py` and `evaluate.py` is a YAML file or `key=value`; later arguments override earlier ones. Add
`--help` to a file to print this list. A key without a default must be set.
"""


def on_files(files: Files, config) -> Files:
    schemas = {f"train.py, stage: {name}": schema for name, schema in STAGES.items()} | {
        "evaluate.py": EvaluationConfig
    }
    tables = [f"\n## {title}\n\n{table(schema)}" for title, schema in schemas.items()]
    files.append(File.generated(config, "reference.md", content=INTRODUCTION + "".join(tables)))
    return files


def table(schema: type) -> str:
    """Return a Markdown table of the keys of a schema."""
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for line in re.split(r"\n(?=[\w.]+: )", describe_schema(schema)):
        if (match := LINE.fullmatch(line)) is None:
            raise ValueError(f"describe_schema returned a line that is not a key: {line!r}")
        kind, default, text = (
            " ".join((match[part] or "").split()).replace("|", "\\|") for part in ("kind", "default", "text")
        )
        rows.append(f"| `{match['key']}` | {kind} | {f'`{default}`' if default else ''} | {text} |")
    return "\n".join(rows) + "\n"

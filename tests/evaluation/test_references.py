"""The real side's features are computed once, and never taken for those of something else."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from evaluation.config import EvaluationConfig
from evaluation.images.references import KEYS, reference_features
from evaluation.protocols.coco import Coco
from evaluation.protocols.requests import read_image
from evaluation.run import evaluate
from evaluation.scores import encoders
from kosmosg.config import load_config

KEY = {"protocol": "coco/x@1#aaaa", "data": "d", "weights": "w", "n": "6"}


class Counted:
    """Computes features and counts how often."""

    def __init__(self, rows: int = 6):
        self.rows, self.calls = rows, 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return torch.randn(self.rows, 4, generator=torch.Generator().manual_seed(self.calls))


def test_the_same_key_reads_the_file(tmp_path: Path) -> None:
    compute = Counted()
    first = reference_features(tmp_path / "kept", KEY, compute, Console(quiet=True))
    second = reference_features(tmp_path / "kept", dict(KEY), compute, Console(quiet=True))
    assert compute.calls == 1 and torch.equal(first, second)
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["coco-x-1-aaaa.safetensors"], (
        "nothing half written"
    )


# The first names the same file, though it is another protocol.
@pytest.mark.parametrize(
    "changed", [{"protocol": "coco x 1 aaaa"}, {"data": "e"}, {"weights": "v"}, {"n": "5"}], ids=KEYS
)
def test_another_key_computes_anew(tmp_path: Path, changed: dict[str, str]) -> None:
    compute, console, other = Counted(), Console(record=True, width=200), {**KEY, **changed}
    reference_features(tmp_path, KEY, compute, console)
    compute.rows = int(other["n"])
    found = reference_features(tmp_path, other, compute, console)
    assert compute.calls == 2 and len(found) == int(other["n"])
    assert f"another {next(iter(changed))}" in console.export_text()
    assert torch.equal(reference_features(tmp_path, other, compute, console), found) and compute.calls == 2


def test_damaged_files_are_replaced(tmp_path: Path) -> None:
    compute, file = Counted(), tmp_path / "coco-x-1-aaaa.safetensors"
    file.write_bytes(b"half")
    found = reference_features(tmp_path, KEY, compute, Console(quiet=True))
    assert compute.calls == 1
    save_file({"features": found[:3]}, file, metadata=KEY)
    reference_features(tmp_path, KEY, compute, Console(quiet=True))
    assert compute.calls == 2, "fewer rows than the key says"
    save_file({"statistics": found}, file, metadata=KEY)
    reference_features(tmp_path, KEY, compute, Console(quiet=True))
    assert compute.calls == 3, "no features in it"


def test_second_evaluation_looks_at_no_reference(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def count(file: Path, **options):
        read.append(file)
        return read_image(file, **options)

    monkeypatch.setattr(encoders, "read_image", count)
    results = []
    for output in ("first", "second"):
        read.clear()
        config = load_config(
            [
                *arguments,
                "dreambench=null",
                "coco.kid={subsets: 5, subset_size: 4, seed: 0}",
                f"reference_features={tmp_path / 'kept'}",
                f"output={tmp_path / output}",
            ],
            EvaluationConfig,
        )
        references = set(Coco(config.protocols()["coco"], config.folder_of("coco")).references())
        evaluate(config, Console(quiet=True))
        assert (references <= set(read)) == (output == "first") and (references & set(read) == set()) == (
            output != "first"
        )
        assert read, "generated images are looked at both times"
        results.append(json.loads((tmp_path / output / "results.json").read_text()))
    assert results[0] == results[1]
    kid = [row for row in results[0] if row["metric"] == "kid"]
    assert len(kid) == 4 and all(row["low"] < row["value"] < row["high"] and row["n"] == 6 for row in kid)
    page, table = ((tmp_path / "second" / name).read_text() for name in ("report.html", "results.md"))
    assert "KID ↓" in page and "KID ↓" in table and "the mean over 5 subsets of 4 images" in table

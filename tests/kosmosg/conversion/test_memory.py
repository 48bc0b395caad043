"""The benchmark at a small size: parts are in memory one at a time."""

import json

import pytest

from benchmarks.convert_memory import main
from tests.conftest import REPOSITORY

SIZES = """
extends: [model/toyland]
model:
  mllm: {width: 768, heads: 12, layers: 5, ffn_width: 3072}
  aligner: {ffn_width: 40960}
"""
SLACK = 40 * 2**20  # what the conversion itself and the unpickled names take


@pytest.mark.slow
def test_parts_are_in_memory_one_at_a_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "sizes.yaml").write_text(SIZES)
    command = ["--config", str(tmp_path / "sizes.yaml")]
    command += ["--decoder", "datamodules/toyland/weights/stable-diffusion", "--folder", str(tmp_path)]
    command += ["--vocabulary", "8000", "--dtype", "float32"]  # twice as wide as what is read
    assert main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 2 * figures["checkpoint_bytes"] > 1.8 * figures["largest_part_bytes"]  # else nothing would be shown
    assert figures["peak_bytes"] - figures["libraries_bytes"] < 1.3 * figures["largest_part_bytes"] + SLACK

"""The benchmark at a small size: parts are in memory one at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
SIZES = """
extends: [model/toyland]
model:
  mllm: {width: 1024, heads: 16, layers: 5, ffn_width: 4096}
  aligner: {ffn_width: 65536}
"""
SLACK = 40 * 2**20  # what the conversion itself and the unpickled names take


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_parts_are_in_memory_one_at_a_time(tmp_path, dtype):
    (tmp_path / "sizes.yaml").write_text(SIZES)
    command = [sys.executable, "benchmarks/convert_memory.py", "--config", str(tmp_path / "sizes.yaml")]
    command += ["--decoder", "datamodules/toyland/weights/stable-diffusion", "--folder", str(tmp_path)]
    command += ["--vocabulary", "8000", *(["--dtype", dtype] if dtype else [])]
    done = subprocess.run(command, cwd=REPOSITORY, env={"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    written = figures["checkpoint_bytes"] * (2 if dtype else 1)
    assert written > 1.8 * figures["largest_part_bytes"]  # else nothing would be shown
    assert figures["peak_bytes"] - figures["libraries_bytes"] < 1.3 * figures["largest_part_bytes"] + SLACK

"""Runs last: nothing that was recorded is left uncompared, and the reduced set is the whole one's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.conftest import Recording


def test_every_recorded_output_is_compared(recording, request):
    here = Path(__file__).parent
    ran = {Path(item.path).name for item in request.session.items if Path(item.path).parent == here}
    if request.config.option.keyword or ran != {path.name for path in here.glob("test_*.py")}:
        pytest.skip("only a run of all of tests/parity compares everything")
    assert set(recording.outputs) - recording.outputs.asked == set()


def test_the_reduced_set_is_part_of_the_whole(recorded, golden):
    ours, whole = Recording(recorded), Recording(golden)
    for name in ("config", "facts"):
        assert getattr(ours, name) == getattr(whole, name)
    for name in ("inputs", "outputs"):
        theirs = getattr(whole, name)
        assert all(torch.equal(tensor, dict.__getitem__(theirs, key)) for key, tensor in getattr(ours, name).items())
    states = {checkpoint: whole.state(checkpoint) for checkpoint in ("final", "stage2")}
    for name, tensor in load_file(recorded / "weights.safetensors").items():
        theirs = states["final"].get(name, states["stage2"].get(name))
        assert torch.equal(tensor, theirs[: len(tensor)] if tensor.dim() else theirs), name
    for name in ("adam_steps.safetensors", "optim.json", "image_2.png"):
        assert (recorded / "data" / name).read_bytes() == (golden / "data" / name).read_bytes()

"""Runs last: nothing that was recorded is left uncompared."""

from pathlib import Path

import pytest


def test_every_recorded_output_is_compared(recording, request):
    here = Path(__file__).parent
    ran = {Path(item.path).name for item in request.session.items if Path(item.path).parent == here}
    if request.config.option.keyword or ran != {path.name for path in here.glob("test_*.py")}:
        pytest.skip("only a run of all of tests/parity compares everything")
    assert set(recording.outputs) - recording.outputs.asked == set()

"""What `kosmosg data check` counts of every bad input is what training counts."""

from pathlib import Path

import pytest

from datamodules.checks.check import CheckConfig, check
from datamodules.images import Limits
from tests.datamodules.bad_inputs import DROPPED, FILTERED, USED
from tests.datamodules.test_bad_inputs import ALL, write_shard

READ = [bad for bad in ALL if bad.way in (DROPPED, FILTERED, USED) and not bad.during]


def test_dropped_is_what_training_drops(subtests: pytest.Subtests, tmp_path: Path) -> None:
    for number, bad in enumerate(READ):
        with subtests.test(bad.name):
            marker, folder = tmp_path / "marker", tmp_path / str(number)
            pattern = write_shard(bad, folder, marker)
            if bad.spoil is not None:
                pattern = bad.spoil(folder / "set-000000.tar", marker) or pattern
            found = check(pattern, CheckConfig(kind=bad.kind, processes=1, limits=Limits(max_member_bytes=120_000)))
            assert found.dropped == ({bad.reason: bad.count} if bad.way == DROPPED else {})
            assert not marker.exists()

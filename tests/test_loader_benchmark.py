"""The loader's benchmark measures what it says it does, on a few samples."""

import json

import pytest

from benchmarks import loader, shuffle
from benchmarks.__main__ import main
from kosmosg.config import ConfigError

SMALL = ["samples=10", "batches=2", "batch_size=3", "captions=60", "caption_batches=3", "memory_captions=3000"]


@pytest.mark.slow
@pytest.mark.parametrize("crops", ["png", "jpg"])
def test_the_loader_is_measured_beside_its_parts(crops, capsys):
    assert main(["loader", "--json", f"crops={crops}", *SMALL]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("ratio", "of_bare_decode", "of_decode_and_transforms"):
        assert 0 < result[name]["low"] <= result[name]["median"] <= result[name]["high"]
    assert result["of_bare_decode"]["median"] < result["of_decode_and_transforms"]["median"]
    assert sum(result["stage3_share_of_time"].values()) == pytest.approx(1)
    assert result["stage2_captions_per_second_and_core"] > 0 < result["stage2_share_of_tokenising"]
    assert result["memory"]["captions"] == 2048 and min(result["memory"]["resident_bytes"]) > 10**7
    loader.print_result(result)
    assert "captions a second" in capsys.readouterr().out


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="crops"):
        loader.measure(["crops=gif"])
    with pytest.raises(ConfigError, match="batches"):
        loader.measure(["batches=0"])


def test_the_shuffles_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(shuffle, "SIZES", (200,))
    monkeypatch.setattr(shuffle, "KEYS", 3)
    assert shuffle.main([]) == 0
    assert "correlation of neighbours" in capsys.readouterr().out

"""Files of others are read as data: what would run is refused by name, headers of known classes become plain."""

import argparse
import os
import pathlib
import pickle
import warnings

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from kosmosg.cli import main
from kosmosg.conversion import ConversionError, read_checkpoint

WEIGHTS = {"a": torch.ones(1)}


class Runs:
    """Unpickled by anything but a reader of data, it calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_code_is_not_run_and_is_named(tmp_path, capsys):
    for place in ["args", "cfg", "model", "extra_state"]:
        marker, path = tmp_path / "marker", tmp_path / "checkpoint.pt"
        for function, argument, name in ((os.system, f"touch {marker}", "posix.system"), (exec, "print('ran')", "exec"),
                                         (eval, f"open({str(marker)!r}, 'w')", "eval")):  # fmt: skip
            torch.save({"model": WEIGHTS, **{place: {"a": Runs(function, argument)}}}, path)
            assert main(["convert", str(path), str(tmp_path / "out")]) == 2
            assert main(["inspect", str(path)]) == 2
            told = capsys.readouterr()
            assert told.err.count(f"names {name},") == 2 and told.err.count(str(path)) == 2
            assert "Traceback" not in told.err and "ran" not in told.out.split()
        assert not marker.exists() and not (tmp_path / "out").exists()


VALUES = {"model": {"decoder_attention_heads": 4, "lr": [0.1, 2], "none": None, "on": True}, "name": "a", "x": 0.5}
OMEGACONF = OmegaConf.create(VALUES)
OmegaConf.set_struct(OMEGACONF, True)
NAMESPACE = argparse.Namespace(lr=(0.1,), best=np.float32(1.5), count=np.int64(-3), inner=argparse.Namespace(on=True))


def test_headers_become_plain_values(tmp_path):
    """Classes of headers are stand-ins: not even their own constructors run."""
    for name, header, expected in (
        ("cfg", OMEGACONF, VALUES),
        ("args", NAMESPACE, {"lr": [0.1], "best": 1.5, "count": -3, "inner": {"on": True}}),
        ("args", {"path": pathlib.PosixPath("/etc"), "list": Runs(list, "abc")}, {"path": None, "list": None}),
    ):
        torch.save({"args": None, name: header, "model": WEIGHTS}, tmp_path / "checkpoint.pt")
        assert read_checkpoint(tmp_path / "checkpoint.pt")[name] == expected


def test_headers_without_end(tmp_path):
    header = {}
    header["self"] = header
    torch.save({"args": header, "model": WEIGHTS}, tmp_path / "checkpoint.pt")
    with pytest.raises(ConversionError, match="nested too deeply"):
        read_checkpoint(tmp_path / "checkpoint.pt")


def test_files_older_than_archives(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pt")["model"]["a"], WEIGHTS["a"])


def test_torchscript_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / "ViT-L-14.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(ConversionError, match=r"TorchScript archive.*torch\.jit\.load.*state_dict"):
        read_checkpoint(path)


def test_a_raw_pickle_is_named_and_never_unpickled(tmp_path, capsys):
    for protocol in range(6):
        for content in [{"model": WEIGHTS}, {"model": {"a": [1.0]}}, np.ones(3), Runs(print, "ran")]:
            path = tmp_path / "checkpoint.pt"
            path.write_bytes(pickle.dumps(content, protocol))
            assert main(["convert", str(path), str(tmp_path / "out")]) == 2
            told = capsys.readouterr()
            assert told.err.startswith(f"kosmosg: '{path}' is ") and "weights_only" not in told.err and told.out == ""
            assert protocol < 2 or "is a raw pickle" in told.err


def test_what_torch_cannot_read_is_told_without_its_advice(tmp_path):
    for name, content in (("nested", {"model": {"a": {1, frozenset()}}}), ("complex", {"a": complex(1, 2)})):
        torch.save(content, tmp_path / name)
        with pytest.raises(ConversionError) as error:
            read_checkpoint(tmp_path / name)
        assert "weights_only" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_other_files(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match=r"no file '.*checkpoint\.pt'"):
        read_checkpoint(path)
    torch.save({"model": {"a": torch.randn(1000)}}, path)
    whole = path.read_bytes()
    for content in (whole[:-200], whole[:100], b"", b"no weights at all", os.urandom(500)):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=r"checkpoint\.pt' is"):
            read_checkpoint(path)
    for content in ({"weights": {}}, {"model": {"a": 1}}, [1], torch.ones(2)):
        torch.save(content, path)
        with pytest.raises(ConversionError, match="no mapping 'model'"):
            read_checkpoint(path)

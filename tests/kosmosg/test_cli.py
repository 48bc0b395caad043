"""The command line: quick help, mistakes in one line, exit status."""

import json
import subprocess
import sys

import pytest

from kosmosg import cli
from kosmosg.cli import COMMANDS, main
from tests import tiny
from tests.conftest import REPOSITORY


def test_help_does_not_load_torch():
    code = (
        "import sys\nfrom kosmosg.cli import main\n"
        f"for arguments in {[[], *([name] for name in COMMANDS)]}:\n"
        "    try:\n        main([*arguments, '--help'])\n"
        "    except SystemExit as done:\n        assert done.code == 0\n"
        "assert not {'torch', 'transformers', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: kosmosg {name}" in done.stdout for name in COMMANDS) and "commands" in done.stdout


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "no.pt"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr() == ("", f"kosmosg: there is no file '{tmp_path / 'no.pt'}'.\n")
    for arguments in ([], ["translate"], ["convert"], ["convert", "a", "b", "--dtype", "int8"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 2 and "usage: kosmosg" in capsys.readouterr().err


def test_interruptions(monkeypatch, capsys, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kosmosg.conversion.inspect_model", interrupt)
    assert main(["inspect", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "kosmosg: interrupted.\n"


def test_there_and_back(tmp_path, tiny_model, capsys):
    assert main(["export", str(tiny_model), str(tmp_path / "model.pt")]) == 0
    assert "final: mllm (" in capsys.readouterr().out
    words = [str(tiny_model / "tokenizer" / name) for name in ("sentencepiece.bpe.model", "dict.txt")]
    arguments = ["convert", str(tmp_path / "model.pt"), str(tmp_path / "out"), "--spm", words[0], "--dict", words[1]]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "mllm.heads: 2, from the header" in told and "no pipeline yet" in told and "left out: gpt_model" in told
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--dtype", "float16"]) == 0
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["parts"]["mllm"]["dtype"] == "float16"
    assert json.loads((tmp_path / "out/mllm/config.json").read_text())["width"] == tiny.WIDTH


def test_a_command_is_one_line_of_the_table(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shout", type(sys)("shout", "Shout a word.\n"))
    sys.modules["shout"].add_arguments = lambda parser: parser.add_argument("word")
    sys.modules["shout"].run = lambda arguments: print(arguments.word.upper()) or 0
    monkeypatch.setitem(cli.COMMANDS, "shout", "shout")
    assert main(["shout", "yes"]) == 0 and capsys.readouterr().out == "YES\n"

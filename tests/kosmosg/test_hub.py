"""`kosmosg push`: what is written loads as what it was made of, and is sent as it was written; no network."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file

from kosmosg import hub
from kosmosg.cli import main
from kosmosg.models.packing import PACKED, SCALE
from kosmosg.pipeline import KosmosGPipeline

DOG = Image.new("RGB", (64, 64), "sienna")


@pytest.fixture
def run(tiny_model, tmp_path):
    """A finished run whose model is the tiny one."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_model)
    data = {"constructed": {"shards": "data/train.tar", "weight": 3}, "edit": {"shards": "", "weight": 1}, "seed": 0}
    settings = {
        "stage": "instruction_tuning",
        "seed": 7,
        "model": {"image_decoder": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
        "data": data,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "finished.json").write_text('{"step": 600}')
    return folder


def condition(folder):
    """What a folder's MLLM and AlignerNet make of a prompt."""
    absent = dict.fromkeys(("unet", "transformer", "vae", "scheduler"))
    return KosmosGPipeline.from_pretrained(folder, **absent).encode_prompt("<i> in the snow", [DOG])[0]


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def export(source, folder, *options):
    return main(["push", str(source), "--license", "mit", "--output", str(folder), *map(str, options)])


def test_the_card_says_what_the_files_say(run, tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.md").write_text(
        "# Results\n\n## Subjects\n\nProtocol `dreambench/toyland@4#81`.\n\n## By template\n"
    )
    assert export(run, tmp_path / "plain", "--evaluation", tmp_path / "evaluation", "--dtype", "float16") == 0
    card = (tmp_path / "plain" / "README.md").read_text()
    for line in (
        "license: mit",
        "base_model: stable-diffusion-v1-5/stable-diffusion-v1-5",
        "- steps: 600",
        "- seed: 7",
        "  - constructed, weight 3",
        "Protocol `dreambench/toyland@4#81`",
        "| float16 |",
    ):
        assert line in card
    assert "edit" not in card and "By template" not in card and "{" not in card
    settings = yaml.safe_load((tmp_path / "plain" / "config.yaml").read_text())
    assert settings == {"model": {"image_decoder": "stable-diffusion-v1-5/stable-diffusion-v1-5"}}
    assert export(run, tmp_path / "plain") == 2 and export(run, tmp_path / "plain", "--overwrite") == 0
    assert "This checkpoint was not evaluated" in (tmp_path / "plain" / "README.md").read_text()


def test_smaller_folders_load_as_the_model(run, tiny_model, tmp_path, monkeypatch):
    expected, plain = condition(tiny_model), size(tiny_model)
    for dtype, share, tolerance in (("float32", 1.01, 0), ("float16", 0.55, 5e-3), ("int8", 0.4, 5e-2)):
        folder = tmp_path / dtype
        assert export(run, folder, "--dtype", dtype) == 0
        assert size(folder) < share * plain
        error = (condition(folder) - expected).norm() / expected.norm()
        assert error <= tolerance and (dtype == "float32" or error > 0)
    monkeypatch.setattr("kosmosg.pipeline.snapshot_download", lambda name, **_: str(tmp_path / name.split("/")[1]))
    assert torch.equal(condition("owner/int8"), condition(tmp_path / "int8"))  # by id, as if it were on the hub
    assert (tmp_path / "int8" / PACKED).is_file() and not (tmp_path / "float16" / PACKED).exists()


def test_what_the_base_has_is_left_out_and_another_base_is_refused(run, tiny_model, tmp_path):
    changed, base = tmp_path / "changed", tmp_path / "base"
    pipeline = KosmosGPipeline.from_pretrained(tiny_model, unet=None, transformer=None, vae=None, scheduler=None)
    pipeline.model.save_pretrained(base, tokenizer=pipeline.tokenizer)
    with torch.no_grad():
        next(pipeline.aligner.parameters()).add_(0.1)
    pipeline.model.save_pretrained(changed, tokenizer=pipeline.tokenizer)
    assert export(changed, tmp_path / "small", "--base", base) == 0
    assert size(tmp_path / "small") < 0.1 * size(changed)
    assert torch.equal(condition(tmp_path / "small"), condition(changed))
    assert not torch.equal(condition(changed), condition(base))
    with torch.no_grad():
        next(pipeline.mllm.parameters()).add_(0.1)
    pipeline.model.save_pretrained(base, tokenizer=pipeline.tokenizer)
    with pytest.raises(ValueError, match="has changed since"):
        condition(tmp_path / "small")
    with pytest.raises(ValueError, match="a local folder, which others do not have"):
        hub.push(tmp_path / "small", "owner/name")


def test_a_damaged_folder_is_refused_by_name(run, tiny_model, tmp_path):
    small, rounded = tmp_path / "small", tmp_path / "rounded"
    assert export(run, small, "--base", tiny_model) == 0 and export(run, rounded, "--dtype", "int8") == 0
    record = json.loads((small / PACKED).read_text())
    weights = "aligner/diffusion_pytorch_model.safetensors"
    for damaged, message in (
        ('{"base"', "is not JSON"),
        (b"\xff", "is not JSON"),
        ([], "left_out is None; allowed: an object of lists"),
        ({**record, "left_out": [weights]}, "left_out is .'aligner/"),
        ({**record, "left_out": {weights: "abc"}}, "left_out is {'aligner/"),
        ({**record, "left_out": {weights: [1]}}, "left_out is {'aligner/"),
        ({**record, "left_out": {"../x.safetensors": ["a"]}}, "left_out has '../x.safetensors'; allowed: aligner/"),
        ({**record, "left_out": {**record["left_out"], weights: ["absent"]}}, "names 'absent' of 'aligner/"),
        ({**record, "base": None}, "base is None; allowed: text"),
        ({**record, "base_fingerprint": 3}, "base_fingerprint is 3; allowed: text"),
    ):
        text = damaged if isinstance(damaged, str | bytes) else json.dumps(damaged)
        (small / PACKED).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=f"'{small / PACKED}'.*{message}"):
            condition(small)
    whole = load_file(rounded / weights)
    scale = next(name for name in whole if name.endswith(SCALE))
    matrix = scale.removesuffix(SCALE)
    for damaged, message in (
        ({scale: whole[scale][:1].clone()}, f"{matrix} is torch.int8 of .* with scales .1.; allowed"),
        ({matrix: whole[matrix].float()}, f"{matrix} is torch.float32 of"),
        ({matrix: whole[matrix][:, :1].clone()}, "expected shape .*, but got"),
        ({"absent": whole[scale] + 1}, "1 unexpected_keys"),
    ):
        save_file(whole | damaged, rounded / weights)
        with pytest.raises(ValueError, match=f"'{rounded}/aligner.*{message}"):
            condition(rounded)


def test_mistakes_are_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for words, message in (
        ((run, "owner/name"), "no Hugging Face token found"),
        ((run,), "give either OWNER/NAME"),
        ((run, "owner/name", "--output", tmp_path / "out"), "give either OWNER/NAME"),
        ((run, "--output", tmp_path / "out", "--dtype", "int4"), "dtype='int4' is not allowed; allowed: float32"),
        ((run, "--output", run), "exists; --overwrite replaces"),
        ((run, "--output", tmp_path / "out", "--evaluation", tmp_path), "holds no results.md"),
        ((tmp_path, "--output", tmp_path / "out"), "holds no model"),
    ):
        assert main(["push", *map(str, words), "--license", "mit"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_sent_is_what_was_written(run, tmp_path, monkeypatch):
    """To an endpoint on loopback that takes commits."""
    received, created = {}, []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.headers["Authorization"] == "Bearer secret"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = {"url": f"{address}/owner/name", "commitUrl": f"{address}/owner/name/commit/1", "commitOid": "1"}
            if self.path == "/api/repos/create":
                created.append(json.loads(body))
            elif "/preupload/" in self.path:
                files = [{**file, "uploadMode": "regular"} for file in json.loads(body)["files"]]
                answer = {"files": [{**file, "shouldIgnore": False} for file in files]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(answer)

        def do_GET(self):
            self.answer({"id": "owner/name", "sha": "1", "siblings": []})

        def answer(self, values):
            content = json.dumps(values).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=address, token="secret"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        assert main(["push", str(run), "owner/name", "--license", "mit", "--private"]) == 0
    finally:
        server.shutdown()
    assert (created[0]["organization"], created[0]["name"]) == ("owner", "name")
    assert created[0]["visibility"] == "private"
    assert export(run, tmp_path / "written") == 0
    files = [file for file in (tmp_path / "written").rglob("*") if file.is_file() and file.name != "README.md"]
    assert {
        str(file.relative_to(tmp_path / "written")): file.read_bytes() for file in files
    }.items() <= received.items()
    assert b"# owner/name" in received["README.md"] and len(received) == len(files) + 1

"""The full-size tokenizers of the reference data, the released loaders' records, and a web server of shards."""

import gzip
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kosmosg.image_processing import ClipImageTransform
from kosmosg.prompt import PromptEncoder
from kosmosg.tokenizer import Tokenizer
from tests.datamodules import worlds


def full_clip_tokenizer(merges: Path) -> CLIPTokenizer:
    lines = gzip.decompress(merges.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    pairs = [tuple(line.split()) for line in lines]
    names = list(bytes_to_unicode().values())
    names += [name + "</w>" for name in names] + ["".join(pair) for pair in pairs]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=pairs, model_max_length=77)


@pytest.fixture(scope="module")
def full_clip(golden: Path) -> Callable[[list[str]], torch.Tensor]:
    merges = golden.parent / "tokenizer" / "clip_bpe_simple_vocab_16e6.txt.gz"
    if not merges.is_file():
        pytest.skip(f"CLIP's merges are not at '{merges}'")
    tokenizer = full_clip_tokenizer(merges)

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor(tokenizer(texts, padding="max_length", truncation=True, max_length=77).input_ids)

    return tokenize


@pytest.fixture(scope="module")
def loaders(golden: Path) -> dict:
    return json.loads((golden / "data" / "loaders.json").read_text())


@pytest.fixture(scope="module")
def full_encoder(golden: Path, loaders: dict) -> PromptEncoder:
    folder = golden.parent / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"the full-size tokenizer is not at '{folder}'")
    tokenizer = Tokenizer(folder / "sentencepiece.bpe.model", folder / "dict.txt")
    return PromptEncoder(tokenizer, ClipImageTransform(224), loaders["image_token_length"])


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are forked where the command spawns them, which takes seconds: what they do is what matters here."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("multiprocessing.get_context", lambda method: fork)


@dataclass
class Server:
    """A web server over a folder that counts requests and does as it is told instead of answering."""

    folder: Path
    address: str = ""
    requests: list[str] = field(default_factory=list)
    fails: Callable[[str, int], bool] = lambda path, number: False
    stalls: Callable[[str, int], bool] = lambda path, number: False

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(request.path)
        number, file = self.requests.count(request.path), self.folder / unquote(request.path.lstrip("/"))
        if self.fails(request.path, number):
            return request.send_error(503)
        if not file.is_file():
            return request.send_error(404)
        content = file.read_bytes()
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            if self.stalls(request.path, number):
                request.wfile.write(content[: len(content) // 2])
                time.sleep(30)
            request.wfile.write(content)

    def shards(self) -> list[str]:
        """Paths of the shards that were asked for."""
        return [path for path in self.requests if path.endswith(".tar")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Over 26 shards of ten captions each."""
    server = Server(tmp_path / "served")
    worlds.write(server.folder, "captions", worlds.captions(260), per_shard=10)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads, listening.block_on_close = True, False
        server.address = f"http://127.0.0.1:{listening.server_address[1]}"
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        listening.shutdown()

"""The downloader against a server on this machine: hashes, retries, manners, resuming."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from datamodules.errors import DataError
from datamodules.sources.download import Download, Downloader
from datamodules.sources.download_config import DownloadConfig
from datamodules.sources.fetching import FetchError, Wanted, fetch, refuse_url
from datamodules.sources.image_store import url_name
from datamodules.sources.url_lists import wanted_images
from tests.datamodules.sources import published
from tests.datamodules.sources.test_conversion import convert


class Server(ThreadingHTTPServer):
    """Images by number, and paths that misbehave. `asked` counts requests, `agents` their User-Agents."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.asked[name] += 1
        self.server.agents.add(self.headers["User-Agent"])
        count, stem = self.server.asked[name], name.removesuffix("_o.jpg")
        if name == "gone":
            return self.answer(404)
        if name == "busy" and count == 1:
            return self.answer(503, headers={"Retry-After": "7"})
        if name == "broken":
            return self.answer(500)
        if name == "away":
            return self.answer(302, headers={"Location": "file:///etc/passwd"})
        if name == "moved":
            return self.answer(302, headers={"Location": "/3_o.jpg"})
        if name == "page":
            return self.answer(200, b"<html>not here</html>")
        if name == "shy":
            return self.answer(200, published.jpeg(1), {"X-Robots-Tag": "otherbot: noindex, noai"})
        if name == "large":
            return self.answer(200, b"\xff\xd8" + b"x" * 3_000_000)
        if name == "slow":
            time.sleep(1.0)
        return self.answer(200, published.jpeg(int(stem) if stem.isdigit() else 0, published.SIDE + 16))

    def answer(self, status: int, content: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client hangs up on what is too large or too slow
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def settings(**options) -> DownloadConfig:
    defaults = {"host_delay": 0, "private_addresses": True, "timeout": 5, "retries": 1, "max_bytes": 1_000_000}
    return DownloadConfig(**defaults | options)


def download(folder: Path, images: list[Wanted], **options) -> Download:
    return Downloader(folder, settings(**options), Console(quiet=True)).run(iter(images))


def test_a_list_is_fetched_checked_and_converted(server: Server, tmp_path: Path) -> None:
    rows = published.open_images_rows(6, server.url)
    rows[4]["OriginalMD5"] = rows[0]["OriginalMD5"]  # another picture stands there today
    rows[5]["OriginalURL"] = f"{server.url}/gone"
    file = published.open_images_list(tmp_path / "list.csv", rows)
    images = list(wanted_images("openimages", file, None))
    done = download(tmp_path / "images", images, user_agent="tester me@example.org")
    assert (done.listed, done.fetched, done.failed) == (6, 4, {"hash_mismatch": 1, "gone": 1})
    assert server.agents == {"tester me@example.org"}
    failures = [json.loads(line) for line in (tmp_path / "images/failures.jsonl").read_text().splitlines()]
    assert {(item["name"], item["reason"]) for item in failures} == {
        (f"{published.image_id(4)}.jpg", "hash_mismatch"),
        (f"{published.image_id(5)}.jpg", "gone"),
    }
    assert json.loads((tmp_path / "images/download.json").read_text())["failed"] == {"hash_mismatch": 1, "gone": 1}
    before = Counter(server.asked)
    again = download(tmp_path / "images", images)
    assert (again.there, again.known_dead, again.fetched) == (4, 2, 0) and server.asked == before
    assert download(tmp_path / "images", images, try_dead_again=True).failed == done.failed
    journal = convert("openimages", file, tmp_path / "out", f"store={tmp_path}/images")
    assert journal.samples == 4 and journal.counts["filtered"] == {"missing_image": 2}


@pytest.mark.parametrize(
    "path, reason, requests",
    [
        ("page", "not_an_image", 1),
        ("shy", "opted_out", 1),
        ("large", "too_large", 1),
        ("broken", "http_500", 2),
        ("away", "refused_url", 1),
        ("slow", "timeout", 2),
    ],
)
def test_failures_have_a_reason_and_passing_ones_are_tried_again(
    path: str, reason: str, requests: int, server: Server, tmp_path: Path
) -> None:
    done = download(tmp_path, [Wanted("a.jpg", f"{server.url}/{path}")], timeout=0.3)
    assert done.failed == {reason: 1} and server.asked[path] == requests
    assert not list(tmp_path.rglob("a.jpg"))
    failure = json.loads((tmp_path / "failures.jsonl").read_text())
    assert failure["for_good"] == (requests == 1)


def test_redirects_are_followed_and_opting_out_is_a_setting(server: Server, tmp_path: Path) -> None:
    images = [Wanted("a.jpg", f"{server.url}/moved"), Wanted("b.jpg", f"{server.url}/shy")]
    assert download(tmp_path, images, respect_opt_out=False).fetched == 2


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0)


def test_retry_after_is_kept(server: Server, tmp_path: Path) -> None:
    clock = Clock()
    images = [Wanted("a.jpg", f"{server.url}/busy"), Wanted("b.jpg", f"{server.url}/2_o.jpg")]
    loader = Downloader(tmp_path, settings(connections=1), Console(quiet=True), clock, clock.sleep)
    assert loader.run(iter(images)).fetched == 2 and clock.now >= 7
    done = download(tmp_path / "b", [Wanted("a.jpg", f"{server.url}/busy")], max_wait=3, retries=0)
    assert done.fetched == 1  # the server is no longer busy


def test_a_host_that_asks_for_too_long_a_rest_is_given_up(server: Server, tmp_path: Path) -> None:
    images = [Wanted(f"{i}.jpg", f"{server.url}/busy") for i in range(4)]
    done = download(tmp_path, images, max_wait=3, host_connections=1)
    assert done.failed == {"http_503": 1, "host_given_up": 3} and server.asked["busy"] == 1
    assert download(tmp_path, images).fetched == 4  # nothing of it was for good


def test_one_host_is_asked_at_its_pace(server: Server, tmp_path: Path) -> None:
    clock = Clock()
    images = [Wanted(f"{i}.jpg", f"{server.url}/{i}_o.jpg") for i in range(5)]
    loader = Downloader(tmp_path, settings(host_delay=3, connections=8), Console(quiet=True), clock, clock.sleep)
    loader.run(iter(images))
    assert clock.now >= 12


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.org/a", "http:///a", "pipe:ls", "http://[1/a", ""]
)
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(Wanted("a", url), settings(retries=0))
    assert caught.value.reason == "refused_url" and not caught.value.passing


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/a", "http://169.254.169.254/meta", "http://[::1]/a", "http://10.0.0.7"]
)
def test_private_addresses_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(FetchError, match="private address"):
        refuse_url(url, DownloadConfig())


def test_names_of_lists_give_plain_files(tmp_path: Path) -> None:
    names = ["ok.jpg", "../up.jpg", "a/b.jpg", "..x", ".lock", "x" * 300]
    info = [{"image_name": name, "raw_url": "http://example.org/a"} for name in names]
    published.write(tmp_path / "a.jsonl", published.jsonl([{"image_info": info}]) + "{\n[1]\n")
    assert [wanted.name for wanted in wanted_images("mmc4", tmp_path, None)] == ["ok.jpg"]
    published.write(tmp_path / "b/a.jsonl", published.jsonl(published.obelics_rows(1)))
    urls = ["https://example.org/0/a.jpg", "https://example.org/0/b.jpg"]
    assert list(wanted_images("obelics", tmp_path / "b", None)) == [Wanted(url_name(url), url) for url in urls]
    with pytest.raises(DataError, match="no list of layout 'laion'"):
        list(wanted_images("laion", tmp_path, None))


def test_fetched_images_are_found_by_their_url(server: Server, tmp_path: Path) -> None:
    rows = [{"images": [f"{server.url}/{i}_o.jpg", None], "texts": [None, "A fish."]} for i in range(3)]
    published.write(tmp_path / "docs/a.jsonl", published.jsonl(rows))
    images = list(wanted_images("obelics", tmp_path / "docs", None))
    assert download(tmp_path / "images", images).fetched == 3
    assert convert("obelics", tmp_path / "docs", tmp_path / "out", f"store={tmp_path}/images").samples == 3

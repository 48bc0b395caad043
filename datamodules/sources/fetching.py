"""One image by one URL: http and https alone, no private hosts, bounded in time and size, checked before it is kept."""

import base64
import email.utils
import hashlib
import io
import ipaddress
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from urllib.parse import urlsplit

from PIL import Image

from datamodules.images import FORMATS
from datamodules.sources.download_config import DownloadConfig

PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))
OPT_OUTS = frozenset(("noai", "noimageai", "noindex", "noimageindex"))
PIECE = 65536


class FetchError(Exception):
    """Why there is no image.

    Attributes:
        reason: short machine-readable name; counted by it.
        passing: whether it may be there later.
        wait: seconds that the host asks to be left alone.
    """

    def __init__(self, reason: str, detail: str, *, passing: bool = False, wait: float | None = None):
        super().__init__(detail)
        self.reason, self.detail, self.passing, self.wait = reason, detail, passing, wait


@dataclass(frozen=True)
class Wanted:
    """An image of a list.

    Attributes:
        name: of the file to write.
        md5: base64 of the content's MD5, as Open Images lists it; "" if unknown.
    """

    name: str
    url: str
    md5: str = ""

    @property
    def host(self) -> str:
        """To which the requests are counted."""
        try:
            return urlsplit(self.url).hostname or ""
        except ValueError:
            return ""


def fetch(wanted: Wanted, config: DownloadConfig) -> bytes:
    """The image's bytes.

    Raises:
        FetchError: with the reason: `refused_url`, `gone`, `http_NNN`, `timeout`, `unreachable`, `too_large`,
            `opted_out`, `hash_mismatch`, `not_an_image`.
    """
    opener = urllib.request.build_opener(_Checked(config))
    try:
        refuse_url(wanted.url, config)
        headers = {"User-Agent": config.user_agent, "Accept": "image/jpeg,image/png,image/webp"}
        with opener.open(urllib.request.Request(wanted.url, headers=headers), timeout=config.timeout) as answer:
            if config.respect_opt_out and _opted_out(answer.headers.get_all("X-Robots-Tag") or []):
                raise FetchError("opted_out", "X-Robots-Tag asks to be left out")
            content = _read(answer, config)
    except urllib.error.HTTPError as error:
        # What is left of redirects are those that urllib itself refuses: to a file, or in a circle.
        refused = "refused_url" if 300 <= error.code < 400 else f"http_{error.code}"
        reason = "gone" if error.code in (404, 410) else refused
        wait = _seconds(error.headers.get("Retry-After")) if error.headers else None
        raise FetchError(reason, str(error), passing=error.code in PASSING, wait=wait) from error
    except TimeoutError as error:
        raise FetchError("timeout", f"no answer in {config.timeout:g} s", passing=True) from error
    except urllib.error.URLError as error:
        timed_out = isinstance(error.reason, TimeoutError)
        raise FetchError("timeout" if timed_out else "unreachable", str(error.reason), passing=True) from error
    except (OSError, HTTPException) as error:
        raise FetchError("unreachable", f"{type(error).__name__}: {error}", passing=True) from error
    except ValueError as error:  # a URL that no request can be made of
        raise FetchError("refused_url", str(error)) from error
    _check(content, wanted)
    return content


def refuse_url(url: str, config: DownloadConfig) -> None:
    """Raises FetchError: another scheme than http and https, or a host in a private network."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("refused_url", f"{url!r:.200}: allowed are http and https")
    behind_proxy = parts.scheme in urllib.request.getproxies()
    if config.private_addresses or behind_proxy:  # behind one, names are resolved there
        return
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError("unreachable", f"{parts.hostname}: {error}", passing=True) from error
    for address in {item[4][0] for item in found}:
        if not ipaddress.ip_address(str(address).split("%")[0]).is_global:
            raise FetchError("refused_url", f"{parts.hostname} is {address}, a private address")


class _Checked(urllib.request.HTTPRedirectHandler):
    """Holds every redirect to what the first URL is held to; the schemes of ftp and file are never followed."""

    max_redirections = 5

    def __init__(self, config: DownloadConfig):
        self.config = config

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        refuse_url(newurl, self.config)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read(answer, config: DownloadConfig) -> bytes:
    begun, content = time.monotonic(), bytearray()
    while piece := answer.read1(PIECE):
        content += piece
        if len(content) > config.max_bytes:
            raise FetchError("too_large", f"more than {config.max_bytes} bytes")
        if time.monotonic() - begun > config.total_timeout:
            raise FetchError("timeout", f"not complete in {config.total_timeout:g} s", passing=True)
    expected = answer.headers.get("Content-Length", "")
    if expected.isdigit() and len(content) != int(expected):
        raise FetchError("unreachable", f"{len(content)} of {expected} bytes arrived", passing=True)
    return bytes(content)


def _check(content: bytes, wanted: Wanted) -> None:
    if wanted.md5:
        found = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        if found != wanted.md5:
            raise FetchError("hash_mismatch", f"MD5 {found}, listed {wanted.md5}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS):
            pass
    except Exception as error:  # hostile bytes make Pillow's decoders raise nearly anything
        raise FetchError("not_an_image", f"{type(error).__name__}: {content[:20]!r}") from error


def _opted_out(tags: list[str]) -> bool:
    words = {word.strip().lower() for tag in tags for word in tag.replace(":", ",").split(",")}
    return not OPT_OUTS.isdisjoint(words)


def _seconds(value: str | None) -> float | None:
    """Retry-After: seconds or a date."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None

"""As much of a W&B server as a run asks for at its start, and that can fall silent."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

VIEWER = {"id": "v", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "p", "name": "kosmosg", "entity": {"id": "e", "name": "me"}}
BUCKET = {"id": "b", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0, "project": PROJECT}
ANSWERS: dict[str, Any] = {  # by the name of the GraphQL operation
    "Viewer": {"viewer": VIEWER},
    "UpsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}},
    "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
    "RunResumeStatus": {"model": None},
}


class Handler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        asked = self.rfile.read(int(self.headers.get("content-length") or 0))
        found: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            query = json.loads(asked)["query"]
            found = {"data": next((answer for name, answer in ANSWERS.items() if name in query), {})}
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@contextmanager
def wandb_server() -> Iterator[ThreadingHTTPServer]:
    """A server in a thread; `shutdown()` and `server_close()` make it unreachable."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

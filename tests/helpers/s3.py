"""An S3 server on this machine that keeps a record of every request, and can be told to act up."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Request:
    """What was asked, and how many bytes went which way; `key` is the object's, "" for a listing."""

    method: str
    key: str
    ranged: bool
    copied: bool
    received: int
    sent: int


@dataclass
class Server:
    """The server. `hook` is called with each request's method and key; an HTTP status that it returns is the answer."""

    requests: list[Request] = field(default_factory=list)
    hook: Callable[[str, str], str | None] = lambda method, key: None

    def __post_init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def run(self) -> None:
        """Serve until the process ends."""
        self._server.serve_forever()

    def start(self) -> None:
        """Serve in a thread."""
        threading.Thread(target=self.run, daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ, start_response):
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix(f"/{BUCKET}").lstrip("/")
        if (status := self.hook(method, key)) is not None:
            start_response(status, [("Content-Length", "0")])
            return [b""]

        def started(status, headers, *rest):
            answered = 0 if method == "HEAD" else int(dict(headers).get("Content-Length", 0))
            copied = "HTTP_X_AMZ_COPY_SOURCE" in environ
            received = int(environ.get("CONTENT_LENGTH") or 0)
            self.requests.append(Request(method, key, "HTTP_RANGE" in environ, copied, received, answered))
            return start_response(status, headers, *rest)

        return self._app(environ, started)


class _Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_) -> None:
        """Say nothing."""


class Bucket:
    """The server's bucket, seen by Amazon's own client."""

    def __init__(self, url: str) -> None:
        self._client = boto3.client("s3", endpoint_url=url)
        self._client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def upload(self, directory: os.PathLike[str], prefix: str) -> None:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory)}", path.read_bytes())

    def remove(self, prefix: str) -> None:
        for key in self.contents(prefix):
            self._client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{key}")

    def contents(self, prefix: str) -> dict[str, bytes]:
        """The objects below a prefix, by name there."""
        found = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
        keys = [entry["Key"] for entry in found]
        return {
            key.removeprefix(f"{prefix}/"): self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            for key in keys
        }

    def buckets(self) -> list[str]:
        return [bucket["Name"] for bucket in self._client.list_buckets()["Buckets"]]

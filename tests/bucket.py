"""Google Cloud Storage on loopback: gcp-storage-emulator, with what the tests need and it lacks.

It ignores ``ifGenerationMatch``, on which locks depend, sends no generation with a file, cannot store empty files,
drops a carriage return at the end of a file, and stores the part of an upload whose client was killed; Google Cloud
Storage does none of these. Here each request passes `Emulator.handle`, which also lets a test count requests, refuse
them, or kill the client.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from functools import partial
from http import HTTPStatus
from http.server import HTTPServer
from typing import Any

import fsspec.config
import pytest

NAME = "bucket"


class Emulator:
    """A running emulator with one bucket.

    Attributes:
      port: where it listens on 127.0.0.1.
      before: called with the method and the object's name before each request is carried out; False refuses it.
    """

    def __init__(self) -> None:
        from gcp_storage_emulator import server  # pyright: ignore[reportMissingImports]
        from gcp_storage_emulator.handlers.buckets import create_bucket  # pyright: ignore[reportMissingImports]
        from gcp_storage_emulator.storage import Storage  # pyright: ignore[reportMissingImports]

        self.before: Callable[[str, str], bool | None] = lambda method, name: None
        self.storage: Any = Storage(use_memory_fs=True)
        create_bucket(NAME, self.storage)
        emulator = self

        class Handler(server.RequestHandler):
            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

        server.HANDLERS = tuple(
            (path, {method: partial(emulator.handle, one) for method, one in handlers.items()})
            for path, handlers in server.HANDLERS
        )
        server._read_raw_data = _whole(server._read_raw_data)
        server.BytesParser = _ExactParser
        handler: Any = Handler
        self._http = HTTPServer(("127.0.0.1", 0), lambda *args: handler(self.storage, *args))
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def handle(self, handler: Callable[..., None], request: Any, response: Any, storage: Any) -> None:
        """Carry out a request, if its expected generation is the object's. Requests come one after the other."""
        data = request.data
        about = data.get("meta", data) if isinstance(data, dict) else {}
        name = request.params.get("object_id") or request.query.get("name", [about.get("name", "")])[0]
        expected = request.query.get("ifGenerationMatch")
        if self.before(request.method, name) is False:
            response.status = HTTPStatus.SERVICE_UNAVAILABLE
        elif name and expected and self.generation(name) != expected[0]:
            response.status = HTTPStatus.PRECONDITION_FAILED
        else:
            if data is None and request.method == "POST":
                request._data = b""
            handler(request, response, storage)
            if name and request.method == "GET":
                response["x-goog-generation"] = self.generation(name)

    def generation(self, name: str) -> str:
        """The generation of an object; 0 if there is none."""
        from gcp_storage_emulator.exceptions import NotFound  # pyright: ignore[reportMissingImports]

        try:
            return str(self.storage.get_file_obj(NAME, name)["generation"])
        except NotFound:
            return "0"

    def names(self, prefix: str = "") -> set[str]:
        """The names of all objects below a folder, relative to it."""
        objects, _ = self.storage.get_file_list(NAME, prefix=prefix)
        return {one["name"].removeprefix(prefix).lstrip("/") for one in objects}

    @property
    def environment(self) -> dict[str, str]:
        """What points gcsfs, google-cloud-storage and tensorstore here."""
        url = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GCS": '{"token": "anon"}',
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC for the kind of bucket
        }


def emulator() -> Iterator[Emulator]:
    """The emulator, with this process's environment pointing to it."""
    for package in ("gcp_storage_emulator", "gcsfs"):  # gcsfs reads the environment when it is imported
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    found = Emulator()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield found
    found.close()


class _ExactParser:
    """The parser of uploads in parts, for lines that end in a line feed alone, as gcsfs writes them: email's takes a
    carriage return at the end of a file for a part of the line's end."""

    def parsebytes(self, data: bytes) -> Any:
        message: Any = BytesParser().parsebytes(data)
        boundary = f"--{message.get_boundary()}".encode()
        if message.get_content_type() == "multipart/related" and boundary + b"\n" in data:
            part = data.split(b"\n" + boundary)[-2]
            content = part.partition(b"\n\n")[2]
            message.get_payload()[1].get_payload = lambda decode: content
        return message


def _whole(read: Callable[[Any], bytes | None]) -> Callable[[Any], bytes | None]:
    """``read``, with an error for a body that ends early, because its sender was killed."""

    def read_whole(handler: Any) -> bytes | None:
        found = read(handler)
        if len(found or b"") < int(handler.headers.get("Content-Length") or 0):
            raise ConnectionError("the client is gone")
        return found

    return read_whole

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """A web server as it comes with Python: whole files only, the time of their last change, and no etags."""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which a web server shows it."""
    folder = tmp_path / "site"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(WholeFiles, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

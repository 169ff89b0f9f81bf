"""How documents in buckets are asked for: in which region, as whom; and what disks do that are full or closed."""

import errno
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stsr_core.catalog import documents as module
from stsr_core.catalog.documents import Documents
from stsr_core.errors import PublicationError
from stsr_core.settings import Settings

SIGNED = re.compile(r"Credential=(?P<key>[^/]+)/\d+/(?P<region>[^/]+)/s3/")


@pytest.fixture
def signatures():
    """Address of a server that knows no object, and the Authorization headers that it got."""
    got = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self):
            got.append(self.headers["Authorization"])
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


@pytest.fixture
def asked(signatures, monkeypatch, tmp_path):
    """Ask for a document with the settings and the environment given; returns key and region of the signature."""
    endpoint, got = signatures
    (tmp_path / "config").write_text("[profile night]\nregion = eu-north-1\n")
    (tmp_path / "credentials").write_text("[night]\naws_access_key_id = owl\naws_secret_access_key = s\n")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def ask(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert Documents("s3://bucket", Settings(s3_endpoint=endpoint).s3_options).fetch("a.json") is None
        found = SIGNED.search(got[-1] or "")
        return found and (found["key"], found["region"])

    return ask


KEYS = {"STSR_S3_ACCESS_KEY_ID": "day", "STSR_S3_SECRET_ACCESS_KEY": "s"}


@pytest.mark.parametrize(
    ("environment", "signed"),
    [
        (KEYS, ("day", "us-east-1")),
        ({**KEYS, "AWS_DEFAULT_REGION": "eu-west-3"}, ("day", "eu-west-3")),
        ({**KEYS, "AWS_REGION": "eu-west-2"}, ("day", "eu-west-2")),
        ({**KEYS, "AWS_DEFAULT_REGION": "eu-west-3", "STSR_S3_REGION": "eu-west-1"}, ("day", "eu-west-1")),
        ({**KEYS, "AWS_PROFILE": "night"}, ("day", "eu-north-1")),
        ({"AWS_PROFILE": "night"}, ("owl", "eu-north-1")),
        ({"STSR_S3_ANONYMOUS": "true"}, None),
    ],
)
def test_region_and_keys_come_from_settings_else_from_the_environment_or_a_profile(asked, environment, signed):
    assert asked(**environment) == signed


def test_a_profile_that_is_not_there_is_an_error_that_says_so(asked):
    with pytest.raises(PublicationError, match=r"profile \(day\) could not be found.*Check address, credentials"):
        asked(AWS_PROFILE="day")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_to_be_full_and_gets_no_empty_file_at_each_try(tmp_path, monkeypatch, number):
    documents = Documents(str(tmp_path))
    documents.create("a.json", {})
    _, tag = documents.read("a.json")

    def fill(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fill)
    for write in (lambda: documents.replace("a.json", {"n": 1}, tag), lambda: documents.write("b.json", b"b")):
        with pytest.raises(PublicationError, match=rf"{os.strerror(number)}\). Free some MB"):
            write()
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "a.json"}
    assert documents.read("a.json") == ({}, tag)


@pytest.mark.parametrize(
    ("closed", "read"),
    [
        ("read_bytes", lambda documents: documents.read("a.json")),
        ("iterdir", lambda documents: documents.names("")),
        ("stat", lambda documents: documents.files("a.json")),
    ],
)
def test_what_may_not_be_read_is_an_error_that_says_so(tmp_path, monkeypatch, closed, read):
    documents = Documents(str(tmp_path))
    documents.create("a.json", {})

    def refuse(path, **_):  # whoever runs tests may read everything, whatever its mode
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, closed, refuse)
    with pytest.raises(PublicationError, match=rf"{tmp_path}.* cannot be read \(Permission denied\). Check its owner"):
        read(documents)


def test_a_folder_in_place_of_a_document_is_an_error_and_nothing_there_is_none(tmp_path):
    (tmp_path / "a.json").mkdir()
    (tmp_path / "file").write_text("")
    documents = Documents(str(tmp_path))
    with pytest.raises(PublicationError, match=r"a.json cannot be read \(Is a directory\)"):
        documents.read("a.json")
    assert documents.read("b.json") is None
    assert documents.read("file/b.json") is None
    assert documents.names("b") == []


@pytest.fixture
def slow_server():
    """Address of a server that sends /slow for 2 s, a byte at a time, and nothing of /silent."""

    class Slow(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "20")
            self.end_headers()
            for _ in range(20):
                time.sleep(0.1 if self.path == "/slow" else 30)
                self.wfile.write(b"x")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_server_that_is_slow_is_waited_for_and_one_that_is_silent_is_given_up(slow_server, monkeypatch):
    monkeypatch.setattr(module, "SILENCE_S", 1.0)
    assert Documents(slow_server).fetch("slow")[0] == 20 * b"x"
    began = time.monotonic()
    with pytest.raises(PublicationError, match="cannot be used"):
        Documents(slow_server).fetch("silent")
    assert time.monotonic() - began < 25

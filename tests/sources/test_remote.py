import pytest

from stsr_core.errors import SourceError
from stsr_core.sources import remote
from stsr_core.sources.remote import patiently, redacted, shown


def test_messages_show_neither_users_nor_signatures():
    assert shown("https://ann:pw@host/a.nc?X-Amz-Signature=abc") == "https://host/a.nc"
    assert shown("s3://bucket/a.nc") == "s3://bucket/a.nc"
    assert shown("/data/a?.nc") == "/data/a?.nc"
    text = redacted("403 for https://ann:pw@host/a.nc?X-Amz-Signature=abc&x=1 with hush", ["hush"])
    assert text == "403 for https://***@host/a.nc?X-Amz-Signature=***&x=1 with ***"


def failing(times, error):
    calls = []

    def action():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return action, calls


def test_what_passes_is_tried_again_and_what_stays_is_not(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    assert patiently(failing(2, ConnectionResetError("cut"))[0], "s3://b/a") == 3
    for error, tries in (
        (ConnectionResetError("cut"), remote.TRIES),
        (PermissionError("no"), 1),
        (ValueError("bad"), 1),
    ):
        action, calls = failing(99, error)
        with pytest.raises(SourceError, match="cannot be read.*the server answers"):
            patiently(action, "s3://b/a")
        assert len(calls) == tries

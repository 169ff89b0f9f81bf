"""Patience with servers, and silence about credentials."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

from stsr_core.errors import SourceError, StsrError

Result = TypeVar("Result")
TRIES = 4
FIRST_WAIT_S = 0.5
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ModuleNotFoundError)
SECRET_QUERY = re.compile(r"(?i)((?:signature|credential|token|secret|password|accesskeyid|sig|key)[\w-]*=)[^&\s'\"]+")
USER_INFO = re.compile(r"(\w+://)[^/\s@]+@")


def shown(url: str) -> str:
    """Return a URL as messages may show it: without user, password and query."""
    parts = urlsplit(url)
    if not parts.scheme or ("@" not in parts.netloc and not parts.query):
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def redacted(text: str, secrets: Iterable[object] = ()) -> str:
    """Return a text without user information and signatures of URLs, and without the given secrets."""
    for secret in secrets:
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return SECRET_QUERY.sub(r"\1***", USER_INFO.sub(r"\1***@", text))


def patiently(action: Callable[[], Result], what: str, *, secrets: Iterable[object] = ()) -> Result:
    """Do something that a server may refuse for a moment; try again after waits that double.

    Raises:
        SourceError: it failed for good; the message names the error, never a credential.
    """
    hidden = tuple(secrets)
    for attempt in range(TRIES):
        try:
            return action()
        except StsrError:
            raise
        except Exception as e:  # whatever a backend raises on a damaged or unreachable file
            if attempt < TRIES - 1 and _passing(e):
                time.sleep(FIRST_WAIT_S * 2**attempt * random.uniform(0.8, 1.2))
                continue
            raise _failure(e, what, hidden) from None  # the cause may hold a signed URL
    raise AssertionError("unreachable")


def _passing(error: Exception) -> bool:
    """Whether the same request may succeed a moment later: servers and connections, not files and keys."""
    if isinstance(error, PERMANENT):
        return False
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or module in (
        "aiohttp",
        "botocore",
        "aiobotocore",
        "urllib3",
        "gcsfs",
        "azure",
    )


def _failure(error: Exception, what: str, hidden: tuple[object, ...]) -> SourceError:
    first = redacted(str(error).strip().split("\n")[0][:300], hidden)
    return SourceError(
        f"{shown(what)} cannot be read ({type(error).__name__}: {first}). NetCDF, GRIB or Zarr is needed; check that "
        "the file is whole, that the server answers, and the credentials."
    )

"""Small files in a folder or bucket, with the two writes that publishing rests on.

`create` never overwrites, and `replace` succeeds only if nobody else replaced the document meanwhile. In
buckets both are conditional writes of the server; on local disks a lock file stands in for the second.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import orjson

from stsr_core.errors import PublicationError
from stsr_core.files import whole

Options = Mapping[str, object]
S3_NAMES = {"endpoint_url": "endpoint", "key": "access_key_id", "secret": "secret_access_key"}  # s3fs to obstore
Document = dict[str, Any]
PATIENCE_SECONDS = 120.0  # how long a writer goes on racing others
FAIR_TRIES = 100  # and how often it tries at least: one of eight that race without end loses 100 times in 600,000
PAUSE_SECONDS = 0.2  # longest wait between two tries; a longer one favours those that came last
SILENCE_S = 60.0  # a server that says nothing for so long is given up; one that is slow has an hour for an object
RACERS = 4  # writers that race in the probe for conditional writes
FULL = (errno.ENOSPC, errno.EDQUOT)
_probed: set[str] = set()  # destinations whose conditional writes this process has seen to work


class ConflictError(PublicationError):
    """Another publisher was faster."""


class DamagedError(PublicationError):
    """A document that cannot be understood; at another try it is no better."""


def tries() -> Iterator[None]:
    """Yield for each try at what others may win, and wait between them.

    The time for it counts only after FAIR_TRIES, so that a machine that stood still is no reason to give up.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    for tried in count():
        if tried >= FAIR_TRIES and time.monotonic() >= until:
            return
        yield
        time.sleep(random.uniform(0, PAUSE_SECONDS))


def _identity(options: Options) -> dict[str, Any]:
    """Region and credentials of an S3 store, found as s3fs finds them: options, environment, ~/.aws.

    Raises:
        PublicationError: a profile that is not there, or a file of ~/.aws that cannot be read.
    """
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    kwargs: Any = options.get("client_kwargs") or {}
    try:
        session = Session(profile=options.get("profile"))
        region = kwargs.get("region_name") or session.get_config_variable("region")
        asked = not options.get("anon") and "key" not in options
        credentials = session.get_credentials() if asked else None
    except BotoCoreError as e:
        raise PublicationError(f"S3 cannot be used ({e}). Check address, credentials and rights.") from e
    return {
        "skip_signature": bool(options.get("anon")),
        **({"region": region} if region else {}),
        **({"credential_provider": lambda: _frozen(credentials)} if credentials is not None else {}),
    }


def _frozen(credentials: Any) -> dict[str, Any]:
    """Credentials as obstore takes them; those that a server renews are asked for again after a minute."""
    now = credentials.get_frozen_credentials()
    renewed = datetime.now(UTC) + timedelta(minutes=1) if now.token else None
    return {
        "access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token,
        "expires_at": renewed,
    }  # fmt: skip


def encode(document: Document) -> bytes:
    """Encode a document as it is stored; on one line and fast, because collections grow to ten thousand links."""
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


@dataclass(frozen=True)
class Documents:
    """Files below a destination: a local folder, s3://bucket/prefix, or for reading http(s)://; paths are relative.

    Attributes:
        destination: where.
        options: options of the fsspec filesystem, for s3.
        sole_publisher: the operator's word that nobody else publishes here; then a store may lack conditional writes.
    """

    destination: str
    options: Options = field(default_factory=dict, repr=False)
    sole_publisher: bool = False

    @classmethod
    def at(cls, destination: str, options: Options | None = None, *, sole_publisher: bool = False) -> Documents:
        """Files below a destination as people write it."""
        return cls(str(destination).rstrip("/") or "/", dict(options or {}), sole_publisher)

    @cached_property
    def _bucket(self) -> Any:
        from obstore.store import HTTPStore, S3Store

        client: Any = {"allow_http": True, "read_timeout": timedelta(seconds=SILENCE_S), "timeout": timedelta(hours=1)}
        if self.destination.startswith(("http://", "https://")):
            return HTTPStore.from_url(self.destination, client_options=client)
        o: dict[str, Any] = dict(self.options)
        return S3Store.from_url(
            self.destination,
            **{name: o[key] for key, name in S3_NAMES.items() if key in o},
            **_identity(o),
            client_options=client,
            retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=60)},
        )

    @cached_property
    def _local(self) -> Path | None:
        return None if "://" in self.destination else Path(self.destination)

    def fetch(self, path: str) -> tuple[bytes, str] | None:
        """Return the bytes of a file and the tag of their state, None where there is none.

        Raises:
            PublicationError: the file cannot be read, or the store cannot be reached.
        """
        if self._local is not None:
            return self._fetch_local(path)
        import obstore

        try:
            result = obstore.get(self._bucket, path)
            return bytes(result.bytes()), str(result.meta["e_tag"])
        except FileNotFoundError:
            return None
        except obstore.exceptions.BaseError as e:
            raise self._unreachable(e) from e

    def read(self, path: str) -> tuple[Document, str] | None:
        """Return a document and the tag of its state, None where there is none.

        Raises:
            DamagedError: the document is no JSON object.
            PublicationError: it cannot be read, or the store cannot be reached.
        """
        found = self.fetch(path)
        if found is None:
            return None
        raw, tag = found
        try:
            document = orjson.loads(raw)
        except ValueError as e:
            raise self._damaged(path, str(e)) from e
        if not isinstance(document, dict):
            raise self._damaged(path, f"a {type(document).__name__} instead of an object")
        return document, tag

    def _damaged(self, path: str, reason: str) -> DamagedError:
        return DamagedError(
            f"{self.destination}/{path} is damaged ({reason}). Restore it from a backup before you publish."
        )

    def _fetch_local(self, path: str) -> tuple[bytes, str] | None:
        assert self._local is not None
        with _reading(self._local / path):
            try:
                raw = (self._local / path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return raw, hashlib.sha256(raw).hexdigest()

    def write(self, path: str, data: bytes) -> None:
        """Write a file under a prefix that is this process's own.

        Raises:
            PublicationError: the destination cannot be written.
        """
        if self._local is None:
            self._put(path, data, "overwrite", lambda: None)
            return
        target = self._local / path
        with self._writing(target):
            _write(target, data)

    def create(self, path: str, document: Document) -> None:
        """Write a document that is not there yet.

        Raises:
            ConflictError: it is there.
            PublicationError: the destination cannot be written.
        """

        def refuse() -> NoReturn:
            raise ConflictError(f"{self.destination}/{path} exists already; it is never overwritten.")

        if self._local is not None:
            target = self._local / path
            with self._locked(target):
                if target.exists():
                    refuse()
                _write(target, encode(document))
            return
        if self.sole_publisher and self.fetch(path) is not None:
            refuse()
        self._put(path, encode(document), "overwrite" if self.sole_publisher else "create", refuse)

    def replace(self, path: str, document: Document, tag: str) -> None:
        """Replace a document that is still in the state `tag`.

        Raises:
            ConflictError: somebody else replaced it.
            PublicationError: the destination cannot be written.
        """

        def refuse() -> NoReturn:
            raise ConflictError(f"{self.destination}/{path} was changed by another publisher.")

        if self._local is not None:
            target = self._local / path
            with self._locked(target):
                now = self._fetch_local(path)
                if now is None or now[1] != tag:
                    refuse()
                _write(target, encode(document))
            return
        if self.sole_publisher and ((now := self.fetch(path)) is None or now[1] != tag):
            refuse()
        self._put(path, encode(document), "overwrite" if self.sole_publisher else {"e_tag": tag}, refuse)

    def amend(self, path: str, change: Callable[[Document], Document]) -> Document | None:
        """Replace a document by what `change` makes of it, anew each time that somebody else was faster.

        Returns:
            The document as it is now; None where there is none.

        Raises:
            PublicationError: others are faster for too long, or the destination cannot be written.
        """
        for _ in tries():
            found = self.read(path)
            if found is None:
                return None
            changed = change(found[0])
            with suppress(ConflictError):
                if changed != found[0]:
                    self.replace(path, changed, found[1])
                return changed
        raise PublicationError(
            f"Others changed {self.destination}/{path} first for {PATIENCE_SECONDS:.0f} s. Run again later."
        )

    def _put(self, path: str, data: bytes, mode: Any, refuse: Callable[[], None]) -> None:
        """Put an object under a condition; `refuse` raises if the server says that it does not hold."""
        import obstore

        known = (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError, FileNotFoundError)
        try:
            obstore.put(self._bucket, path, data, mode=mode)
        except known:
            refuse()
        except obstore.exceptions.BaseError as e:
            raise self._unreachable(e) from e

    def require_conditional_writes(self) -> None:
        """Probe the store, once a process: publishers that race are safe only where conditional writes hold.

        Raises:
            PublicationError: they do not hold, and this is not the sole publisher.
        """
        if self.sole_publisher or self.destination in _probed:
            return
        path = f".probe-{uuid.uuid4().hex}.json"
        try:
            flaw = self._flaw(path)
        finally:
            self.remove(path)
        if flaw is not None:
            raise PublicationError(
                f"{self.destination} does not keep its conditional writes ({flaw}), so two publishers could destroy "
                "each other's versions. Use a store that honours If-Match and If-None-Match, or, if nobody else ever "
                "publishes there, say so with STSR_SOLE_PUBLISHER=true."
            )
        _probed.add(self.destination)

    def _flaw(self, path: str) -> str | None:
        """Say what is wrong with the conditional writes of the store, None where nothing is."""
        self.create(path, {"n": 0})
        if self._succeeds(lambda: self.create(path, {"n": 1})):
            return "an object was created twice"
        found = self.read(path)
        if found is None:
            return "an object vanished"
        with ThreadPoolExecutor(RACERS) as pool:
            won = list(
                pool.map(lambda n: self._succeeds(lambda: self.replace(path, {"n": n}, found[1])), range(1, RACERS + 1))
            )
        if sum(won) != 1:
            return f"{sum(won)} of {RACERS} replacements of one state succeeded"
        return None

    @staticmethod
    def _succeeds(write: Callable[[], None]) -> bool:
        try:
            write()
        except ConflictError:
            return False
        return True

    def remove(self, path: str) -> None:
        """Remove a file or everything below a prefix; nothing happens where there is none.

        Raises:
            PublicationError: it cannot be removed, or the store cannot be reached.
        """
        if self._local is not None:
            _remove_local(self._local / path)
            return
        import obstore

        try:
            below = [meta["path"] for batch in obstore.list(self._bucket, path) for meta in batch]
            obstore.delete(self._bucket, below or path)  # a thousand in one request where the store can
        except FileNotFoundError:
            return
        except obstore.exceptions.BaseError as e:
            raise self._unreachable(e) from e

    def names(self, prefix: str) -> list[str]:
        """Names directly below a prefix; those that begin with a dot are not counted."""
        if self._local is not None:
            folder = self._local / prefix
            with _reading(folder):
                return sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else []
        import obstore

        try:
            found = obstore.list_with_delimiter(self._bucket, prefix)
        except obstore.exceptions.BaseError as e:
            raise self._unreachable(e) from e
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return sorted(name for p in paths if (name := p.rstrip("/").rsplit("/", 1)[-1])[0] != ".")

    def files(self, prefix: str) -> dict[str, tuple[int, datetime]]:
        """Size and time of writing of every file below a prefix (or of that file), by path below the destination."""
        if self._local is not None:
            with _reading(self._local / prefix):
                return _local_files(self._local, prefix)
        import obstore

        try:
            listed = [meta for batch in obstore.list(self._bucket, prefix) for meta in batch]
            if not listed:
                listed = [obstore.head(self._bucket, prefix)]
        except FileNotFoundError:
            return {}
        except obstore.exceptions.BaseError as e:
            raise self._unreachable(e) from e
        return {str(m["path"]): (m["size"], m["last_modified"]) for m in listed}

    def _unreachable(self, error: Exception) -> PublicationError:
        first = str(error).strip().split("\n")[0].partition(": <?xml")[0][:400]
        code = re.search(r"<Code>(\w+)</Code>", str(error))  # of S3, such as SignatureDoesNotMatch
        said = f"{first}: {code[1]}" if code else first
        return PublicationError(f"{self.destination} cannot be used ({said}). Check address, credentials and rights.")

    @contextmanager
    def _writing(self, target: Path) -> Iterator[None]:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as e:
            todo = "Free some MB on it" if e.errno in FULL else "Check the path and its permissions"
            raise PublicationError(f"{target.parent} cannot be written ({e.strerror}). {todo}.") from e

    @contextmanager
    def _locked(self, target: Path) -> Iterator[None]:
        with self._writing(target):
            handle = os.open(target.parent / ".lock", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield
            finally:
                os.close(handle)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise PublicationError(
            f"{e.filename or path} cannot be read ({e.strerror}). Check its owner and permissions."
        ) from e


def _local_files(root: Path, prefix: str) -> dict[str, tuple[int, datetime]]:
    target = root / prefix
    found: dict[str, tuple[int, datetime]] = {}
    for path in sorted(target.rglob("*")) if target.is_dir() else [target]:
        try:
            state = path.stat()
        except FileNotFoundError:  # somebody else is cleaning
            continue
        if path.is_file() and path.name[0] != ".":
            found[path.relative_to(root).as_posix()] = (state.st_size, datetime.fromtimestamp(state.st_mtime, UTC))
    return found


def _remove_local(target: Path) -> None:
    def tolerate(function: Any, path: str, problem: Any) -> None:
        if not isinstance(problem[1], FileNotFoundError):  # that one somebody else removed
            raise problem[1]

    try:
        if target.is_dir():
            shutil.rmtree(target, onerror=tolerate)
        else:
            target.unlink(missing_ok=True)
    except NotADirectoryError:
        return
    except OSError as e:
        raise PublicationError(
            f"{e.filename} cannot be removed ({e.strerror}). Check its owner and permissions, then run again."
        ) from e


def _write(target: Path, data: bytes) -> None:
    with whole(target) as part:
        part.write_bytes(data)

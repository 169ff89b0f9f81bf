import socket

import pytest
from distributed import LocalCluster

from stsr_core.ensemble import cluster
from stsr_core.ensemble.cluster import Cluster
from stsr_core.errors import ConfigurationError


def test_what_answers_and_is_no_scheduler_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(ConfigurationError, match="No Dask scheduler answers at .* Start it, or unset"),
            Cluster(scheduler_address=address).client(),
        ):
            pass


def test_a_local_cluster_that_takes_long_to_end_does_not_undo_finished_work(monkeypatch):
    slow = LocalCluster(n_workers=1, processes=False, dashboard_address=":0")
    close = slow.close

    def late(*arguments):
        close(*arguments)
        raise TimeoutError

    monkeypatch.setattr(slow, "close", late)
    monkeypatch.setattr(Cluster, "_local", lambda *_: slow)
    with Cluster(device="cpu").client() as client:
        assert client.submit(int).result() == 0

from distributed import LocalCluster

from stsr_core.ensemble.cluster import Cluster


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

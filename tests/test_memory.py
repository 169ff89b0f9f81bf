import platform
import resource

import dask
import psutil
import pytest
from distributed import Client, LocalCluster

from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble.generate import Networks
from stsr_core.factors import Factor
from stsr_core.memory import available

OF_DASK = {"distributed.nanny.pre-spawn-environ": {"MALLOC_TRIM_THRESHOLD_": "65536"}}  # of its workers, by default
TENSORS, TENSOR_BYTES, PAGE = 40, 8 << 20, 4096


def test_a_machine_without_containers_has_what_the_system_says(tmp_path):
    assert 0 < available(tmp_path) <= psutil.virtual_memory().total


def test_a_container_has_what_its_limit_leaves(tmp_path):
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.max").write_text("5000000\n")
    assert available(tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("2000000\n")
    assert available(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert available(tmp_path) > 5_000_000


def test_what_a_container_caches_of_files_is_free(tmp_path):
    (tmp_path / "memory.current").write_text("4900000\n")
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 900000\nfile 4000000\nactive_file 1000000\ninactive_file 3000000\n")
    assert available(tmp_path) == 3_100_000


def cleared() -> float:
    """Share of the pages of tensors, made one after the other, that the system cleared anew."""
    import torch

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    before = faults()
    for _ in range(TENSORS):
        torch.ones(TENSOR_BYTES // 4)
    return (faults() - before) / (TENSORS * TENSOR_BYTES / PAGE)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_a_worker_of_any_cluster_keeps_the_memory_that_it_frees(library):
    factor = Factor(space=4, time=1)
    networks = Networks("0" * 64, Downscaler.load(library.serving(factor), factor, choose_device("cpu")), "cpu", "auto")
    one = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with dask.config.set(OF_DASK), LocalCluster(**one) as cluster, Client(cluster) as client:

        def at_last() -> float:  # once the heap has grown to what tensors need
            return [client.submit(cleared, pure=False).result() for _ in range(2)][-1]

        assert at_last() > 0.9
        client.register_plugin(networks)
        assert at_last() < 0.1

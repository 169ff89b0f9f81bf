"""Small networks with random weights: what the engine's tests need is speed, not skill."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from stsr_core.checkpoint import Library, write_checkpoint
from stsr_core.ensemble.cluster import Cluster
from stsr_core.factors import Factor, recipe
from stsr_core.networks.denoiser import Denoiser
from stsr_core.networks.mean import MeanNetwork

CHANNELS = (8, 32)
torch.set_num_threads(1)  # tiny networks lose more to threads than they win


def random_checkpoint(folder: Path, factors: list[tuple[int, int]], *, distilled: bool = False) -> None:
    """Write a checkpoint of tiny networks whose outputs are not zero."""
    torch.manual_seed(0)
    networks = {"mean": MeanNetwork(CHANNELS), "denoiser": Denoiser(CHANNELS)}
    if distilled:
        networks["teacher"] = Denoiser(CHANNELS)
    for network in networks.values():
        torch.nn.init.normal_(network.unet.last.weight, std=0.05)
    card = {
        "name": "tiny",
        "architecture": {"mean_channels": CHANNELS, "denoiser_channels": CHANNELS},
        "transform": {},
        "served": [
            {
                "configuration": recipe(Factor(space=s, time=t)),
                "residual_scale": 0.3,
                "evaluations": 2,
                "teacher": {"spread": 1.0, "evaluations": 4} if distilled else None,
            }
            for s, t in factors
        ],
        "training": {"data": "none"},
    }
    weights = {f"{n}.{k}": v for n, network in networks.items() for k, v in network.state_dict().items()}
    write_checkpoint(folder, card, weights)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    random_checkpoint(folder, [(4, 1), (4, 3), (10, 1)])
    return folder


@pytest.fixture(scope="session")
def library(checkpoints: Path) -> Library:
    return Library.open(checkpoints)


@pytest.fixture
def rain() -> np.ndarray:
    """Coarse rain with a dry half, (T, Y, X) = (8, 9, 11), float32."""
    rng = np.random.default_rng(5)
    amount = rng.gamma(0.5, 2.0, (8, 9, 11)).astype(np.float32)
    amount[:, :, 6:] = 0.0
    amount[3] = 0.0
    return amount


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running Dask cluster that tests share, as a scheduler to connect to."""
    with Cluster(device="cpu", workers=2).client() as client:
        yield Cluster(scheduler_address=client.scheduler.address, device="cpu")


@pytest.fixture
def cuts(monkeypatch):
    """How often reading what has a name in its path is cut off, on memory:// as on a server; waits are short."""
    from fsspec.implementations.memory import MemoryFileSystem

    from stsr_core.sources import remote

    left, read = {}, MemoryFileSystem.cat_file

    def cat_file(self, path, *args, **kwargs):
        for name, times in left.items():
            if name in path and times > 0:
                left[name] -= 1
                raise ConnectionResetError("cut")
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    return left

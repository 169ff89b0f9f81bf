"""Where a training runs: one process alone, or one of those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from stsr_core.downscaler import native_bfloat16

PATIENCE = timedelta(hours=12)  # with a rank that others wait for, as with rank 0, which alone reads an archive

Made = TypeVar("Made")


@dataclass(frozen=True)
class Run:
    """Where a training runs: this process among all that torchrun started, and on what device."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> Run:
        """Join the process group that torchrun announced in the environment, or run alone."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls(0, 1, device)
        local = int(os.environ["LOCAL_RANK"])
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), world, device)

    @property
    def precision(self) -> torch.dtype:
        """Half where the device computes in it, single elsewhere."""
        return torch.bfloat16 if native_bfloat16(self.device) else torch.float32

    def mixed(self) -> torch.autocast:
        """Mixed precision; weights and their updates stay single."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def of_first(self, make: Callable[[], Made]) -> Made:
        """What rank 0 makes, on all ranks; the others wait for it."""
        made = [make() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(made, src=0, device=self.device)
        return cast("Made", made[0])

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over all ranks, in place, in one message."""
        if self.world == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))

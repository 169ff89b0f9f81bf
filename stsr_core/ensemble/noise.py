"""Noise that depends on (product seed, driving member, member, absolute time, absolute place) and on nothing else."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from stsr_core.translation import kernels_serve

LANES = 4  # numbers that one counter of the generator gives; they lie side by side along x
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
WORD = (1 << 32) - 1


def stream_of(driving: str) -> int:
    """Number of the stream of noise of a driving member, 48 bits of a digest of its label; 0 for the label ""."""
    return int.from_bytes(hashlib.sha256(driving.encode()).digest()[:6]) if driving else 0


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words of 32 bits for every counter, by Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers:
    as easy as 1, 2, 3").

    Args:
        counter: four words of 32 bits each as int64, of shapes that broadcast.
        key: two words of 32 bits.

    Returns:
        Four words of 32 bits each as int64.
    """
    a, b, c, d = counter
    for i in range(ROUNDS):
        k, m = ((word + i * step) & WORD for word, step in zip(key, WEYL, strict=True))
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # their low 64 bits are right, sign or not
        a, b, c, d = (second >> 32 & WORD) ^ b ^ k, second & WORD, (first >> 32 & WORD) ^ d ^ m, first & WORD
    return torch.broadcast_tensors(a, b, c, d)


def lattice_noise(
    seed: int,
    member: int,
    start: tuple[int, int, int],
    shape: tuple[int, int, int],
    stream: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise on a box of the absolute fine lattice, made on the device where it is needed.

    Any two boxes agree where they overlap: the generator counts by place and time. Devices agree but for rounding.

    Args:
        seed: product seed.
        member: number of the member, from 0.
        start: absolute fine index of the first step, row and column, each within 31 bits; may be negative.
        shape: (T, Y, X) of the box.
        stream: number of the driving member's stream, see `stream_of`.
        device: where to make it.

    Returns:
        (T, Y, X), float32.
    """
    digest = hashlib.sha256(f"{seed} {stream}".encode()).digest()
    key = int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])
    groups, offset = divmod(start[2], LANES)
    box = (*shape[:2], -(-(offset + shape[2]) // LANES))
    make = _by_steps
    if kernels_serve(torch.device(device)):
        from stsr_core.ensemble.noise_kernel import noise as make
    found = make(key, member, (*start[:2], groups), box, torch.device(device))
    return found.reshape(*shape[:2], -1)[..., offset : offset + shape[2]]


def _by_steps(
    key: tuple[int, int], member: int, start: tuple[int, int, int], shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Noise for a box of counters, (T, Y, G, LANES), step by step as a CPU does it in its caches."""
    noise = torch.empty((*shape, LANES), device=device)

    def words(first: int, number: int, axis: int) -> Tensor:
        index = torch.arange(first, first + number, device=device) & WORD
        return index.reshape([-1 if n == axis else 1 for n in range(3)])

    row, group = words(start[1], shape[1], 1), words(start[2], shape[2], 2)
    for step, frame in enumerate(noise):
        counter = group, row, words(start[0] + step, 1, 0), torch.tensor(member, device=device)
        found = philox(counter, key)
        for pair, (a, b) in enumerate(zip(found[::2], found[1::2], strict=True)):
            frame[..., 2 * pair], frame[..., 2 * pair + 1] = (values[0] for values in _normal(a, b))
    return noise


def _normal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals of two random words (Box and Muller 1958)."""
    radius = ((a.float() + 0.5) / 2**32).log_().mul_(-2).sqrt_()
    angle = b.float().mul_(2 * math.pi / 2**32)
    return radius * angle.cos(), radius * angle.sin_()

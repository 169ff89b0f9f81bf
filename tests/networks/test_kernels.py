"""Kernels for GPUs, run by Triton's interpreter where there is none, against what CPUs do."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from stsr_core import translation

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

CHECK = """
import torch
from torch import nn

from stsr_core.ensemble import noise, noise_kernel
from stsr_core.networks import attention, between
from stsr_core.networks.denoiser import Denoiser
from stsr_core.networks.layers import ResidualBlock
from stsr_core.factors import Factor

by_kernels, steps = False, noise._by_steps
between.by_kernels = attention.by_kernels = lambda x: by_kernels


def compared(function):
    global by_kernels
    found = []
    for by_kernels in (False, True):
        with torch.inference_mode():
            found.append(function())
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


torch.manual_seed(0)
for channels, rows, columns in ((32, 2, 6), (96, 4, 2)):
    field = torch.randn(10, channels, rows, columns).contiguous(memory_format=torch.channels_last)
    half = torch.randn(10, channels, rows // 2, columns // 2)
    scale, shift = torch.randn(10, 2 * channels).chunk(2, dim=1)
    layer, point = nn.Conv2d(channels, channels, 3), nn.Conv2d(channels, channels, 1)
    head, last, stem = nn.Conv2d(channels, 32, 3), nn.Conv2d(8, 2, 3), nn.Conv2d(4 * 5, channels, 3)
    cells, attend = torch.randn(10, 5, 2 * rows, 2 * columns), attention.TemporalAttention(channels)
    nn.init.normal_(attend.out.weight)
    compared(lambda: between.mirrored(field))
    compared(lambda: between.normed(field, None))
    compared(lambda: between.tokens(field))
    compared(lambda: between.modulated(*between.convolved(point, field), scale, shift))
    compared(lambda: between.merged(*between.convolved(point, half), field))
    block = ResidualBlock(channels, 7)
    for weights in (block.second.weight, block.modulation.weight):
        nn.init.normal_(weights, std=0.1)
    compared(lambda: block(*between.convolved(layer, between.mirrored(field)), torch.ones(10, 7)))
    compared(lambda: block(*between.from_cells(cells, stem), torch.ones(10, 7)))
    compared(lambda: between.to_cells(field, head, last))
    compared(lambda: attend(field, 5))
    compared(lambda: attend(field, 10))

network = Denoiser((32, 32))
nn.init.normal_(network.unet.last.weight)
noisy, frames, angle = torch.randn(1, 3, 1, 9, 14), torch.rand(1, 3, 5, 9, 14), torch.tensor([0.7])
compared(lambda: network(noisy, angle, noisy, frames, Factor(space=5, time=2)))

for seed, member, start, shape in ((1, 0, (0, 0, 0), (3, 5, 16)), (7, 3, (-5, -1001, -4003), (2, 3, 41))):
    made = []
    for noise._by_steps in (steps, noise_kernel.noise):
        made.append(noise.lattice_noise(seed, member, start, shape, 12345))
    torch.testing.assert_close(made[1], made[0], atol=1e-5, rtol=1e-5)
"""


def test_kernels_serve_recent_gpus_only(monkeypatch):
    monkeypatch.setattr(translation, "CAN_TRANSLATE", True)
    for capability, wanted in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        translation.kernels_serve.cache_clear()
        assert translation.kernels_serve(torch.device("cuda")) is wanted
        assert not translation.kernels_serve(torch.device("cpu"))
    translation.kernels_serve.cache_clear()


def test_kernels_do_what_cpus_do():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]

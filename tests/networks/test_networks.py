import pytest
import torch

from stsr_core.evaluation.scores import seam_ratio
from stsr_core.factors import Factor
from stsr_core.grids import coarsen
from stsr_core.networks.attention import TemporalAttention, _by_products
from stsr_core.networks.denoiser import Denoiser
from stsr_core.networks.layers import VideoUNet, _grown
from stsr_core.networks.mean import CONDITION_CHANNELS, LINEAR_CHANNEL, MeanNetwork
from stsr_core.networks.transform import (
    condition,
    linear_interpolation,
    pycnophylactic_gain,
    to_amount,
    to_signed_amount,
    to_transformed,
)

CHANNELS = (8, 32, 32)
FACTOR = Factor(space=5, time=2)


@pytest.mark.parametrize("size", [(40, 40), (25, 75), (13, 31)])
def test_frames_of_any_size_come_back_at_their_size(size):
    unet = VideoUNet(3, 2, CHANNELS, 4)
    out = unet(torch.randn(2, 6, 3, *size), torch.randn(2, 4))
    assert out.shape == (2, 6, 2, *size)


def test_an_untrained_mean_is_the_linear_interpolation():
    frames = torch.rand(1, 4, CONDITION_CHANNELS, 20, 20)
    out = MeanNetwork(CHANNELS)(frames, FACTOR)
    torch.testing.assert_close(out[:, :, 0], frames[:, :, LINEAR_CHANNEL])


@pytest.mark.parametrize("kind", [MeanNetwork, Denoiser])
def test_what_tells_the_spacing_changes_nothing_at_1_km_and_something_elsewhere(kind):
    torch.manual_seed(0)
    network = kind(CHANNELS).eval()
    torch.nn.init.normal_(network.unet.last.weight)
    frames = torch.rand(1, 4, CONDITION_CHANNELS, 20, 20)
    one = torch.rand(1, 4, 1, 20, 20)
    seen = (frames, FACTOR) if kind is MeanNetwork else (one, torch.tensor([0.5]), one, frames, FACTOR)
    with torch.no_grad():
        before = network(*seen)
        for name, parameter in network.named_parameters():
            if name.endswith("by_spacing"):
                torch.nn.init.normal_(parameter)
        assert torch.equal(network(*seen, 1), before)
        changes = [(network(*seen, km) - before).abs().mean() for km in (2, 5)]
    assert changes[1] > changes[0] > 1e-3


def test_attention_carries_information_between_frames_and_can_be_left_out():
    torch.manual_seed(0)
    for attention in (True, False):
        network = MeanNetwork(CHANNELS, attention=attention)
        torch.nn.init.normal_(network.unet.last.weight)
        frames = torch.rand(1, 4, CONDITION_CHANNELS, 20, 20)
        changed = frames.clone()
        changed[:, 3] += 1.0
        moved = (network(frames, FACTOR)[:, 0] != network(changed, FACTOR)[:, 0]).any()
        assert bool(moved) is attention


def test_attention_knows_the_order_of_frames():
    torch.manual_seed(0)
    layer = TemporalAttention(32)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(5, 32, 2, 2)
    swapped = x[[1, 0, 2, 3, 4]]
    assert not torch.allclose(layer(x, 5)[4], layer(swapped, 5)[4])


def test_the_denoiser_sees_noise_level_and_factor():
    torch.manual_seed(0)
    network = Denoiser(CHANNELS)
    for module in network.modules():
        if hasattr(module, "modulation"):
            torch.nn.init.normal_(module.modulation.weight)
    torch.nn.init.normal_(network.unet.last.weight)
    x, frames = torch.randn(1, 4, 1, 20, 20), torch.rand(1, 4, CONDITION_CHANNELS, 20, 20)
    base = network(x, torch.tensor([0.5]), x, frames, FACTOR)
    assert not torch.allclose(base, network(x, torch.tensor([1.0]), x, frames, FACTOR))
    assert not torch.allclose(base, network(x, torch.tensor([0.5]), x, frames, Factor(space=25, time=2)))


def test_the_denoisers_gate_stops_noise_cell_by_cell():
    network = Denoiser(CHANNELS)
    x, frames = torch.randn(1, 4, 1, 20, 20), torch.rand(1, 4, CONDITION_CHANNELS, 20, 20)
    passed = network(x, torch.tensor([0.5]), x, frames, FACTOR)
    torch.testing.assert_close(passed, torch.tensor(0.5).cos() * x)
    network.unet.last.bias.data[1] = 1.0
    assert network(x, torch.tensor([0.5]), x, frames, FACTOR).abs().max() == 0


def test_transform_and_inverse_agree_and_nothing_is_negative():
    amount = torch.tensor([0.0, 0.01, 1.0, 100.0])
    torch.testing.assert_close(to_amount(to_transformed(amount, 0.2), 0.2), amount, rtol=1e-4, atol=1e-6)
    assert to_amount(torch.tensor([-3.0]), 0.2) == 0
    torch.testing.assert_close(to_signed_amount(to_transformed(amount, 0.2), 0.2), amount, rtol=1e-4, atol=1e-6)
    assert -0.2 < to_signed_amount(torch.tensor([-3.0]), 0.2) < to_signed_amount(torch.tensor([-1.0]), 0.2) < 0


def test_conditioning_frames_hold_the_coarse_amount_and_the_phase():
    coarse = torch.rand(1, 5, 6, 7) * 4
    frames = condition(coarse, FACTOR, 0.2)
    assert frames.shape == (1, 6, CONDITION_CHANNELS, 20, 25)
    first = to_amount(frames[0, :, 0], 0.2)
    kept = torch.from_numpy(coarsen(first.numpy(), FACTOR))
    torch.testing.assert_close(kept, coarse[0, 1:-1, 1:-1, 1:-1], rtol=0.1, atol=0.05)
    torch.testing.assert_close(first[0::2], first[1::2])
    assert frames[0, :, 2:].abs().max() < 1
    torch.testing.assert_close(frames[0, 0, 3, 0, :5], frames[0, 0, 3, 0, 5:10])


def test_the_first_frame_is_smooth_across_coarse_cells_and_dry_where_they_are():
    factor = Factor(space=10, time=1)
    axis = torch.arange(12.0)
    coarse = (3 * torch.exp(-((axis[:, None] - 6) ** 2 + (axis[None, :] - 5) ** 2) / 4) - 0.2).clamp(min=0.0)
    coarse = coarse.expand(1, 4, 12, 12)
    gain = pycnophylactic_gain(coarse, factor.space)
    first = to_amount(condition(coarse, factor, 0.2, log_gain=gain)[:, :, 0], 0.2)
    assert torch.equal(first, to_amount(condition(coarse, factor, 0.2)[:, :, 0], 0.2))
    kept, wanted = torch.from_numpy(coarsen(first[0].numpy(), factor)), coarse[0, 1:-1, 1:-1, 1:-1]
    assert (kept - wanted).abs().mean() < 0.01 * wanted.mean()
    assert kept[wanted == 0].max() < 2e-3
    assert 0.9 < seam_ratio(first.numpy(), factor.space) < 1.1


def test_linear_interpolation_is_exact_on_a_plane_and_local():
    # An even field stays even; a ramp in x stays a ramp.
    ramp = torch.arange(7.0).expand(1, 4, 5, 7)
    fine = linear_interpolation(ramp, FACTOR)
    torch.testing.assert_close(fine[0, 0, 0].diff(), torch.full((24,), 1 / 5 / 2), rtol=1e-4, atol=1e-5)


def test_frames_grow_by_mirroring_even_where_they_are_small():
    x = torch.arange(3.0)[None, None, None, :].expand(1, 1, 18, 3)
    grown = _grown(x, 8)
    assert grown.shape == (1, 1, 24, 16)  # two strides at least, for convolutions at the lowest level mirror too
    assert grown[0, 0, 5].tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1, 2, 2]
    whole = torch.rand(1, 1, 16, 24)
    assert _grown(whole, 8) is whole
    assert _grown(x[..., :5, :], 8, (0, 5))[0, 0, 4].tolist() == [1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1]
    assert _grown(whole, 8, (3, 0))[0, 0, :4, 1].tolist() == whole[0, 0, [2, 1, 0, 0], 1].tolist()


def test_what_is_left_of_a_window_changes_near_the_cut_only():
    torch.manual_seed(0)
    unet = VideoUNet(3, 2, (8, 8, 8), 4, attention=False).eval()
    torch.nn.init.normal_(unet.last.weight)
    frames, context = torch.randn(1, 3, 3, 120, 120), torch.randn(1, 4)
    whole = unet(frames, context)[..., 25:, 30:]
    inner = (..., slice(45, None), slice(45, None))
    cut, moved = unet(frames[..., 25:, 30:], context, cut=(25, 30)), unet(frames[..., 25:, 30:], context)
    torch.testing.assert_close(cut[inner], whole[inner], rtol=1e-4, atol=1e-5)
    assert (moved - whole)[inner].std() > 0.01 * whole[inner].std()  # as the lower levels lie elsewhere then


def test_borders_see_what_the_middle_sees():
    torch.manual_seed(0)
    network = MeanNetwork((8, 8), attention=False).eval()
    torch.nn.init.normal_(network.unet.last.weight)
    even = torch.ones(1, 2, 5, 32, 32)
    with torch.no_grad():
        found = network(even, Factor(space=1, time=2))
    torch.testing.assert_close(found, found[..., 14:16, 14:16].repeat(1, 1, 1, 16, 16), rtol=1e-4, atol=1e-4)


def test_attention_by_products_is_that_of_torch():
    q, k, v = (torch.randn(7, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(_by_products(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))

"""The random numbers of a run: distinct, unrelated, and pinned."""

import math

import pytest
import torch

from ddpo.seeds import Purpose, fill_noise, fill_normal, one_seed, random_orders, sample_seeds, stream

WORD = (1 << 64) - 1


def philox(counter, key):
    """A block of Philox4x64-10 from its definition (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [right >> 64 ^ c[1] ^ k[0], right & WORD, left >> 64 ^ c[3] ^ k[1], left & WORD]
        k = [(k[0] + 0x9E3779B97F4A7C15) & WORD, (k[1] + 0xBB67AE8584CAA73B) & WORD]
    return c


def normal(seeds, size):
    """The first `size` numbers of each seed."""
    noise = torch.empty(len(seeds), size)
    for row, seed in zip(noise, seeds, strict=True):
        fill_normal(row, stream(int(seed)))
    return noise


def test_a_stream_is_philox_under_the_key_and_the_place_that_it_was_given():
    assert philox((0, 0, 0, 0), (0, 0)) == [  # the published answer
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip
    raw = stream(2**63 + 5, 2**62 + 3, place=7).bit_generator.random_raw(8).tolist()
    assert raw == [word for draw in (1, 2) for word in philox((draw, 0, 0, 7), (2**63 + 5, 2**62 + 3))]


def test_a_million_samples_of_a_run_have_different_seeds():
    seeds = torch.cat([sample_seeds(0, epoch, range(1024)) for epoch in range(1000)])
    assert len(seeds.unique()) == 1_024_000
    assert len((seeds & 0xFFFFFFFF).unique()) < 1_024_000  # of their low halves, which torch would take, some are equal


def test_every_bit_of_both_seeds_and_of_the_place_gives_another_stream():
    base = [(5, 9, 3)]
    flipped = [
        tuple(v ^ (1 << bit) * (i == word) for i, v in enumerate(base[0])) for word in range(3) for bit in range(64)
    ]
    firsts = {
        int(stream(seed, second, place=place).bit_generator.random_raw()) for seed, second, place in base + flipped
    }
    assert len(firsts) == 1 + 3 * 64


@pytest.mark.parametrize("seed", [0, 3, 2**32 + 3])
def test_training_never_meets_the_noise_of_an_evaluation(seed):
    """Whatever both seeds are: the two kinds of seeds differ in their lowest bits."""
    training = torch.cat([sample_seeds(seed, epoch, range(256)) for epoch in range(4)])
    evaluation = sample_seeds(seed, 0, range(1024), purpose=Purpose.EVALUATION)
    assert not torch.isin(training, evaluation).any()
    assert set((training & 7).tolist()) == {Purpose.TRAINING} and set((evaluation & 7).tolist()) == {Purpose.EVALUATION}


def test_seeds_are_distinct_over_runs_epochs_and_indices():
    seeds = torch.cat([sample_seeds(run, epoch, range(1000)) for run in range(10) for epoch in range(10)])
    assert seeds.shape == (100_000,) and seeds.dtype == torch.int64
    assert (seeds >= 0).all()
    assert len(seeds.unique()) == 100_000


def test_seeds_do_not_depend_on_how_samples_are_divided_among_processes():
    whole = sample_seeds(3, 7, range(64))
    parts = torch.cat([sample_seeds(3, 7, range(start, start + 16)) for start in range(0, 64, 16)])
    assert torch.equal(whole, parts)


def test_seeds_look_random_in_every_bit_above_the_purpose():
    seeds = sample_seeds(0, 0, range(4096))
    bits = torch.stack([(seeds >> bit) & 1 for bit in range(3, 63)]).double()
    assert (bits.mean(1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(4096)


def test_noise_is_standard_normal():
    """Kolmogorov-Smirnov at the level of 1 in 1,000, and a chi-square over 64 cells of equal probability."""
    x = normal(sample_seeds(0, 0, range(256)), 4096).double().flatten().sort().values
    n, places = len(x), torch.special.ndtr(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert math.sqrt(n) * torch.maximum(places - steps[:-1], steps[1:] - places).max() < 1.95
    counts = torch.histc(places, bins=64, min=0, max=1)
    chi_square = ((counts - n / 64).square() / (n / 64)).sum()
    assert abs(chi_square - 63) < 4 * math.sqrt(2 * 63)


@pytest.mark.parametrize("seeds", [range(512), sample_seeds(0, 0, range(512)).tolist()], ids=["neighbours", "samples"])
def test_noises_of_different_seeds_are_uncorrelated(seeds):
    size = 2048
    x = normal(seeds, size).double()
    products = (x @ x.T / math.sqrt(size))[tuple(torch.triu_indices(512, 512, offset=1))]  # each ~ N(0, 1)
    assert abs(products.mean()) < 4 / math.sqrt(len(products))
    assert abs(products.var() - 1) < 4 * math.sqrt(2 / len(products))
    assert products.abs().max() < 6
    along = (x[:, :-1] * x[:, 1:]).sum() / math.sqrt(x[:, 1:].numel())  # neighbouring numbers of a stream
    assert abs(along) < 4


def test_a_sample_s_noise_is_its_stream_s_and_that_of_its_complement_negated():
    seeds = sample_seeds(3, 5, range(6))
    drawn = torch.empty(6, 2, 7)
    fill_noise(drawn, torch.where(torch.arange(6) % 2 == 1, ~seeds, seeds))
    signs = torch.tensor([1.0, -1.0] * 3)[:, None]
    assert torch.equal(drawn.flatten(1), signs * normal(seeds, 14))


def test_random_orders_are_uniform_permutations():
    orders = random_orders(6000, 3, stream(one_seed(0, 0, purpose=Purpose.PASS)))
    assert torch.equal(orders.sort(1).values, torch.arange(3).expand(6000, 3))
    counts = torch.bincount((orders * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    assert (counts > 0).sum() == 6 and (counts[counts > 0] - 1000).abs().max() < 4 * math.sqrt(1000 * 5 / 6)


def test_the_noise_of_a_seed_stays_what_it_was():
    """Whoever changes these numbers changes `ddpo.seeds.NOISE` too: runs would go on with other noise."""
    assert sample_seeds(0, 1, [2]).tolist() == [2797454498872373344]
    assert normal([13], 3)[0].tolist() == [-0.03740885481238365, -0.5910791158676147, 0.06255308538675308]

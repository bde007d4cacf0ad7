"""The Vendi score against its limits, numpy and the jackknife; distances against a loop."""

import math

import numpy as np
import pytest
import torch

from rewards.clusters import standard_error
from rewards.spread import spreads, vendi, vendi_draws, vendi_of_captions


@pytest.mark.parametrize("size", [1, 2, 7])
def test_equal_images_count_as_one_and_orthogonal_ones_each(size: int) -> None:
    assert vendi(torch.ones(size, 9) * torch.arange(1, size + 1)[:, None]) == pytest.approx(1.0, abs=1e-6)
    assert vendi(3 * torch.eye(9)[:size]) == pytest.approx(size)
    assert vendi(torch.eye(9)[:size].repeat(4, 1)) == pytest.approx(size), "copies add nothing"


def test_two_images_have_the_closed_form_of_their_cosine() -> None:
    for cosine in (-0.9, 0.0, 0.3, 0.99):
        shares = [(1 + cosine) / 2, (1 - cosine) / 2]
        expected = math.exp(-sum(share * math.log(share) for share in shares))
        features = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
        assert vendi(features) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("images", "size"), [(5, 20), (20, 5), (12, 12)])
def test_it_is_numpys_whichever_of_the_two_matrices_is_smaller(images: int, size: int) -> None:
    features = np.random.default_rng(0).normal(size=(images, size))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(unit @ unit.T / images)
    shares = shares[shares > 1e-12]
    assert vendi(torch.from_numpy(features)) == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())))


def test_a_row_without_length_is_like_no_other() -> None:
    features = torch.cat([torch.eye(3), torch.zeros(2, 3)])
    assert vendi(features) == pytest.approx(5.0)


def test_the_draws_of_captions_have_the_score_as_mean_and_the_jackknifes_error() -> None:
    random = torch.Generator().manual_seed(0)
    captions = torch.arange(6).repeat_interleave(3)
    features = torch.randn(6, 4, generator=random)[captions] + 0.4 * torch.randn(18, 4, generator=random)
    draws = vendi_draws(features, captions)
    left_out = np.array([vendi(features[captions != one]) for one in range(6)])
    jackknife = math.sqrt(5 / 6 * ((left_out - left_out.mean()) ** 2).sum())
    assert float(draws.mean()) == pytest.approx(vendi(features))
    assert standard_error(draws) == pytest.approx(jackknife)
    assert vendi_draws(features[:3], captions[:3]).tolist() == [vendi(features[:3])]
    own = [vendi(features[3 * one : 3 * one + 3]) for one in range(6)]
    assert vendi_of_captions(features, captions).tolist() == pytest.approx(own)


def test_distances_are_within_a_caption_and_across_captions() -> None:
    random = torch.Generator().manual_seed(0)
    distances = torch.rand(6, 6, generator=random)
    distances = (distances + distances.T) * (1 - torch.eye(6))
    captions = torch.tensor([0, 0, 0, 1, 1, 1])
    found = spreads(distances, captions)
    for i in range(6):
        for name, wanted in (("within", True), ("across", False)):
            others = [float(distances[i, j]) for j in range(6) if j != i and (captions[i] == captions[j]) == wanted]
            assert float(found[f"{name}/mean"][i]) == pytest.approx(sum(others) / len(others))
            assert float(found[f"{name}/nearest"][i]) == pytest.approx(min(others))
    assert set(spreads(distances, torch.arange(6))) == {"across/mean", "across/nearest"}
    assert set(spreads(distances, torch.zeros(6))) == {"within/mean", "within/nearest"}

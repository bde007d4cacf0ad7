"""How different images are, from their features: the Vendi score, and distances to all others and to the nearest.

With K_ij a similarity of images i and j, K_ii = 1, positive semidefinite, and l the eigenvalues of K / n,

    Vendi = exp(-sum_i l_i log l_i)                              (Friedman and Dieng, arXiv:2210.02410, eq. 2)

the effective number of different images: 1 for n equal ones, n for n whose similarities are 0. Here K is the cosine of
features. It is no mean of images; its standard error is the jackknife's over captions.

E images, C captions, F features.
"""

import torch
from torch import Tensor
from torch.nn import functional


def vendi(features: Tensor) -> float:
    """The Vendi score of the cosines of features (n, F), in [1, n].

    A row without length is like no other.
    """
    unit = functional.normalize(features.double(), dim=1)
    kernel = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit  # the same eigenvalues but for zeros
    shares = torch.linalg.eigvalsh(kernel / len(features)).clamp(min=0)
    lost = (1 - shares.sum()).clamp(min=0)  # of rows without length, each an eigenvalue 1 / n of its own
    entropy = torch.special.entr(shares).sum() + lost * torch.log(torch.tensor(float(len(features))))
    return float(entropy.exp())


def vendi_of_captions(features: Tensor, captions: Tensor) -> Tensor:
    """The Vendi score of the images of each caption alone, (C,) float64, in the order of the captions' numbers."""
    return torch.tensor([vendi(features[captions == one]) for one in captions.unique()], dtype=torch.float64)


def vendi_draws(features: Tensor, captions: Tensor) -> Tensor:
    """Numbers, one a caption, whose mean is the Vendi score of all images and whose standard error is its jackknife's.

    With V_-c the score without the images of caption c, they are V + (C - 1) (mean V_- - V_-c). With one caption there
    is nothing to leave out: (1,), the score.

    Args:
        features: (E, F).
        captions: Numbers of the images' captions, (E,) int64.
    """
    whole, names = vendi(features), captions.unique()
    if len(names) < 2:
        return torch.tensor([whole], dtype=torch.float64)
    without = torch.tensor([vendi(features[captions != one]) for one in names], dtype=torch.float64)
    return whole + (len(names) - 1) * (without.mean() - without)


def spreads(distances: Tensor, captions: Tensor) -> dict[str, Tensor]:
    """Distances of each image to the others, (E,) each: means and the nearest, `within` its caption and `across`.

    `within` is missing where a caption has one image, `across` where there is one caption.

    Args:
        distances: (E, E).
        captions: Numbers of the images' captions, (E,) int64.
    """
    same = captions[:, None] == captions[None]
    others = {"within": same & ~torch.eye(len(captions), dtype=torch.bool), "across": ~same}
    found = {}
    for name, chosen in others.items():
        if bool(chosen.any(1).all()):
            found[f"{name}/mean"] = (distances * chosen).sum(1) / chosen.sum(1)
            found[f"{name}/nearest"] = distances.masked_fill(~chosen, float("inf")).amin(1)
    return found

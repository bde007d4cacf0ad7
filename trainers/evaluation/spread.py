"""How different the pictures of an evaluation are, in the features of an encoder: `spread/...` of its values.

spread/vendi              Vendi score of all pictures, its error the jackknife's over captions
spread/vendi_within       of the pictures of each caption alone
spread/within/mean        mean distance of a picture to the others of its caption
spread/within/nearest     distance to the nearest of them
spread/across/mean, spread/across/nearest      the same, to the pictures of other captions
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rewards.builtin.diversity import cosine, euclidean, make_embedding
from rewards.spread import spreads, vendi_draws, vendi_of_captions

PREFIX = "spread/"
Spread = Callable[[Tensor, int], dict[str, Tensor]]
"""Of images (E, 3, H, W) in [0, 1], so many of a caption next to each other."""


def spread_of(name: str | None, device: torch.device) -> Spread | None:
    """What measures the spread by the features of an embedding; None for None.

    Args:
        name: `colour` (whose distances are root mean square differences, and whose cosines are about mid-grey),
            `imagenet` or `file.py:name` (distances `(1 - cosine) / 2`).
        device: Where an embedding network runs.
    """
    if name is None:
        return None
    embed, is_colour = make_embedding(name, device), name == "colour"

    @torch.no_grad()
    def spread(images: Tensor, per_caption: int) -> dict[str, Tensor]:
        features = torch.cat([embed(part.to(device)).float().cpu() for part in images.split(64)])
        captions = torch.arange(len(images)) // per_caption
        distances = euclidean(features) if is_colour else cosine(features)
        seen = features - 0.5 if is_colour else features
        within = {"vendi_within": vendi_of_captions(seen, captions)} if per_caption > 1 else {}
        found = {"vendi": vendi_draws(seen, captions), **within, **spreads(distances, captions)}
        return {f"{PREFIX}{key}": value.float() for key, value in found.items()}

    return spread

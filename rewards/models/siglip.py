"""SigLIP (Zhai et al. 2023, arXiv:2303.15343) as rewards use it: which model, and how it wants its pictures."""

from __future__ import annotations

from rewards.images.preprocessing import Preprocessing

MODEL, REVISION = "google/siglip-so400m-patch14-384", "9fdffc58afc957d1a03a25b10dba0329ab15c2a3"
SIGLIP = Preprocessing(size=(384, 384), fit="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

"""An ensemble of scorers and the folder it is kept in.

    config.json            encoder, vocabulary, side, number of members, temperature
    members.safetensors    the weights, `<member>.<name>`; a frozen encoder's own weights are not copied

Scores are divided by the temperature: a difference of 1 between two pictures of one prompt is a log-odds of 1.
Legend: `K` members, `B` batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from rewards.base import UserError
from rewards.preferences.encoders import Encoder, make_encoder
from rewards.preferences.networks import Scorer
from rewards.preferences.vocabulary import Vocabulary

CONFIG, WEIGHTS = "config.json", "members.safetensors"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """What is needed to make the networks again.

    Attributes:
        encoder: Name, see `rewards.preferences.encoders`.
        words: Vocabulary in order.
        length: Words of a caption that are read.
        side: Of the pictures that the CNN sees.
        members: `K`.
        temperature: What scores are divided by.
    """

    encoder: str
    words: tuple[str, ...]
    length: int
    side: int
    members: int
    temperature: float

    def make_encoder(self, device: torch.device) -> Encoder:
        """The encoder; see there for what it raises."""
        vocabulary = Vocabulary(words=self.words, length=self.length)
        return make_encoder(self.encoder, vocabulary=vocabulary, side=self.side, device=device)


@final
class Ensemble:
    """Fitted scorers.

    Args:
        config: Of the ensemble.
        encoder: That made the features the members were fitted on.
        members: `K` of them.
    """

    def __init__(self, config: EnsembleConfig, encoder: Encoder, members: Sequence[Scorer]) -> None:
        assert len(members) == config.members
        self.config = config
        self.encoder = encoder
        self.members = tuple(member.eval().requires_grad_(False) for member in members)

    def scores(self, images: Tensor, captions: list[str]) -> Tensor:
        """Calibrated scores of every member, `(K, B)`, for `(B, 3, H, W)` in [0, 1]; differentiable in the images."""
        features, text = self.encoder.images(images), self.encoder.captions(captions)
        scores = [member.score(features, member.read(text)) for member in self.members]
        return torch.stack(scores) / self.config.temperature

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `members.safetensors`."""
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{number}.{name}": value.cpu().contiguous()
            for number, member in enumerate(self.members)
            for name, value in member.state_dict().items()
        }
        (folder / WEIGHTS).write_bytes(save(tensors))  # `save_file` would close it to all but its owner
        config = {
            "format": FORMAT,
            "encoder": self.config.encoder,
            "words": list(self.config.words),
            "length": self.config.length,
            "side": self.config.side,
            "members": self.config.members,
            "temperature": self.config.temperature,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, device: torch.device) -> Ensemble:
        """Reads what `save` wrote.

        Raises:
            UserError: The folder holds no ensemble, a damaged one, or one whose encoder is not to be had.
            ImportError: The encoder needs a package.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = read_config(folder)
        encoder = config.make_encoder(device)
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / WEIGHTS} cannot be read ({error}); fit the reward again") from error
        members = []
        for number in range(config.members):
            with torch.random.fork_rng():  # the weights drawn here are replaced
                member = encoder.scorer()
            prefix = f"{number}."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            try:
                member.load_state_dict(own)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1].strip()
                raise UserError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {reason}") from error
            members.append(member)
        return cls(config, encoder, members)


def read_config(folder: Path) -> EnsembleConfig:
    """What the networks in a folder are made from; reads no weights.

    Raises:
        UserError: The folder holds no ensemble.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is no fitted reward (no {CONFIG} in it); make one with ddpo rewards fit")
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["format"] != FORMAT:
            raise UserError(f"its format is {entry['format']!r}, this version reads {FORMAT}")
        return EnsembleConfig(
            encoder=str(entry["encoder"]),
            words=tuple(map(str, entry["words"])),
            length=int(entry["length"]),
            side=int(entry["side"]),
            members=int(entry["members"]),
            temperature=float(entry["temperature"]),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no configuration of a fitted reward: {type(error).__name__} {error}") from error

"""`ddpo rewards fit`, `pairs` and `label`: learning a reward from what people prefer."""

import argparse
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.cli.arguments import existing
from trainers.cli.parser import Parser, command

if TYPE_CHECKING:  # `ddpo --help` imports nothing heavy
    from rewards.preferences.fitting import FitConfig
    from rewards.preferences.pairs import Pair

_FIT_EPILOG = """\
PAIRS has a line for each pair, pictures relative to the file; label is 1 (a is better), 0 (b is better) or 0.5 (tie):
  {"prompt": "a red circle", "a": "003.png", "b": "017.png", "label": 1}

--encoder says what the reward sees:
  cnn                          pixels and the captions' words, for tiny pictures (default)
  open_clip:MODEL@PRETRAINED   frozen embeddings, such as open_clip:ViT-L-14-quickgelu@openai
  clip:MODEL, siglip:MODEL     frozen embeddings of transformers: a folder or owner/name[@revision]
  imagenet                     frozen EfficientNet-Lite0, and the captions' words

The folder then is a reward: {name: learned, options: {path: FOLDER, pessimism: 0.5}}.
"""

_SOURCE_HELP = "run folder (its evaluation pictures), or folder of pictures with metadata.jsonl"


def add_preference_commands(actions: "argparse._SubParsersAction[Parser]") -> None:
    """Adds the three subcommands to `ddpo rewards`."""
    fitting = command(actions, "fit", _fit, "learn a reward from labelled pairs of pictures", epilog=_FIT_EPILOG)
    fitting.add_argument("pairs", type=existing, metavar="PAIRS", help="JSON lines")
    fitting.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to make")
    fitting.add_argument("--encoder", default="cnn", metavar="NAME", help="what the reward sees (default cnn)")
    fitting.add_argument("--device", default="cpu", help="where to train (default cpu)")
    fitting.add_argument(
        "--mirror", action="store_true", help="also see pictures mirrored; only where no caption tells left from right"
    )
    for name, kind, about in _FIT_OPTIONS:
        fitting.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=about)

    pairing = command(actions, "pairs", _pairs, "choose the next pairs to label: those an ensemble disagrees on")
    pairing.add_argument("source", type=existing, metavar="SOURCE", help=_SOURCE_HELP)
    pairing.add_argument("--num", type=int, required=True, metavar="N", help="pairs to choose")
    pairing.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of pairs to write")
    pairing.add_argument("--reward", type=existing, metavar="FOLDER", help="fitted reward (without: choose at random)")
    pairing.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="pairs not to choose again; repeatable",
    )
    pairing.add_argument("--seed", type=int, default=0, help="of random choices (default 0)")

    labelling = command(actions, "label", _label, "a local page to say which of two pictures is better")
    labelling.add_argument("source", type=existing, metavar="SOURCE", help=f"file of pairs; or a {_SOURCE_HELP}")
    labelling.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="labels, appended to; to go on, repeat"
    )
    labelling.add_argument("--num", type=int, default=100, help="random pairs when SOURCE is a folder (default 100)")
    labelling.add_argument(
        "--train",
        action="store_true",
        help="once Ctrl-C ends the labelling, train on all labels by DPO; --key value as for ddpo train",
    )
    labelling.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (default: a free one)")
    labelling.add_argument("--no-browser", dest="open_browser", action="store_false", help="print the address only")


_FIT_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("members", int, "scorers in the ensemble (default 4)"),
    ("epochs", int, "passes over the training pairs, at most (default 30)"),
    ("patience", int, "passes without improvement before a member stops (default 6)"),
    ("batch_size", int, "pairs in a gradient step (default 128)"),
    ("learning_rate", float, "peak learning rate (default 2e-3)"),
    ("weight_decay", float, "decoupled weight decay (default 0.01)"),
    ("gauge", float, "weight of the term that pins the zero of the scores (default 1e-3)"),
    ("shift", int, "the CNN sees pictures moved by up to so many pixels (default 2)"),
    ("validation", float, "share of the prompts for early stopping and calibration (default 0.1)"),
    ("heldout", float, "share of the prompts for the report (default 0.2)"),
    ("side", int, "pixels of the square that the CNN sees: 16, 32, 64, 128 (default 32)"),
    ("seed", int, "of split, bootstrap, weights and order (default 0)"),
)


def _fit(options: argparse.Namespace, _: list[str]) -> None:
    from rewards.preferences.command import fit_reward

    text = fit_reward(
        options.pairs, options.out, encoder=options.encoder, config=_fit_config(options), device=options.device
    )
    print(text)


def _fit_config(options: argparse.Namespace) -> "FitConfig":
    from rewards.preferences.fitting import FitConfig

    given = {field.name: vars(options)[field.name] for field in fields(FitConfig)}
    return FitConfig(**{name: value for name, value in given.items() if value is not None})


def _pairs(options: argparse.Namespace, _: list[str]) -> None:
    from ddpo.validation import UserError
    from rewards.preferences.pairs import read_pairs, write_pairs

    if options.out.exists():
        raise UserError(f"{options.out} exists already; choose another --out, or remove it")
    known = frozenset(pair.key for path in options.exclude for pair in read_pairs(path, labelled=False))
    chosen = _propose(options.source, options.num, reward=options.reward, known=known, seed=options.seed)
    write_pairs(options.out, chosen)
    print(f"{options.out}: {len(chosen)} pairs; label them with ddpo rewards label {options.out} --out labels.jsonl")


def _label(options: argparse.Namespace, overrides: list[str]) -> None:
    from rewards.preferences.labels import LabelSession
    from rewards.preferences.pairs import read_pairs
    from rewards.preferences.server import serve
    from trainers.cli.label_training import check_is_run, train_on_labels

    if options.train:
        check_is_run(options.source)
    if options.source.suffix == ".jsonl":
        pairs = read_pairs(options.source, labelled=False)
    else:
        pairs = _propose(options.source, options.num)
    ended = suppress(KeyboardInterrupt) if options.train else nullcontext()
    with LabelSession(pairs, options.out) as session, ended:
        serve(session, port=options.port, open_browser=options.open_browser)
    if options.train:
        run = train_on_labels(options.source, options.out, overrides)
        print(f"look at {run}/before_after.png; on: ddpo rewards label {run} --out {options.out} --train")


def _propose(
    source: Path,
    num: int,
    *,
    reward: Path | None = None,
    known: frozenset[tuple[str, frozenset[Path]]] = frozenset(),
    seed: int = 0,
) -> "list[Pair]":
    import torch

    from ddpo.validation import UserError
    from rewards.preferences.ensemble import Ensemble
    from rewards.preferences.selection import propose
    from trainers.analysis.evaluation_pictures import pictures_of

    if num < 1:
        raise UserError(f"--num must be at least 1, got {num}")
    ensemble = None if reward is None else Ensemble.load(reward, device=torch.device("cpu"))
    return propose(pictures_of(source), num, ensemble=ensemble, known=known, seed=seed, show=True)

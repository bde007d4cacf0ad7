"""`ddpo rewards fit`, `pairs` and `label`: arguments, and the pictures of a run for the last two."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.commands.arguments import command

if TYPE_CHECKING:  # `ddpo --help` imports nothing heavy
    from rewards.preferences.fitting import FitConfig
    from rewards.preferences.pairs import Pair
    from rewards.preferences.pictures import Picture

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


def add_preference_commands(actions: argparse._SubParsersAction) -> None:
    """Adds the three subcommands to `ddpo rewards`."""
    fitting = command(actions, "fit", _fit, "learn a reward from labelled pairs of pictures", epilog=_FIT_EPILOG)
    fitting.add_argument("pairs", type=Path, metavar="PAIRS", help="JSON lines")
    fitting.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to make")
    fitting.add_argument("--encoder", default="cnn", metavar="NAME", help="what the reward sees (default cnn)")
    fitting.add_argument("--device", default="cpu", help="where to train (default cpu)")
    fitting.add_argument(
        "--mirror", action="store_true", help="also see pictures mirrored; only where no caption tells left from right"
    )
    for name, kind, about in _FIT_OPTIONS:
        fitting.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=about)

    pairing = command(actions, "pairs", _pairs, "choose the next pairs to label: those an ensemble disagrees on")
    pairing.add_argument("source", type=Path, metavar="SOURCE", help=_SOURCE_HELP)
    pairing.add_argument("--num", type=int, required=True, metavar="N", help="pairs to choose")
    pairing.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of pairs to write")
    pairing.add_argument("--reward", type=Path, metavar="FOLDER", help="fitted reward (without: choose at random)")
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
    labelling.add_argument("source", type=Path, metavar="SOURCE", help=f"file of pairs; or a {_SOURCE_HELP}")
    labelling.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="labels, appended to; to go on, repeat"
    )
    labelling.add_argument("--num", type=int, default=100, help="random pairs when SOURCE is a folder (default 100)")
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
    print(text)  # noqa: T201


def _fit_config(options: argparse.Namespace) -> "FitConfig":
    from rewards.preferences.fitting import FitConfig

    given = {field.name: vars(options)[field.name] for field in fields(FitConfig)}
    return FitConfig(**{name: value for name, value in given.items() if value is not None})


def _pairs(options: argparse.Namespace, _: list[str]) -> None:
    from rewards.preferences.pairs import read_pairs, write_pairs

    if options.out.exists():
        raise ValueError(f"{options.out} exists already; choose another --out, or remove it")
    known = frozenset(pair.key for path in options.exclude for pair in read_pairs(path, labelled=False))
    chosen = _propose(options.source, options.num, reward=options.reward, known=known, seed=options.seed)
    write_pairs(options.out, chosen)
    print(f"{options.out}: {len(chosen)} pairs; label them with ddpo rewards label {options.out} --out labels.jsonl")  # noqa: T201


def _label(options: argparse.Namespace, _: list[str]) -> None:
    from rewards.preferences.labels import LabelSession
    from rewards.preferences.pairs import read_pairs
    from rewards.preferences.server import serve

    if options.source.suffix == ".jsonl":
        pairs = read_pairs(options.source, labelled=False)
    else:
        pairs = _propose(options.source, options.num)
    with LabelSession(pairs, options.out) as session:
        serve(session, port=options.port, open_browser=options.open_browser)


def _propose(
    source: Path,
    num: int,
    *,
    reward: Path | None = None,
    known: frozenset[tuple[str, frozenset[Path]]] = frozenset(),
    seed: int = 0,
) -> "list[Pair]":
    import torch

    from rewards.preferences.ensemble import Ensemble
    from rewards.preferences.selection import propose

    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}")
    ensemble = None if reward is None else Ensemble.load(reward, device=torch.device("cpu"))
    return propose(pictures_of(source), num, ensemble=ensemble, known=known, seed=seed, show=True)


def pictures_of(source: Path) -> "list[Picture]":
    """The pictures of a folder with metadata, or of a run's evaluations, which are written out as files first.

    Args:
        source: a folder with `metadata.jsonl`, or a run folder; the pictures then go to `<run>/evaluations/pictures`.

    Raises:
        ValueError: neither, or a run without evaluations.
    """
    from rewards.preferences.pictures import METADATA, read_pictures

    if (source / METADATA).is_file() or not (source / "config.yaml").is_file():
        return read_pictures(source)
    return _write_evaluations(source)


def _write_evaluations(run: Path) -> "list[Picture]":
    from rewards.preferences.pictures import Picture, write_metadata
    from trainers.config_io import load_config
    from trainers.evaluation import Evaluation, chosen_prompts, evaluation_prompts
    from trainers.from_python import PROMPTS, refuse_objects
    from trainers.pictures import to_pil
    from trainers.prompt_record import check_evaluated

    config = load_config(run / "config.yaml")
    stems = sorted(path.stem for path in (run / "evaluations").glob("*.safetensors"))
    if not stems:
        raise ValueError(f"{run} has no evaluations, whose pictures could be compared; a run makes one when it starts")
    if config.evaluation.prompts is None:
        refuse_objects(run, only=PROMPTS)
    chosen = chosen_prompts(config.evaluation, evaluation_prompts(config))
    check_evaluated(run, chosen)
    texts = [prompt.text for prompt in chosen for _ in range(config.evaluation.images_per_prompt)]
    folder = run / "evaluations" / "pictures"
    folder.mkdir(exist_ok=True)
    found = []
    for stem in stems:
        evaluation = Evaluation.load(run / "evaluations", stem, texts)
        for number, (text, image) in enumerate(zip(texts, evaluation.pictures(), strict=True)):
            path = folder / f"{stem}_{number:04d}.png"
            if not path.is_file():
                to_pil(image).save(path)
            found.append(Picture(prompt=text, path=path))
    write_metadata(folder, found)
    return found

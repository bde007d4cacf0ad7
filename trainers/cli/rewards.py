"""`ddpo rewards`: list, score, test, serve, and learning one from preferences."""

import argparse
from pathlib import Path

from trainers.cli.arguments import existing, mapping, positive
from trainers.cli.parser import Parser, command
from trainers.cli.preferences import add_preference_commands


def add_reward_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds `rewards` and its subcommands."""
    rewards = commands.add_parser("rewards", help="list, score, test or serve rewards, or learn one from preferences")
    actions = rewards.add_subparsers(metavar="ACTION", required=True)
    listing = command(actions, "list", _rewards_list, "every reward that can be named")
    listing.add_argument("--verbose", action="store_true", help="also typical scores, extras, licences, options")
    listing.add_argument("--markdown", action="store_true", help="the built-in ones as the table of docs/rewards.md")
    scoring = command(actions, "score", _rewards_score, "score image files")
    scoring.add_argument("name", metavar="NAME", help="registered name, file.py:name or module:name")
    scoring.add_argument("images", type=existing, nargs="+", metavar="IMAGE", help="image files")
    scoring.add_argument("--prompt", metavar="TEXT", help="the prompt of the images")
    scoring.add_argument("--options", type=mapping, metavar="JSON", help="options of the reward")
    testing = command(actions, "test", _rewards_test, "check rewards on sample pictures; status 1 when a check fails")
    testing.add_argument(
        "names", metavar="NAME", nargs="*", help="rewards (default: all built-in ones that can run here)"
    )
    testing.add_argument("--options", type=mapping, metavar="JSON", help="options of the reward, for a single NAME")
    testing.add_argument("--prompt", metavar="TEXT", help="the prompt of the sample pictures")
    _add_rewards_serve(actions)
    add_preference_commands(actions)


_SERVE_EPILOG = """\
Serves rewards to `remote` rewards of runs elsewhere: another environment, machine or device.

  ddpo rewards serve ocr jpeg_compressibility
  ddpo rewards serve 'clip_score={"model": "ViT-B-32", "pretrained": "openai"}' my_rewards.py:sharp --device cuda:1
  DDPO_REWARD_TOKEN=... ddpo rewards serve ocr --host 0.0.0.0

A line of JSON with the address is printed once it is ready. Only 127.0.0.1 is served unless --host says otherwise, and
other machines only with a token. SIGTERM finishes what was accepted. Format and security: docs/reward_server.md
"""


def _add_rewards_serve(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = command(actions, "serve", _rewards_serve, "score for runs elsewhere, over HTTP", epilog=_SERVE_EPILOG)
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="+",
        help='as in a configuration; options: NAME={"key": value}; under another name: LABEL=NAME',
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--device", default="cpu", help="for rewards with weights, e.g. cuda:1 (default cpu)")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the token and nothing else (default: DDPO_REWARD_TOKEN, if set)",
    )
    parser.add_argument(
        "--max-batch", type=positive, default=64, help="images up to which requests are joined; 1: never (default 64)"
    )
    parser.add_argument(
        "--max-delay-ms", type=float, default=2.0, help="how long a request waits for others to join (default 2)"
    )
    parser.add_argument("--max-body-mb", type=float, default=64.0, help="largest request (default 64)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds until a request is given up (default 120)"
    )
    parser.add_argument("--max-queue", type=positive, default=64, help="requests waiting at once (default 64)")
    parser.add_argument(
        "--ends-with-parent", action="store_true", help="end when standard input closes, as with its starter's end"
    )


def _rewards_list(options: argparse.Namespace, _: list[str]) -> None:
    from rewards.tools.cli import catalogue, list_rewards

    print(catalogue() if options.markdown else list_rewards(verbose=options.verbose))


def _rewards_score(options: argparse.Namespace, _: list[str]) -> None:
    from rewards.tools.cli import score

    print(score(options.name, options.images, prompt=options.prompt, options=options.options))


def _rewards_test(options: argparse.Namespace, _: list[str]) -> int:
    from rewards.tools.cli import run_selftests

    text, passed = run_selftests(options.names, options=options.options, prompt=options.prompt)
    print(text)
    return 0 if passed else 1


def _rewards_serve(options: argparse.Namespace, _: list[str]) -> None:
    from rewards.serving.serve import serve
    from rewards.serving.server import Limits

    limits = Limits(
        max_batch=options.max_batch,
        max_delay=options.max_delay_ms / 1000,
        max_body_mb=options.max_body_mb,
        timeout=options.timeout,
        max_queue=options.max_queue,
    )
    serve(
        options.names,
        host=options.host,
        port=options.port,
        device=options.device,
        token_file=options.token_file,
        limits=limits,
        ends_with_parent=options.ends_with_parent,
        announce=lambda line: print(line, flush=True),
    )

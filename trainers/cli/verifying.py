"""`ddpo verify` and `ddpo check`: the mathematics, and a model."""

import argparse
from pathlib import Path

from trainers.cli.arguments import as_given, model, names, positive
from trainers.cli.parser import Parser, command


def add_verification_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds the subcommands."""
    _add_verify(commands)
    _add_check(commands)


_VERIFY_EPILOG = """\
Without --policy: closed-form control problems, solvers, and the trainer held to an optimum that is known.
With --policy: the likelihood of that model (log-probabilities, KL, first ratio, stock images, gradient).

  ddpo verify                              about a minute on 2 cores
  ddpo verify --full --report verification
  ddpo verify --only lqr,trainer
  ddpo verify --policy stable-diffusion-v1-5/stable-diffusion-v1-5 --precision bf16

Exit status 1 when a measurement is outside its tolerance.
"""


def _add_verify(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = command(
        commands, "verify", _verify, "hold the mathematics to exact answers, and print the table", epilog=_VERIFY_EPILOG
    )
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument(
        "--full",
        dest="level",
        action="store_const",
        const="full",
        help="also the longer checks (about 6 minutes of one core)",
    )
    levels.add_argument(
        "--slow", dest="level", action="store_const", const="slow", help="all checks, the slowest too (7 minutes)"
    )
    parser.add_argument("--only", type=names, metavar="GROUP,...", help="only these groups of checks")
    parser.add_argument(
        "--json",
        dest="json_file",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the measurements as JSON (default: to stdout)",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write figures and one HTML page here")
    parser.add_argument(
        "--policy", dest="model", type=model, metavar="MODEL", help="check this pipeline: a folder, a hub id, or shapes"
    )
    parser.add_argument(
        "--sampler", dest="sampler_kind", help="with --policy: sampler.kind (default: what fits the model)"
    )
    parser.add_argument("--num-steps", type=positive, default=10, help="with --policy: denoising steps (default 10)")
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="with --policy: guidance (default 5)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="with --policy: of the network"
    )
    parser.set_defaults(config=None, height=None, width=None, level="fast")


_CHECK_EPILOG = """\
Holds the policy to the stock pipeline: model output of every step, noise-free images, the saved adapter in a fresh
pipeline; then the likelihood, as verify --policy does. The sampler is the one that fits the model unless named.
A model that edits is given input images made here.

  ddpo check stabilityai/stable-diffusion-xl-base-1.0 --precision bf16
  ddpo check ./my_pipeline --num-steps 4 --guidance-scale 1

Exit status 1 when a measurement is outside its tolerance, 2 with the reason when the pipeline cannot be trained.
"""


def _add_check(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = command(commands, "check", _check, "whether a pipeline can be trained: the table", epilog=_CHECK_EPILOG)
    parser.add_argument("model", type=model, metavar="MODEL", help="a folder, a single file, a hub id, or shapes")
    parser.add_argument("--config", metavar="MODEL", help="of a single file: a pipeline of the same kind, for settings")
    parser.add_argument(
        "--sampler",
        dest="sampler_kind",
        choices=("ddim", "ddpm", "lcm", "flow_sde", "dance_sde", "cps"),
        help="default: what fits",
    )
    parser.add_argument("--num-steps", type=positive, default=10, help="denoising steps (default 10)")
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="as the pipeline defines it (default 5)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network")
    parser.add_argument("--height", type=positive, help="pixels (default: the pipeline's own)")
    parser.add_argument("--width", type=positive, help="pixels (default: the pipeline's own)")


def _verify(options: argparse.Namespace, _: list[str]) -> int:
    from trainers.verification.command import VerifyRequest, verify
    from trainers.verification.conformance import SubjectRequest

    options.subject = None if options.model is None else as_given(SubjectRequest, options)
    return verify(as_given(VerifyRequest, options))


def _check(options: argparse.Namespace, _: list[str]) -> int:
    from trainers.verification.conformance import SubjectRequest, check, load_subject

    return check(load_subject(as_given(SubjectRequest, options)))

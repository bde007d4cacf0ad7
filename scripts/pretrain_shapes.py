"""Pretrains the pipeline of coloured shapes that ships in `ddpo/assets/shapes`.

python scripts/pretrain_shapes.py --output runs/shapes --minutes 40

Set OMP_WAIT_POLICY=PASSIVE where other processes share the cores. A killed run goes on with --resume.
"""

import argparse
from pathlib import Path

from trainers.pretraining.pretrain import pretrain


def main() -> None:
    """Parses the command line and runs the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--work", type=Path, help="folder of pictures and training states (default: OUTPUT-work)")
    parser.add_argument("--minutes", type=float, default=40.0, help="training of the denoiser (default: 40)")
    parser.add_argument("--vae-minutes", type=float, default=6.0, help="training of the autoencoder (default: 6)")
    parser.add_argument("--images", type=int, default=30_000, help="pictures to render (default: 30000)")
    parser.add_argument("--resume", action="store_true", help="continue from the training states in WORK")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, weights, batches and noise (default: 0)")
    options = parser.parse_args()
    accuracies = pretrain(
        options.output,
        work=options.work or options.output.with_name(f"{options.output.name}-work"),
        minutes=options.minutes,
        vae_minutes=options.vae_minutes,
        num_images=options.images,
        resume=options.resume,
        seed=options.seed,
    )
    for name, value in accuracies.items():
        print(f"{name:10} {value:.3f}")


if __name__ == "__main__":
    main()

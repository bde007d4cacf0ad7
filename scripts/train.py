"""`ddpo train` as a script, for launchers: `accelerate launch scripts/train.py CONFIG`."""

import sys

from trainers.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

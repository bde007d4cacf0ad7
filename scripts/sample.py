"""`ddpo sample` as a script."""

import sys

from trainers.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))

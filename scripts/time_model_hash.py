"""How long it takes to hash a pretrained model of some size, as every run does once at its start.

python scripts/time_model_hash.py --gigabytes 5
"""

import argparse
import hashlib
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Writes a file, hashes it, and prints the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size (default 5)")
    options = parser.parse_args()
    block = bytes(range(256)) * 2**16
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        with path.open("wb") as file:
            for _ in range(round(options.gigabytes * 1e9 / len(block))):
                file.write(block)
        started = time.process_time()
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        seconds = time.process_time() - started
    print(f"{options.gigabytes:g} GB: {seconds:.1f} s of one core")


if __name__ == "__main__":
    main()

"""`python -m trainers` is the command `ddpo`."""

from trainers.cli import entry_point

if __name__ == "__main__":
    entry_point()

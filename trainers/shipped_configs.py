"""Where the configurations, prompt lists and launch files that come with the project lie, and what they are."""

from pathlib import Path

_INSTALLED = Path(__file__).resolve().parent / "configs"
_CHECKOUT = Path(__file__).resolve().parent.parent / "configs"

CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
PROMPTS = CONFIGS / "prompts"


def shipped() -> dict[str, str]:
    """The shipped configurations by name, each with the line that its file begins with."""
    files = sorted(CONFIGS.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for file in files}

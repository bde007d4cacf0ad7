"""Where the configurations, prompt lists and launch files that come with the project lie."""

from pathlib import Path

_INSTALLED = Path(__file__).resolve().parent / "configs"
_CHECKOUT = Path(__file__).resolve().parent.parent / "configs"

CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
PROMPTS = CONFIGS / "prompts"

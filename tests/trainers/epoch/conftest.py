"""The tiny pipeline that the runs of this folder train."""

from pathlib import Path

import pytest

from tests.tiny import tiny_stable_diffusion


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion, saved."""
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder, safe_serialization=True)
    return folder

"""Pictures to score, and a registry that forgets what a test registered."""

import importlib
import itertools

import pytest
import torch

from rewards import loading, registry


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompts():
    return ["a red circle", "a blue square", "two crosses", "a green triangle"]


@pytest.fixture
def metadata():
    return [{} for _ in range(4)]


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    return (tmp_path_factory.mktemp("caches") / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, caches):
    """What is remembered of downloads is remembered by one test alone."""
    monkeypatch.setenv("DDPO_CACHE", str(next(caches)))


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    for module in set(registry.BUILT_IN.values()):
        importlib.import_module(module)  # a module registers its rewards only when it is first imported
    monkeypatch.setattr(registry, "_registrations", dict(registry._registrations))
    monkeypatch.setattr(loading, "_files", {})

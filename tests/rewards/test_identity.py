"""The hash of a reward changes with its code, arguments and weights, and with nothing else."""

import functools

import numpy as np
import torch
from torch import nn

from rewards import Card, as_reward, loading, resolve
from rewards.identity import identify

CODE = """
from torch import nn

class Net:
    def __init__(self, *, device, gain=1.0):
        self.network = nn.Linear(3, 1).to(device)
        nn.init.constant_(self.network.weight, {weight})
        nn.init.zeros_(self.network.bias)
        self.gain = gain
        self.me = self

    def __call__(self, images, prompts, metadata):
        return self.network(images.mean(dim=(2, 3))).flatten() * self.gain
"""


def hashed(tmp_path, monkeypatch, code, options=None):
    monkeypatch.setattr(loading, "_files", {})
    file = tmp_path / "mine.py"
    file.write_text(code)
    reward = resolve(f"{file}:Net", options=options)
    return identify(reward, options=options).hash


def test_the_hash_repeats_and_follows_code_and_arguments(tmp_path, monkeypatch):
    one = CODE.format(weight=1.0)
    hashes = [
        hashed(tmp_path, monkeypatch, one),
        hashed(tmp_path, monkeypatch, one),
        hashed(tmp_path, monkeypatch, one.replace("* self.gain", "* self.gain ** 2")),
        hashed(tmp_path, monkeypatch, one, {"gain": 2.0}),
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_hash_ignores_words_imports_and_code_that_is_not_used(tmp_path, monkeypatch):
    one = CODE.format(weight=1.0)
    told = one.replace("class Net:", 'class Net:\n    """A net."""\n    # it has one layer')
    more = f"import math\nfrom os import path\n{told}\ndef unused():\n    return {{}}\n"
    assert hashed(tmp_path, monkeypatch, one) == hashed(tmp_path, monkeypatch, more)


USING = """
from rewards import register
SCALE = {scale}
OTHER = 1
def half(x):
    return x * SCALE / 2
@register("using", description="{about}")
def Net(images, prompts, metadata):
    import math
    return half(images.mean((1, 2, 3)))
"""


def test_the_hash_follows_what_the_function_uses_in_its_own_module(tmp_path, monkeypatch):
    code = USING.format(scale=1, about="a")
    variants = [code.replace("x * SCALE", "x + SCALE"), USING.format(scale=2, about="a")]
    first = hashed(tmp_path, monkeypatch, code)
    assert len({first, *(hashed(tmp_path, monkeypatch, variant) for variant in variants)}) == 3
    assert hashed(tmp_path, monkeypatch, USING.format(scale=1, about="b")) == first
    assert hashed(tmp_path, monkeypatch, code.replace("OTHER = 1", "OTHER = 2")) == first


def test_a_reward_of_the_package_is_its_name_and_version_wherever_its_code_stands(monkeypatch):
    brightness = resolve("brightness")
    first = identify(brightness).hash
    monkeypatch.setattr(brightness.function, "__module__", "rewards.elsewhere")
    monkeypatch.setattr(brightness.function, "__qualname__", "moved")
    assert identify(brightness).hash == first != identify(resolve("redness")).hash
    monkeypatch.setattr("rewards.identity.card_of", lambda _: Card(version=2))
    assert identify(brightness).hash != first


class Holder:
    def __init__(self, parts):
        self.parts = parts

    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))


def test_every_weight_counts_wherever_the_object_keeps_it():
    def made(change=0.0):
        torch.manual_seed(0)
        parts = {"networks": [nn.Linear(2, 2), nn.BatchNorm1d(2)], "head": Holder((torch.ones(3),))}
        parts["networks"][1].running_mean += change
        return parts

    hashes = {
        identify(as_reward(Holder(parts))).hash
        for parts in (made(), made(), made(1e-3), made() | {"head": Holder((torch.tensor([1.0, 1.0, 1.5]),))})
    }
    assert len(hashes) == 3


def test_a_reward_made_of_others_has_their_identity_in_it(monkeypatch):
    def composite(weight):
        terms = [{"name": "brightness", "ideal": 1.0, "weight": weight}, {"name": "redness", "ideal": 1.0}]
        return identify(resolve("chebyshev", options={"terms": terms}), options={"terms": terms}).hash

    assert composite(1.0) == composite(1.0) != composite(2.0)


def test_versions_and_the_place_are_noted():
    identity = identify(resolve("brightness"))
    assert identity.versions["torch"] == torch.__version__.partition("+")[0]
    assert set(identity.to_json()) == {"name", "hash", "form", "package_version", "versions", "where"}
    assert identity.where == "this process"


class Scaled:
    def __init__(self, gain, offsets=()):
        self.gain = gain
        self.offsets = np.asarray(offsets)

    def score(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)) * self.gain

    __call__ = score


def powered(images, prompts, metadata, *, of, kind="mean"):
    return images.mean(dim=(1, 2, 3)) ** of


class Network(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)) * self.gain


def hash_of(target):
    return identify(as_reward(target, name="r")).hash


def test_numbers_and_arrays_of_an_object_count():
    made = [Scaled(1.0), Scaled(1.5), Scaled(1.0, [0.0]), Scaled(1.0, [1.0]), Scaled(1.0, np.ones(1, np.float32))]
    assert len({hash_of(one) for one in made}) == len(made)
    assert hash_of(Scaled(1.5, [2.0])) == hash_of(Scaled(1.5, [2.0]))
    assert hash_of(Network(1.0)) == hash_of(Network(1.0)) != hash_of(Network(2.0))


def test_equal_numbers_in_other_places_count():
    assert hash_of(Holder([1.0, 1.0, 2.0])) != hash_of(Holder([1.0, 2.0, 2.0]))


def test_a_bound_method_is_its_object_and_its_function():
    assert hash_of(Scaled(1.0).score) == hash_of(Scaled(1.0).score) != hash_of(Scaled(2.0).score)
    assert hash_of(Scaled(1.0).score) != hash_of(Scaled(1.0))


def test_a_partial_is_its_function_and_its_arguments():
    variants = [{"of": 1}, {"of": 2}, {"of": 2, "kind": "median"}, {"of": torch.ones(1)}, {"of": torch.zeros(1)}]
    assert len({hash_of(functools.partial(powered, **options)) for options in variants}) == len(variants)
    assert hash_of(functools.partial(powered, of=2)) == hash_of(functools.partial(powered, of=2))
    assert hash_of(functools.partial(Scaled(1.0).score)) != hash_of(functools.partial(Scaled(2.0).score))

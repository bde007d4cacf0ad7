"""From prompts to conditions: each prompt by itself, remembered within bounds."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpo import Policy, SamplerConfig
from ddpo.pipeline.lru import Recent
from tests.ddpo.families import tiny_flux, tiny_sdxl
from tests.ddpo.more_families import tiny_qwen
from tests.ddpo.tools import PROMPTS, SIZE, make_policy
from tests.tiny import tiny_stable_diffusion

EMBEDDINGS = "encoder_hidden_states"
ODE = SamplerConfig(kind="ode", num_steps=2, guidance_scale=4.0, **SIZE)


@pytest.fixture
def encoded(monkeypatch):
    """A policy and the texts that its text encoder is given."""
    policy, texts = make_policy(), []
    encode = policy.pipeline.encode_prompt
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda p, *a, **k: texts.extend(p) or encode(p, *a, **k))
    return policy, texts


def encoder_of(policy):
    return policy._view.wiring.encoder


def remembered(policy, prompt):
    return encoder_of(policy)._branches.get((prompt, ""))


def assert_same(one, two):
    for first, second in ((one.positive, two.positive), (one.negative, two.negative)):
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_qwen])
def test_an_encoding_does_not_depend_on_what_was_encoded_with_it_or_before(build):
    """Of these two, a batch of seven prompts is not to the last bit seven batches of one."""
    prompts = [*PROMPTS, "one", "a b c d e", "ten cats"]
    alone, together = (Policy(build(), sampler=ODE) for _ in range(2))
    whole = together.encode(prompts)
    for row, prompt in enumerate(prompts):
        own = alone.encode([prompt])
        for side in ("positive", "negative"):
            for name, value in getattr(own, side).items():
                shared = getattr(whole, side)[name][row]
                assert torch.equal(value[0], shared[: len(value[0])] if value[0].ndim else shared), (prompt, name)


def test_a_forgotten_prompt_is_encoded_again_to_the_same_bits(encoded, monkeypatch):
    policy, texts = encoded
    expected = policy.encode(PROMPTS)
    size = sum(value.nbytes for value in remembered(policy, PROMPTS[0])[0].values())
    monkeypatch.setattr("ddpo.pipeline.encoding.REMEMBERED_BYTES", 4 * size)  # of which the unconditional branch is one
    policy = policy.with_sampler(replace(policy.sampler, guidance_scale=4.0))  # with an encoder of its own
    texts.clear()
    assert_same(policy.encode(PROMPTS), expected)
    assert texts == PROMPTS
    assert_same(policy.encode(PROMPTS[1:]), expected.index(torch.tensor([1, 2, 3])))
    assert texts == PROMPTS, "the last three are remembered"
    assert_same(policy.encode(PROMPTS[:1]), expected.index(torch.tensor([0])))
    assert texts == [*PROMPTS, PROMPTS[0]]


def test_more_prompts_at_once_than_can_be_remembered(monkeypatch):
    expected = make_policy().encode(PROMPTS)
    monkeypatch.setattr("ddpo.pipeline.encoding.REMEMBERED_BYTES", 0)
    policy = make_policy()
    assert_same(policy.encode(PROMPTS), expected)
    assert remembered(policy, PROMPTS[0]) is None


def test_what_is_remembered_holds_no_more_memory_than_its_values_and_one_unconditional_branch():
    policy = make_policy()
    policy.encode(PROMPTS)
    entries = [remembered(policy, prompt) for prompt in PROMPTS]
    for positive, negative in entries:
        assert negative[EMBEDDINGS] is entries[0][1][EMBEDDINGS]
        for value in (*positive.values(), *negative.values()):
            assert value.untyped_storage().nbytes() == value.nbytes
    assert len({positive[EMBEDDINGS].data_ptr() for positive, _ in entries}) == len(PROMPTS)


@given(limit=st.integers(0, 9), used=st.lists(st.integers(0, 5), max_size=30))
def test_the_values_forgotten_are_those_not_used_for_longest(limit, used):
    """Against a list in order of use; value n takes n bytes."""
    recent, model = Recent(limit), OrderedDict()
    for n in used:
        assert (recent.get(n) is not None) == (n in model)
        if n in model:
            model.move_to_end(n)
            continue
        recent.put(n, str(n), n)
        model[n] = str(n)
        while sum(model) > limit:
            model.popitem(last=False)
    assert [n for n in range(6) if recent.get(n) == str(n)] == sorted(model)


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_flux, tiny_qwen])
@pytest.mark.parametrize(
    ("change", "shared"),
    [({"num_steps": 3}, True), ({"guidance_scale": 1.0}, False), ({"height": 32, "width": 32}, False)],
    ids=["steps", "guidance", "size"],
)
def test_another_sampler_shares_encodings_only_where_they_are_the_same(build, change, shared):
    """FLUX takes the guidance scale itself as part of its condition."""
    policy, sampler = Policy(build(), sampler=ODE), replace(ODE, **change)
    policy.encode(PROMPTS[:2])
    view = policy.with_sampler(sampler)
    assert (encoder_of(view) is encoder_of(policy)) == shared
    assert_same(view.encode(PROMPTS[:2]), Policy(build(), sampler=sampler).encode(PROMPTS[:2]))


@pytest.mark.parametrize(
    ("prompts", "metadata", "message"),
    [
        ("a cat", None, r"prompts must be a sequence of texts, got one text; give \['a cat'\]"),
        ([], None, "there is no prompt to encode; give at least one"),
        (["a", "b"], [{}], "one dictionary of metadata for each of 2 prompts, got 1"),
    ],
    ids=["text", "none", "metadata"],
)
def test_prompts_that_are_none_are_refused(prompts, metadata, message):
    with pytest.raises(ValueError, match=message):
        make_policy().encode(prompts, metadata)

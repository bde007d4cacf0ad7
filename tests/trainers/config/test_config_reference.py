"""The declared keys: documented, closed to others, with defaults that the reference shows."""

from ddpo.weights.adapter import FullConfig
from rewards.docstrings import documented
from trainers.config import Config
from trainers.config.reference import reference
from trainers.config.schema import declared, element_of, fields_of, is_optional, kinds_of, plain, words


def groups():
    for hint in fields_of(Config).values():
        yield from kinds_of(hint).values()
        yield from (group for group in (plain(hint), element_of(hint)) if fields_of(group))


def test_every_key_is_documented_and_no_undeclared_one_is():
    for group in {Config, *groups()}:
        keys = {field.name for field in declared(group)}
        if "kind" in keys and len(words(fields_of(group)["kind"])) == 1:  # the group's own docstring says what it is
            keys.remove("kind")
        assert set(documented(group, "Attributes")) == keys, group


def test_every_group_refuses_unknown_keys():
    for group in {Config, *groups()}:
        assert group.__pydantic_config__ == {"extra": "forbid"}, group


def test_the_default_kind_of_a_union_is_its_first_member():
    for field in declared(Config):
        hint = fields_of(Config)[field.name]
        if kinds := kinds_of(hint):
            assert type(getattr(Config(), field.name)) is (
                type(None) if is_optional(hint) else next(iter(kinds.values()))
            )


def test_the_reference_lists_every_key():
    text = reference()
    assert all(f"--{field.name}" in text or f"{field.name}:" in text for field in declared(Config))
    assert "--optimizer.learning_rate float|null  (default null)" in text
    assert "--kl.target float  (required)" in text
    assert max(map(len, text.splitlines())) <= 130


def test_defaults_that_depend_on_other_keys():
    assert Config().learning_rate == 3e-4
    assert Config(adapter=FullConfig()).learning_rate == 1e-5
    assert Config().gate_tolerance_nats == 1e-5

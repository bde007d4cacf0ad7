"""Names become rewards: by registration, file, module and entry point; every miss says what would have worked."""

import importlib
import importlib.metadata
import pkgutil
import sys

import pytest
import torch

import rewards
from rewards import (
    DescribedReward,
    Description,
    RewardError,
    UserError,
    as_reward,
    available,
    register,
    registry,
    resolve,
)
from rewards.loading import load_file, load_module
from rewards.requirements import check_requirements

FILE = '''
import torch
from rewards import register

@register("softness", differentiable=True, range=(0, 2), description="How soft.")
def soft(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))

def plain(images, prompts, metadata):
    """A plain function."""
    return torch.zeros(len(images))

class Scaled:
    """Brightness times a factor."""
    def __init__(self, *, device, factor, offset=0.0):
        self.device, self.factor, self.offset = device, factor, offset
    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)) * self.factor + self.offset

class NoDevice:
    def __init__(self, factor=1.0):
        pass

class NotCallable:
    def __init__(self, *, device):
        pass

constant = 3
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def plug_ins(monkeypatch):
    """Call with `{name: "module:object"}` to make these the installed entry points."""

    def install(points):
        found = [
            importlib.metadata.EntryPoint(name=name, value=value, group=registry.ENTRY_POINT_GROUP)
            for name, value in points
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: found if group == "ddpo.rewards" else [])

    return install


# -------------------------------------------------------------------------------------------- registration


def test_register_works_bare_and_with_arguments():
    @register
    def bare(images, prompts, metadata):
        """First line.

        Second line.
        """
        return torch.zeros(len(images))

    @register("dressed", differentiable=True, range=(0, float("inf")), description="Said here.")
    def _(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))

    assert (resolve("bare").function, resolve("bare").description) == (bare, "First line.")
    dressed = resolve("dressed")
    assert (dressed.differentiable, dressed.range, dressed.description) == (True, (0, float("inf")), "Said here.")
    assert "test_registry.py:" in dressed.source


def test_register_without_a_name_takes_the_functions():
    @register(differentiable=True)
    def anonymous(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))

    assert resolve("anonymous").differentiable


def test_duplicate_names_name_both_sources():
    @register("twice")
    def first(images, prompts, metadata):
        return torch.zeros(len(images))

    with pytest.raises(
        ValueError, match=r"'twice' is already taken by .*first.*test_registry.py:\d+.*second.*other_name"
    ):

        @register("twice")
        def second(images, prompts, metadata):
            return torch.zeros(len(images))

    assert resolve("twice").function is first


def test_built_in_names_cannot_be_taken_even_before_they_are_imported(monkeypatch):
    monkeypatch.setattr(registry, "_registrations", {})
    with pytest.raises(ValueError, match=r"'brightness' is already taken by the built-in module rewards.builtin.color"):

        @register
        def brightness(images, prompts, metadata):
            return torch.zeros(len(images))


def test_running_a_definition_again_replaces_it():
    def define(value):
        @register("again")
        def cell(images, prompts, metadata):
            return torch.full((len(images),), value)

    define(1.0)
    define(2.0)
    assert resolve("again")(torch.zeros(1, 3, 2, 2), [""], [{}]).total.item() == 2.0


@pytest.mark.parametrize("name", ["", "two words", "a:b", "a/b"])
def test_unusable_names_are_refused(name):
    with pytest.raises(ValueError, match="without spaces"):
        register(name)(lambda images, prompts, metadata: None)


@pytest.mark.parametrize("bounds", [(1, 0), (1, 1), (0,), (0, float("nan"))])
def test_impossible_ranges_are_refused(bounds):
    with pytest.raises(ValueError, match="low < high"):
        register("r", range=bounds)(lambda images, prompts, metadata: None)


@pytest.mark.parametrize("name", sorted(registry.BUILT_IN))
def test_every_built_in_is_found_and_says_what_it_is(name):
    reward = registry.find(name)
    assert reward.name == name
    assert reward.description
    assert reward.range is not None


def test_built_in_table_lists_all_that_the_modules_register():
    for module in pkgutil.walk_packages(rewards.__path__, "rewards."):
        importlib.import_module(module.name)
    registered = {
        name for name, noted in registry._registrations.items() if noted.target.__module__.startswith("rewards.")
    }
    assert registered == set(registry.BUILT_IN)


# --------------------------------------------------------------------------------------------------- files


def test_reward_from_a_file_by_function_or_registered_name(file, images, prompts, metadata):
    by_registered, by_function = resolve(f"{file}:softness"), resolve(f"{file}:soft")
    assert by_registered == by_function
    assert by_registered.differentiable
    assert by_registered.range == (0, 2)
    torch.testing.assert_close(by_registered(images, prompts, metadata).total, images.mean(dim=(1, 2, 3)))


def test_undecorated_function_is_described_by_its_docstring(file):
    reward = resolve(f"{file}:plain")
    assert (reward.name, reward.description, reward.differentiable) == ("plain", "A plain function.", False)
    assert f"{file}:9" in reward.source


def test_a_file_is_run_once(file):
    assert resolve(f"{file}:plain").function is resolve(f"{file}:plain").function


def test_class_is_constructed_with_device_and_options(file, images, prompts, metadata):
    reward = resolve(f"{file}:Scaled", device="cpu", options={"factor": 3.0})
    assert reward.function.device == torch.device("cpu")
    torch.testing.assert_close(reward(images, prompts, metadata).total, 3 * images.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Scaled", {}, r"needs the option 'factor' \(valid options: factor, offset\)"),
        ("Scaled", {"facto": 1.0}, r"unknown option 'facto' \(did you mean 'factor'\? valid options: factor, offset\)"),
        ("Scaled", {"factor": 1.0, "device": "cpu"}, r"`device` is not an option"),
        ("NoDevice", {}, r"'NoDevice' must take a keyword argument `device`.*my_rewards.py"),
        ("NotCallable", {}, r"'NotCallable' needs __call__"),
        ("plain", {"factor": 1.0}, r"'plain' is a function and takes no options, got factor.*make it a class"),
        ("constant", {}, r"'constant' is a int, not a reward; a reward is a function \(images"),
        ("softnes", {}, r"my_rewards.py has no reward 'softnes'; did you mean 'softness'\?"),
        ("zzz", {}, r"has no reward 'zzz'; it defines NoDevice, NotCallable, Scaled, plain, soft, softness"),
        ("", {}, r"has no reward ''; it defines"),
    ],
)
def test_misuse_of_a_file_says_what_would_work(file, name, options, message):
    with pytest.raises(ValueError, match=message):
        resolve(f"{file}:{name}", options=options)


def test_file_without_a_name_says_how_to_write_it(file):
    with pytest.raises(ValueError, match=r"names a file but not what is in it; write .*my_rewards.py:name"):
        resolve(str(file))


def test_missing_file_is_named():
    with pytest.raises(ValueError, match=r"no such file: nowhere/mine.py"):
        resolve("nowhere/mine.py:f")


def test_file_that_fails_to_run_is_chained_and_can_be_repaired(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("1 / 0")
    with pytest.raises(ValueError, match=r"broken.py cannot be run, it raised ZeroDivisionError") as caught:
        load_file(path)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    path.write_text("value = 1")
    assert load_file(path).value == 1


# ------------------------------------------------------------------------------------------------- modules


def test_reward_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "scoring_plugin.py").write_text(FILE.replace("softness", "plugin_softness"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scoring_plugin", raising=False)
    assert resolve("scoring_plugin:soft").name == "plugin_softness"
    assert resolve("scoring_plugin:plain").name == "plain"


def test_unknown_module_suggests_the_file_when_there_is_one(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    with pytest.raises(ValueError, match=r"no module 'my_rewards'; write my_rewards.py:name"):
        resolve("my_rewards:plain")
    with pytest.raises(ValueError, match=r"no module 'no_such_package.scores'; install it, or write file.py:name"):
        resolve("no_such_package.scores:f")


def test_a_module_missing_its_own_dependency_is_not_called_unknown(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"importing needs_more needs 'no_such_dependency', which is not installed"):
        load_module("needs_more")


@pytest.mark.parametrize("spec", [":f", "..:f", "a b:f", "rewards/color:brightness"])
def test_things_that_are_no_module_name_are_refused(spec):
    with pytest.raises(ValueError, match="is not a module name"):
        resolve(spec)


# -------------------------------------------------------------------------------------------- entry points


def test_reward_from_an_entry_point(tmp_path, monkeypatch, plug_ins):
    (tmp_path / "installed_plugin.py").write_text(FILE.replace("softness", "plugged"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "installed_plugin", raising=False)
    plug_ins([("plugged", "installed_plugin:soft"), ("flat", "installed_plugin:plain")])
    assert {"plugged", "flat"} <= set(available())
    assert "installed_plugin" not in sys.modules  # listing imports nothing
    assert resolve("plugged").differentiable
    assert resolve("plugged").differentiable  # now registered and an entry point, yet one and the same
    assert resolve("flat").name == "flat"


def test_an_entry_point_may_export_what_another_module_of_its_package_registers(tmp_path, monkeypatch, plug_ins):
    package = tmp_path / "plug_reexporting"
    package.mkdir()
    (package / "__init__.py").write_text("from plug_reexporting.scores import warmth\n")
    (package / "scores.py").write_text(
        "from rewards import register\n\n@register\ndef warmth(images, prompts, metadata):\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plug_ins([("warmth", "plug_reexporting:warmth")])
    first, second = resolve("warmth"), resolve("warmth")
    assert first == second and first.name == "warmth"
    plug_ins([("warmth", "plug_reexporting:warmth"), ("warmth", "other_plug:warmth")])
    with pytest.raises(ValueError, match="claimed by plug_reexporting.scores.warmth .* and entry point other_plug"):
        resolve("warmth")


def test_entry_points_that_clash_or_fail_are_named(plug_ins):
    plug_ins([("x", "one:f"), ("x", "two:f"), ("brightness", "other:f"), ("gone", "no_such_plugin:f")])
    with pytest.raises(ValueError, match=r"'x' is claimed by entry point one:f and entry point two:f"):
        resolve("x")
    with pytest.raises(
        ValueError, match=r"'brightness' is claimed by rewards.builtin.color.brightness .* and entry point other:f"
    ):
        resolve("brightness")
    with pytest.raises(
        ValueError, match=r"'gone': its entry point no_such_plugin:f cannot be loaded, it raised ModuleNotFound"
    ):
        resolve("gone")


# -------------------------------------------------------------------------------------------- other errors


def test_unknown_names_suggest_near_ones_and_the_file_form():
    with pytest.raises(ValueError, match=r"unknown reward 'brightn'; did you mean 'brightness'.*file.py:name"):
        resolve("brightn")
    with pytest.raises(ValueError, match=r"unknown reward 'qqqq'; known: .*jpeg_compressibility.*file.py:name"):
        resolve("qqqq")


def test_as_reward_wraps_functions_and_instances():
    class Instance:
        def __call__(self, images, prompts, metadata):
            return torch.zeros(len(images))

    assert as_reward(Instance()).name == "Instance"
    assert as_reward(lambda images, prompts, metadata: None, name="mine").name == "mine"
    brightness = resolve("brightness")
    assert as_reward(brightness) is brightness
    assert as_reward(brightness.function) == brightness
    with pytest.raises(ValueError, match="Instance is a class; construct it first"):
        as_reward(Instance)


# ------------------------------------------------------------------------------- what others' code may do


def written(tmp_path, code):
    file = tmp_path / "theirs.py"
    file.write_text(f"import sys\n{code}\n")
    return file


def test_a_file_that_exits_when_it_is_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"theirs.py cannot be run, it called exit\(3\)"):
        resolve(f"{written(tmp_path, 'sys.exit(3)')}:f")


def test_a_file_that_reads_the_command_line_sees_an_empty_one_of_its_own(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["ddpo", "train", "--rewards.0.name", "x"])
    parser = "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument({})\nargs = parser.parse_args()"
    use = "\ndef f(images, prompts, metadata): return images.mean((1, 2, 3)) * args.gain"
    reward = resolve(f"{written(tmp_path, parser.format(repr('--gain') + ', default=2.0') + use)}:f")
    assert reward(torch.ones(1, 3, 2, 2), [""], [{}]).total.tolist() == [2.0]
    assert sys.argv == ["ddpo", "train", "--rewards.0.name", "x"]
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"theirs.py cannot be run, it called exit\(2\)"):
        resolve(f"{written(tmp_path / 'other', parser.format(repr('gain')) + use)}:f")
    assert "usage: theirs.py" in capfd.readouterr().err


def test_a_constructor_that_raises_or_exits_names_the_reward(tmp_path):
    body = "def __init__(self, *, device):\n        {}\n    def __call__(self, images, prompts, metadata): ..."
    code = "class {}:\n    " + body
    file = written(tmp_path, code.format("Exits", "sys.exit('no weights')") + "\n" + code.format("Raises", "{}['x']"))
    with pytest.raises(
        RewardError, match=r"reward 'Exits' called exit\('no weights'\) when it was made \(.*theirs.py:2"
    ):
        resolve(f"{file}:Exits")
    with pytest.raises(RewardError, match=r"reward 'Raises' raised KeyError: 'x' when it was made"):
        resolve(f"{file}:Raises")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(images): ...", r"called as f\(images, prompts, metadata\), but it is f\(images\).*take these three"),
        (
            "def f(images, prompts, metadata, device): ...",
            r"but it is f\(images, prompts, metadata, device\).*'device'",
        ),
        ("async def f(images, prompts, metadata): ...", r"'f' is asynchronous .*f\(images, prompts, metadata\)"),
        ("def f(images, prompts, metadata): yield 1", r"'f' is a generator"),
        (
            "class f:\n    def __init__(self, *, device): ...\n    def __call__(self, images): ...",
            r"called as f\(images, prompts, metadata\), but it is f\(images\)",
        ),
    ],
)
def test_a_signature_that_does_not_fit_is_told_before_the_reward_is_called(tmp_path, code, message):
    with pytest.raises(UserError, match=message):
        resolve(f"{written(tmp_path, code)}:f")
    if not code.startswith("class"):
        with pytest.raises(UserError, match=message):  # before a run loads its model
            check_requirements(f"{tmp_path / 'theirs.py'}:f", {})


def test_functions_that_take_more_by_default_are_rewards(tmp_path):
    file = written(tmp_path, "def f(*args, **kwargs): ...\ndef g(a, b, c, d=1): ...")
    assert resolve(f"{file}:f").name == "f" and resolve(f"{file}:g").name == "g"


class Told(DescribedReward):
    def __init__(self, about):
        self._about = about

    def describe(self):
        return self._about

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))


def test_an_object_describes_itself_and_what_it_leaves_out_stays_as_registered():
    plain, told = as_reward(Told(Description())), as_reward(Told(Description(name="t", groupwise=True, range=(0, 2))))
    assert (plain.name, plain.groupwise, plain.range) == ("Told", False, None)
    assert (told.name, told.groupwise, told.range, told.differentiable) == ("t", True, (0, 2), False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Description(groupwise="yes"), "groupwise must be True, False or None, got 'yes'"),
        (lambda: Description(range=(1, 0)), r"range must be \(low, high\), low < high, got \(1, 0\)"),
        (lambda: as_reward(Told({"groupwise": True})), r"describe\(\) must return a rewards.Description, got dict"),
    ],
)
def test_a_wrong_description_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()

import dataclasses
import shlex

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpo.credit.advantages import AdvantageConfig
from ddpo.credit.kl import AdaptiveKL, FixedKL
from ddpo.credit.lagrangian import Constraint
from ddpo.sampling.samplers import SamplerConfig
from ddpo.validation import UserError
from ddpo.weights.adapter import FullConfig, LoraConfig
from rewards.combine.weighted_sum import RewardTerm
from trainers.config import Config, synonyms, yaml_text
from trainers.config.groups import (
    BatchConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
)
from trainers.config.io import ConfigError, ConfigFile, config_of, find_config, load_config, to_yaml
from trainers.config.resumed import load_resumed, resume_overrides
from trainers.prompts import PromptConfig
from trainers.shipped_configs import CONFIGS

REWARD = "rewards: [{name: jpeg_compressibility}]\n"


def write(folder, text):
    file = folder / "x.yaml"
    file.write_text(REWARD + text)
    return file


def refusal(folder, text, overrides=""):
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), shlex.split(overrides))
    return str(caught.value).replace(f"{folder}/", "")


# ------------------------------------------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_loads_and_is_short(file):
    config = load_config(file)
    assert len(file.read_text().splitlines()) <= 30
    assert load_config(file.stem) == config


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_config_survives_a_round_trip(file, tmp_path):
    config = load_config(file)
    for full in (False, True):
        (tmp_path / "again.yaml").write_text(to_yaml(config, full=full))
        assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("accelerate/*.yaml")), ids=lambda file: file.stem)
def test_accelerate_knows_every_key_of_the_launch_configs(file):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(file))
    assert config.num_processes == {"single_gpu": 1, "multi_gpu_8": 8, "two_nodes": 16, "fsdp2_8": 8}[file.stem]


def test_sd15_configs_hold_ddpos_published_numbers():
    for name, updates, buffer in (("sd15_jpeg", 4, 16), ("sd15_aesthetic", 2, 32)):
        config = load_config(name)
        assert config.learning_rate == 3e-4
        assert config.objective.clip_range == 1e-4
        assert config.objective.updates_per_epoch == updates
        assert config.advantages == AdvantageConfig(
            baseline="prompt", scale="group_std", clip=5.0, min_count=16, buffer_size=buffer
        )
        assert (config.sampler.num_steps, config.sampler.eta, config.sampler.guidance_scale) == (50, 1.0, 5.0)
        assert config.batch.samples_per_epoch == 256


# ------------------------------------------------------------------------------------------------- the bad-input list


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {learning_rate: fast}", "x.yaml: optimizer.learning_rate: must be a number, got 'fast'"),
        ("optimizer: {learning_rate: true}", "x.yaml: optimizer.learning_rate: must be a number, got true"),
        (
            "optimizer: {learning_rate: -1}",
            "x.yaml: optimizer.learning_rate: must be positive and at most 1, or null, got -1.0",
        ),
        (
            "optimizer: {learning_rate: .inf}",
            "x.yaml: optimizer.learning_rate: must be positive and at most 1, or null, got inf",
        ),
        ("optimizer: {epsilon: .inf}", "x.yaml: optimizer.epsilon: must be finite, got inf"),
        ("kl: {alpha: .inf}", "x.yaml: kl.alpha: must be at least 0 and finite, got inf"),
        ("kl: {alpha: .nan}", "x.yaml: kl.alpha: must be at least 0 and finite, got nan"),
        (
            "objective: {kind: reward_gradient, ceiling: .nan}",
            "x.yaml: objective.ceiling: must be a number, got nan",
        ),
        (
            "objective: {kind: reward_gradient, last_steps: 99}",
            "x.yaml: objective.last_steps: must be at most 50, sampler.num_steps, or all, got 99",
        ),
        (
            "objective: {kind: preference, first_step: 2}",
            "x.yaml: objective.first_step: must be 4 with preset: dpo (spo alone compares next states), got 2",
        ),
        (
            "objective: {kind: preference, contenders: 8}",
            "x.yaml: objective.contenders: must be 4 with preset: dpo (spo alone compares next states), got 8",
        ),
        (
            "objective: {kind: preference, preset: kto, clip: 0.2}",
            "x.yaml: objective.clip: must be 0.1 with preset: kto (it has no ratio of densities; d3po and spo do), "
            "got 0.2",
        ),
        (
            "objective: {kind: clean_sample, preset: raft, temperature: 0.5}",
            "x.yaml: objective.temperature: must be null with a best_fraction, whose images weigh the same: nothing "
            "would read it, got 0.5",
        ),
        (
            "offline: {source: judged.jsonl}\nobjective: {kind: preference, margin: 1.5}",
            "x.yaml: objective.margin: must be at most 1 with offline (judged images score 1 and 0: no pair differs "
            "by more), got 1.5",
        ),
        ("kl: {kind: adaptive, target: .inf}", "x.yaml: kl.target: must be finite, got inf"),
        ("shaping: {steps: [1], strength: .inf}", "x.yaml: shaping.strength: must be positive and finite, got inf"),
        ("optimizer: {lerning_rate: 1}", "x.yaml: optimizer.lerning_rate: unknown key (did you mean 'learning_rate'?)"),
        ("adapter: {rank: 0}", "x.yaml: adapter.rank: must be at least 1, at most 16,384, got 0"),
        (
            "adapter: {alpha: 1e300}",
            "x.yaml: adapter.alpha: must be positive and at most 1000 times the rank, or null, got 1e+300",
        ),
        ("seed: 9223372036854775808", "x.yaml: seed: must be at least 0 and below 2^63, got 9223372036854775808"),
        (
            "optimizer: {learning_rate: 1e300}",
            "x.yaml: optimizer.learning_rate: must be positive and at most 1, or null, got 1e+300",
        ),
        ("kl: {alpha: 1e300}", "x.yaml: kl.alpha: must be at most 1e+09, got 1e+300"),
        (
            "heldout_rewards: [{name: a, weight: -1e300}]",
            "x.yaml: heldout_rewards.0.weight: must be at most 1e+09, got -1e+300",
        ),
        (
            "sampler: {num_steps: 1000000000}",
            "x.yaml: sampler.num_steps: must be at least 1, at most 100,000, got 1000000000",
        ),
        (
            "batch: {samples_per_epoch: 1000000000}",
            "x.yaml: batch.samples_per_epoch: must be at most 1,000,000, got 1000000000",
        ),
        ("prompts: {limit: 1000000000}", "x.yaml: prompts.limit: must be at most 1,000,000, got 1000000000"),
        (
            'prompts: {source: "a\\0.txt"}',
            "x.yaml: prompts.source: must be text without a NUL, its letter 2, got 'a\\x00.txt'",
        ),
        (
            'heldout_rewards: [{name: a, options: {b: "\\ud800"}}]',
            "x.yaml: heldout_rewards.0.options.b: must be text without half of a surrogate pair, its letter 1, "
            "got '\\ud800'",
        ),
        ("adapter: {rank: true}", "x.yaml: adapter.rank: must be a whole number, got true"),
        ("adapter: {rank: 4.5}", "x.yaml: adapter.rank: must be a whole number, got 4.5"),
        ("adapter: {rank: '4'}", "x.yaml: adapter.rank: must be a whole number, got '4'"),
        ("adapter: {kind: fullx}", "x.yaml: adapter.kind: must be lora or full, got 'fullx'"),
        ("adapter: {kind: full, rank: 4}", "x.yaml: adapter.rank: unknown key (valid: kind)"),
        ("adapter: full", "x.yaml: adapter: must be a mapping of keys, got 'full'"),
        ("adapter: {target_modules: to_q}", "x.yaml: adapter.target_modules: must be a list, got 'to_q'"),
        ("kl: {kind: adaptive}", "x.yaml: kl.target: missing key"),
        ("kl: {kind: adaptive, target: 0}", "x.yaml: kl.target: must be positive (nats), got 0.0"),
        ("modelx: {}", "x.yaml: modelx: unknown key (did you mean 'model'?)"),
        ("model: {offload: yes}", "x.yaml: model.offload: must be true or false, got 'yes'"),
        ("model: {path: 3}", "x.yaml: model.path: must be text, got 3"),
        ("model:", "x.yaml: model: must be a mapping of keys, got null"),
        (
            "model: {precision: fp-32}",
            "x.yaml: model.precision: must be fp32, bf16 or fp16, got 'fp-32' (did you mean 'fp32'?)",
        ),
        ("sampler: {height: 4}", "x.yaml: sampler.height: must be at least 8 pixels or null, got 4"),
        ("heldout_rewards: jpeg", "x.yaml: heldout_rewards: must be a list, got 'jpeg'"),
        ("heldout_rewards: [{weight: 1}]", "x.yaml: heldout_rewards.0.name: missing key"),
        (
            "heldout_rewards: [{name: a, weigt: 1}]",
            "x.yaml: heldout_rewards.0.weigt: unknown key (did you mean 'weight'?)",
        ),
        (
            "heldout_rewards: [{name: a, weight: .nan}]",
            "x.yaml: heldout_rewards.0.weight: must be a finite number, got nan",
        ),
        (
            "heldout_rewards: [{name: a}, {name: a}]",
            "x.yaml: heldout_rewards: must be a list that names each reward once, or tells them apart by `label`, "
            "got ['a', 'a']",
        ),
        ("evaluation: {prompts: {limit: 0}}", "x.yaml: evaluation.prompts.limit: must be at least 1 or null, got 0"),
        (
            "tracking: {trackers: [mlflow]}",
            "x.yaml: tracking.trackers.0: must be trackio, wandb or tensorboard, got 'mlflow'",
        ),
        (
            "evaluation: {stop_on_overoptimisation: true, every_epochs: 0}",
            "x.yaml: evaluation.every_epochs: must be at least 1 with stop_on_overoptimisation (it compares the "
            "evaluations of a run), got 0",
        ),
        (
            "evaluation: {stop_on_overoptimisation: true, overoptimisation_threshold: 0}",
            "x.yaml: evaluation.overoptimisation_threshold: must be positive with stop_on_overoptimisation (0 never "
            "warns, so it would never stop), got 0.0",
        ),
        ("epochs: 0", "x.yaml: epochs: must be at least 1, got 0"),
        (
            "run: {name: " + "é" * 101 + "}",
            "x.yaml: run.name: must be at most 200 bytes long, got " + repr("é" * 101),
        ),
        ("run: {name: a/b}", "x.yaml: run.name: must be a folder name without '/', or null, got 'a/b'"),
        (
            "sampler: {eta: 0}",
            "x.yaml: sampler.eta: must be positive with objective.kind: policy_gradient (without noise there is no "
            "log-probability), got 0.0",
        ),
        (
            "sampler: {kind: ode}",
            "x.yaml: sampler.kind: must be a stochastic sampler with objective.kind: policy_gradient (without noise "
            "there is no log-probability), got 'ode'",
        ),
        (
            "sampler: {kind: ode, last_step: pretrained}\nobjective: {kind: clean_sample}",
            "x.yaml: sampler.last_step: must be stock with kind: ode (without noise all steps are alike), "
            "got 'pretrained'",
        ),
        (
            "sampler: {eta: 0, last_step: noisy}\nobjective: {kind: clean_sample}",
            "x.yaml: sampler.last_step: must be stock with eta: 0 (without noise all steps are alike), got 'noisy'",
        ),
        (
            "sampler: {last_step: noisy, stochastic_steps: {kind: window, shift_every_epochs: 0}}",
            "x.yaml: sampler.last_step: must be stock or pretrained with stochastic_steps that never come to the last "
            "step, got 'noisy'",
        ),
        (
            "sampler: {last_step: noisy, stochastic_steps: {kind: random, high_noise_fraction: 0.5}}",
            "x.yaml: sampler.last_step: must be stock or pretrained with stochastic_steps that never come to the last "
            "step, got 'noisy'",
        ),
        (
            "evaluation: {sampler: {kind: ode, last_step: pretrained}}",
            "x.yaml: evaluation.sampler.last_step: must be stock with kind: ode (without noise all steps are alike), "
            "got 'pretrained'",
        ),
        (
            "objective: {kind: adjoint_matching, replay_epochs: 1}\nkl: {kind: adaptive, target: 1}",
            "x.yaml: kl.kind: must be fixed with objective.replay_epochs (targets of earlier epochs hold the weight "
            "that the KL had then), got 'adaptive'",
        ),
        (
            "objective: {kind: adjoint_matching, replay_epochs: 1}\nkl: {alpha: 0.1}\n"
            "constraints: [{reward: kl, at_most: 1}]",
            "x.yaml: constraints: must be without kl with objective.replay_epochs (targets of earlier epochs hold the "
            "weight that the KL had then), got ['kl']",
        ),
        (
            "batch: {group_size: 1}",
            "x.yaml: batch.group_size: must be at least 2 with advantages.baseline: group (or choose baseline: prompt "
            "or batch), got 1",
        ),
        (
            "objective: {surrogate: reinforce}",
            "x.yaml: objective.updates_per_epoch: must be 1, as must inner_epochs, with surrogate: reinforce (it is "
            "on-policy; use ppo for several updates), got 2",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, message):
    assert refusal(tmp_path, text) == message


@pytest.mark.parametrize(
    "text",
    [
        "sampler: {last_step: pretrained}\nevaluation: {sampler: {kind: ode}}",
        "sampler: {last_step: noisy, stochastic_steps: {kind: window}}",
        "sampler: {last_step: noisy, stochastic_steps: {kind: random_window}}",
        "sampler: {last_step: noisy, stochastic_steps: {kind: window, start: 46, shift_every_epochs: 0}}",
        "objective: {kind: adjoint_matching}\nkl: {kind: adaptive, target: 1}",
    ],
)
def test_what_is_refused_elsewhere_is_allowed_where_it_is_read(tmp_path, text):
    load_config(write(tmp_path, text))


def test_every_problem_gets_its_own_line(tmp_path):
    lines = refusal(tmp_path, "adapter: {rank: x}\nmodel: {offlod: true}").splitlines()
    assert lines == [
        "x.yaml: model.offlod: unknown key (did you mean 'offload'?)",
        "x.yaml: adapter.rank: must be a whole number, got 'x'",
    ]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rewards: must be a list of at least one reward, e.g. [{name: jpeg_compressibility}]"),
        ("- a", "must be a mapping of keys, got ['a']"),
        ("a: [1", "not valid YAML: line 1, column 6: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\nseed: 2", "not valid YAML: line 2, column 1: the key 'seed' occurs twice"),
        ("a: \x00", "not valid YAML: unacceptable character"),
        ("seed:\n  [a]: 1", "not valid YAML: line 2, column 3: a key must be a word, not a list or a mapping"),
        ("? {a: 1}\n: 2", "not valid YAML: line 1, column 3: a key must be a word, not a list or a mapping"),
        ("run: {name: !!binary aGk=}", "not valid YAML: line 1, column 13: could not determine a constructor for"),
        (BOMB, "not valid YAML: aliases make more than 100,000 values of it; write out what is meant"),
        ("rewards: &a [*a]", "not valid YAML: line 1, column 10: holds itself by an alias"),
        ("x: " + "[" * 1200, "not valid YAML: is nested too deeply"),
        ("seed: !!timestamp 2026-11-21", "not valid YAML: line 1, column 7: could not determine a constructor for"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "x.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/x.yaml: {message}")


def test_a_missing_config_names_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"shapes_pp: no such configuration \(did you mean 'shapes_ppo'\?\)"):
        find_config("shapes_pp")
    with pytest.raises(ConfigError, match="is a folder, not a configuration"):
        find_config(tmp_path)


def test_yaml_numbers_read_as_numbers_and_words_as_text(tmp_path):
    config = load_config(write(tmp_path, "optimizer: {learning_rate: 1e-4}\nmax_minutes: 5\nrun: {name: off}"))
    assert config.optimizer.learning_rate == 1e-4
    assert isinstance(config.max_minutes, float)
    assert config.run.name == "off"
    assert yaml_text.parse("[010, 1_000, 2026-11-21, .inf]") == [10.0, "1_000", "2026-11-21", float("inf")]


def test_a_union_without_kind_means_the_default_kind(tmp_path):
    config = load_config(write(tmp_path, "adapter: {rank: 4}\nkl: {alpha: 0.1}"))
    assert config.adapter == LoraConfig(rank=4)
    assert config.kl == FixedKL(alpha=0.1)


# ----------------------------------------------------------------------------------------------------------- overrides


def test_overrides_reach_every_kind_of_key(tmp_path):
    file = write(tmp_path, "adapter: {kind: lora, rank: 4}\nkl: {alpha: 0.5}")
    config = load_config(
        file,
        shlex.split(
            "--optimizer.learning_rate 1e-4 --rewards.0.weight 2 --rewards.1.name brightness --adapter.kind full "
            "--kl.target 3 --kl.kind adaptive --model.offload true --run.name 7 --max_minutes=null --kl.alpha=0.25 "
            "--evaluation.prompts.source a.txt --tracking.trackers [] --rewards.0.options.scale 2 --run.output_dir a:b"
        ),
    )
    assert config.optimizer.learning_rate == 1e-4
    assert config.rewards == (
        RewardTerm(name="jpeg_compressibility", weight=2.0, options={"scale": 2}),
        RewardTerm(name="brightness"),
    )
    assert config.adapter == FullConfig()
    assert config.kl == AdaptiveKL(target=3.0, alpha=0.25)
    assert config.model.offload is True
    assert config.run == RunConfig(name="7", output_dir="a:b")
    assert config.max_minutes is None
    assert config.evaluation.prompts == PromptConfig(source="a.txt")
    assert config.tracking.trackers == ()


def test_aliases_that_mean_little_stay_allowed(tmp_path):
    text = "evaluation: {prompts: &p {source: shapes}}\nprompts: {<<: *p, split: heldout}\n"
    assert load_config(write(tmp_path, text)).prompts == PromptConfig(source="shapes", split="heldout")


def test_one_word_is_a_list_of_one(tmp_path):
    config = load_config(write(tmp_path, ""), shlex.split("--tracking.trackers wandb --adapter.target_modules to_q"))
    assert config.tracking.trackers == ("wandb",)
    assert config.adapter == LoraConfig(target_modules=("to_q",))


def test_every_word_of_other_trainers_leads_to_a_key_that_exists():
    assert set(synonyms._OURS.values()) - {"resume"} <= set(synonyms.every_key())


def test_negative_override_values_and_whole_groups(tmp_path):
    config = load_config(write(tmp_path, ""), ["--rewards.0.weight", "-1", "--kl", "{kind: adaptive, target: 2}"])
    assert config.rewards[0].weight == -1
    assert config.kl == AdaptiveKL(target=2.0)


def test_overriding_with_the_same_kind_keeps_the_files_keys(tmp_path):
    config = load_config(write(tmp_path, "adapter: {rank: 4}"), ["--adapter.kind", "lora"])
    assert config.adapter == LoraConfig(rank=4)


def test_nested_dictionaries_make_the_configuration_that_yaml_makes(tmp_path):
    keys = {"sampler": {"num_steps": 20}, "adapter": {"kind": "full"}, "rewards": [{"name": "shapes", "weight": 2}]}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(keys))
    assert config_of(keys) == load_config(tmp_path / "x.yaml")
    assert config_of({**keys, "adapter": FullConfig()}) == config_of(keys)
    with pytest.raises(ConfigError, match=r"^config_of: sampler.num_stpes: unknown key \(did you mean 'num_steps'\?\)"):
        config_of({"sampler": {"num_stpes": 20}})
    for wrong in ({"sampler": {"num_steps": 20}}, {"evaluation": EvaluationConfig(prompts={"source": "a.txt"})}):
        with pytest.raises(UserError, match="a group, such as SamplerConfig.*config_of makes a Config of dictionaries"):
            Config(**wrong)


OWNED = """
rewards: [{name: jpeg_compressibility, weight: 10, normalize: std, options: {a: 1}, label: size}, {name: brightness}]
constraints: [{reward: kl, at_most: 3, penalty: 2}]
model: {path: owner/old, revision: abc, variant: fp16, precision: bf16}
"""


def test_another_reward_bound_or_model_keeps_nothing_of_the_former(tmp_path):
    (tmp_path / "x.yaml").write_text(OWNED)
    new = "--constraints.0.at_least .2 --constraints.0.reward brightness --model.path owner/new --rewards.0.name a.py:f"
    config = load_config(tmp_path / "x.yaml", shlex.split(new))
    assert config.rewards == (RewardTerm(name="a.py:f"), RewardTerm(name="brightness"))
    assert config.constraints == (Constraint(reward="brightness", at_least=0.2),)
    assert config.model == ModelConfig(path="owner/new", precision="bf16")
    weighed = load_config(tmp_path / "x.yaml", ["--rewards.0.weight", "3", "--rewards.0.name", "sharpness"])
    assert weighed.rewards[0] == RewardTerm(name="sharpness", weight=3.0)
    same = load_config(tmp_path / "x.yaml", ["--rewards.0.name", "jpeg_compressibility", "--model.path", "owner/old"])
    assert same == load_config(tmp_path / "x.yaml")
    moved = ConfigFile.read(tmp_path / "x.yaml").config(["--model.path", "/here"], same_run=True)
    assert (moved.model.path, moved.model.variant) == ("/here", "fp16")


def test_a_whole_group_and_a_key_in_it_do_not_depend_on_their_order(tmp_path):
    group, key = ["--rewards", "[{name: sharpness, weight: 2}]"], ["--rewards.0.weight", "5"]
    for tokens in (group + key, key + group):
        assert load_config(write(tmp_path, ""), tokens).rewards == (RewardTerm(name="sharpness", weight=5.0),)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "--optimizer.lerning_rate 1",
            "command line: optimizer.lerning_rate: unknown key (did you mean 'learning_rate'?)",
        ),
        ("--learning_rate 1", "command line: learning_rate: unknown key (did you mean 'optimizer.learning_rate'?)"),
        ("--lerning_rate 1", "command line: lerning_rate: unknown key (did you mean 'optimizer.learning_rate'?)"),
        ("--batchsize 1", "command line: batchsize: unknown key (did you mean 'batch.train_batch_size'?)"),
        ("--LoraRank 1", "command line: LoraRank: unknown key (did you mean 'adapter.rank'?)"),
        ("--optimizer.lr 1", "command line: optimizer.lr: unknown key (did you mean 'learning_rate'?)"),
        ("--kl.beta 1", "command line: kl.beta: unknown key (did you mean 'kl.alpha'?)"),
        ("--sampler.steps 1", "command line: sampler.steps: unknown key (did you mean 'num_steps'?)"),
        ("--num_steps 1", "command line: num_steps: unknown key (did you mean 'sampler.num_steps'?)"),
        ("--foo 1", "command line: foo: unknown key (valid: model, adapter, "),
        ("--tracking.trackers wandbb", "command line: tracking.trackers.0: must be trackio, wandb or tensorboard, got"),
        ("--optimizer.learning_rate fast", "command line: optimizer.learning_rate: must be a number, got 'fast'"),
        ("--adapter.rank 0", "command line: adapter.rank: must be at least 1, at most 16,384, got 0"),
        ("--adapter.kind ful", "command line: adapter.kind: must be lora or full, got 'ful'"),
        ("--kl.kind adaptive", "command line: kl.target: missing key"),
        ("--rewards.0.weigt 2", "command line: rewards.0.weigt: unknown key (did you mean 'weight'?)"),
        (
            "--rewards.5.weight 2",
            "command line: rewards.5.weight: there is no entry 5 in the list (1 given, numbered from 0)",
        ),
        (
            "--rewards.x.weight 2",
            "command line: rewards.x.weight: there is no entry x in the list (1 given, numbered from 0)",
        ),
        (
            "--rewards.².weight 2",
            "command line: rewards.².weight: there is no entry ² in the list (1 given, numbered from 0)",
        ),
        ("--rewards '{[a]: 1}'", "command line: rewards: '{[a]: 1}' is not a YAML value: line 1, column 2: a key must"),
        ("--model.offload on", "command line: model.offload: must be true or false, got 'on'"),
        ("--epochs", "command line: epochs: needs a value: --epochs VALUE"),
        ("--epochs --seed 3", "command line: epochs: needs a value: --epochs VALUE"),
        ("--epochs '&a [*a]'", "command line: epochs: '&a [*a]' is not a YAML value: line 1, column 1: holds itself"),
        ("--epochs [1", "command line: epochs: '[1' is not a YAML value: line 1, column 3"),
        ("epochs 3", "command line: 'epochs': overrides are written --key value, e.g. --optimizer.learning_rate 1e-4"),
        ("--epochs.x 3", "command line: epochs: must be a whole number, got {'x': 3}"),
        ("--sampler.eta 0", "command line: sampler.eta: must be positive with objective.kind"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(tmp_path, overrides, message):
    text = refusal(tmp_path, "", overrides)
    assert text.startswith(message)
    assert "\n" not in text


# -------------------------------------------------------------------------------------------------------------- resume


def test_resuming_may_change_lengths_checkpoints_and_tracking_only(tmp_path):
    file = write(tmp_path, "")
    grown = ["--epochs", "200", "--max_minutes", "9", "--checkpoints.keep_last", "5", "--tracking.project", "yes"]
    saved, wanted = load_resumed(ConfigFile.read(file), grown)
    assert saved == load_config(file)
    assert (wanted.epochs, wanted.max_minutes, wanted.checkpoints.keep_last) == (200, 9.0, 5)
    tokens = resume_overrides(saved, wanted, saved_file=file)
    assert load_resumed(ConfigFile.read(file), tokens) == (saved, wanted)
    with pytest.raises(ConfigError) as caught:
        load_resumed(ConfigFile.read(file), ["--optimizer.learning_rate", "1e-3", "--adapter.kind", "full"])
    message = str(caught.value)
    assert "optimizer.learning_rate (saved null, now 0.001)" in message
    assert "adapter.kind (saved 'lora', now 'full')" in message
    allowed = (
        "epochs, max_minutes, optimizer.schedule_epochs, checkpoints.*, tracking.*, distributed.*, reward_processes.*"
    )
    assert f"on resume only {allowed}, and where files lie, may change" in message


def test_resuming_ignores_where_the_run_folder_is(tmp_path):
    saved = load_config(write(tmp_path, "run: {name: first}"))
    wanted = dataclasses.replace(saved, run=RunConfig())
    assert resume_overrides(saved, wanted, saved_file=tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- properties

positive = st.floats(min_value=1e-12, max_value=1e6)
texts = st.text(min_size=1, max_size=12).filter(
    lambda text: text.strip() and not set(text) & {"/", "\0"} and text not in (".", "..")
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
configs = st.builds(
    Config,
    adapter=st.builds(LoraConfig, rank=st.integers(1, 64), alpha=st.none() | st.floats(1e-12, 1e3))
    | st.builds(FullConfig),
    sampler=st.builds(SamplerConfig, kind=st.sampled_from(["ddim", "cps"]), eta=st.floats(0.1, 1)),
    kl=st.builds(FixedKL, alpha=positive) | st.builds(AdaptiveKL, target=positive),
    batch=st.builds(BatchConfig, samples_per_epoch=st.integers(2, 999), group_size=st.integers(2, 9)),
    optimizer=st.builds(OptimizerConfig, learning_rate=st.none() | st.floats(1e-12, 1)),
    rewards=st.builds(RewardTerm, name=texts, weight=positive, options=st.dictionaries(texts, scalars, max_size=2)).map(
        lambda term: (term,)
    ),
    prompts=st.builds(PromptConfig, source=texts, limit=st.none() | st.integers(1, 10**6)),
    evaluation=st.builds(EvaluationConfig, prompts=st.none() | st.builds(PromptConfig, source=texts)),
    tracking=st.builds(TrackingConfig, trackers=st.sampled_from([(), ("wandb",), ("wandb", "trackio")]), project=texts),
    run=st.builds(RunConfig, name=st.none() | texts),
    max_minutes=st.none() | positive,
    clock=st.sampled_from(["wall", "process"]),
)


@settings(deadline=None, max_examples=60)
@given(config=configs, full=st.booleans())
def test_writing_and_reading_gives_the_same_config(tmp_path_factory, config, full):
    file = tmp_path_factory.mktemp("config") / "x.yaml"
    file.write_text(to_yaml(config, full=full), encoding="utf-8")
    assert load_config(file) == config


@given(
    value=st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
)
def test_yaml_reads_back_what_it_wrote_and_so_does_any_reader(value):
    assert yaml_text.parse(yaml_text.dump(value)) == value
    assert yaml_text.parse(yaml_text.dump(value, inline=True)) == value
    assert yaml.safe_load(yaml_text.dump(value)) == value

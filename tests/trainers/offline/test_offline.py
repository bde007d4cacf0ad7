"""Learning from judged images: what is read and refused, how images become latents, and runs without a reward."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo import LoraConfig, Policy, SamplerConfig
from ddpo.credit.advantages import AdvantageConfig
from ddpo.objectives.preference import PreferenceConfig
from ddpo.validation import UserError
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import assert_trained_alike, reproducible, weights
from tests.trainers.world import all_succeed, command
from trainers.cli import main
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrackingConfig
from trainers.config.io import ConfigError, load_config, to_yaml
from trainers.loop import resume, train, train_from_config
from trainers.offline.latents import LatentStore
from trainers.offline.read import OfflineConfig, OfflineError, count_cropped, images_of, load_judged, scores_of
from trainers.planning.plan import PlanError, expected_plan
from trainers.planning.preflight import preflight
from trainers.prompts import PromptStream
from trainers.run_folder.checkpoint import latest_checkpoint, load_checkpoint
from trainers.run_folder.folder import read_metrics

CONFIG = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{num_steps: 3, guidance_scale: 2.0}}
objective: {{kind: preference, beta: 500, noises: 2}}
offline: {{source: {source}}}
batch: {{samples_per_epoch: 8, group_size: 2, sample_batch_size: 3, train_batch_size: 5}}
optimizer: {{learning_rate: 1e-3}}
prompts: {{source: {folder}/prompts.txt}}
evaluation: {{num_prompts: 1, images_per_prompt: 2, every_epochs: 0, ode: false}}
checkpoints: {{every_epochs: 1, keep_last: 10}}
tracking: {{trackers: [], pictures_every_epochs: 2, num_pictures: 4}}
run: {{output_dir: {folder}/runs}}
epochs: 2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder, safe_serialization=True)
    return folder


def picture(path: Path, number: int, size: tuple[int, int] = (32, 32)) -> Path:
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def write_pairs(folder: Path, count: int = 5) -> Path:
    """A file of pairs in both spellings, with a tie and a skipped one, and prompts."""
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    lines = []
    for number in range(count):
        for side in "ab":
            picture(folder / f"{number}{side}.png", 2 * number + (side == "b"), (32, 32) if number else (48, 32))
        a, b = f"{number}a.png", f"{number}b.png"
        chosen = {"prompt": f"a cat {number}", "chosen": a, "rejected": b}
        lines.append(chosen if number % 2 else {"prompt": f"a cat {number}", "a": b, "b": a, "label": 0})
    lines.append({"prompt": "a tie", "a": "0a.png", "b": "1b.png", "label": 0.5})
    lines.append({"prompt": "not seen", "a": "0a.png", "b": "1b.png", "skipped": True})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_config(folder: Path, model: Path, source: Path) -> Path:
    file = folder / "offline.yaml"
    file.write_text(CONFIG.format(model=model, source=source, folder=folder))
    return file


def start(config: Path, *overrides: str) -> Path:
    loaded = load_config(config, overrides)
    return train_from_config(loaded, config_yaml=to_yaml(loaded, full=True))


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_pairs_of_both_spellings_are_read_and_ties_are_left_out(tmp_path: Path) -> None:
    entries = load_judged(OfflineConfig(source=str(write_pairs(tmp_path))))
    assert [entry.text for entry in entries] == [f"a cat {number}" for number in range(5)]
    for number, entry in enumerate(entries):
        better = [image for image, score in zip(images_of(entry), scores_of(entry), strict=True) if score == 1]
        assert [image.name for image in better] == [f"{number}a.png"]
        assert sorted(scores_of(entry)) == [0, 1]
    assert count_cropped(entries, (32, 32)) == (2, 10)


def test_single_images_are_liked_or_not(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    lines = [{"prompt": "a cat", "image": "a.png", "liked": liked} for liked in (True, False)]
    (tmp_path / "likes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    entries = load_judged(OfflineConfig(source=str(tmp_path / "likes.jsonl")))
    assert [tuple(scores_of(entry)) for entry in entries] == [(1.0,), (0.0,)]


def test_everything_that_is_wrong_is_named_by_its_line(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    (tmp_path / "b.png").write_bytes(b"no picture")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    lines = [
        '{"prompt": "a cat", "chosen": "a.png", "rejected": "missing.png"}',
        '{"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"}',
        '{"prompt": "a cat", "chosen": "a.png", "rejected": "c.png"}',
        '{"prompt": "a cat", "chosen": "a.png"}',
        '{"prompt": " ", "chosen": "a.png", "rejected": "a.png"}',
        '{"prompt": "a cat", "image": "a.png"}',
        "[1]",
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(OfflineError) as raised:
        load_judged(OfflineConfig(source=str(file)))
    found = str(raised.value).splitlines()
    expected = (
        "there is no image", "cannot be read", "cannot be read", "'rejected' must be the path of a picture",
        "not blank", "'liked' must be true or false", "an object such as",
    )  # fmt: skip
    assert len(found) == len(expected)
    for number, (line, words) in enumerate(zip(found, expected, strict=True), 1):
        assert line.startswith(f"{file}: line {number}: ") and words in line


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"prompt": "a", "a": "a.png", "b": "b.png", "label": 0.5}], "has nothing to learn from"),
        ([{"prompt": "a", "chosen": "a.png", "rejected": "b.png"}, {"prompt": "a", "image": "a.png", "liked": True}],
         "put them into two files"),
    ],
)  # fmt: skip
def test_a_file_of_ties_alone_or_of_two_kinds_is_refused(tmp_path: Path, lines: list[dict], words: str) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        picture(tmp_path / name, number)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(OfflineError, match=words):
        load_judged(OfflineConfig(source=str(tmp_path / "pairs.jsonl")))
    with pytest.raises(OfflineError, match="no such file of pairs"):
        load_judged(OfflineConfig(source=str(tmp_path / "other.jsonl")))


def test_a_dataset_in_the_columns_of_pick_a_pic_is_read_without_its_ties(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    contents = [picture(tmp_path / f"{number}.png", number).read_bytes() for number in range(4)]
    rows = [(1.0, True), (0.0, True), (0.5, True), (1.0, False)]
    table = {
        "caption": [f"a cat {row}" for row in range(4)],
        "jpg_0": contents,
        "jpg_1": contents[::-1],
        "label_0": [label for label, _ in rows],
        "has_label": [labelled for _, labelled in rows],
    }
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "data" / "train.parquet"))
    entries = load_judged(OfflineConfig(source=str(tmp_path / "data")))
    assert [(entry.text, tuple(scores_of(entry))) for entry in entries] == [("a cat 0", (1, 0)), ("a cat 1", (0, 1))]
    policy = Policy(tiny_stable_diffusion(), sampler=SamplerConfig(num_steps=2), adapter=LoraConfig(rank=2))
    of_cells = LatentStore(policy, tmp_path / "latents")(images_of(entries[1]))
    of_files = LatentStore(policy, tmp_path / "others")([tmp_path / "1.png", tmp_path / "2.png"])
    assert torch.equal(of_cells, of_files)
    with pytest.raises(OfflineError, match="has no column caption, jpg_0, jpg_1, label_0"):
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "data" / "train.parquet"))
        load_judged(OfflineConfig(source=str(tmp_path / "data")))


# ---- latents ---------------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_middle_of_the_image_and_are_encoded_once(tmp_path: Path) -> None:
    policy = Policy(tiny_stable_diffusion(), sampler=SamplerConfig(num_steps=2), adapter=LoraConfig(rank=2))
    wide = picture(tmp_path / "wide.png", 0, (64, 32))
    store = LatentStore(policy, tmp_path / "latents")
    assert store.size == (32, 32)
    found = store([wide])
    middle = torch.from_numpy(np.asarray(Image.open(wide))[:, 16:48].astype(np.float32) / 255).permute(2, 0, 1)
    torch.testing.assert_close(found, policy.encode_images(middle[None]).cpu())
    (file,) = (tmp_path / "latents").iterdir()
    calls = []
    encode = policy.encode_images
    policy.encode_images = lambda images: calls.append(len(images)) or encode(images)
    again = LatentStore(policy, tmp_path / "latents")
    assert torch.equal(again([wide, wide]), found.repeat(2, 1, 1, 1)) and calls == [1], "only the test picture"
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(LatentStore(policy, tmp_path / "latents")([wide]), found), "what was cut short is made again"
    other = Policy(tiny_stable_diffusion(seed=1), sampler=SamplerConfig(num_steps=2), adapter=LoraConfig(rank=2))
    assert not torch.equal(LatentStore(other, tmp_path / "latents")([wide]), found), "another VAE"
    assert len(list((tmp_path / "latents").iterdir())) == 2


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_without_a_reward_resumes_bit_exactly_with_its_place_among_the_pairs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pairs = write_pairs(tmp_path)
    config = write_config(tmp_path, model, pairs)
    whole = start(config, "--run.name", "whole", "--epochs", "3")
    printed = capsys.readouterr().err
    assert "offline: 2 of 10 image files are not 32 x 32" in printed
    parts = start(config, "--run.name", "parts", "--epochs", "1")
    resume(parts, ["--epochs", "3"])
    first, second = weights(whole, "weights", "optimizer"), weights(parts, "weights", "optimizer")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(parts)
    rows = read_metrics(whole)
    assert rows[0]["policy/pair_accuracy"] == 0.5 and rows[-1]["policy/pair_accuracy"] > 0.5
    assert not [name for row in rows for name in row if name.startswith(("reward/", "kl/", "advantages/"))]
    assert (whole / "before_after.png").is_file() and (whole / "pictures" / "epoch_000002.png").is_file()
    assert "reward" not in (whole / "summary.txt").read_text()
    assert main(["evaluate", str(parts)]) == 0
    assert f"| judged images | `{pairs}` |" in (whole / "lora" / "README.md").read_text()
    _, values = load_checkpoint(latest_checkpoint(parts))
    assert values["prompts"] == 12, "four pairs an epoch"
    seen = PromptStream(load_judged(OfflineConfig(source=str(pairs))), seed=0, shuffle=True).draw(5)
    assert len({entry.text for entry in seen}) == 5, "each pair once a pass"


def test_likes_are_learnt_from_python_without_a_reward(tmp_path: Path) -> None:
    lines = []
    for number in range(4):
        picture(tmp_path / f"{number}.png", number)
        lines.append({"prompt": f"a cat {number}", "image": f"{number}.png", "liked": number % 2 == 0})
    (tmp_path / "likes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    policy = Policy(
        tiny_stable_diffusion(), sampler=SamplerConfig(num_steps=2, guidance_scale=2.0), adapter=LoraConfig(rank=2)
    )
    config = Config(
        objective=PreferenceConfig(preset="kto", beta=200, noises=2),
        offline=OfflineConfig(source=str(tmp_path / "likes.jsonl")),
        batch=BatchConfig(samples_per_epoch=4, group_size=1, sample_batch_size=4, train_batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=False, every_epochs=0),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0),
        run=RunConfig(output_dir=str(tmp_path)),
        epochs=3,
    )
    rows = read_metrics(train(policy, prompts=["a cat"], config=config))
    assert rows[0]["policy/utility"] == 0.5 and rows[-1]["policy/utility"] > 0.5
    assert rows[-1]["policy/liked_error_change"] < rows[-1]["policy/disliked_error_change"]
    with pytest.raises(UserError, match=r"train\(\) needs reward= or config.rewards, but for"):
        train(
            policy,
            prompts=["a cat"],
            config=replace(config, offline=None, advantages=AdvantageConfig(baseline="batch")),
        )


def test_two_processes_train_on_pairs_as_one(model: Path, tmp_path: Path) -> None:
    config, runs = write_config(tmp_path, model, write_pairs(tmp_path)), {}
    for count in (1, 2):
        arguments = ["train", str(config), "--run.name", f"p{count}"]
        all_succeed(command, arguments, count=count, log=tmp_path / f"p{count}.log")
        runs[count] = tmp_path / "runs" / f"p{count}"
    one, two = weights(runs[1], "weights"), weights(runs[2], "weights")
    assert_trained_alike(one, two)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--objective.preset", "d3po", "--objective.noises", "1"), "offline: must be null with d3po"),
        (("--objective", "{kind: policy_gradient}"), "offline: must be null with ppo"),
        (("--constraints", "[{reward: brightness, at_least: 0.5}]"), r"constraints: must be \[\] with offline"),
        (("--offline.limit", "0"), "offline.limit: must be at least 1 or null"),
    ],
)
def test_what_judged_images_cannot_do_is_refused_before_anything_is_read(
    overrides: tuple[str, ...], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_config(tmp_path, model, tmp_path / "missing.jsonl"), overrides)


def test_files_and_groups_are_checked_before_weights_load(model: Path, tmp_path: Path) -> None:
    missing = load_config(write_config(tmp_path, model, tmp_path / "missing.jsonl"))
    pairs = write_pairs(tmp_path)
    with pytest.raises(OfflineError, match="no such file of pairs"):
        preflight(missing, num_processes=1)
    config = write_config(tmp_path, model, pairs)
    wrong = load_config(config, ["--batch.group_size", "4"])
    with pytest.raises(PlanError, match=r"batch.group_size must be 2 with offline \(pairs\), got 4"):
        preflight(wrong, num_processes=1)
    plan = preflight(load_config(config), num_processes=1)
    assert plan.sampling_rows == 0 and "judged images are encoded" in plan.describe()
    assert expected_plan(load_config(config), num_processes=1) == plan

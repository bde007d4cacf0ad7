"""A run that edits, from the command line: train, sample, evaluate; and what is refused before weights load."""

import json
import warnings

import pytest
import torch
from PIL import Image

from ddpo.pipeline.input_images import probe_images
from tests.ddpo.families import tiny_kontext
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import CONFIG
from trainers.cli import main
from trainers.prompts import PromptConfig, PromptError, load_prompts
from trainers.run_folder.folder import read_metrics
from trainers.tracking.pictures import enlarge, side_by_side, with_inputs

REWARD = '''
import numpy as np
import torch
from rewards import register


@register
def keeps_the_input(images, prompts, metadata):
    """Negative mean difference to the input image."""
    assert all(entry["image"].size == (16, 16) and entry["image_path"].endswith(".png") for entry in metadata)
    inputs = torch.stack([torch.tensor(np.array(entry["image"])).permute(2, 0, 1) / 255 for entry in metadata])
    return -(images - inputs).abs().mean((1, 2, 3))
'''


def write_source(folder, count=3):
    """A prompt file with images beside it, of another size than the pictures."""
    (folder / "photos").mkdir()
    for i, image in enumerate(probe_images(count, (40, 24))):
        image.save(folder / "photos" / f"{i}.png")
    lines = [json.dumps({"prompt": f"make it {word}", "image": f"photos/{i}.png"})
             for i, word in enumerate(["red", "dark", "a painting"][:count])]  # fmt: skip
    source = folder / "edits.jsonl"
    source.write_text("\n".join(lines))
    return source


def write_edit_config(folder, pipeline, *, prompts, reward="brightness"):
    pipeline.save_pretrained(folder / "model")
    (folder / "keeps.py").write_text(REWARD)
    text = CONFIG.format(model=folder / "model", guidance=4.0, prompts=prompts, output=folder / "runs")
    text = text.replace("sampler: {", "sampler: {kind: flow_sde, eta: 0.7, height: 16, width: 16, ")
    text = text.replace("name: brightness", f"name: {reward}")
    text = text.replace("epochs: 3", "epochs: 2")
    config = folder / "kontext_edits.yaml"
    config.write_text(text)
    return config


def test_a_run_that_edits_trains_samples_and_evaluates_from_the_command_line(tmp_path, capsys):
    reward = f"{tmp_path / 'keeps.py'}:keeps_the_input"
    config = write_edit_config(tmp_path, tiny_kontext(), prompts=write_source(tmp_path), reward=reward)
    assert main(["train", str(config)]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("_kontext_edits")
    first, second = read_metrics(run)
    assert first["policy/gate_nats"] < 1e-3 and second["kl/path_nats"] > 0
    assert first["reward/mean"] < 0
    single = Image.open(run / "pictures" / "epoch_000002.png").width
    assert single > 2 * 2 * 144  # two columns, each of an input and a picture

    photo = tmp_path / "photos" / "2.png"
    capsys.readouterr()
    with warnings.catch_warnings(action="error", category=UserWarning):  # such as pictures without scores
        assert main(["sample", str(run), "--prompt", "make it red", "--image", str(photo), "--num-images", "2"]) == 0
    assert "before_after.png" in capsys.readouterr().out
    (picture,) = run.glob("samples/*/001.png")
    assert Image.open(picture).size == (16, 16)
    assert main(["sample", str(run), "--prompt", "make it red"]) == 2
    assert "takes an input image, but the prompt 'make it red'" in capsys.readouterr().err
    assert main(["sample", str(run), "--prompt", "x", "--image", str(tmp_path / "none.png")]) == 2
    assert "there is no image" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 0
    assert (run / "evaluation_epoch_000002" / "before_after.png").is_file()


def test_prompts_without_images_and_images_without_use_end_before_sampling(tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("make it red\n")
    config = write_edit_config(tmp_path, tiny_kontext(), prompts=words)
    assert main(["train", str(config)]) == 2
    assert "FluxKontextPipeline takes an input image, but the prompt 'make it red'" in capsys.readouterr().err

    (tmp_path / "sd").mkdir()
    config = write_edit_config(tmp_path / "sd", tiny_stable_diffusion(), prompts=write_source(tmp_path))
    config.write_text(config.read_text().replace("kind: flow_sde, eta: 0.7, ", ""))
    assert main(["train", str(config)]) == 2
    assert "comes with an input image `image`, which cannot be used: StableDiffusionPipeline" in capsys.readouterr().err


def test_images_of_a_json_source_are_found_beside_it(tmp_path, monkeypatch):
    source = write_source(tmp_path)
    monkeypatch.chdir("/")
    prompts = load_prompts(PromptConfig(source=str(source)))
    assert [prompt.metadata["image"] for prompt in prompts] == [str(tmp_path / "photos" / f"{i}.png") for i in range(3)]
    assert len({prompt.group for prompt in prompts}) == 3


@pytest.mark.parametrize(
    ("image", "message"),
    [("photos/9.png", "there is no image .*photos/9.png"), ("edits.jsonl", "cannot be read"), (3, "must be a file or")],
)
def test_an_image_that_cannot_be_used_is_refused_with_its_line(tmp_path, image, message):
    source = write_source(tmp_path)
    source.write_text(source.read_text() + "\n" + json.dumps({"prompt": "make it blue", "image": image}))
    with pytest.raises(PromptError, match=rf"edits.jsonl: line 4: 'image': .*{message}"):
        load_prompts(PromptConfig(source=str(source)))


def test_a_function_may_return_pictures(tmp_path):
    (tmp_path / "source.py").write_text(
        "from PIL import Image\n"
        "def edits():\n"
        "    return [{'prompt': 'make it red', 'image': Image.new('RGB', (8, 8), c)} for c in ('red', 'blue')]\n"
    )
    first, second = load_prompts(PromptConfig(source=f"{tmp_path / 'source.py'}:edits"))
    assert first.metadata["image"].getpixel((0, 0)) == (255, 0, 0)
    assert first.text == second.text and first.group != second.group


def test_pictures_show_the_input_left_of_what_was_made_of_it():
    made, inputs = torch.zeros(2, 3, 16, 16), probe_images(2, (16, 16))
    pair = with_inputs(made, inputs)[0]
    assert pair.size == (288, 144)
    assert pair.crop((0, 0, 144, 144)).tobytes() == enlarge(inputs[0]).tobytes()
    assert not any(pair.crop((144, 0, 288, 144)).tobytes())
    scores = [0.0, 1.0]
    plain = side_by_side(made, made, ["a", "b"], scores, scores, columns=1)
    wider = side_by_side(made, made, ["a", "b"], scores, scores, columns=1, inputs=inputs)
    assert plain.width < wider.width < 1.6 * plain.width

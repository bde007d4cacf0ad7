"""What is downloaded is pinned or remembered: another file than at first is refused, and the list says which."""

import json
import os
import re

import pytest

from rewards import UserError, registry
from rewards.downloads import Download
from rewards.models import weights
from rewards.models.first_download import RECORD, cache_folder, check_first
from rewards.models.weights import locate_file, locate_folder
from rewards.registry import BUILT_IN, find
from rewards.tools.cli import list_rewards

NEEDS_NO_DOWNLOAD = ("imagenet_class", "ocr", "nsfw")


def check(path, name="owner/model@main/weights.bin"):
    check_first("mine", name, path, cure="set revision")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"first")
    return path


def test_another_file_than_the_first_download_is_refused_until_its_entry_is_deleted(file):
    check(file)
    check(file)
    file.write_bytes(b"other")
    with pytest.raises(
        UserError, match=r"'mine': owner/model@main/weights.bin has sha256 .*publisher changed.*revision"
    ):
        check(file)
    check(file, name="owner/another@main/weights.bin")
    record = cache_folder() / RECORD
    known = json.loads(record.read_text())
    del known["owner/model@main/weights.bin"]
    record.write_text(json.dumps(known))
    check(file)


def test_the_same_content_at_another_time_is_the_same_file_and_is_read_once_more_only(file, monkeypatch):
    check(file)
    os.utime(file, ns=(1, 1))
    check(file)
    monkeypatch.setattr("rewards.models.first_download.sha256_of", lambda path: pytest.fail("was read again"))
    check(file)


def test_a_damaged_record_is_named(file):
    check(file)
    (cache_folder() / RECORD).write_text("[]")
    with pytest.raises(UserError, match=r"downloads.json cannot be read .*delete it"):
        check(file)


def test_a_file_without_a_published_hash_is_remembered_and_one_with_is_compared_with_that(file, monkeypatch):
    monkeypatch.setattr(weights, "_fetch", lambda reward, download, option: file)
    unknown = Download(file="w.bin", url="https://example.org/w.bin")
    assert locate_file("mine", None, unknown, option="head") == file
    file.write_bytes(b"other")
    with pytest.raises(UserError, match=r"https://example.org/w.bin has sha256 .*option head"):
        locate_file("mine", None, unknown, option="head")
    with pytest.raises(UserError, match=r"expected abcd"):
        locate_file("mine", None, Download(file="w.bin", url="https://example.org/x", sha256="abcd"), option="head")


def test_weights_of_a_repository_that_moved_on_are_refused_with_the_commit_to_name(tmp_path, monkeypatch):
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        (tmp_path / commit).mkdir()
        (tmp_path / commit / "model.safetensors").write_text(commit)
    hub = type("hub", (), {"snapshot_download": staticmethod(lambda *a, **k: str(tmp_path / commits[0]))})
    monkeypatch.setattr(weights, "require", lambda *a, **k: hub)
    locate_folder("mine", "owner/model", option="model")
    commits.reverse()
    with pytest.raises(
        UserError, match=rf"owner/model@main/model.safetensors.*set its revision \(this one is {'b' * 40}\)"
    ):
        locate_folder("mine", "owner/model", option="model")


def test_every_built_in_reward_that_loads_weights_says_which_and_pins_what_it_can():
    from_hub = {name: find(name).card.downloads for name in BUILT_IN if find(name).card.modules}
    assert all(downloads for name, downloads in from_hub.items() if name not in NEEDS_NO_DOWNLOAD)
    loose = {str(d.file) for downloads in from_hub.values() for d in downloads if not d.is_pinned}
    assert loose == {"ViT-L-14-quickgelu openai", "aesthetic_predictor_v2_5.pth"}


def test_the_list_says_of_each_download_how_a_change_is_noticed():
    text = list_rewards(verbose=True)
    paragraph = {part.partition(":")[0]: part for part in text.split("\n\n")}
    assert re.search(
        r"downloads +HPS_v2.1_compressed.pt of xswu/HPSv2, pinned to .*sha256 c57a38fb4a2f.*as published", text
    )
    assert "no published hash: that of the first download is kept" in paragraph["imagereward"]
    assert "not pinned" in paragraph["aesthetic_v2_5"] and "not pinned" in paragraph["clip_score"]
    for name in ("diversity", "rank", "win_rate"):
        assert "treats as fixed" in paragraph[name]
    assert registry.available().keys() <= paragraph.keys()

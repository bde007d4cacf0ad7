"""Files of pairs: every malformed line is named, splits keep captions apart, pairs are of one prompt."""

import json
import random

import pytest
from PIL import Image

from rewards.preferences.pairs import Pair, read_pairs, split_by_prompt, write_pairs
from rewards.preferences.pictures import Picture, read_pictures, write_metadata
from rewards.preferences.selection import MAX_USES, propose


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"prompt": "a cat", "a": "0.png", "b": "1.png", "label": 1}


def test_pictures_are_relative_to_the_file_and_extra_keys_are_allowed(folder):
    (pair,) = read_pairs(write(folder / "p.jsonl", GOOD | {"label": 0.5, "who": "me"}), labelled=True)
    assert pair == Pair(prompt="a cat", a=folder / "0.png", b=folder / "1.png", label=0.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ({**GOOD, "prompt": 3}, "'prompt' must be a text, got 3"),
        ({**GOOD, "label": 2}, "'label' must be 1 .* got 2"),
        ({**GOOD, "label": True}, "'label' must be 1 .* got True"),
        ({**GOOD, "label": "1"}, "'label' must be 1 .* got '1'"),
        ({key: GOOD[key] for key in ("prompt", "a", "b")}, "has no 'label'"),
        ({**GOOD, "b": "missing.png"}, "'b': there is no picture .*missing.png"),
        ({**GOOD, "b": None}, "'b' must be the path of a picture, got None"),
        ({**GOOD, "b": "0.png"}, "are the same picture"),
    ],
)
def test_a_malformed_line_is_named_with_file_and_number(folder, line, message):
    path = write(folder / "p.jsonl", GOOD, "", line)
    with pytest.raises(ValueError, match=rf"p.jsonl: line 3: .*{message}"):
        read_pairs(path, labelled=True)


def test_a_line_ends_at_a_newline_alone(folder):
    prompt = "a cat\u2028of two\u0085lines"
    lines = [json.dumps({**GOOD, "prompt": prompt}, ensure_ascii=False) for _ in range(2)]
    for content in ("\n".join(lines), "\r\n".join(lines) + "\r\n"):
        (folder / "p.jsonl").write_bytes(content.encode())
        pairs = read_pairs(folder / "p.jsonl", labelled=True)
        assert [pair.prompt for pair in pairs] == [prompt] * 2
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "a\u2028b"}\n', encoding="utf-8")
    assert [picture.prompt for picture in read_pictures(folder)] == ["a\u2028b"]


def test_all_malformed_lines_are_named_at_once(folder):
    with pytest.raises(ValueError) as caught:
        read_pairs(write(folder / "p.jsonl", "{", GOOD, "[]"), labelled=True)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["line 1", "line 3"]


def test_skipped_pairs_are_passed_over_and_unlabelled_ones_read_when_no_label_is_asked_for(folder):
    skipped = {"prompt": "a cat", "a": "2.png", "b": "1.png", "skipped": True}
    path = write(folder / "p.jsonl", GOOD, skipped)
    assert len(read_pairs(path, labelled=True)) == 1
    assert [pair.label for pair in read_pairs(path, labelled=False)] == [1.0, None]


def test_written_pairs_are_read_back_from_another_folder(folder):
    pairs = [Pair(prompt="a cat", a=folder / "0.png", b=folder / "1.png", label=0.5)]
    write_pairs(folder / "deep" / "er" / "p.jsonl", pairs)
    (read,) = read_pairs(folder / "deep" / "er" / "p.jsonl", labelled=True)
    assert (read.a.resolve(), read.b.resolve(), read.label) == (folder / "0.png", folder / "1.png", 0.5)


def test_no_prompt_is_in_two_parts_and_shares_are_kept():
    prompts = [f"caption {i % 50}" for i in range(400)]
    parts = split_by_prompt(prompts, (0.1, 0.2), seed=3)
    by_prompt = {}
    for prompt, part in zip(prompts, parts, strict=True):
        by_prompt.setdefault(prompt, set()).add(part)
    assert all(len(own) == 1 for own in by_prompt.values())
    assert [sum(own == {part} for own in by_prompt.values()) for part in range(3)] == [35, 5, 10]
    assert split_by_prompt(prompts, (0.1, 0.2), seed=4) != parts


def test_each_part_has_a_prompt_or_the_split_is_refused():
    assert sorted(split_by_prompt(["a", "b", "c"], (0.1, 0.2), seed=0)) == [0, 1, 2]
    assert sorted(split_by_prompt(["a", "b", "c"], (0.5, 0.4), seed=0)) == [0, 1, 2]
    with pytest.raises(ValueError, match="need 3 different prompts at least, got 2"):
        split_by_prompt(["a", "b", "a"], (0.1, 0.2), seed=0)


def test_proposed_pairs_share_a_prompt_are_new_and_use_no_picture_too_often(folder):
    pictures = [Picture(prompt=f"p{i % 2}", path=folder / f"{i}.png") for i in range(6)]
    first = propose(pictures, 2, seed=1)
    prompt_of = {picture.path: picture.prompt for picture in pictures}
    assert all(prompt_of[pair.a] == prompt_of[pair.b] == pair.prompt for pair in first)
    known = frozenset(pair.key for pair in first)
    rest = propose(pictures, 10, known=known, seed=1)
    assert len(rest) == 6 - 2  # three pairs for each prompt, all found once the limit gives way
    assert not known & {pair.key for pair in rest}
    many = [Picture(prompt="p", path=folder / f"{i}.png") for i in range(6)]
    uses = [path for pair in propose(many, 5, seed=0) for path in (pair.a, pair.b)]
    assert max(uses.count(path) for path in uses) <= MAX_USES
    with pytest.raises(ValueError, match="none of the 1 pictures shares its prompt"):
        propose(pictures[:1], 1)


def test_metadata_is_read_back_and_a_wrong_line_is_named(folder):
    pictures = [Picture(prompt="x", path=folder / "0.png"), Picture(prompt="y", path=folder / "1.png")]
    random.Random(0).shuffle(pictures)
    write_metadata(folder, pictures)
    assert read_pictures(folder) == pictures
    write(folder / "metadata.jsonl", {"file_name": "0.png", "text": "x"}, {"file_name": "9.png", "text": "x"})
    with pytest.raises(ValueError, match=r"metadata.jsonl: line 2: there is no picture .*9.png"):
        read_pictures(folder)

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.loading import load_named
from trainers.prompts import Prompt, PromptConfig, PromptError, PromptStream, load_prompts, to_prompt

NOT_FINITE = "must hold finite numbers, got {}; leave the key out, or write null"


def load(source, **keys):
    return load_prompts(PromptConfig(source=str(source), **keys))


def refusal(source, **keys):
    with pytest.raises(PromptError) as caught:
        load(source, **keys)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- sources


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa cat\n\n  a dog, at night \nein Fuchs äöü\n", encoding="utf-8")
    prompts = load(tmp_path / "a.txt")
    assert [prompt.text for prompt in prompts] == ["a cat", "a dog, at night", "ein Fuchs äöü"]
    assert load(tmp_path / "a.txt", limit=2) == prompts[:2]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c"])
def test_a_prompt_ends_at_a_newline_alone(tmp_path, separator):
    texts = [f"a cat{separator}a dog", "a bird"]
    for newline in ("\n", "\r\n"):
        (tmp_path / "a.txt").write_bytes(newline.join(texts).encode())
        assert [prompt.text for prompt in load(tmp_path / "a.txt")] == texts
    entries = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(entries), encoding="utf-8")
    assert [prompt.text for prompt in load(tmp_path / "a.jsonl")] == texts


def test_json_lines_carry_metadata(tmp_path):
    entries = [{"prompt": "a cat", "count": 2}, {"prompt": "a dog", "count": 1, "metadata": {"color": "red"}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert load(tmp_path / "a.jsonl") == [
        Prompt(text="a cat", metadata={"count": 2}),
        Prompt(text="a dog", metadata={"count": 1, "color": "red"}),
    ]


def test_a_line_ends_at_a_newline_alone(tmp_path):
    text = "a cat\u2028of two\u0085lines"
    lines = tmp_path / "p.jsonl"
    lines.write_bytes(json.dumps({"prompt": text}, ensure_ascii=False).encode() + b"\r\n")
    assert load(lines) == [Prompt(text=text)]
    plain = tmp_path / "p.txt"
    plain.write_text(f"{text}\na dog\n", encoding="utf-8")
    assert [prompt.text for prompt in load(plain)] == [text, "a dog"]


ROWS = [{"prompt": "a cat", "count": 2}, {"prompt": "a dog, at night", "count": 1}]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.parquet", "a.json", "A.JSONL"])
def test_tables_and_lists_are_prompts_like_json_lines(tmp_path, name):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(ROWS)
    write = {
        "a.csv": lambda path: table.to_csv(path, index=False),
        "a.TSV": lambda path: table.to_csv(path, index=False, sep="\t"),
        "a.parquet": table.to_parquet,
        "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
        "A.JSONL": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    }
    write[name](tmp_path / name)
    wanted = [Prompt(text=row["prompt"], metadata={"count": row["count"]}) for row in ROWS]
    assert load(tmp_path / name) == wanted
    assert refusal(tmp_path / name, column="caption").endswith("has no key 'caption'; keys: prompt, count")


def test_a_list_of_plain_texts_in_json_and_a_text_file_in_capitals(tmp_path):
    (tmp_path / "a.json").write_text('["a cat", "a dog"]')
    (tmp_path / "A.TXT").write_text("a cat\na dog")
    assert load(tmp_path / "a.json") == load(tmp_path / "A.TXT") == [Prompt(text="a cat"), Prompt(text="a dog")]


def test_a_file_of_another_kind_is_not_looked_for_on_the_hub(tmp_path):
    (tmp_path / "prompts.docx").write_bytes(b"PK")
    assert refusal(tmp_path / "prompts.docx").endswith("read from: .txt, .jsonl, .json, .csv, .tsv, .parquet")


def test_lines_that_begin_with_a_hash_and_a_blank_are_comments(tmp_path):
    (tmp_path / "a.txt").write_text("# animals\na cat\n#\n#1 dad mug\n")
    assert [prompt.text for prompt in load(tmp_path / "a.txt")] == ["a cat", "#1 dad mug"]
    (tmp_path / "a.jsonl").write_text('# animals\n{"prompt": "# a cat"}\n')
    assert [prompt.text for prompt in load(tmp_path / "a.jsonl")] == ["# a cat"]


def test_a_relative_image_in_any_file_starts_from_that_file(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "a.json").write_text('[{"prompt": "make it snow", "image": "x.png"}]')
    assert load(tmp_path / "a.json")[0].metadata == {"image": str(tmp_path / "x.png")}


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    """A flat picture of 10^8 pixels: 100 kB as a file, 300 MB decoded. The function hands it over unread."""
    from PIL import Image

    Image.new("1", (10_000, 10_000)).save(tmp_path / "flat.png")
    (tmp_path / "p.py").write_text(
        f"from PIL import Image\nopened = Image.open({str(tmp_path / 'flat.png')!r})\n"
        "def f():\n    return [{'prompt': 'a', 'image': opened}]\n"
    )
    assert "an image of 10000 x 10000 pixels is too large" in refusal(f"{tmp_path}/p.py:f")
    opened = load_named(f"{tmp_path}/p.py:f")()[0]["image"]
    assert opened._im is None, "no pixel was decoded"


def test_a_function_in_a_file_is_called_with_the_split_it_takes(tmp_path):
    (tmp_path / "p.py").write_text("def plain():\n    return ['a']\ndef of(split):\n    return [{'prompt': split}]\n")
    assert load(f"{tmp_path}/p.py:plain") == [Prompt(text="a")]
    assert load(f"{tmp_path}/p.py:of", split="test") == [Prompt(text="test")]


def test_a_function_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "prompt_module_xyz.py").write_text("def words():\n    return ('a', 'b')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [prompt.text for prompt in load("prompt_module_xyz:words")] == ["a", "b"]


def test_shapes_gives_captions_of_the_split_and_hard_ones_only():
    train, heldout = load("shapes", limit=200), load("shapes", limit=200, split="heldout")
    assert len(train) == 200
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in heldout}
    assert {prompt.metadata["category"] for prompt in load("shapes_hard", limit=30)} == {"count", "position", "binding"}
    assert load("shapes", limit=50) == train[:50]


def test_the_shipped_list_of_animals_has_45_different_ones():
    animals = [prompt.text for prompt in load("animals")]
    assert len(set(animals)) == len(animals) == 45


def test_a_dataset_gives_its_column_and_its_simple_columns_as_metadata(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [{"caption": "a cat", "count": 2, "boxes": [1, 2]}, {"caption": "a dog", "count": 1, "boxes": []}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = load(tmp_path / "data", column="caption")
    assert prompts == [Prompt(text="a cat", metadata={"count": 2}), Prompt(text="a dog", metadata={"count": 1})]
    assert refusal(tmp_path / "data").endswith("has no column 'prompt'; columns: caption, count, boxes")
    assert "split 'test'" in refusal(tmp_path / "data", column="caption", split="test")


# ------------------------------------------------------------------------------------------------- the bad-input list


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt: has no prompts; give at least one"),
        ("a.txt", "\n  \n", "a.txt: has no prompts; give at least one"),
        ("a.jsonl", "", "a.jsonl: has no prompts; give at least one"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": a}', "a.jsonl: line 3: not JSON: Expecting value at column 12"),
        ("a.jsonl", "[1, 2]", 'a.jsonl: line 1: must be an object such as {"prompt": "a cat"}, got [1, 2]'),
        ("a.jsonl", '{"text": "a"}', "a.jsonl: line 1: has no key 'prompt'; keys: text"),
        ("a.jsonl", '{"prompt": 3}', "a.jsonl: line 1: 'prompt' must be a text that is not blank, got 3"),
        ("a.jsonl", '{"prompt": " "}', "a.jsonl: line 1: 'prompt' must be a text that is not blank, got ' '"),
        ("a.jsonl", '{"prompt": "a", "metadata": 3}', "a.jsonl: line 1: 'metadata' must be a mapping, got 3"),
        (
            "a.jsonl",
            '{"prompt": "a \\ud800"}',
            "a.jsonl: line 1: 'prompt' must be text without half of a surrogate pair, its letter 3",
        ),
        ("a.txt", "a cat\n\0\0", "a.txt: line 2: 'prompt' must be text without a NUL, its letter 1"),
        (
            "a.jsonl",
            '{"prompt": "a", "x": ' + "[" * 100_000,
            "a.jsonl: line 1: JSON that cannot be read: maximum recursion depth exceeded while decoding a JSON array "
            "from a unicode string",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "x": ' + "9" * 5000 + "}",
            "a.jsonl: line 1: JSON that cannot be read: Exceeds the limit (4300 digits) for integer string conversion: "
            "value has 5000 digits",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "image": "https://x.org/a.png"}',
            "a.jsonl: line 1: 'image' must be a file on this machine, got 'https://x.org/a.png'; download it first",
        ),
        ("a.json", '["a",\n b]', "a.json: not JSON: Expecting value at line 2, column 2"),
        (
            "a.json",
            '{"prompt": "a"}',
            'a.json: must be a list such as ["a cat", {"prompt": "a dog"}], got {"prompt": "a"}; one object a line '
            "goes into a .jsonl file",
        ),
        ("a.json", '["a", 3]', "a.json: entry 1: must be a text or a dict, got int"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "x": NaN}', f"a.jsonl: line 2: 'x' {NOT_FINITE.format('nan')}"),
        ("a.jsonl", '{"prompt": "a", "x": 1e999}', f"a.jsonl: line 1: 'x' {NOT_FINITE.format('inf')}"),
        (
            "a.json",
            '["a", {"prompt": "b", "metadata": {"x": {"y": [1, -Infinity]}}}]',
            f"a.json: entry 1: 'x' {NOT_FINITE.format('-inf')}",
        ),
        ("a.csv", "prompt,x\na,1\nb,inf\n", f"a.csv: row 1: 'x' {NOT_FINITE.format('inf')}"),
        ("a.tsv", "prompt\tx\na\t-inf\n", f"a.tsv: row 0: 'x' {NOT_FINITE.format('-inf')}"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name).replace(f"{tmp_path}/", "") == message


@pytest.mark.parametrize(
    "value",
    [
        float("nan"), np.float32("inf"), {"deep": (1, [float("nan")])}, np.array([1.0, np.nan]),
        torch.tensor([1.0, float("inf")], dtype=torch.bfloat16), np.array([None, float("nan")], dtype=object),
    ],
    ids=repr,
)  # fmt: skip
def test_metadata_from_python_hold_no_number_that_is_not_finite(value):
    with pytest.raises(PromptError, match=r"'x' must hold finite numbers, got (nan|inf); leave the key out"):
        Prompt(text="a", metadata={"x": value})
    with pytest.raises(PromptError, match=r"^entry 3: 'x' must hold finite numbers"):
        to_prompt({"prompt": "a", "x": value}, where="entry 3")


def test_metadata_that_hold_themselves_are_refused_and_finite_ones_kept():
    endless = {}
    endless["x"] = endless
    with pytest.raises(PromptError, match="'x' is nested without end"):
        Prompt(text="a", metadata=endless)
    kept = {"big": 10**400, "none": None, "flag": True, "text": "nan", "list": [1, 2.5], "ints": np.arange(3)}
    assert Prompt(text="a", metadata=kept).metadata is kept


def test_a_table_with_a_number_that_is_not_finite_is_refused_by_row(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"prompt": ["a", "b"], "x": [[1.0], [float("nan")]]}), tmp_path / "a.parquet")
    assert "a.parquet: row 1: 'x' must hold finite numbers, got nan" in refusal(tmp_path / "a.parquet")


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    assert refusal("nowhere/a.txt").startswith("nowhere/a.txt: no such prompt file (looked for /")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 'a cat'", "must return a list of texts or dicts, got str"),
        ("return {'prompt': 'a'}", "must return a list of texts or dicts, got dict"),
        ("return None", "must return a list of texts or dicts, got NoneType"),
        ("return ['a', 3]", "entry 1: must be a text or a dict, got int"),
        ("return []", "has no prompts; give at least one"),
        (
            "import pandas; return pandas.DataFrame({'prompt': ['a']})",
            "must return a list of texts or dicts, got DataFrame; end with .to_dict('records')",
        ),
        (
            "import numpy; return numpy.array(['a'])",
            "must return a list of texts or dicts, got ndarray; end with .tolist()",
        ),
        ("raise KeyError('x')", "calling it failed with KeyError: 'x'"),
    ],
)
def test_a_function_with_a_wrong_result_is_refused(tmp_path, body, message):
    (tmp_path / "p.py").write_text(f"def f():\n    {body}\n")
    assert refusal(f"{tmp_path}/p.py:f") == f"{tmp_path}/p.py:f: {message}"


def test_a_table_that_is_none_and_captions_without_end_are_refused(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_text("no parquet")
    assert "a.parquet: cannot be read as a parquet table: " in refusal(tmp_path / "a.parquet")
    assert refusal("shapes", limit=10**6) == "shapes: limit must be at most 131,072, got 1,000,000"


def test_a_function_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "p.py").write_text("x = 1\n")
    assert refusal(f"{tmp_path}/p.py:f").endswith("has no function 'f'")
    assert refusal("no_such_module_xyz:f").startswith("no_such_module_xyz:f: cannot be imported:")
    assert "cannot be imported: no such file" in refusal(f"{tmp_path}/q.py:f")


def test_shapes_refuses_another_split():
    assert refusal("shapes", split="test") == "shapes: split must be train or heldout, got 'test'"


def test_a_dataset_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refusal("someone/prompts")
    assert "pip install 'ddpo[datasets]'" in message
    assert "animals" in message


# ---------------------------------------------------------------------------------------------------------- the stream

PROMPTS = [Prompt(text=str(i)) for i in range(7)]


@given(seed=st.integers(0, 2**31), counts=st.lists(st.integers(0, 9), max_size=6), shuffle=st.booleans())
def test_the_order_depends_on_seed_and_position_alone(seed, counts, shuffle):
    in_pieces = PromptStream(PROMPTS, seed=seed, shuffle=shuffle)
    pieces = [prompt for count in counts for prompt in in_pieces.draw(count)]
    assert pieces == PromptStream(PROMPTS, seed=seed, shuffle=shuffle).draw(sum(counts))
    resumed = PromptStream(PROMPTS, seed=seed, shuffle=shuffle)
    resumed.position = in_pieces.position
    assert resumed.draw(20) == in_pieces.draw(20)


@given(seed=st.integers(0, 2**31))
def test_each_pass_visits_every_prompt_once_in_a_new_order(seed):
    stream = PromptStream(PROMPTS, seed=seed, shuffle=True)
    passes = [tuple(prompt.text for prompt in stream.draw(7)) for _ in range(6)]
    assert all(sorted(order) == sorted(prompt.text for prompt in PROMPTS) for order in passes)
    assert len(set(passes)) > 1


def test_without_shuffling_the_source_order_repeats():
    assert PromptStream(PROMPTS, seed=0, shuffle=False).draw(9) == [*PROMPTS, *PROMPTS[:2]]


def test_a_stream_of_nothing_is_refused():
    with pytest.raises(PromptError, match="at least one prompt"):
        PromptStream([], seed=0, shuffle=True)

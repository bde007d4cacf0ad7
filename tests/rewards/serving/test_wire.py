"""What a reward server and its clients exchange: exact where it says so, and strict about everything else."""

import base64
import io
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from rewards import Scores
from rewards.serving.wire import (
    JSON,
    SAFETENSORS,
    WireError,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    pack,
)

LIMIT = 10_000_000
IMAGE = torch.zeros(1, 3, 2, 2)


def decode(body, media=SAFETENSORS):
    return decode_request(body, media, max_bytes=LIMIT)


def request_with(tensors, **fields):
    whole = {"reward": "r", "prompts": ["a"], "metadata": [{}], **fields}
    return save(tensors, metadata={"request": json.dumps(whole)})


def picture(size=(5, 4), kind="PNG"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return pixels, base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_images_on_eight_bit_levels_arrive_exactly_in_either_precision(precision):
    images = torch.randint(0, 256, (3, 3, 7, 5)).float() / 255
    assert pack(images, precision).dtype == torch.uint8
    arrived = decode(encode_request("r", images, ["a", "b", "c"], [{}] * 3, precision=precision))
    assert torch.equal(arrived.images, images)


def test_other_images_arrive_exactly_in_float32_and_to_a_sixteenth_of_a_level_in_float16():
    images = torch.rand(2, 3, 16, 16)
    metadata = [{"text": "ü", "count": 3}, {"box": [0.5, None, True]}]
    exact = decode(encode_request("r", images, ["a\n", "猫"], metadata, precision="float32"))
    assert torch.equal(exact.images, images)
    assert (exact.reward, exact.prompts, exact.metadata) == ("r", ["a\n", "猫"], metadata)
    rounded = decode(encode_request("r", images, ["a", "b"], [{}] * 2)).images
    assert 0 < (rounded - images).abs().max() <= 2**-12
    assert 2**-12 <= 1 / 255 / 16


def test_png_pictures_arrive_as_pil_decodes_them():
    pixels, text = picture()
    body = json.dumps({"reward": "r", "prompts": ["a"], "metadata": [{}], "images": [text]}).encode()
    images = decode(body, JSON).images
    assert torch.equal(images, torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_scores_survive_the_reply_bit_by_bit(values):
    total = torch.tensor(values, dtype=torch.float32)
    reply = encode_reply(Scores(total=total, components={"part": -total}), name="r", hash="h", package_version="1")
    back = decode_reply(json.loads(json.dumps(reply)), count=len(values))
    assert back.scores.total.numpy().tobytes() == total.numpy().tobytes()
    assert torch.equal(back.scores.components["part"], -total)


HUGE_HEADER = struct.pack("<Q", 1 << 60) + b"{}"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "safetensors"),
        (b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.", "safetensors"),
        (HUGE_HEADER, "safetensors"),
        (struct.pack("<Q", 4) + b"[1]]rest", "not JSON"),
        (save({"images": IMAGE}), "__metadata__"),
        (request_with({"pictures": IMAGE}), "one tensor"),
        (request_with({"images": IMAGE, "more": IMAGE + 1}), "one tensor"),
        (request_with({"images": IMAGE.double()}), "F64"),
        (request_with({"images": IMAGE.long()}), "I64"),
        (request_with({"images": IMAGE + 2}), r"\[0, 1\]"),
        (request_with({"images": IMAGE * float("nan")}), r"\[0, 1\]"),
        (request_with({"images": IMAGE[0]}), "shape"),
        (request_with({"images": IMAGE}, prompts=["a", "b"]), "prompts"),
        (request_with({"images": IMAGE}, prompts="a"), "list of strings"),
        (request_with({"images": IMAGE}, prompts=[1]), "list of strings"),
        (request_with({"images": IMAGE}, metadata=[]), "metadata"),
        (request_with({"images": IMAGE}, metadata=["x"]), "list of objects"),
        (request_with({"images": IMAGE}, reward=3), "name"),
        (request_with({"images": IMAGE}, code="x"), "code"),
        (request_with({"images": IMAGE})[:-4], "safetensors"),
    ],
)
def test_malformed_bodies_are_refused_with_the_reason(body, reason):
    with pytest.raises(WireError, match=reason):
        decode(body)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_never_anything_else(body):
    for media in (SAFETENSORS, JSON):
        with pytest.raises(WireError):
            decode(body, media)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("images"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("@png"), inner, max_size=3)
    ),
    max_leaves=8,
)


WHOLE = {"dtype": "F32", "shape": [1, 3, 2, 2], "data_offsets": [0, 48]}


def with_header(header):
    """A black image under a safetensors header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(48)


def is_read_or_refused(body, media):
    """Whether the request was understood; anything else than WireError would be a server's internal error."""
    try:
        decode(body, media)
    except WireError:
        return False
    return True


@given(st.dictionaries(st.sampled_from(["reward", "prompts", "metadata", "images", "x"]), anything))
def test_valid_json_of_anything_is_read_or_refused(change):
    whole = {"reward": "r", "prompts": ["a"], "metadata": [{}], "images": [picture()[1]]}
    is_read_or_refused(json.dumps({**whole, **change}).encode(), JSON)
    fields = {key: value for key, value in {**whole, **change}.items() if key != "images"}
    is_read_or_refused(request_with({"images": IMAGE}, **fields), SAFETENSORS)


@given(
    entry=st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "x"]),
        anything | st.sampled_from(["F32", "U8", "BF16"]) | st.lists(st.integers(-2, 1 << 62), max_size=4),
    ),
    notes=anything | st.fixed_dictionaries({"request": anything}),
)
def test_valid_headers_of_anything_are_read_or_refused(entry, notes):
    fields = json.dumps({"reward": "r", "prompts": ["a"], "metadata": [{}]})
    for header in (
        {"__metadata__": {"request": fields}, "images": {**WHOLE, **entry}},
        {"__metadata__": notes, "images": WHOLE},
        {"__metadata__": {"request": fields}, "images": notes},
    ):
        is_read_or_refused(with_header(header), SAFETENSORS)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_pictures_are_read_or_refused(damages):
    notes, exif = PngInfo(), Image.Exif()
    notes.add_text("comment", "x" * 40, zip=True)
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("P", (5, 4)).save(file, format="PNG", pnginfo=notes, exif=exif, transparency=0)
    data = bytearray(file.getvalue())
    for place, value in damages:
        data[place % len(data)] = value
    is_read_or_refused(json_request(base64.b64encode(bytes(data)).decode()), JSON)


def json_request(image, **fields):
    return json.dumps({"reward": "r", "prompts": ["a"], "metadata": [{}], "images": [image], **fields}).encode()


def with_text_chunk(size):
    notes, file = PngInfo(), io.BytesIO()
    notes.add_text("comment", "x" * size, zip=True)
    Image.new("RGB", (2, 2)).save(file, format="PNG", pnginfo=notes)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "body",
    [
        (json_request("é" * 8), JSON),
        (json_request(with_text_chunk(2_000_000)), JSON),
        (json_request("x", metadata=[{"image": {"@png": "é"}}]), JSON),
        (request_with({"images": IMAGE}).replace(b'"dtype":"F32"', b'"dtype":[   ]'), SAFETENSORS),
        (with_header({"__metadata__": {"request": "\ud800"}, "images": WHOLE}), SAFETENSORS),
    ],
    ids=["base64 not ASCII", "huge text chunk", "picture in the metadata", "type is a list", "half a character"],
)
def test_what_makes_the_libraries_raise_is_refused(body):
    with pytest.raises(WireError):
        decode(*body)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([], "non-empty"),
        (["!!"], "base64"),
        ([picture(kind="JPEG")[1]], "not a PNG"),
        ([picture()[1], picture(size=(3, 3))[1]], "one size"),
        ([picture(size=(2000, 2000))[1]], "size limit"),
    ],
)
def test_pictures_that_are_no_png_or_too_large_are_refused(images, reason):
    body = {"reward": "r", "prompts": ["a"] * len(images), "metadata": [{}] * len(images), "images": images}
    with pytest.raises(WireError, match=reason):
        decode(json.dumps(body).encode(), JSON)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": [1.0]}, "1 numbers for 2 images"),
        ({"scores": [1.0, float("nan")]}, "not a finite"),
        ({"scores": [1.0, 1e300]}, "not a finite"),
        ({"scores": [1.0, "2"]}, "must be a number, got str"),
        ({"scores": [True, 1.0]}, "must be a number, got bool"),
        ({"scores": 3.0}, "list of 2 numbers"),
        ({"scores": [[1.0], [2.0]]}, "must be a number, got list"),
        ({"components": {"part": [1.0]}}, "component 'part'"),
        ({"components": None}, "must have reward"),
        ({"reward": {"name": "r"}}, "name and hash"),
    ],
)
def test_replies_that_are_no_score_for_every_image_are_refused(change, reason):
    reply = {"reward": {"name": "r", "hash": "h"}, "scores": [1.0, 2.0], "components": {}}
    decode_reply(reply, count=2)
    with pytest.raises(WireError, match=reason):
        decode_reply({**reply, **change}, count=2)


def test_metadata_that_json_cannot_hold_is_an_error_at_the_sender():
    with pytest.raises(ValueError, match="cannot be sent as JSON"):
        encode_request("r", IMAGE, ["a"], [{"box": torch.zeros(2)}])


def test_pictures_in_the_metadata_arrive_exactly_and_count_for_the_size_limit():
    pixels, _ = picture()
    body = encode_request("r", torch.rand(1, 3, 8, 8), ["a"], [{"image": Image.fromarray(pixels), "n": 1}])
    (entry,) = decode(body).metadata
    assert np.array_equal(np.array(entry["image"]), pixels) and entry["n"] == 1
    with pytest.raises(WireError, match="passes the size limit"):
        decode_request(body, SAFETENSORS, max_bytes=pixels.nbytes - 1)


def test_pictures_nested_in_the_metadata_arrive_too():
    pixels, _ = picture()
    nested = {"edit": {"sources": [{"image": Image.fromarray(pixels)}, "text"]}}
    (entry,) = decode(encode_request("r", torch.rand(1, 3, 8, 8), ["a"], [nested])).metadata
    (source, text) = entry["edit"]["sources"]
    assert np.array_equal(np.array(source["image"]), pixels) and text == "text"


def test_metadata_may_be_nested_but_not_without_end():
    for depth in (50, 300, 500, 700, 900, 100_000):
        body = json_request(picture()[1]).replace(b"[{}]", b'[{"x": %s}]' % (b"[" * depth + b"]" * depth))
        was_read = is_read_or_refused(body, JSON)
        assert was_read or depth > 50
    assert not was_read


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_wherever_a_request_has_them(number):
    body = f'{{"reward": "r", "prompts": ["p"], "images": [], "metadata": [{{"a": [{{"b": {number}}}]}}]}}'
    with pytest.raises(WireError, match="is not a finite number"):
        decode_request(body.encode(), JSON, max_bytes=1000)
    tensors = encode_request("r", torch.zeros(1, 3, 1, 1), ["p"], [{"a": 12345}])
    length = int.from_bytes(tensors[:8], "little")
    header = tensors[8 : 8 + length].replace(b"12345", number.encode())
    with pytest.raises(WireError, match="is not a finite number"):
        decode_request(len(header).to_bytes(8, "little") + header + tensors[8 + length :], SAFETENSORS, max_bytes=1000)

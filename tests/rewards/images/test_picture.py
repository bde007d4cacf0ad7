"""Pictures are scored as a viewer shows them, the same from a file, over the wire and on the labelling page."""

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from ddpo.pipeline.input_images import read_image
from rewards.images.picture import load_image, open_rgb
from rewards.serving.wire import JSON, decode_request


def sixteen_bit_grey():
    levels = np.array([[0, 257, 32896], [65535, 128, 129]], dtype=np.uint16)
    rounded = np.array([[0, 1, 128], [255, 0, 1]], dtype=np.uint8)
    return Image.fromarray(levels), {}, np.repeat(rounded[..., None], 3, axis=2)


def half_transparent():
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0] = [[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]
    return Image.fromarray(pixels), {}, np.array([[[255, 0, 0], [255, 255, 255], [204, 204, 204]]], dtype=np.uint8)


def transparent_by_palette():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    return picture, {"transparency": 0}, np.array([[[255, 255, 255], [40, 50, 60]]], dtype=np.uint8)


def on_its_side():
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    return Image.fromarray(pixels), {"exif": exif}, np.rot90(pixels, -1)


@pytest.mark.parametrize("make", [sixteen_bit_grey, half_transparent, transparent_by_palette, on_its_side])
def test_every_reader_sees_what_a_viewer_shows(make, tmp_path):
    picture, options, expected = make()
    path = tmp_path / "x.png"
    picture.save(path, **options)
    assert np.array_equal(np.asarray(open_rgb(path)), expected)
    assert np.array_equal((load_image(path)[0].permute(1, 2, 0) * 255).round().numpy(), expected)
    text = base64.b64encode(path.read_bytes()).decode()
    body = {"reward": "r", "prompts": ["a"], "metadata": [{"in": {"@png": text}}], "images": [text]}
    request = decode_request(json.dumps(body).encode(), JSON, max_bytes=1000)
    assert np.array_equal((request.images[0].permute(1, 2, 0) * 255).round().numpy(), expected)
    assert np.array_equal(np.asarray(request.metadata[0]["in"]), expected)
    if make is not sixteen_bit_grey:
        assert np.array_equal(np.asarray(read_image(path)), expected), "as pipelines that edit are given it"


def test_a_damaged_file_is_named(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, format="PNG")
    path = tmp_path / "half.png"
    path.write_bytes(buffer.getvalue()[:60])
    with pytest.raises(ValueError, match=r"half\.png cannot be read as an image"):
        open_rgb(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8200, 20_000])
def test_a_picture_that_is_huge_when_decoded_is_refused_before(side, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)))
    with path.open("ab") as file:
        data = b"IDAT" + zlib.compress(bytes(1000))
        file.write(struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    for read in (open_rgb, load_image, read_image):
        with pytest.raises(ValueError, match=r"bomb\.png.*(too large|decompression bomb)"):
            read(path)

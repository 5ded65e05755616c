"""Pictures of every kind become what a person sees, or an error names the row; pixel values are checked."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from jlora import LoraConfig
from tests.runs import program
from train.config import ConfigError, DataConfig, ImageClassification, Pretrained, TrainConfig
from train.data import tables as data
from train.data.tables import Table
from train.networks.registry import make_network
from train.tasks import pictures
from train.tasks.images import Images, count_blank, first_side
from train.tasks.labels import class_names, class_numbers
from train.tasks.pictures import Picture, Unreadable, open_image, to_array
from train.tasks.registry import make_task

SIDE = 8
GREY = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
ALPHA = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE), np.uint8)


def file(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def seen(value: Any, channels: int = 3, brightest: float = 255.0, side: int = SIDE) -> np.ndarray:
    return to_array(open_image(value), side, channels, brightest)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What is seen of a colour [...] from 0 to 255 through its alpha, by the definition of compositing."""
    share = alpha / 255
    return (share * colour + (1 - share) * 255) / 255


def luma(colour: np.ndarray) -> np.ndarray:
    """Brightness by ITU-R 601-2."""
    return colour @ np.array([299, 587, 114]) / 1000


def with_palette(transparent: int | None = None) -> tuple[bytes, np.ndarray]:
    """A picture whose pixels are numbers of four colours, and these colours."""
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255], [250, 250, 250]], np.uint8)
    numbers = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 4
    image = Image.fromarray(numbers).convert("P")
    image.frombytes(numbers.tobytes())
    image.putpalette(colours.tobytes())
    options = {} if transparent is None else {"transparency": transparent}
    values = colours.astype(float)
    if transparent is not None:
        values[transparent] = 255
    return file(image, "PNG", **options), values[numbers] / 255


CMYK = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 4), np.uint8)
BITS = GREY > 127
DEEP = np.random.default_rng(4).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=-1)
KINDS: dict[str, tuple[bytes, np.ndarray]] = {
    "grey": (file(Image.fromarray(GREY)), GREY_RGB / 255),
    "colour": (file(Image.fromarray(COLOUR)), COLOUR / 255),
    "1-bit": (file(Image.fromarray(BITS)), np.repeat(BITS[..., None], 3, axis=-1).astype(float)),
    "16-bit png": (file(Image.fromarray(DEEP)), np.repeat(DEEP[..., None], 3, axis=-1) / 65535),
    "16-bit tiff": (file(Image.fromarray(DEEP), "TIFF"), np.repeat(DEEP[..., None], 3, axis=-1) / 65535),
    "16-bit png, one transparent": (
        file(Image.fromarray(DEEP), transparency=int(DEEP[0, 0])),
        np.repeat(np.where(DEEP == DEEP[0, 0], 65535, DEEP)[..., None], 3, axis=-1) / 65535,
    ),
    "transparent": (
        file(Image.fromarray(np.dstack([COLOUR, ALPHA]))),
        on_white(COLOUR.astype(float), ALPHA[..., None].astype(float)),
    ),
    "grey, transparent": (
        file(Image.fromarray(np.dstack([GREY, ALPHA]), "LA")),
        on_white(GREY_RGB.astype(float), ALPHA[..., None].astype(float)),
    ),
    "colour, one transparent": (
        file(Image.fromarray(COLOUR), transparency=tuple(COLOUR[0, 0].tolist())),
        np.where((COLOUR == COLOUR[0, 0]).all(axis=-1, keepdims=True), 255, COLOUR) / 255,
    ),
    "palette": with_palette(),
    "palette, transparent": with_palette(1),
    "cmyk": (
        file(Image.fromarray(CMYK, "CMYK"), "TIFF"),
        (255 - CMYK[..., :3].astype(float)) * (255 - CMYK[..., 3:].astype(float)) / 255**2,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_becomes_what_is_seen(kind):
    """In colour and in grey, at its own size: what Pillow's 8 bits round is the tolerance."""
    content, expected = KINDS[kind]
    found = seen(content)
    assert found.dtype == np.float32 and found.shape == (SIDE, SIDE, 3)
    exact = kind.startswith("16-bit")
    np.testing.assert_allclose(found, expected, atol=1e-6 if exact else 1.01 / 255)
    np.testing.assert_allclose(seen(content, 1)[..., 0], luma(expected), atol=1e-6 if exact else 2.01 / 255)


def test_transparent_pixels_are_white():
    """Pictures with an alpha channel are often black where they are transparent."""
    nothing = np.zeros((SIDE, SIDE, 4), np.uint8)
    assert (seen(file(Image.fromarray(nothing))) == 1).all()
    drawn = nothing.copy()
    drawn[2:5, 3] = (0, 0, 0, 255)
    found = seen(file(Image.fromarray(drawn)), 1)[..., 0]
    np.testing.assert_array_equal(found == 0, drawn[..., 3] == 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright(orientation):
    """As its EXIF says: each orientation is a turn and a mirror of the pixels that are stored."""
    upright = np.zeros((4, 6), np.uint8)
    upright[0], upright[:, 0], upright[0, 0] = 100, 200, 255
    turned: dict[int, Any] = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("PNG", "TIFF"):
        content = file(Image.fromarray(np.ascontiguousarray(turned[orientation])), form, exif=exif)
        image = open_image(content)
        assert isinstance(image, Picture)
        np.testing.assert_array_equal(np.asarray(image.image), upright)
        assert pictures.side_of(image) == 6


@pytest.mark.parametrize("size", [(16, 16), (5, 3), (40, 12), (8, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_sizes_are_resized_by_pillow(size, channels):
    """Bicubic, into a square; 16 bits as 8 bits are, up to the 8 bits' rounding."""
    pixels = np.random.default_rng(5).integers(0, 256, (size[1], size[0]), np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255
    found = seen(file(Image.fromarray(pixels)), channels)
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], channels, axis=-1))
    deep = seen(file(Image.fromarray(pixels.astype(np.uint16) * 257)), channels)
    assert deep.min() >= 0 and deep.max() <= 1
    np.testing.assert_allclose(deep, found, atol=1.5 / 255)


@pytest.mark.parametrize("form", ["TIFF", "PPM"])
def test_pictures_whose_format_has_no_white_are_scaled_by_brightest_or_an_error(form):
    """32 bits and floats, which Pillow would clip at 255."""
    levels = (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) * 1000).astype(np.int32)
    content = file(Image.fromarray(levels if form == "TIFF" else levels.astype(np.uint16)), form)
    with pytest.raises(Unreadable, match="pixels from 0 to 63000, expected 0 to task.brightest = 255; pass --task.bri"):
        seen(content)
    np.testing.assert_allclose(seen(content, 1, 63000)[..., 0], levels / 63000, rtol=1e-6)
    floats = levels.astype(np.float32) / 63000
    np.testing.assert_allclose(seen(file(Image.fromarray(floats), "TIFF"), 1, 1.0)[..., 0], floats, rtol=1e-6)
    floats[0, 0] = np.nan
    with pytest.raises(Unreadable, match="pixels from nan to nan"):
        seen(file(Image.fromarray(floats), "TIFF"))


def test_an_inverted_cmyk_jpeg_is_not_a_negative():
    """Adobe's files hold 255 - ink, as Pillow writes them: red is red."""
    red = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
    np.testing.assert_allclose(seen(file(red, "JPEG"))[3, 3], [1, 0, 0], atol=3 / 255)


def test_lab_is_converted():
    """By the colour profile of CIELAB, in which L = 0 is black and L = 255 white."""
    lab = Image.merge(
        "LAB", [Image.fromarray(np.array([[0, 255]] * 2, np.uint8)), *([Image.new("L", (2, 2), 128)] * 2)]
    )
    np.testing.assert_allclose(seen(file(lab, "TIFF"), side=2)[0, :, 0], [0, 1], atol=3 / 255)


@pytest.mark.parametrize("value", ["path", "bytes", "both", "Path of datasets"])
def test_a_picture_may_be_a_path_or_its_content(tmp_path, monkeypatch, value):
    content, expected = KINDS["colour"]
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    values = {
        "path": "a.png",
        "bytes": content,
        "both": {"path": "elsewhere.png", "bytes": content},
        "Path of datasets": {"path": str(tmp_path / "a.png"), "bytes": None},
    }
    np.testing.assert_allclose(seen(values[value]), expected, rtol=1e-6)


def damaged() -> dict[str, tuple[Any, str]]:
    """Values that are not pictures, each with its error."""
    noise = Image.fromarray(np.random.default_rng(6).integers(0, 256, (64, 64, 3), np.uint8))
    png, jpeg, gif = file(noise), file(noise, "JPEG"), file(noise, "GIF")
    return {
        "half a png": (png[: len(png) // 2], "truncated"),
        "half a jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half a gif": (gif[: len(gif) // 2], "truncated"),
        "a flipped bit": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "."),
        "text": (b"this is no picture", "not a picture in a format that Pillow reads"),
        "nothing": (b"", "not a picture in a format"),
        "no file": ("nowhere/a.png", "no file at nowhere/a.png; paths are absolute, or relative to"),
        "a folder": (".", "directory"),
        "neither": ({"path": None, "bytes": None}, "neither a file nor its content"),
        "an object": ({"a": 1}, "neither a file nor its content"),
    }


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_picture_is_an_error(kind):
    value, message = damaged()[kind]
    with pytest.raises(Unreadable, match=message):
        seen(value)


# Pixels as numbers


@pytest.mark.parametrize(
    ("pixels", "channels"),
    [(GREY.ravel(), 1), (GREY, 1), (GREY[..., None], 1), (GREY, 3), (COLOUR, 3)],
    ids=["flat", "rows", "one channel", "grey for colour", "colour"],
)
def test_pixels_are_taken_unchanged(pixels, channels):
    expected = np.broadcast_to(np.reshape(pixels, (SIDE, SIDE, -1)), (SIDE, SIDE, channels)) / np.float32(255)
    np.testing.assert_array_equal(seen(pixels.tolist(), channels), expected)
    image = open_image(pixels.tolist())
    assert pictures.side_of(image) == SIDE


@pytest.mark.parametrize(
    ("pixels", "channels", "message"),
    [
        (np.zeros((2, 32)), 1, "2 x 32 pixels are not a square image"),  # 64 pixels, as 8 x 8 has
        (np.zeros(63), 1, "63 pixels are not a square image"),
        (np.zeros(()), 1, "not a square image"),
        (np.zeros((4, 4)), 1, "4 x 4 x 1 pixels, expected 8 x 8 x 1: numbers are not resized, pictures are"),
        (COLOUR, 1, "8 x 8 x 3 pixels, expected 8 x 8 x 1"),
        (np.zeros((8, 8, 2)), 3, "8 x 8 x 2 pixels, expected 8 x 8 x 3"),
        (np.zeros((8, 8, 3, 1)), 3, "not a square image"),
        (GREY * 2.0, 1, "pixels from 8 to 496, expected 0 to task.brightest = 255; pass --task.brightest 496"),
        (GREY - 9.0, 1, r"pixels from -5 to .*, expected 0 to task.brightest = 255$"),
        (np.full((8, 8), np.nan), 1, "pixels from nan to nan"),
        (np.full((8, 8), np.inf), 1, "pixels from inf to inf, expected 0 to task.brightest = 255$"),
    ],
)
def test_pixels_of_another_shape_or_range_are_an_error(pixels, channels, message):
    with pytest.raises(Unreadable, match=message):
        seen(pixels.tolist(), channels)


def test_ragged_rows_are_an_error():
    for value in ([[1, 2], [3]], ["a"], None, 3):
        with pytest.raises(Unreadable, match="is not an image|not a square image"):
            seen(value)


# The task


def task(**config: Any) -> Images:
    options: dict[str, Any] = {"side": SIDE, "labels": ("a", "b")} | config
    return Images(ImageClassification(**options), options["labels"], 3, 0.0, 1.0)


def table(values: list[Any], labels: list[Any] | None = None, feature: Any = None) -> Any:
    features = None
    if feature is not None:
        features = datasets.Features({"image": feature, "label": datasets.Value("string")})
    return Table.from_dict({"image": values, "label": labels or ["a"] * len(values)}, features=features)


PICTURE = datasets.Image()
AS_STORED: dict[str, tuple[Any, Any]] = {
    "an image feature": (lambda content, path: {"bytes": content, "path": None}, PICTURE),
    "an image feature of paths": (lambda content, path: str(path), PICTURE),
    "bytes": (lambda content, path: content, None),
    "paths": (lambda content, path: str(path), None),
    "objects": (lambda content, path: {"bytes": content, "path": "x.png"}, None),
}


@pytest.mark.parametrize("stored", AS_STORED)
def test_every_way_to_store_a_picture_gives_the_same(tmp_path, stored):
    make, feature = AS_STORED[stored]
    kinds = ["colour", "16-bit png", "transparent"]
    for kind in kinds:
        (tmp_path / f"{kind}.png").write_bytes(KINDS[kind][0])
    values = [make(KINDS[kind][0], tmp_path / f"{kind}.png") for kind in kinds]
    found = task().encode(table(values, feature=feature))[""]["image"]
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    for one, kind in zip(found, kinds, strict=True):
        np.testing.assert_array_equal(one, seen(KINDS[kind][0]))
    assert first_side(table(values, feature=feature), "image") == SIDE


def test_every_damaged_picture_is_named_by_its_row():
    cases = damaged()
    values = [KINDS["colour"][0], cases["half a png"][0], KINDS["grey"][0], cases["text"][0]]
    for feature in (None, PICTURE):
        with pytest.raises(ConfigError) as caught:
            task().encode(table(values, feature=feature))
        message = str(caught.value)
        assert "task.image: 2 of 4 values of the column 'image' cannot be used" in message
        assert re.search(r"row 2.*: .*truncated", message) and re.search(r"row 4.*: not a picture", message)
        assert "row 1" not in message and "row 3" not in message
    with pytest.raises(ConfigError, match=r"task.image: the column 'image', row 1.*: not a picture"):
        first_side(table([cases["text"][0]]), "image")
    with pytest.raises(ConfigError, match="and 4 more"):
        task().encode(table([b"x"] * 12))


def test_animated_and_dark_images_are_reported(capsys):
    """Animations; and numbers so small that another `brightest` is likely."""
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for form in ("GIF", "TIFF"):
        animated = file(frames[0], form, save_all=True, append_images=frames[1:])
        found = task().encode(table([KINDS["grey"][0], animated]))[""]["image"]
        np.testing.assert_allclose(found[1], found[0], atol=1e-6)
        assert "1 of 2 images are animated; their first frame is used: row 2" in capsys.readouterr().out
    small = [(GREY // 16).tolist(), (GREY // 32).tolist()]
    dark = task().encode(table(small))[""]["image"]
    advice = re.search(
        r"no pixel of 2 images is brighter than 0.059 of white.*--task.brightest (\S+)", capsys.readouterr().out
    )
    assert advice and float(advice[1]) == 15
    bright = task(brightest=float(advice[1])).encode(table(small))[""]["image"]
    np.testing.assert_allclose(bright, 17 * np.asarray(dark), rtol=1e-5)
    assert capsys.readouterr().out == ""
    task().encode(table([KINDS["colour"][0]]))
    assert capsys.readouterr().out == ""


def test_a_picture_has_its_own_white():
    """`brightest` is for numbers alone, and does not scale pictures."""
    content, expected = KINDS["grey"]
    np.testing.assert_allclose(task(brightest=16.0).encode(table([content]))[""]["image"][0], expected, rtol=1e-6)


def test_images_of_one_colour_are_counted():
    flat = np.full((3, 4, 4, 3), 0.5, np.float32)
    flat[1, 2, 2, 1] = 0.4
    flat[2] = [0.1, 0.2, 0.3]
    assert count_blank(flat) == 2


@pytest.mark.parametrize(
    "says", [{}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": True}]
)
def test_images_are_normalized_as_the_checkpoints_preprocessor_does(tmp_path, says):
    """(value * rescale_factor - mean) / std, each step only if its configuration says so."""
    vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 8, "patch_size": 4, **vit}))
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.5, 0.6]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std, **says}))
    config = TrainConfig(
        "vit", ImageClassification(labels=("a", "b"), side=8), Pretrained(str(tmp_path)), DataConfig("x"), LoraConfig()
    )
    found: Any = make_task(config, make_network(config)).encode(table([KINDS["colour"][0]]))[""]["image"]
    expected = COLOUR * (says.get("rescale_factor", 1 / 255) if says.get("do_rescale", True) else 1)
    if says.get("do_normalize", True):
        expected = (expected - mean) / std
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


# Folders and files of pictures


def write(folder: Path, bright: bool, count: int) -> None:
    """Bright or dark noise, in 16-bit grey."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(bright)
    for i in range(count):
        levels = rng.integers(20000, 30000, (SIDE, SIDE)) + 30000 * bright
        Image.fromarray(levels.astype(np.uint16)).save(folder / f"{i}.png")


def test_a_folder_of_pictures_is_read(tmp_path):
    """Classes are folders. A validation folder that lacks one has its own numbers for the others."""
    for name in ("cat", "dog", "owl"):
        write(tmp_path / "train" / "train" / name, name != "cat", 2)
    for name in ("dog", "owl"):
        write(tmp_path / "other" / "validation" / name, True, 1)
    tables = data.load(DataConfig(str(tmp_path / "train"), str(tmp_path / "other")), tmp_path / "cache")
    names = class_names(tables["train"], "label")
    assert names == ("cat", "dog", "owl")
    assert sorted(class_numbers(tables["train"], "label", names)) == [0, 0, 1, 1, 2, 2]
    assert sorted(class_numbers(tables["validation"], "label", names)) == [1, 2]
    found = task(labels=names).encode(tables["train"])[""]
    assert np.asarray(found["image"]).max() < 1 and count_blank(np.asarray(found["image"])) == 0


def test_a_run_on_pictures_learns_and_reports_blank_ones(tmp_path):
    """A folder of 16-bit pictures, of which two have one colour: bright against dark."""
    for part, count in (("train", 8), ("validation", 4)):
        for name in ("bright", "dark"):
            write(tmp_path / "set" / part / name, name == "bright", count)
    for name in ("bright", "dark"):
        flat = np.full((SIDE, SIDE), 50000 if name == "bright" else 25000, np.uint16)
        Image.fromarray(flat).save(tmp_path / "set" / "train" / name / "flat.png")
    (tmp_path / "mine.py").write_text(
        "from jlora import LoraConfig\nfrom train.config import *\n"
        f"config = TrainConfig('mine', ImageClassification(), Mlp((16,)), DataConfig({str(tmp_path / 'set')!r}),"
        " LoraConfig(2, train_also=('head',)), base=FitConfig(4, 6), fit=FitConfig(2, 6),"
        " learning_rate=LearningRates(base=2e-2))\n"
    )
    run_dir = tmp_path / "run"
    code, printed = program(
        str(tmp_path / "mine.py"), "--run-dir", str(run_dir), "--cache-dir", str(tmp_path / "cache")
    )
    assert code == 0, printed
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["metrics"]["adapted"]["validation"]["accuracy"] == 1
    assert summary["labels"] == {"train": {"bright": 9, "dark": 9}, "validation": {"bright": 4, "dark": 4}}
    assert summary["blank_images"] == {"train": 2} and "train: 2 images have a single colour" in printed
    # A file that is damaged later is an error that names it.
    broken = tmp_path / "set" / "train" / "dark" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    code, printed = program(
        str(tmp_path / "mine.py"), "--cache-dir", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "again")
    )
    assert code == 2 and "3.png" in printed and "Traceback" not in printed, printed

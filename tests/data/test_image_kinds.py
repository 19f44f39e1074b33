"""What image files become: the tables in docs/data.md, line by line, and whole ranges of values."""

import io
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dataset_files import draw, png, png_of, ppm, tiff
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from unlocked.data import load_dataset
from unlocked.data.decode import decode_into, image_size

ROOT = Path(__file__).parents[2]
Pixel = tuple[int, ...]


def rows(heading: str) -> list[tuple[str, ...]]:
    """The cells of the table that follows the heading in docs/data.md, without its two lines on top."""
    text = (ROOT / "docs" / "data.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[2:]]


def numbers(cell: str) -> Pixel:
    return tuple(int(word) for word in cell.split())


def decoded(path: Path, channels: int, resize: int | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [C, H, W]."""
    array = np.zeros((1, channels, *(size or image_size(path))), dtype=np.uint8)
    decode_into(array, [0], [str(path)], resize=resize, example=str(path))
    return array[0]


def saved(mode: str, form: str) -> Callable[[Pixel], bytes]:
    def make(pixel: Pixel) -> bytes:
        file = io.BytesIO()
        Image.new(mode, (3, 2), pixel if len(pixel) > 1 else pixel[0]).save(file, form)
        return file.getvalue()

    return make


def palette(mode: str) -> Callable[[Pixel], bytes]:
    """Pixels that all refer to the colour; with an alpha of their own in the mode PA."""

    def make(pixel: Pixel) -> bytes:
        image = Image.new(mode, (3, 2), 1 if mode == "P" else (1, pixel[3]))
        image.putpalette([0, 0, 0, *pixel[:3]])
        file = io.BytesIO()
        image.save(file, "PNG" if mode == "P" else "TIFF")
        return file.getvalue()

    return make


def pgm(largest: int) -> Callable[[Pixel], bytes]:
    return lambda pixel: f"P5\n3 2\n{largest}\n".encode() + struct.pack(">H", pixel[0]) * 6


def only_a_mode(mode: str, pixel_format: str) -> Callable[[Pixel], bytes]:
    """For modes that no format's file has: a format of our own, as any package can add one to Pillow."""
    return lambda pixel: f"MODE {mode}\n".encode() + struct.pack(pixel_format, *pixel) * 6


class _ModeFile(ImageFile.ImageFile):
    format = "MODE"

    def _open(self) -> None:
        self._mode = self.fp.readline().decode().split()[1]
        self._size = (3, 2)
        self.tile = [ImageFile._Tile("raw", (0, 0, 3, 2), self.fp.tell(), (self._mode, 0, 1))]


Image.register_open("MODE", _ModeFile, lambda prefix: prefix.startswith(b"MODE "))

FILES: dict[str, Callable[[Pixel], bytes]] = {
    "black and white": saved("1", "PNG"),
    "grey": saved("L", "PNG"),
    "grey of 4 bits (PNG)": lambda pixel: png_of(0, 4, bytes([17 * pixel[0]] * 4), (2, 3)),
    "grey with alpha": saved("LA", "PNG"),
    "palette": palette("P"),
    "palette with alpha (TIFF)": palette("PA"),
    "colour": saved("RGB", "PNG"),
    "colour of 16 bits a channel (PNG)": lambda pixel: png_of(2, 16, struct.pack(">3H", *pixel) * 6, (2, 3)),
    "colour with alpha": saved("RGBA", "PNG"),
    "colour with a byte of no meaning (no file)": only_a_mode("RGBX", "=4B"),
    "print colours": saved("CMYK", "TIFF"),
    "video colours": saved("YCbCr", "IM"),
    "grey of 16 bits (PNG, TIFF)": saved("I;16", "PNG"),
    "the same, big-endian (TIFF)": saved("I;16B", "TIFF"),
    "the same, named little-endian (IM)": saved("I;16L", "IM"),
    "the same in the machine's own order": only_a_mode("I;16N", "=H"),
    "grey of 12 bits (TIFF)": lambda pixel: tiff(12, 1, (4097 * pixel[0]).to_bytes(3, "big") * 4, (2, 4)),
    "grey of 16 bits, 0 is white (TIFF)": lambda pixel: tiff(16, 0, struct.pack("<H", pixel[0]) * 6, (2, 3)),
    "grey of 16 bits (PGM)": pgm(65535),
    "grey up to 4095 (PGM)": pgm(4095),
    "grey of 32 bits (TIFF)": saved("I", "TIFF"),
    "grey of floats (TIFF)": saved("F", "TIFF"),
    "Lab (TIFF)": saved("LAB", "TIFF"),
    "HSV (no file)": only_a_mode("HSV", "=3B"),
    "grey times alpha (no file)": only_a_mode("La", "=2B"),
    "colour times alpha (no file)": only_a_mode("RGBa", "=4B"),
}
KINDS = rows("What an image becomes")


@pytest.mark.parametrize("row", KINDS, ids=[row[0] for row in KINDS])
def test_every_line_of_the_table_of_modes(row: tuple[str, ...], tmp_path: Path) -> None:
    name, mode, pixel, three, one = row
    path = tmp_path / "some.png"  # Pillow goes by the content
    path.write_bytes(FILES[name](numbers(pixel)))
    with Image.open(path) as image:
        assert f"`{image.mode}`" == mode
    if three == one == "refused":
        for attempt in (lambda: image_size(path), lambda: decoded(path, 3, size=(2, 3))):
            with pytest.raises(ValueError, match=rf"^image {path} has Pillow's mode {mode[1:-1]}, .*; save it as RGB"):
                attempt()
        return
    for channels, cell in ((3, three), (1, one)):
        values = decoded(path, channels)
        assert {tuple(value) for value in values.reshape(channels, -1).T.tolist()} == {numbers(cell)}


def test_the_table_has_every_mode_of_pillow() -> None:
    assert sorted(FILES) == sorted(row[0] for row in KINDS)
    assert {f"`{mode}`" for mode in Image.MODES} <= {row[1] for row in KINDS}


def colour_of(name: str, mode: str, pixel: Pixel) -> list[float]:
    """By the definitions: ink on paper, JFIF's YCbCr, a share of the largest value."""
    if mode == "CMYK":
        return [(255 - ink) * (255 - pixel[3]) / 255 for ink in pixel[:3]]
    if mode == "YCbCr":
        y, cb, cr = pixel[0], pixel[1] - 128, pixel[2] - 128
        return [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]
    if mode[0] == "P" or mode.startswith("RGB"):
        return [value / (257 if "16 bits" in name else 1) for value in pixel[:3]]
    largest = {"1": 1, "L": 255, "LA": 255}.get(mode, 65535)
    for words, other in (("4 bits", 15), ("12 bits", 4095), ("up to 4095", 4095)):
        largest = other if words in name else largest
    grey = 255 * pixel[0] / largest
    return [255 - grey if "0 is white" in name else grey] * 3


@pytest.mark.parametrize("row", [row for row in KINDS if row[3] != "refused"], ids=lambda row: row[0])
def test_the_numbers_of_the_table_are_right(row: tuple[str, ...]) -> None:
    """Grey is Rec. 601's luma. Pillow rounds in between."""
    colour = colour_of(row[0], row[1].strip("`"), numbers(row[2]))
    assert np.abs(np.subtract(numbers(row[3]), colour)).max() <= 1
    assert abs(numbers(row[4])[0] - np.dot((0.299, 0.587, 0.114), colour)) <= 1.5


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ramp.png", png_of(0, 16, RAMP.astype(">u2").tobytes(), (256, 256))),
        ("ramp.tif", tiff(16, 1, RAMP.astype("<u2").tobytes(), (256, 256))),
        ("ramp.pgm", b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes()),
        ("white is 0.tif", tiff(16, 0, (65535 - RAMP).astype("<u2").tobytes(), (256, 256))),
    ],
    ids=["PNG", "TIFF", "PGM", "TIFF, 0 is white"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_value_of_16_bits_keeps_its_upper_eight(name: str, content: bytes, channels: int, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    expected = np.broadcast_to(RAMP >> 8, (channels, 256, 256))
    np.testing.assert_array_equal(decoded(path, channels), expected)
    half = decoded(path, channels, resize=128, size=(128, 128))  # and these are what is scaled
    scaled = np.asarray(Image.fromarray((RAMP >> 8).astype(np.uint8)).resize((128, 128), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(half, np.broadcast_to(scaled, (channels, 128, 128)))


@given(
    seed=st.integers(0, 2**32 - 1), mode=st.sampled_from(["LA", "RGBA", "PA"]), form=st.sampled_from(["PNG", "TIFF"])
)
def test_transparency_changes_no_colour(seed: int, mode: str, form: str) -> None:
    random = np.random.default_rng(seed)
    height, width, bands = *(int(side) for side in random.integers(1, 9, 2)), len(mode)
    values = random.integers(0, 256, (height, width, bands), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA" if mode == "RGBA" else "LA")
    expected = values[..., :3] if mode == "RGBA" else np.repeat(values[..., :1], 3, 2)
    if mode == "PA":
        image, colours, form = Image.frombytes("PA", (width, height), values.tobytes()), random.bytes(768), "TIFF"
        image.putpalette(colours)
        expected = np.frombuffer(colours, np.uint8).reshape(256, 3)[values[..., 0]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.png"
        image.save(path, form)
        np.testing.assert_array_equal(decoded(path, 3), expected.transpose(2, 0, 1))


Case = tuple[Path, np.ndarray | str]
PIXELS = draw(3, 5, 7)


def _turned(folder: Path) -> Case:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn to the right
    Image.fromarray(PIXELS).save(folder / "turned.png", exif=exif)
    with Image.open(folder / "turned.png") as image:
        assert image.getexif()[274] == 6
    return folder / "turned.png", PIXELS


def _see_through(folder: Path) -> Case:
    image = Image.fromarray(PIXELS).quantize(8)
    image.save(folder / "clear.png", transparency=bytes([0, 128, 255, 0]))
    return folder / "clear.png", np.asarray(image.convert("RGB"))


def _frames(form: str) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        frames = [Image.fromarray(np.full((5, 7, 3), 50 * i, dtype=np.uint8)) for i in range(4)]
        options = {"lossless": True} if form == "WebP" else {}
        frames[1].save(folder / "frames.gif", form, save_all=True, append_images=[frames[2], frames[3]], **options)
        with Image.open(folder / "frames.gif") as image:
            assert image.n_frames == 3
        return folder / "frames.gif", np.full((5, 7, 3), 50, dtype=np.uint8)

    return make


def _profile(folder: Path) -> Case:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # which would make other colours of them
    Image.fromarray(PIXELS).save(folder / "profile.png", icc_profile=lab)
    with Image.open(folder / "profile.png") as image:
        assert image.info["icc_profile"] == lab
    return folder / "profile.png", PIXELS


def _large(size: tuple[int, int]) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        """Its header alone: whoever asked for pixels would find the file damaged."""
        (folder / "large.ppm").write_bytes(b"P6 %d %d 255\n" % (size[1], size[0]))
        return folder / "large.ppm", r"has too many pixels: .*\(\d+ pixels\) exceeds limit of .* Make it smaller"

    return make


def _long(folder: Path) -> Case:
    (folder / "long.ppm").write_bytes(ppm(draw(1, 2, 20_000)))
    return (
        folder / "long.ppm",
        "is 2 x 20000 pixels, and 100 x 1000000 when it is scaled to 100 x 100: more than the limit of",
    )


def _cut_off(folder: Path) -> Case:
    (folder / "cut.png").write_bytes(png(PIXELS)[:-30])
    return folder / "cut.png", "is damaged"


OTHERS: dict[str, tuple[Callable[[Path], Case], ...]] = {
    "EXIF orientation": (_turned,),
    "transparent colours of a palette": (_see_through,),
    "several frames or pages (GIF, TIFF, PNG, WebP)": tuple(map(_frames, ("GIF", "TIFF", "PNG", "WebP"))),
    "colour profile (ICC)": (_profile,),
    "more pixels than the limit": tuple(_large((side, 1000)) for side in (1001, 2000, 2001, 1_000_000)),
    "more pixels than the limit when it is scaled": (_long,),
    "damaged or cut off": (_cut_off,),
}
REST = rows("What else is in a file")


def test_every_line_of_the_table_of_the_rest_is_tried() -> None:
    assert sorted(OTHERS) == sorted(row[0] for row in REST)


@pytest.mark.parametrize("row", REST, ids=[row[0] for row in REST])
def test_every_line_of_the_table_of_the_rest(
    row: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    for make in OTHERS[row[0]]:
        path, expected = make(tmp_path)
        if isinstance(expected, str):
            assert row[1].startswith("refused")
            resize, size = (100, (100, 100)) if "scaled" in row[0] else (None, PIXELS.shape[:2])
            with pytest.raises(ValueError, match=f"^image {path} {expected}"):
                decoded(path, 3, resize, size if "large" not in path.name else None)
        else:
            assert not row[1].startswith("refused")
            np.testing.assert_array_equal(decoded(path, 3), expected.transpose(2, 0, 1))


def test_the_limit_holds_in_every_process_and_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name in ("1.png", "2.png", "3.png"):
            (tmp_path / split / "a" / name).write_bytes(png(draw(1, 4, 4)))
    long = tmp_path / "train" / "a" / "3.png"
    long.write_bytes(png(draw(1, 4, 64)))
    for limit, workers in ((255, 1), (255, 2), (None, 2)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        if limit is None:
            assert len(load_dataset("folder", tmp_path, image_size=4, workers=workers)[0]) == 3
        else:
            with pytest.raises(
                ValueError, match=f"^image {long} has too many pixels: .* set PIL.Image.MAX_IMAGE_PIXELS"
            ):
                load_dataset("folder", tmp_path, image_size=4, workers=workers)

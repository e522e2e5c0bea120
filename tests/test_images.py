"""Picture files: every kind that users bring, padding and resizing, writing whole or not at all, and data sets."""

import errno
import hashlib
import io
import os
import struct
import tempfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from invdiff import ChecksumError, InputError, ShapeError, cards
from invdiff.card_models import DataCard
from invdiff.images import (
    load_data_card,
    load_image,
    read_image,
    read_tiles,
    resize_image,
    write_png,
)

KEPT = "sRGB values kept as they are (not linearised)"


def levels(*shape, top=256, seed=0):
    return np.random.default_rng(seed).integers(0, top, shape)


def picture(*shape, seed=0):
    return Image.fromarray(levels(*shape, seed=seed).astype(np.uint8))


def as_tensor(array, span=255):
    array = np.asarray(array, np.float64)
    return torch.from_numpy((array[None] if array.ndim == 2 else array.transpose(2, 0, 1)) / span).float()


def png16(array, colour_type):
    """Encode a 16-bit PNG, which Pillow writes for grey alone: each row unfiltered."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_rgb_and_grey_pngs_keep_their_values(tmp_path):
    colour, grey = picture(5, 7, 3), picture(4, 3)
    colour.save(tmp_path / "colour.png")
    grey.save(tmp_path / "grey.png")
    read = read_image(tmp_path / "colour.png")
    assert read.pixels.dtype == torch.float32 and read.pixels.is_contiguous() and read.notes == (KEPT,)
    assert torch.equal(read.pixels, as_tensor(colour))
    repeated = read_image(str(tmp_path / "grey.png"))
    assert torch.equal(repeated.pixels, as_tensor(grey).repeat(3, 1, 1))
    assert repeated.notes == (KEPT, "grey repeated to three channels")
    assert torch.equal(read_image(tmp_path / "grey.png", grey=True).pixels, as_tensor(grey))
    averaged = read_image(tmp_path / "colour.png", grey=True)
    weights = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    torch.testing.assert_close(averaged.pixels, (as_tensor(colour) * weights).sum(0, keepdim=True))
    assert averaged.notes == (KEPT, "colours averaged to grey (ITU-R 601)")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_exif_orientation(tmp_path, orientation, kind):
    path, stored = tmp_path / f"turned.{kind}", picture(5, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    # EXIF 2.32: the file's 0th row is the picture's top, top, bottom, bottom, left, right, right, left, and its 0th
    # column the left, right, right, left, top, top, bottom, bottom.
    x = as_tensor(stored)
    swapped = x.transpose(1, 2)
    expected = [x, x.flip(2), x.flip(1, 2), x.flip(1), swapped, swapped.flip(2), swapped.flip(1, 2), swapped.flip(1)]
    read = read_image(path)
    assert torch.equal(read.pixels, expected[orientation - 1])
    with Image.open(path) as opened:
        assert torch.equal(read.pixels, as_tensor(ImageOps.exif_transpose(opened)))
    assert ("EXIF orientation applied" in read.notes) == (orientation > 1)


def test_alpha_is_dropped_not_blended(tmp_path):
    for shape in ((4, 5, 4), (4, 5, 2)):
        stored = picture(*shape)
        stored.save(tmp_path / "alpha.png")
        read = read_image(tmp_path / "alpha.png")
        expected = as_tensor(np.asarray(stored)[..., :-1]).expand(3, -1, -1)
        assert torch.equal(read.pixels, expected) and "alpha dropped" in read.notes


def test_sixteen_bit_grey(tmp_path):
    values = levels(6, 5, top=65536).astype(np.uint16)
    values[0, :2] = 0, 65535
    for name in ("grey.png", "grey.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        read = read_image(tmp_path / name, grey=True)
        assert torch.equal(read.pixels, as_tensor(values, 65535)) and "16-bit values scaled by 1/65535" in read.notes
    assert len(read.pixels.unique()) > 25


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4)])
def test_sixteen_bit_colour_png_keeps_both_bytes(tmp_path, colour_type, channels):
    values = levels(6, 5, channels, top=65536)
    (tmp_path / "deep.png").write_bytes(png16(values, colour_type))
    read = read_image(tmp_path / "deep.png")
    assert torch.equal(read.pixels, as_tensor(values[..., :3], 65535))
    assert "16-bit values scaled by 1/65535" in read.notes and ("alpha dropped" in read.notes) == (channels == 4)


def test_sixteen_bits_that_are_lost_are_said_to_be(tmp_path):
    values = levels(6, 5, 2, top=65536)
    (tmp_path / "deep.png").write_bytes(png16(values, 4))
    read = read_image(tmp_path / "deep.png")
    assert torch.equal(read.pixels, as_tensor(values[..., :1] >> 8).expand(3, -1, -1))
    assert "16-bit colours reduced to 8 bits" in read.notes


def test_palette_one_bit_and_floats(tmp_path):
    stored = picture(6, 6, 3).quantize(7)
    stored.save(tmp_path / "palette.png", transparency=2)
    read = read_image(tmp_path / "palette.png")
    assert torch.equal(read.pixels, as_tensor(stored.convert("RGB")))
    assert {"palette expanded", "alpha dropped"} <= set(read.notes)
    bits = levels(5, 9, top=2).astype(bool)
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert torch.equal(read_image(tmp_path / "bits.png", grey=True).pixels, as_tensor(bits, 1))
    floats = np.random.default_rng(1).random((4, 5), np.float32)
    Image.fromarray(floats).save(tmp_path / "floats.tiff")
    assert torch.equal(read_image(tmp_path / "floats.tiff", grey=True).pixels, torch.from_numpy(floats)[None])
    Image.fromarray(floats + 1).save(tmp_path / "beyond.tiff")
    with pytest.raises(InputError, match=r"beyond\.tiff: .*finite and in \[0, 1\]"):
        read_image(tmp_path / "beyond.tiff")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "integers.tiff")
    with pytest.raises(InputError, match=r"integers\.tiff: .*70000, are not 16-bit"):
        read_image(tmp_path / "integers.tiff")


def test_cmyk_jpeg_and_colour_profile(tmp_path):
    flat = Image.new("RGB", (16, 16), (200, 60, 20))
    flat.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    read = read_image(tmp_path / "cmyk.jpg")
    assert "CMYK turned into RGB" in read.notes and read.pixels.shape == (3, 16, 16)
    # An inverted reading would be off by more than 0.2; JPEG at this quality by a few levels.
    torch.testing.assert_close(read.pixels[:, 8, 8], torch.tensor([200.0, 60.0, 20.0]) / 255, atol=6 / 255, rtol=0)
    flat.save(tmp_path / "profile.png", icc_profile=b"a profile")
    assert "colour profile not applied" in read_image(tmp_path / "profile.png").notes


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    read = read_image(tmp_path / "moving.gif")
    assert torch.equal(read.pixels, as_tensor(frames[0])) and "the first of 3 frames taken" in read.notes


def test_what_is_no_picture(tmp_path):
    with pytest.raises(InputError, match=r"no picture .*missing\.png"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(InputError, match="no picture"):
        read_image(tmp_path)
    for content in (b"", b"not a picture at all"):
        (tmp_path / "text.png").write_bytes(content)
        with pytest.raises(InputError, match=r"text\.png is not a picture that can be read"):
            read_image(tmp_path / "text.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "gif", "bmp"])
def test_a_truncated_or_damaged_file_is_an_input_error_wherever_it_is_cut(tmp_path, kind):
    whole = io.BytesIO()
    picture(24, 31, 3).save(whole, format=kind)
    blob, path = whole.getvalue(), tmp_path / f"cut.{kind}"
    generator = np.random.default_rng(0)
    failed = 0
    for i in range(60):
        cut = int(generator.integers(1, len(blob)))
        broken = bytearray(blob[:cut] if i % 2 else blob)
        for place in generator.integers(0, len(broken), 0 if i % 2 else 4):
            broken[place] ^= 0xFF
        path.write_bytes(broken)
        try:
            read_image(path)
        except InputError as error:
            assert path.name in str(error)
            failed += 1
    assert failed > 10
    path.write_bytes(blob[: len(blob) // 2])
    with pytest.raises(InputError, match=r"damaged or truncated|is not a picture"):
        read_image(path)


def test_a_tiff_whose_pixels_begin_at_a_word(tmp_path):
    whole = io.BytesIO()
    picture(4, 5).save(whole, format="tiff")
    begin = struct.pack("<HHI", 273, 4, 1)  # tag StripOffsets, one long; type 2 is text, a TypeError in Pillow
    assert whole.getvalue().count(begin) == 1
    (tmp_path / "odd.tiff").write_bytes(whole.getvalue().replace(begin, struct.pack("<HHI", 273, 2, 1)))
    with pytest.raises(InputError, match=r"odd\.tiff is damaged or truncated"):
        read_image(tmp_path / "odd.tiff")


def test_too_many_pixels(tmp_path, monkeypatch):
    picture(8, 8).save(tmp_path / "large.png")
    for most in (40, 20):  # Pillow warns above its limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(InputError, match=r"large\.png has far more pixels"):
            read_image(tmp_path / "large.png")


def test_resizing_refuses_no_size():
    with pytest.raises(InputError, match="got 0"):
        resize_image(torch.zeros(3, 4, 4), 0)


def test_resizing():
    x = as_tensor(levels(30, 45, 3))
    small = resize_image(x, 15)
    assert small.shape == (3, 10, 15) and resize_image(x, 90).shape == (3, 60, 90)
    assert resize_image(x[:, :1], 9).shape == (3, 1, 9)
    torch.testing.assert_close(resize_image(x, 45), x, atol=1e-6, rtol=0)
    assert float(small.min()) >= 0 and float(small.max()) <= 1
    # Anti-aliased: white noise of standard deviation s has less than s / 2 left after averaging three by three.
    assert float(small.std()) < 0.5 * float(x.std())
    step = torch.cat([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)], -1)
    assert float(resize_image(step, 64).min()) >= 0 and float(resize_image(step, 64).max()) <= 1  # bicubic overshoots


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    x = as_tensor(levels(5, 7, channels))
    path = write_png(tmp_path / "x.png", x)
    assert path == tmp_path / "x.png" and torch.equal(read_image(path, grey=channels == 1).pixels, x)
    with Image.open(path) as stored:
        assert stored.mode == ("L" if channels == 1 else "RGB")
    write_png(str(path), 3 * x - 1)  # replaces, clips, rounds to the nearest level
    expected = ((3 * x - 1).clamp(0, 1) * 255).round() / 255
    assert torch.equal(read_image(path, grey=channels == 1).pixels, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_the_file_has_the_usual_permissions(tmp_path):
    umask = os.umask(0o022)
    try:
        assert write_png(tmp_path / "x.png", torch.zeros(3, 2, 2)).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(umask)


@pytest.mark.parametrize("where", ["mkstemp", "save", "replace"])
def test_a_picture_that_cannot_be_written_leaves_nothing_new(tmp_path, monkeypatch, where):
    path = write_png(tmp_path / "x.png", torch.zeros(3, 4, 4))
    before = path.read_bytes()
    kind = errno.EACCES if where == "mkstemp" else errno.ENOSPC

    def fail(target=None, file=None, *rest, **settings):
        if where == "save":
            file.write(b"the first bytes")
        raise OSError(kind, os.strerror(kind))

    owner = {"mkstemp": tempfile, "save": Image.Image, "replace": type(tmp_path)}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, fail)
        with pytest.raises(InputError, match=rf"Cannot write .*x\.png: {os.strerror(kind)}"):
            write_png(path, torch.ones(3, 4, 4))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"] and path.read_bytes() == before


def test_unwritable_places(tmp_path):
    with pytest.raises(InputError, match="No such file or directory"):
        write_png(tmp_path / "nowhere" / "x.png", torch.zeros(3, 4, 4))
    with pytest.raises(InputError, match=r"Cannot write"):
        write_png(tmp_path, torch.zeros(3, 4, 4))
    assert list(tmp_path.iterdir()) == []
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write into any folder")
    with pytest.raises(InputError, match="Permission denied"):
        write_png(closed / "x.png", torch.zeros(3, 4, 4))


def test_what_is_no_picture_to_write(tmp_path):
    with pytest.raises(ShapeError, match=r"\(1 or 3, h, w\), got \(2, 4, 4\)"):
        write_png(tmp_path / "x.png", torch.zeros(2, 4, 4))
    with pytest.raises(InputError, match="holds NaN"):
        write_png(tmp_path / "x.png", torch.full((3, 4, 4), torch.nan))
    assert list(tmp_path.iterdir()) == []


# Data sets.


def tiles_card(tmp_path, side=8, **changes):
    """Two files of tiles in three columns, six tiles and four (two places empty), all values different by tile."""
    files, all_tiles = [], []
    for which, count in enumerate((6, 4)):
        grid = np.zeros((2 * side, 3 * side, 3), np.uint8)
        for i in range(count):
            tile = levels(side, side, 3, seed=10 * which + i)
            grid[i // 3 * side :, i % 3 * side :][:side, :side] = tile
            all_tiles.append(as_tensor(tile))
        path = tmp_path / f"tiles_{which}.png"
        Image.fromarray(grid).save(path)
        files.append({"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "count": count})
    values = {"name": "some", "version": 1, "title": "t", "source": "a shelf", "licence": "CC0", "reader": "tiles"}
    values |= {"files": files, "side": side, "columns": 3, "splits": {"train": [0, 3], "test": [3, 10]}}
    return DataCard.model_validate(values | changes), all_tiles


def test_read_tiles(tmp_path):
    _, tiles = tiles_card(tmp_path)
    path = tmp_path / "tiles_0.png"
    assert torch.equal(read_tiles(path, 8, 3, [5, 0, 4]), torch.stack([tiles[5], tiles[0], tiles[4]]))
    for side, columns in ((8, 2), (7, 3), (6, 4)):
        with pytest.raises(InputError, match=rf"no grid of {columns} tiles of {side}"):
            read_tiles(path, side, columns, [0])
    for indices in ([6], [-1], [0, 9], []):
        with pytest.raises(InputError, match="tiles 0 to 5"):
            read_tiles(path, 8, 3, indices)


def test_tiles_of_the_test_split_across_files(tmp_path, monkeypatch):
    card, tiles = tiles_card(tmp_path)
    for index in range(7):
        assert torch.equal(load_image(card, index, 8, data=tmp_path), tiles[3 + index])
    for index in (-1, 7):
        with pytest.raises(InputError, match=f"some has pictures 0 to 6, got index {index}"):
            load_image(card, index, 8, data=tmp_path)
    monkeypatch.setenv("INVDIFF_DATA", str(tmp_path))
    assert torch.equal(load_image(tiles_card(tmp_path, splits={})[0], 6, 8), tiles[6])  # without splits, all
    averaged = tiles[3].unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    torch.testing.assert_close(load_image(card, 0, 4), averaged)
    assert torch.equal(load_image(card, 0, 6), tiles[3][:, 1:7, 1:7])  # no multiple: the centre
    torch.testing.assert_close(
        load_image(card, 0, 3), tiles[3][:, 1:7, 1:7].unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    )
    with pytest.raises(InputError, match="8 x 8 pixels, fewer than the 16 x 16"):
        load_image(card, 0, 16)
    with pytest.raises(InputError, match="at least 1 pixel, got 0"):
        load_image(card, 0, 0)


def test_a_file_of_tiles_that_is_another_or_missing(tmp_path):
    card, _ = tiles_card(tmp_path)
    load_image(card, 0, 8, data=tmp_path)
    picture(16, 24, 3, seed=99).save(tmp_path / "tiles_0.png")
    with pytest.raises(ChecksumError, match=r"tiles_0\.png has the SHA-256 .*a shelf"):
        load_image(card, 0, 8, data=tmp_path)
    (tmp_path / "tiles_1.png").unlink()
    with pytest.raises(InputError, match=r"needs the file .*tiles_1\.png.*a shelf.*INVDIFF_DATA"):
        load_image(card, 5, 8, data=tmp_path)


@pytest.mark.parametrize("reader", ["tiles", "folder"])
def test_missing_data_names_the_source_and_the_variable(tmp_path, monkeypatch, reader):
    card = tiles_card(tmp_path, reader=reader)[0]
    monkeypatch.delenv("INVDIFF_DATA", raising=False)
    with pytest.raises(InputError, match=r"some is not part of the package.*a shelf.*INVDIFF_DATA"):
        load_image(card, 0, 8)
    for data in (tmp_path / "nowhere", tmp_path / "tiles_0.png"):
        with pytest.raises(InputError, match=r"no folder .*(nowhere|tiles_0).*a shelf.*INVDIFF_DATA"):
            load_image(card, 0, 8, data=data)


def test_folder_of_pictures_by_name(tmp_path):
    card = tiles_card(tmp_path, reader="folder", files=[], splits={})[0]
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(InputError, match=r"holds no picture.*a shelf"):
        load_image(card, 0, 4, data=folder)
    stored = {name: picture(9, 12, 3, seed=i) for i, name in enumerate(("b.PNG", "a.tiff", "c.webp"))}
    for name, x in stored.items():
        x.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    (folder / "notes.txt").write_text("no picture")
    for index, name in enumerate(sorted(stored)):
        square = as_tensor(stored[name])[:, :, 1:10]
        expected = square.unfold(1, 3, 3).unfold(2, 3, 3).mean((-1, -2))
        torch.testing.assert_close(load_image(card, index, 3, data=folder), expected)
    with pytest.raises(InputError, match="0 to 2, got index 3"):
        load_image(card, 3, 3, data=folder)
    with pytest.raises(InputError, match="9 x 9 pixels, fewer than the 10 x 10"):
        load_image(card, 0, 10, data=folder)
    last = card.model_copy(update={"splits": {"test": (2, 3)}})
    assert torch.equal(load_image(last, 0, 9, data=folder), as_tensor(stored["c.webp"])[:, :, 1:10])
    with pytest.raises(InputError, match="ends at picture 4, but there are 3"):
        load_image(card.model_copy(update={"splits": {"test": (2, 4)}}), 0, 3, data=folder)


def test_pictures_inside_scikit_image():
    import skimage

    card = load_data_card("skimage-photos")
    for index, entry in enumerate(card.entries):
        left, top, length = entry.box
        with Image.open(f"{skimage.__path__[0]}/data/{entry.file}") as opened:
            whole = np.asarray(opened.convert("RGB"))  # one of them is grey
        box = as_tensor(whole[top : top + length, left : left + length])
        assert box.shape == (3, length, length)
        assert torch.equal(load_image(card, index, length), box)
        small = load_image(card, index, 64)
        assert small.shape == (3, 64, 64) and 0 <= float(small.min()) < float(small.max()) <= 1
    entry = card.entries[0]
    for changed, words in (
        ({"file": "nothing.png"}, r"does not hold nothing\.png"),
        ({"box": (400, 0, 224)}, "does not lie inside astronaut"),
    ):
        other = card.model_copy(update={"entries": (entry.model_copy(update=changed),)})
        with pytest.raises(InputError, match=words):
            load_image(other, 0, 64)
    with pytest.raises(InputError, match="0 to 7, got index 8"):
        load_image(card, 8, 64)


def test_every_data_card_can_be_loaded_by_name():
    assert [load_data_card(name).name for name in cards.names("data")] == cards.names("data")

"""A tar file that is not whole is never taken for a shorter one; the attacks are scripted."""

import gzip
import io
import lzma
import random
import tarfile
from pathlib import Path

import pytest
from encodable import write_tar

from t5lib.data import tars
from t5lib.data.tars import check_tar, named, read_samples
from t5lib.utils.errors import T5Error

SAMPLES = [{f"{index:04d}.png": bytes([index]) * 700, f"{index:04d}.cls": b"%d" % index} for index in range(6)]
BLOCK = 512


@pytest.fixture
def tar(tmp_path) -> Path:
    return write_tar(tmp_path / "a.tar", SAMPLES)


def read(path: Path) -> list[dict]:
    check(path)
    with path.open("rb") as file:
        return list(read_samples(path, file))


def check(path: Path) -> None:
    with path.open("rb") as file:
        check_tar(path, file)


def headers(path: Path) -> list[int]:
    with tarfile.open(path) as opened:
        return [member.offset for member in opened]


def silent(path: Path, content: bytes, whole: list[dict]) -> bool:
    """Whether `content` is read as something else without a word."""
    path.write_bytes(content)
    try:
        return read(path) != whole
    except T5Error as error:
        assert "\n" not in str(error)
        return False


def test_no_flipped_bit_in_a_header_goes_unnoticed(tar):
    rng, content, whole, places = random.Random(0), tar.read_bytes(), read(tar), headers(tar)
    for _ in range(60):
        flipped = bytearray(content)
        flipped[rng.choice(places) + rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)
        assert not silent(tar, bytes(flipped), whole)


def test_no_flipped_bit_in_a_compressed_tar_goes_unnoticed(tar, tmp_path):
    rng, whole, path = random.Random(0), gzip.compress(tar.read_bytes(), mtime=0), tmp_path / "a.tar.gz"
    path.write_bytes(whole)
    samples = read(path)
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        assert not silent(path, bytes(flipped), samples)


@pytest.mark.parametrize("compressed", [False, True])
def test_no_cut_goes_unnoticed(tar, tmp_path, compressed):
    content, samples, end = tar.read_bytes(), read(tar), headers(tar)[-1] + 2 * BLOCK
    places = [*headers(tar), *range(100, end + BLOCK, 311), end, end + BLOCK]
    for place in places:
        part = content[:place]
        path = tmp_path / "cut.tar"
        assert not silent(path, gzip.compress(part) if compressed else part, samples), place
        with pytest.raises(T5Error, match=r"cut\.tar (was cut short|cannot be read|is damaged)"):
            read(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_tars_joined_into_one_are_refused(tar, compressed):
    content = gzip.compress(tar.read_bytes()) if compressed else tar.read_bytes()
    tar.write_bytes(content + content)
    with pytest.raises(T5Error, match=r"goes on after its end, at byte \d+, where no reader looks: tar files joined"):
        read(tar)


def test_zeros_after_the_end_are_padding(tar):
    samples = read(tar)
    tar.write_bytes(tar.read_bytes() + bytes(40 * BLOCK))
    assert read(tar) == samples


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("1.jpg", "README"), "'README' belongs to no sample: its name is not KEY.ENDING"),
        (("1.jpg", "a/._1.jpg"), "'a/._1.jpg' belongs to no sample"),
        (("1.jpg", "1.__url__"), "'1.__url__' belongs to no sample"),  # webdataset's own name
        (("1.jpg", "1."), "'1.' belongs to no sample"),
        (("1.jpg", ".hidden"), "'.hidden' belongs to no sample"),
        (("1.jpg", "2.jpg", "1.txt", "2.txt"), "sample '1' are not next to each other, .* tar --sort=name"),
        (("1.jpg", "1.cls", "1.jpg"), "holds '1.jpg' twice"),
        (("1.jpg", "1.JPG"), "holds '1.JPG' twice"),
    ],
)
def test_files_that_a_reader_would_pass_over_or_mix_up_are_named(tmp_path, names, message):
    with pytest.raises(T5Error, match=message):
        check(write_tar(tmp_path / "a.tar", [{name: b"x"} for name in names]))


def test_names_that_differ_in_case_alone_are_two_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", [{"a.JPG": b"x"}, {"A.jpg": b"y"}])
    assert [(sample["__key__"], sample["jpg"]) for sample in read(path)] == [("a", b"x"), ("A", b"y")]


def test_folders_and_files_about_the_shard_are_no_samples(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as out:
        for name, kind in (("in", tarfile.DIRTYPE), ("__about__", tarfile.REGTYPE), ("in/1.cls", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            out.addfile(member, io.BytesIO())
    assert [sample["__key__"] for sample in read(path)] == ["in/1"]


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        member = tarfile.TarInfo("1.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "2.jpg"
        out.addfile(member)
    with pytest.raises(T5Error, match=r"'1.jpg' is not a regular file; pack links as files .tar --dereference"):
        check(tmp_path / "a.tar")


def header(size: int, kind: bytes = tarfile.REGTYPE, name: str = "1.jpg") -> bytes:
    """A block that declares `size`, beyond 8 GB and below 0 as GNU tar writes it."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = (size % 256**12 | 128 << 88).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


about = tarfile.TarInfo.create_pax_global_header  # a header of entries about the files behind it


def damaged(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes(99) + content[half + 99 :]


ZEROS, LONG_NAME = bytes(2 * BLOCK), tarfile.GNUTYPE_LONGNAME
SPARSE = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**12), "GNU.sparse.name": "1.jpg"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(10**12), f"'1.jpg' of {10**12} bytes in 1536"),
        (header(2**80), "'1.jpg' of 1208925819614629174706176 bytes"),
        (header(-BLOCK), "a header of -512 bytes"),  # from which a reader would begin anew, for ever
        (about({"size": "-512"}) + header(0), "'1.jpg' of -512 bytes"),
        (header(0, tarfile.GNUTYPE_SPARSE), "'1.jpg' with holes .pack it again, without --sparse"),
        (about(SPARSE) + header(BLOCK), "'1.jpg' with holes"),
        (header(2**40, LONG_NAME), "a header of 1099511627776 bytes"),
        (header(2**40, tarfile.XHDTYPE), "a header of 1099511627776 bytes"),
        ((header(3, LONG_NAME) + b"abc".ljust(BLOCK, b"\0")) * 2000, "maximum recursion depth"),
        (gzip.compress(header(2 * 10**8) + bytes(10**6)), "'1.jpg' of 200000000 bytes in"),
        (gzip.compress((header(99_840) + bytes(99_840)) * 20), r"\d+ bytes or more packed into"),
        (gzip.compress(header(0) + bytes(3 * 10**6)), r"an end of \d+ zero bytes or more"),
        (damaged(lzma.compress(header(99_840) + random.Random(0).randbytes(99_840))), "Corrupt input data"),
    ],
    ids=[
        *("beyond the file", "absurd", "negative", "negative pax", "sparse", "sparse pax", "long name", "pax", "chain"),
        *("bomb", "many in a bomb", "zeros behind", "damaged xz"),
    ],
)
def test_what_a_header_declares_is_bounded_by_what_can_be_there(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(tars, "LARGEST_MEMBER", 10**5)
    path = tmp_path / "a.tar"
    path.write_bytes(content + ZEROS)
    with pytest.raises(T5Error, match=message) as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_control_characters_of_names_are_shown_and_not_obeyed(tmp_path):
    path = write_tar(tmp_path / "a.tar", [{"\x1b[2J\n\u202e" + "n" * 999: b"x"}])
    with pytest.raises(T5Error, match=r"a\.tar: '\\x1b\[2J\\n\\u202en+…' belongs to no sample") as raised:
        check(path)
    assert len(str(raised.value)) < 500


def test_an_error_without_words_is_named_by_its_kind(tmp_path):
    with pytest.raises(T5Error, match=r"a\.tar cannot be read as a tar file \(EOFError\)"), named("a.tar"):
        raise EOFError


def test_what_is_no_tar_file_is_named(tmp_path):
    (tmp_path / "html.tar").write_bytes(b"<html>not found</html>")
    (tmp_path / "empty.tar").touch()
    for name in ("html", "empty"):
        with pytest.raises(T5Error, match=rf"{name}\.tar cannot be read as a tar file") as raised:
            check(tmp_path / f"{name}.tar")
        assert "\n" not in str(raised.value)

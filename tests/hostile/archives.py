"""Tars: a sound packed model with one more entry, or headers that no archiver writes."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.case import Case

BLOCK = tarfile.BLOCKSIZE


def entry(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"x", **fields: object) -> bytes:
    """One entry as bytes, in GNU's format unless `format` says another."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
    form = fields.pop("format", tarfile.GNU_FORMAT)
    for field, value in fields.items():
        setattr(info, field, value)
    data = info.tobuf(form, "utf-8", "surrogateescape")  # type: ignore[arg-type]
    return data + (content + bytes(-len(content) % BLOCK) if info.size == len(content) else b"")


def adding(*parts: bytes) -> Callable[[Path], None]:
    """The packed model with more entries before the mark of its end."""

    def poison(path: Path) -> None:
        data = path.read_bytes()
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // BLOCK) * BLOCK
        path.write_bytes(data[:end] + b"".join(parts) + bytes(2 * BLOCK))

    return poison


def header(**fields: bytes) -> bytes:
    """A header of an entry `evil` with fields written by hand, under a checksum that holds."""
    places = {"name": 0, "mode": 100, "size": 124, "chksum": 148, "type": 156, "link": 157, "magic": 257, "gnu": 386}
    data = bytearray(entry("evil", content=b""))
    for name, value in fields.items():
        data[places[name] : places[name] + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def pax(*records: tuple[str, str]) -> bytes:
    """A pax header with these records, for the entry after it."""
    body = b""
    for key, value in records:
        text = f" {key}={value}\n".encode()
        size = len(text) + 1
        while len(str(size)) + len(text) != size:
            size = len(str(size)) + len(text)
        body += str(size).encode() + text
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % BLOCK)


def long_name(length: int) -> bytes:
    """GNU's entry for a name of this many letters."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, length
    return info.tobuf(tarfile.USTAR_FORMAT) + b"a" * min(length, 2**20) + bytes(-length % BLOCK)


def recoded(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def _zip(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        packed.writestr("../evil", data)
    return stream.getvalue()


LEAVES = "leaves the archive"
PLAIN = "link, a device or sparse"
NEGATIVE = b"\xff" * 12  # base-256 for -1
HUGE = b"\x80" + struct.pack(">3xQ", 2**62)
ENTRIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "climbs out": (adding(entry("../evil")), LEAVES),
    "climbs out from inside": (adding(entry("model_weights/../../evil")), LEAVES),
    "climbs out behind a dot": (adding(entry("./../evil")), LEAVES),
    "is absolute": (adding(entry("/tmp/evil")), LEAVES),
    "is absolute behind a dot": (adding(entry(".//tmp/evil")), LEAVES),
    "has a backslash": (adding(entry("..\\evil")), LEAVES),
    "has a drive": (adding(entry("C:\\evil")), LEAVES),
    "has no name": (adding(header(name=bytes(100))), LEAVES),
    "has a line break": (adding(entry("a\nb")), LEAVES),
    "has a bell": (adding(entry("a\x07b")), LEAVES),
    "turns the text around": (adding(entry("a\u202eb")), LEAVES),
    "is no UTF-8": (adding(entry("a\udcffb")), LEAVES),
    "lies too deep": (adding(entry("/".join("abcdefghi") + "/j")), LEAVES),
    "is a folder above": (adding(entry("../up", tarfile.DIRTYPE)), LEAVES),
    "is a link": (adding(entry("evil", tarfile.SYMTYPE, linkname="/etc/passwd")), PLAIN),
    "is a link inside": (adding(entry("evil", tarfile.SYMTYPE, linkname="manifest.json")), PLAIN),
    "is a link for a folder": (adding(entry("sub", tarfile.SYMTYPE, linkname=".."), entry("sub/evil")), PLAIN),
    "is a hard link": (adding(entry("evil", tarfile.LNKTYPE, linkname="../../etc/passwd")), PLAIN),
    "is a device": (adding(entry("evil", tarfile.CHRTYPE, devmajor=1, devminor=5)), PLAIN),
    "is a disk": (adding(entry("evil", tarfile.BLKTYPE, devmajor=8)), PLAIN),
    "is a pipe": (adding(entry("evil", tarfile.FIFOTYPE)), PLAIN),
    "is of an unknown kind": (adding(header(type=b"Z")), "not listed|link, a device"),
    "is sparse": (adding(header(type=b"S", gnu=b"%011o\0%011o\0" % (0, 2**30))), "sparse|readable"),
    "is sparse by pax": (
        adding(pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")), entry("evil")),
        "sparse|readable",
    ),
    "is sparse by an old pax": (
        adding(pax(("GNU.sparse.size", "9" * 12), ("GNU.sparse.map", "0,1" * 1000)), entry("evil")), "sparse|readable",
    ),
    "comes twice": (adding(entry("./manifest.json")), "comes twice"),
    "comes twice under another name": (adding(entry("manifest.json")), "comes twice"),
    "is a file and a folder": (adding(entry("manifest.json/evil")), "a file and the folder"),
    "nobody lists": (adding(entry("evil")), "not listed"),
    "is renamed by pax": (adding(pax(("path", "../evil")), entry("good")), LEAVES),
    "is linked by pax": (adding(pax(("linkpath", "/etc/passwd")), entry("evil", tarfile.SYMTYPE)), PLAIN),
    "has its size from pax": (adding(pax(("size", "-512")), entry("evil")), "is no number"),
    "has its size from pax in another script": (adding(pax(("size", "\u0661")), entry("evil")), "is no number"),
    "has its size from pax as 1e3": (adding(pax(("size", "1e3")), entry("evil")), "is no number"),
    "has 2^62 bytes": (adding(header(size=HUGE)), "longer than"),
    "has -1 bytes": (adding(header(size=NEGATIVE)), "longer than|twice|readable|no entry"),
    "is a folder of -512 bytes": (
        adding(header(type=b"5", size=b"\xff" * 10 + b"\xfe\x00")), PLAIN,
    ),
    "is a pax header of -512 bytes": (
        adding(header(type=b"x", size=b"\xff" * 10 + b"\xfe\x00")), "readable|no entry|twice",
    ),
    "is a pax header without end": (adding(header(type=b"x", size=HUGE)), "readable|no entry|headers have"),
    "is a long name without end": (adding(header(type=b"L", size=HUGE)), "readable|no entry|headers have"),
    "has a name of a megabyte": (adding(long_name(2**20), entry("evil")), LEAVES),
    "has a pax name of megabytes": (adding(pax(("path", "a/" * 2**20)), entry("evil")), LEAVES),
    "has a checksum that does not hold": (adding(b"x" * BLOCK), "no entry and no mark"),
    "is one of 21,000": (adding(*(entry(f"f{number}", content=b"") for number in range(21_000))), "entries"),
    "hides behind 3,000 headers": (adding(*[pax(("comment", "x"))] * 3000, entry("evil")), "readable"),
    "is a name for nothing": (adding(long_name(200)), "readable"),
    "has headers without end": (adding(*[pax(("comment", "x" * 2**20))] * 40, entry("evil")), "headers have"),
}  # fmt: skip
BEHIND = "behind the mark of its end"


def _marked(data: bytes) -> bytes:
    """An archive that ends with one block of zeros where two belong."""
    entries = data.rstrip(b"\0")
    return entries + bytes(-len(entries) % BLOCK + BLOCK)


WHOLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "is packed with gzip": (recoded(gzip.compress), "compressed with gzip"),
    "unfolds from gzip": (recoded(lambda data: gzip.compress(data + bytes(10**8))), "compressed with gzip"),
    "is packed with bzip2": (recoded(bz2.compress), "compressed with bzip2"),
    "is packed with xz": (recoded(lzma.compress), "compressed with xz"),
    "is a zip": (recoded(_zip), "readable tar|not a .nemo"),
    "is empty": (recoded(lambda data: b""), "readable tar|not a .nemo|mark of its end"),
    "is zeros": (recoded(lambda data: bytes(len(data))), "not a .nemo|readable tar"),
    "is cut short": (recoded(lambda data: data[: len(data) // 2]), "cut short"),
    "is cut short in a header": (recoded(lambda data: data[:700]), "cut short"),
    "has no end": (recoded(lambda data: data.rstrip(b"\0")), "end of data|cut short"),
    "goes on behind its end": (recoded(lambda data: data + entry("evil")), BEHIND),
    "goes on behind half a mark of its end": (recoded(lambda data: _marked(data) + entry("evil")), BEHIND),
    "is two archives": (recoded(lambda data: data + data), BEHIND),
    "has a text behind its end": (recoded(lambda data: data + b"hello"), BEHIND),
    "has megabytes of nothing behind its end": (recoded(lambda data: data + bytes(2**21)), BEHIND),
    "is one long line": (recoded(lambda data: b"a" * 10**6), "readable tar"),
}


def cases() -> Iterator[Case]:
    for name, (poison, says) in ENTRIES.items():
        yield Case(f"tar with an entry that {name}", "tar", poison, says)
    for name, (poison, says) in WHOLES.items():
        yield Case(f"tar that {name}", "tar", poison, says)

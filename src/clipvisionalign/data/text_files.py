"""Text files as people have them: any usual encoding, any line ending, any delimiter, quotes that are never closed.

- A line ends at LF, CR LF or CR alone: U+2028, U+0085 and form feeds are characters of a line.
- What is not UTF-8 byte for byte is read as Windows-1252 there, and said; a byte order mark decides before that.
- A field of a delimited file is quoted where its quotes are closed before a delimiter or the line's end (RFC 4180); any
  other quote is a character of the field. A quoted field goes over several lines only where none of them would be a row
  of its own.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

#: Lines that one quoted field may go over.
LONGEST_FIELD = 200

#: Delimiters of a header, the usual before the unusual.
DELIMITERS = (",", "\t", ";", "|")

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip

_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True)
class Decoded:
    """A file's text. mended: what had to be mended in it, "" for nothing, and the line of the first such place."""

    text: str
    mended: str = ""
    line: int = 0


def decode(content: bytes) -> Decoded:
    """Bytes as text: by their byte order mark, as UTF-8, as UTF-16 without a mark, or with Windows-1252 where they are
    not UTF-8.

    >>> decode("un café".encode("cp1252")).text, decode("un café".encode("utf-16")).text
    ('un café', 'un café')
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), _utf16_without_mark(content))
    if encoding:
        try:
            return Decoded(content.decode(encoding))
        except UnicodeDecodeError as error:
            text = content.decode(encoding, "replace")
            line = len(split_lines(content[: error.start].decode(encoding, "ignore"))) or 1
            return Decoded(text, f"not whole as {encoding.upper()} (byte {error.start:,})", line)
    try:
        return Decoded(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = 1 + len(_LINE_END.findall(before.decode("utf-8")))
        return Decoded(
            content.decode("utf-8", _WINDOWS),
            f"not UTF-8 (byte 0x{content[error.start]:02x}), read as Windows-1252",
            line,
        )


def _utf16_without_mark(content: bytes) -> str:
    """The byte order of UTF-16 text without a mark: every second byte of a Latin text is 0; "" for other text."""
    start = content[:2000]
    if len(start) < 4 or b"\0" not in start:
        return ""
    even, odd = start[::2].count(0) / len(start[::2]), start[1::2].count(0) / len(start[1::2])
    if odd > 0.3 and even < 0.05:
        return "utf-16-le"
    return "utf-16-be" if even > 0.3 and odd < 0.05 else ""


def _as_windows(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are not UTF-8 as Windows-1252; those that it has no character for as Latin-1."""
    assert isinstance(error, UnicodeDecodeError)
    some = error.object[error.start : error.end]
    found = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in some)
    return found, error.end


_WINDOWS = "clipvisionalign-windows-1252"
codecs.register_error(_WINDOWS, _as_windows)


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, without their ends: LF, CR LF or CR.

    >>> split_lines("one\x0b\u2028still one\r\ntwo\n")
    ['one\x0b\u2028still one', 'two']
    """
    lines = _LINE_END.split(text)
    if lines and not lines[-1]:
        lines.pop()
    return lines


@dataclass(frozen=True)
class Record:
    """One row of a delimited file. line: where it begins; unclosed: a quote of it was never closed."""

    line: int
    cells: list[str]
    unclosed: bool = False


def delimited(
    lines: Sequence[str], delimiter: str, is_row: Callable[[list[str]], bool], first: int = 1
) -> Iterator[Record]:
    """The rows of a delimited file; blank lines are none.

    is_row: whether the cells of a line would be a row of their own, which no quoted field may swallow. first: the
    number of the first line.

    >>> rows = delimited(['a.jpg,"one, two"', 'b.jpg,"Stop" it says', 'c.jpg,"never closed'], ",", lambda cells: True)
    >>> [row.cells[1] for row in rows]
    ['one, two', '"Stop" it says', '"never closed']
    """
    place = 0
    while place < len(lines):
        line, begin = lines[place], place
        place += 1
        if not line.strip(" \t"):
            continue
        cells, is_open = split_cells(line, delimiter)
        unclosed = is_open
        if is_open:
            whole = _closed(lines, begin, delimiter, is_row)
            if whole is not None:
                cells, place = whole
                unclosed = False
        yield Record(first + begin, cells, unclosed)


def _closed(
    lines: Sequence[str], begin: int, delimiter: str, is_row: Callable[[list[str]], bool]
) -> tuple[list[str], int] | None:
    """The cells of a row whose quoted field goes over several lines, and the line after it; None where it does not."""
    for last in range(begin + 1, min(len(lines), begin + LONGEST_FIELD)):
        if is_row(split_cells(lines[last], delimiter)[0]):
            return None
        if '"' in lines[last]:
            cells, is_open = split_cells("\n".join(lines[begin : last + 1]), delimiter)
            if not is_open:
                return cells, last + 1
    return None


_QUOTED = re.compile(r' *"((?:[^"]|"")*+)" *')
_ESCAPED = re.compile(r' *"((?:[^"\\]|""|\\.)*+)" *', re.DOTALL)


def split_cells(line: str, delimiter: str) -> tuple[list[str], bool]:
    """The cells of a row, and whether a quoted one of them may go on in the next line: its quote is not closed yet."""
    if '"' not in line:
        return line.split(delimiter), False
    cells, start, is_open = [], 0, False
    while True:
        for form in (_QUOTED, _ESCAPED):
            found = form.match(line, start)
            if found and (found.end() == len(line) or line[found.end()] == delimiter):
                cell = found[1].replace('""', '"')
                cells.append(re.sub(r"\\(.)", r"\1", cell) if form is _ESCAPED else cell)
                end = found.end()
                break
        else:
            end = line.find(delimiter, start)
            end = len(line) if end < 0 else end
            cell = line[start:end]
            begins = cell.lstrip(" ")
            behind = line[start + len(cell) - len(begins) + 1 :].replace('""', "")
            # A cell over two lines that no quotes hold together is none: its quote may be closed further on.
            is_open = is_open or "\n" in cell or (begins.startswith('"') and '"' not in behind)
            cells.append(cell)
        if end == len(line):
            return cells, is_open
        start = end + 1


def delimiter_of(header: str, fits: Callable[[list[str]], bool], usual: str = ",") -> str:
    """The delimiter that splits a header into columns that `fits` takes: the usual one, where none does."""
    for delimiter in dict.fromkeys((usual, *DELIMITERS)):
        if fits(split_cells(header, delimiter)[0]):
            return delimiter
    return usual

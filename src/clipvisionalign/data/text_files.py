"""Text files in any usual encoding, with any line ending and delimiter, and with unbalanced quotes.

- A line ends at LF, CR LF or CR alone: U+2028, U+0085 and form feeds are characters of a line.
- A byte order mark decides the encoding. What is not UTF-8 is read as Windows-1252 byte for byte; a file whose words
  are of another script by that, in the encoding that its letters suggest. Either is noted.
- A field of a delimited file is quoted where its quotes are closed before a delimiter or the line's end (RFC 4180); any
  other quote is a character of the field. A quoted field goes over several lines only where none of them would be a row
  of its own.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import charset_normalizer

#: Lines that one quoted field may go over.
MAX_FIELD_LINES = 200

#: Cells of one row that each go over several lines.
_MAX_LONG_FIELDS = 20

#: Delimiters of a header, the usual before the unusual.
DELIMITERS = (",", "\t", ";", "|")

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip

_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True)
class Decoded:
    """The text of a file.

    Attributes:
        text: The text.
        repair: What had to be mended in it; "" for nothing.
        line: Line of the first such place, from 1.
    """

    text: str
    repair: str = ""
    line: int = 0


def decode(content: bytes) -> Decoded:
    """Decode bytes to text.

    By their byte order mark, as UTF-8, as UTF-16 without a mark, in an encoding of another script, or as Windows-1252
    where they are not UTF-8. It never fails.

    Args:
        content: The bytes.

    Returns:
        The text, and what had to be mended.

    >>> decode("un café".encode("cp1252")).text, decode("un café".encode("utf-16")).text
    ('un café', 'un café')
    """
    encoding = next(
        (name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), _utf16_without_mark(content)
    )
    if encoding == "utf-8-sig":
        # The mark does not cover what programs added later.
        content, encoding = content.removeprefix(codecs.BOM_UTF8), ""
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
        prefix = content[: error.start]
        line = 1 + len(_LINE_END.findall(prefix.decode("utf-8")))
        wrong = f"not UTF-8 (byte 0x{content[error.start]:02x}), read as"
        if script := _encoding_of_script(content):
            repair = f"{wrong} {script.upper()}, a guess by its letters: saved as UTF-8 it needs none"
            return Decoded(content.decode(script, "replace"), repair, line)
        return Decoded(content.decode("utf-8", _WINDOWS_1252_ERRORS), f"{wrong} Windows-1252", line)


#: Encodings of other scripts than Latin, as programs of their countries write them.
_SCRIPTS = [
    "cp1251", "koi8_r", "cp1253", "cp1255", "cp1256", "cp874", "gb18030", "big5", "shift_jis",
    "euc_jp", "euc_kr",
]  # fmt: skip

#: Bytes of lines with a letter beyond ASCII by which an encoding is guessed: some hundred captions.
_GUESS_SAMPLE_BYTES = 20_000

#: Bytes beyond ASCII below which nothing is guessed.
_MIN_GUESS_BYTES = 8


def _encoding_of_script(content: bytes) -> str:
    """The encoding of a text that is not UTF-8, where its words are of another script than Latin: most of those with a
    byte beyond ASCII hold little else. "" for Latin text, in which accents are few."""
    words = [word for word in re.findall(rb"[A-Za-z\x80-\xff]+", content) if not word.isascii()]
    non_latin = sum(2 * _beyond_ascii(word) > len(word) > 1 for word in words)
    valid_utf8 = sum(_is_utf8(word) for word in words)
    if 2 * non_latin <= len(words) or 2 * valid_utf8 >= len(words) or sum(map(_beyond_ascii, words)) < _MIN_GUESS_BYTES:
        return ""
    size, sample = 0, []
    for line in content.split(b"\n"):
        if not line.isascii() and size < _GUESS_SAMPLE_BYTES:
            sample.append(line)
            size += len(line)
    best = charset_normalizer.from_bytes(b"\n".join(sample), cp_isolation=_SCRIPTS).best()
    return best.encoding if best else ""


def _beyond_ascii(word: bytes) -> int:
    return sum(byte > 127 for byte in word)


def _is_utf8(word: bytes) -> bool:
    try:
        word.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _utf16_without_mark(content: bytes) -> str:
    """The byte order of UTF-16 text without a mark, "" for other text: every second byte of a Latin text is 0, and so
    it is of a header or of a first image's name before captions in any script."""
    for start in (content[:2000], content[:16]):
        if len(start) < 4 or b"\0" not in start:
            continue
        even, odd = start[::2].count(0) / len(start[::2]), start[1::2].count(0) / len(start[1::2])
        if odd > 0.3 and even < 0.05:
            return "utf-16-le"
        if even > 0.3 and odd < 0.05:
            return "utf-16-be"
    return ""


def _decode_as_windows_1252(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are not UTF-8 as Windows-1252; those that it has no character for as Latin-1."""
    assert isinstance(error, UnicodeDecodeError)
    undecodable = error.object[error.start : error.end]
    text = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in undecodable)
    return text, error.end


_WINDOWS_1252_ERRORS = "clipvisionalign-windows-1252"
codecs.register_error(_WINDOWS_1252_ERRORS, _decode_as_windows_1252)


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, without their ends: LF, CR LF or CR.

    Args:
        text: The text.

    Returns:
        Its lines; an end at the end of the text begins none.

    >>> split_lines("one\x0b\u2028still one\r\ntwo\n")
    ['one\x0b\u2028still one', 'two']
    """
    lines = _LINE_END.split(text)
    if lines and not lines[-1]:
        lines.pop()
    return lines


@dataclass(frozen=True)
class Record:
    """One row of a delimited file.

    Attributes:
        line: Line where it begins, from 1.
        cells: Its cells, without their quotes.
        unclosed: Whether a quote of it is never closed.
    """

    line: int
    cells: list[str]
    unclosed: bool = False


def read_delimited(
    lines: Sequence[str], delimiter: str, is_row: Callable[[list[str]], bool], first_line: int = 1
) -> Iterator[Record]:
    """The rows of a delimited file (RFC 4180, and quotes that are not); blank lines are none.

    Args:
        lines: The lines of the file.
        delimiter: One character.
        is_row: Whether cells of one line would be a row of their own, which no quoted field may contain.
        first_line: Number of the first line.

    Yields:
        The rows.

    >>> lines = ['a.jpg,"one, two"', 'b.jpg,"Stop" it says', 'c.jpg,"never closed']
    >>> rows = read_delimited(lines, ",", lambda cells: True)
    >>> [row.cells[1] for row in rows]
    ['one, two', '"Stop" it says', '"never closed']
    """
    is_row_cache: dict[int, bool] = {}

    def is_row_at(index: int) -> bool:
        """`is_row` of a line; each is split once, however many quotes are open before it."""
        if index not in is_row_cache:
            is_row_cache[index] = is_row(split_cells(lines[index], delimiter)[0])
        return is_row_cache[index]

    index = 0
    while index < len(lines):
        line, begin = lines[index], index
        index += 1
        if not line.strip(" \t"):
            continue
        cells, open_at = _split(line, delimiter)
        unclosed = open_at is not None
        if open_at is not None:
            closed = _close_quote(lines, begin, open_at[1], delimiter, is_row_at)
            if closed is not None:
                rest, last, like_a_row = closed
                joined = [*cells[: open_at[0]], *rest]
                if not like_a_row or is_row(joined):
                    cells, index, unclosed = joined, last + 1, False
        yield Record(first_line + begin, cells, unclosed)


def _close_quote(
    lines: Sequence[str], begin: int, start: int, delimiter: str, is_row_at: Callable[[int], bool]
) -> tuple[list[str], int, bool] | None:
    """The cells from the open quote at `start` on, the line that closes it, and whether that line looks like a row, as
    it does where the images' names stand behind the captions; None where nothing closes it, or a row lies between.

    The first quote that is neither doubled nor escaped decides: it closes the cell, or nothing does. Each line is
    looked at once; only what lies between the quotes is joined.
    """
    cells: list[str] = []
    first, fields = begin, 1
    inside = _inside(lines[begin], start)
    for last in range(begin + 1, min(len(lines), begin + MAX_FIELD_LINES)):
        line, closes = lines[last], False
        if '"' in line:
            ends = [_end_of(form, line, 0) for form in inside]
            closes = any(end < len(line) and _ends_cell(line, end + 1, delimiter) for end in ends)
            inside = [form for form, end in zip(inside, ends, strict=True) if end == len(line)]
        like_a_row = is_row_at(last)
        if like_a_row and (not closes or is_row_at(begin)):
            return None
        if closes:
            text = "\n".join([lines[first][start:], *lines[first + 1 : last + 1]])
            rest, reopened = _split(text, delimiter)
            if reopened is None:
                return [*cells, *rest], last, like_a_row
            cells += rest[: reopened[0]]
            first, start = last, len(line) - (len(text) - reopened[1])
            inside = _inside(line, start)
            fields += 1
        if not inside or fields > _MAX_LONG_FIELDS:
            return None
    return None


def _ends_cell(line: str, end: int, delimiter: str) -> bool:
    """Whether a cell ends at a place of a line, but for blanks."""
    rest = line[end:].lstrip(" ")
    return not rest or rest.startswith(delimiter)


_QUOTED = re.compile(r' *"((?:[^"]|"")*+)" *')
_ESCAPED = re.compile(r' *"((?:[^"\\]|""|\\.)*+)" *', re.DOTALL)
#: How far a line continues within a quoted cell of each form.
_INSIDE = (re.compile(r'(?:[^"]|"")*+'), re.compile(r'(?:[^"\\]|""|\\.)*+\\?', re.DOTALL))


def _end_of(form: re.Pattern[str], line: str, start: int) -> int:
    match = form.match(line, start)
    assert match is not None
    return match.end()


def _inside(line: str, start: int) -> list[re.Pattern[str]]:
    """The forms in which the quote that opens a cell at `start` is still open at the line's end."""
    behind = line.index('"', start) + 1
    return [form for form in _INSIDE if _end_of(form, line, behind) == len(line)]


def split_cells(line: str, delimiter: str) -> tuple[list[str], bool]:
    """The cells of one line.

    Args:
        line: The line.
        delimiter: One character.

    Returns:
        The cells, and whether a quoted one may continue in the next line: its quote is not closed yet.

    >>> split_cells('a.jpg,"one, two"', ",")
    (['a.jpg', 'one, two'], False)
    """
    cells, open_at = _split(line, delimiter)
    return cells, open_at is not None


def _split(line: str, delimiter: str) -> tuple[list[str], tuple[int, int] | None]:
    """The cells of a row; and of the first whose quote is not closed yet, its number and where it begins."""
    if '"' not in line:
        return line.split(delimiter), None
    cells: list[str] = []
    start, open_at = 0, None
    while True:
        for form in (_QUOTED, _ESCAPED):
            match = form.match(line, start)
            if match and (match.end() == len(line) or line[match.end()] == delimiter):
                cell = match[1].replace('""', '"')
                cells.append(re.sub(r"\\(.)", r"\1", cell) if form is _ESCAPED else cell)
                end = match.end()
                break
        else:
            end = line.find(delimiter, start)
            end = len(line) if end < 0 else end
            cell = line[start:end]
            if open_at is None and cell.lstrip(" ").startswith('"') and _inside(line, start):
                open_at = len(cells), start
            cells.append(cell)
        if end == len(line):
            return cells, open_at
        start = end + 1


def detect_delimiter(header: str, fits: Callable[[list[str]], bool], default: str = ",") -> str:
    """The delimiter that splits a header into columns that fit.

    Args:
        header: The first line.
        fits: Whether these may be the names of columns.
        default: The delimiter to try first, and to return where none fits.

    Returns:
        One character.
    """
    for delimiter in dict.fromkeys((default, *DELIMITERS)):
        if fits(split_cells(header, delimiter)[0]):
            return delimiter
    return default

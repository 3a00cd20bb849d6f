"""Documents out of files: one reader a form, each bounded in what it holds and each with a place to name."""

from __future__ import annotations

import gzip
import io
import json
import re
import tokenize
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import attrs

from nmoe.config.data_source import Arrow, Files, Hub, Jsonl, Parquet, Source, Streamed
from nmoe.effects.data.prepare.inputs import extra, one_line
from nmoe.errors import InputError
from nmoe.pure.data.prep import Item, Range
from nmoe.pure.data.text import pieces

CHUNK_BYTES = 1 << 20
MAX_BYTES_A_BYTE = 6
"""JSON bytes that a byte of text can take: \\u0000."""
OTHER_FIELDS_BYTES = 1 << 26
"""Bytes of a line of JSON beside its text; a longer line is passed over unread."""
ZSTD_CHUNK_BYTES = 1 << 12
"""A compressed chunk can grow by any factor; a small one keeps what it grows to small."""
ROWS = 64
ARROW_MAGIC = b"ARROW1"
"""First bytes of a file of random access; a stream has none."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a pair that JSON can write and UTF-8 can not."""


@attrs.frozen(kw_only=True)
class Document:
    """One record of a file.

    text      None where it is left out
    reason    why it is left out: "unreadable" or "long"
    replaced  whether bytes that are not UTF-8 were replaced
    position  byte of the (decompressed) file where it begins; row of a Parquet file
    """

    text: str | None
    position: int
    id: str | None = None
    reason: str | None = None
    replaced: bool = False


def read(item: Item, part: Range, source: Source) -> Iterator[Document]:
    """The documents of part of a file, in order; of one longer than `filter.max_bytes` without its text.

    Raises:  InputError at the first that can not be read, with file and position; where the source says `skip` it
             yields one without text instead, and continues behind it where the file can be read behind it.
    """
    if item.form in ("text", "text.gz", "text.zst", "python"):
        records = _whole(item, source)
    elif item.form in ("parquet", "arrow"):
        records = _rows(item, part, source)
    else:
        records = _lines(item, part, source)
    position = part.start
    while True:
        try:
            document = next(records, None)
        except (OSError, EOFError, zlib.error, MemoryError) as error:
            document = InputError(
                f"{item.name}: expected a file that can be read to its end, got {one_line(error)} behind "
                f'{position}; restore it, or write clean.unreadable = "skip"'
            )
        except InputError as error:
            document = error
        if document is None:
            return
        if isinstance(document, InputError):
            if source.clean.unreadable == "error":
                raise document
            yield Document(text=None, position=position, reason="unreadable")
            return
        position = document.position
        yield _shortened(document, source.filter.max_bytes)


def _shortened(document: Document, max_bytes: int) -> Document:
    """The document, its text left out where it has more than `max_bytes` bytes of UTF-8, in any form of file."""
    text = document.text
    if text is None or 4 * len(text) <= max_bytes or len(text.encode("utf-8")) <= max_bytes:
        return document
    return Document(text=None, position=document.position, reason="long")


def _decoded(raw: bytes, name: str, position: int, source: Source) -> tuple[str, bool]:
    """The text of some bytes, and whether some of them were replaced."""
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError as error:
        if source.clean.invalid_utf8 == "replace":
            return raw.decode("utf-8", "replace"), True
        raise InputError(
            f"{name}: expected UTF-8, got byte {raw[error.start]:#04x} at {position + error.start}; fix or exclude the "
            'file, or write clean.invalid_utf8 = "replace"'
        ) from error


def _whole(item: Item, source: Source) -> Iterator[Document]:
    """A file as one document, or as several where the source says after how many characters it is cut."""
    with open(item.path, "rb") as file:
        raw = _beginning(file, item, source.filter.max_bytes + 1)
    if len(raw) > source.filter.max_bytes:
        yield Document(text=None, position=0, reason="long")
    elif item.form == "python":
        yield Document(text=_python(raw, item.name), position=0)
    else:
        text, replaced = _decoded(raw, item.name, 0, source)
        most = source.input.max_chars if isinstance(source.input, Files) else None
        position = 0
        for piece in pieces(text, most or len(text)):
            yield Document(text=piece, position=position, replaced=replaced)
            position += len(piece.encode("utf-8"))


def _beginning(file: BinaryIO, item: Item, size: int) -> bytes:
    """The first `size` bytes of a file, decompressed where its form says so."""
    if item.form == "text.gz":
        with gzip.open(file) as unpacked:
            return unpacked.read(size)
    if item.form != "text.zst":
        return file.read(size)
    raw = bytearray()
    for chunk in _zstd_chunks(file, item.name):
        raw += chunk
        if len(raw) >= size:
            break
    return bytes(raw[:size])


def _python(raw: bytes, name: str) -> str:
    """The text of a Python file, whose first lines may name its encoding."""
    try:
        return raw.decode(tokenize.detect_encoding(io.BytesIO(raw).readline)[0])
    except (UnicodeDecodeError, SyntaxError, LookupError) as error:
        raise InputError(
            f"{name}: expected Python in the encoding it names, got {one_line(error)}; fix the file"
        ) from error


def _lines(item: Item, part: Range, source: Source) -> Iterator[Document]:
    """The lines of a JSONL file that begin in a range of bytes; blank ones are none."""
    with open(item.path, "rb") as file:
        if item.form == "gzip":
            with gzip.open(file) as unpacked:
                yield from _records(_chunks(unpacked), 0, None, item, source)
        elif item.form == "zstd":
            yield from _records(_zstd_chunks(file, item.name), 0, None, item, source)
        else:
            # One byte back, so that a line which begins with the range is not taken for the rest of one before it.
            begin = max(part.start - 1, 0)
            file.seek(begin)
            yield from _records(_chunks(file), begin, part, item, source)


def _records(chunks: Iterator[bytes], begin: int, part: Range | None, item: Item, source: Source) -> Iterator[Document]:
    """The documents of lines of JSON; `part` says which lines count."""
    longest = MAX_BYTES_A_BYTE * source.filter.max_bytes + OTHER_FIELDS_BYTES
    for position, line in _cut(chunks, begin, longest):
        if part is not None and position >= part.end:
            return
        if part is not None and position < part.start:
            continue
        if line is None:
            yield Document(text=None, position=position, reason="long")
        elif line.strip():
            try:
                document = _record(line, position, item.name, source)
            except InputError as error:
                if source.clean.unreadable == "error":
                    # counted only now: an editor goes to a line, not to a byte
                    at = f" (line {_line_number(item.path, position)})" if item.form == "lines" else ""
                    raise InputError(f"{error}{at}") from error
                document = Document(text=None, position=position, reason="unreadable")
            yield document


def _record(line: bytes, position: int, name: str, source: Source) -> Document:
    """The document of one line of JSON."""
    fields = source.input
    remedy = 'fix the line, or write clean.unreadable = "skip"'
    decoded, replaced = _decoded(line, name, position, source)
    try:
        record: Any = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: expected a line of JSON at byte {position}, got {one_line(error)}; {remedy}"
        ) from error
    if not isinstance(record, dict):
        raise InputError(f"{name}: expected a JSON object at byte {position}, got {type(record).__name__}; {remedy}")
    if isinstance(fields, Files | Jsonl) and fields.text_field not in record and record:
        keys = ", ".join(sorted(record)[:8])
        remedy = (
            f"its keys are {keys}; name that of the text by --text-field, or input.text_field of a TOML, or {remedy}"
        )
    return _checked(record.get, position, f"at byte {position}", replaced, name, source, remedy)


def _line_number(path: str, position: int) -> int:
    """The line that begins at a byte of a file, from 1."""
    with open(path, "rb") as file:
        chunks = (file.read(min(CHUNK_BYTES, position - start)) for start in range(0, position, CHUNK_BYTES))
        return 1 + sum(chunk.count(b"\n") for chunk in chunks)


def _checked(get: Any, position: int, place: str, replaced: bool, name: str, source: Source, remedy: str) -> Document:
    """The document of a record whose fields `get` looks up."""
    fields = source.input
    if not isinstance(fields, Files | Jsonl | Parquet | Arrow | Hub | Streamed):
        raise TypeError(f"{name}: read as records, but its source has no fields")
    text = get(fields.text_field)
    if not isinstance(text, str):
        raise InputError(
            f"{name}: expected a text in {fields.text_field} {place}, got "
            f"{'nothing' if text is None else type(text).__name__}; {remedy}"
        )
    if surrogate := SURROGATE.search(text):
        if source.clean.invalid_utf8 == "error":
            raise InputError(
                f"{name}: expected Unicode in {fields.text_field} {place}, got the lone surrogate "
                f"U+{ord(surrogate[0]):04X}; {remedy}"
            )
        text, replaced = SURROGATE.sub("?", text), True
    id_field = None if isinstance(fields, Files) else fields.id_field
    if id_field is None:
        return Document(text=text, position=position, replaced=replaced)
    identifier = get(id_field)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise InputError(
            f"{name}: expected a text or integer in {id_field} {place}, got {type(identifier).__name__}; {remedy}"
        )
    # never replaced: two ids that differ would become one
    if surrogate := SURROGATE.search(str(identifier)):
        raise InputError(
            f"{name}: expected Unicode in {id_field} {place}, got the lone surrogate "
            f"U+{ord(surrogate[0]):04X}; {remedy}"
        )
    return Document(text=text, position=position, id=str(identifier), replaced=replaced)


def _chunks(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    """The bytes of a file from where it stands."""
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _zstd_chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """The decompressed bytes of all frames of a file; one that ends inside a frame is an error, never a short text."""
    try:
        import zstandard
    except ImportError as error:
        raise extra("zstandard", name, "data") from error
    frame, rest = None, b""
    try:
        while rest or (rest := file.read(ZSTD_CHUNK_BYTES)):
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            unpacked = frame.decompress(rest)
            rest = b""
            if frame.eof:
                rest, frame = frame.unused_data, None
            if unpacked:
                yield unpacked
    except zstandard.ZstdError as error:
        raise InputError(
            f"{name}: expected zstd data up to byte {file.tell()}, got {one_line(error)}; restore it"
        ) from error
    if frame is not None:
        raise InputError(f"{name}: expected whole zstd frames, got an end inside one at byte {file.tell()}; restore it")


def _cut(chunks: Iterator[bytes], begin: int, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Position and content of each line; None for one of more than `most` bytes, which is never held."""
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        for piece in whole:
            size = held + len(piece)
            yield begin, b"".join([*parts, piece]) if size <= most else None
            begin, parts, held = begin + size + 1, [], 0
        held += len(last)
        if held <= most:
            parts.append(last)
        else:
            parts = []
    if held:
        yield begin, b"".join(parts) if held <= most else None


def _rows(item: Item, part: Range, source: Source) -> Iterator[Document]:
    """The rows of an Arrow file, or of some row groups of a Parquet file."""
    try:
        import pyarrow
    except ImportError as error:
        raise extra("pyarrow", item.name, "data") from error
    fields = source.input
    if not isinstance(fields, Files | Parquet | Arrow | Hub):
        raise TypeError(f"{item.name}: read as rows, but its source has no columns")
    id_field = None if isinstance(fields, Files) else fields.id_field
    columns = [fields.text_field, *([] if id_field is None else [id_field])]
    remedy = 'restore it, or write clean.unreadable = "skip"'
    batches = _parquet_batches if item.form == "parquet" else _arrow_batches
    try:
        for row, batch in batches(item, part, columns, pyarrow):
            for number, record in enumerate(_plain(batch, pyarrow), row):
                yield _row(record, number, item.name, source)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter of a damaged schema
        noun = item.form.capitalize()
        raise InputError(f"{item.name}: expected {noun}, got {one_line(error)}; {remedy}") from error


def _parquet_batches(item: Item, part: Range, columns: list[str], pyarrow: Any) -> Iterator[tuple[int, Any]]:
    """Number of the first row, and up to ROWS rows of these columns, of some row groups."""
    from pyarrow import parquet

    with parquet.ParquetFile(item.path) as file:
        _check_columns(item.name, file.schema_arrow, columns, pyarrow.types)
        row = sum(file.metadata.row_group(index).num_rows for index in range(part.start))
        groups = list(range(part.start, part.end))
        for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, columns=columns):
            yield row, batch
            row += batch.num_rows


def _arrow_batches(item: Item, part: Range, columns: list[str], pyarrow: Any) -> Iterator[tuple[int, Any]]:
    """Number of the first row, and up to ROWS rows of these columns, of a whole file, checked before they are used."""
    with pyarrow.memory_map(item.path) as file:
        random_access = file.read(len(ARROW_MAGIC)) == ARROW_MAGIC
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if random_access else pyarrow.ipc.open_stream(file)
        _check_columns(item.name, reader.schema, columns, pyarrow.types)
        row = 0
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if random_access else reader:
            # Only a whole batch knows its buffers: offsets that point outside them would read foreign memory.
            arrays = [_as_bytes(batch.column(name), pyarrow) for name in columns]
            for array in arrays:
                array.validate(full=True)
            for at in range(0, batch.num_rows, ROWS):
                yield row + at, pyarrow.RecordBatch.from_arrays([array.slice(at, ROWS) for array in arrays], columns)
            row += batch.num_rows


def _as_bytes(array: Any, pyarrow: Any) -> Any:
    """Texts as bytes, unread: what is not UTF-8 is ours to judge."""
    kinds = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    return array.view(kinds[array.type]) if array.type in kinds else array


def _check_columns(name: str, schema: Any, columns: list[str], types: Any) -> None:
    """Refuse a table without these columns, or with other values in them than texts and integers."""
    if absent := [column for column in columns if column not in schema.names]:
        raise InputError(
            f"{name}: expected a column {', '.join(absent)}, got "
            f"{', '.join(schema.names)[:200]}; set input.text_field and input.id_field"
        )
    for column in columns:
        # of other types the values may have no Python object: a time beyond the year 9999
        if not _is_text_or_integer(schema.field(column).type, types):
            raise InputError(
                f"{name}: expected texts or integers in column {column}, got "
                f"{str(schema.field(column).type)[:80]}; set input.text_field and input.id_field"
            )


def _is_text_or_integer(column: Any, types: Any) -> bool:
    """Whether a column of this Arrow type holds texts, bytes or integers, plain or by dictionary; one of nulls does."""
    value = column.value_type if types.is_dictionary(column) else column
    return any(
        matches(value)
        for matches in (
            *(types.is_string, types.is_large_string, types.is_binary, types.is_large_binary),
            *(types.is_integer, types.is_null),
        )
    )


def _plain(batch: Any, pyarrow: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch, its texts as bytes, so that what is not UTF-8 is ours to judge."""
    binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    arrays: list[list[Any]] = []
    for column in batch.columns:
        whole = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        arrays.append(whole.cast(binary.get(whole.type, whole.type)).to_pylist())
    for row in zip(*arrays, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def _row(record: dict[str, Any], row: int, name: str, source: Source) -> Document:
    """The document of one row."""
    remedy = 'fix the row, or write clean.unreadable = "skip"'
    texts: dict[str, Any] = {}
    replaced = False
    try:
        for field, value in record.items():
            if isinstance(value, bytes):
                value, changed = _decoded(value, f"{name}: row {row}", 0, source)
                replaced = replaced or changed
            texts[field] = value
        return _checked(texts.get, row, f"in row {row}", replaced, name, source, remedy)
    except InputError:
        if source.clean.unreadable == "error":
            raise
        return Document(text=None, position=row, reason="unreadable")

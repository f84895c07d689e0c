"""Records of tables of (image, caption): CSV, TSV (also gzipped) and parquet, read row by row."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sacl_ds.data.json_files import LeadsOut, inside
from sacl_ds.data.making.record import ImageBytesLoader, ImageFileLoader, Record, no_image
from sacl_ds.errors import UserError, nearest

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, slots=True)
class TableRow:
    """Row of a table. where: 'line 7' or 'row 7'. image: a path, or the encoded image itself; empty where there is
    none."""

    where: str
    image: str | bytes
    captions: list[str]
    problem: str = ""


class RowReader(Protocol):
    def rows(self) -> Iterator[TableRow]: ...


class TableRecords:
    """Records of a table: consecutive rows of one image are one sample with several captions."""

    def __init__(self, path: Path, table: RowReader, images: Path) -> None:
        self.path, self.table, self.images = path, table, images

    def __iter__(self) -> Iterator[Record]:
        number = 0
        group: list[TableRow] = []
        for row in self.table.rows():
            if group and (not row.image or row.image != group[0].image):
                yield self._record(number, group)
                number, group = number + 1, []
            group.append(row)
        if group:
            yield self._record(number, group)

    def _record(self, number: int, rows: Sequence[TableRow]) -> Record:
        image = rows[0].image
        captions = [caption for row in rows for caption in row.captions]
        # of several rows, name the one without a caption
        named = next((row for row in rows if not any(c.strip() for c in row.captions)), rows[0])
        meta = {"row": rows[0].where} if isinstance(image, bytes) else {"filename": image}
        problem = next((row.problem for row in rows if row.problem), "") or ("" if image else "no image")
        load: Callable[[], bytes]
        try:
            load = ImageBytesLoader(image) if isinstance(image, bytes) else ImageFileLoader(inside(self.images, image))
        except LeadsOut:
            load, problem = no_image, problem or "image outside the folder --images"
        where = f"{self.path} {named.where}"
        return Record(f"{number:09d}", captions, load if image else no_image, meta, where, problem)


def table_records(
    table: Path,
    images: Path,
    image_column: str = "path",
    caption_column: str = "caption",
    quotes: bool = True,
    delimiter: str | None = None,
) -> TableRecords:
    """Records of a table; paths are relative to `images`. The kind of table follows from the ending of its name.

    quotes: whether quotation marks in a CSV or TSV enclose values. delimiter: between its values, where it is not what
    the name says (\\t: a tab); blanks after it are passed over. Raises UserError for a table that cannot be read and a
    column that it lacks, now or while it is iterated.
    """
    name = table.name.lower()
    if name.endswith(".parquet"):
        return TableRecords(table, ParquetTable(table, image_column, caption_column), images)
    between = _DELIMITERS.get(os.path.splitext(name.removesuffix(".gz"))[1])
    if delimiter is not None:
        between = "\t" if delimiter == "\\t" else delimiter.strip(" ") or delimiter
        if len(between) != 1 or between in '"\r\n\0':
            raise UserError(f"--delimiter {delimiter!r}: give one character, such as ';' or '|', or '\\t'")
    if between is None:
        raise UserError(f"{table}: a table's name ends in .csv, .tsv, .csv.gz, .tsv.gz or .parquet")
    read = TextTable(table, between, image_column, caption_column, quotes, delimiter is not None)
    return TableRecords(table, read, images)


def _check_delimiter(table: Path, delimiter: str, header: str) -> None:
    """Refuse a table that its delimiter leaves in one piece. header: the only column that it gives."""
    others = [each for each in ("\t", "|", ";", ",") if each != delimiter and each in header]
    if others:
        used, other = (each.encode("unicode_escape").decode() for each in (delimiter, others[0]))
        raise UserError(
            f"{table}: its header is one column, {header[:80]!r}, where {used!r} stands between values; "
            f"give --delimiter '{other}'"
        )


def _check_columns(table: Path, there: Sequence[str], image_column: str, caption_column: str) -> None:
    for option, name in (("--image-column", image_column), ("--caption-column", caption_column)):
        if name not in there:
            near = nearest(name, there)
            hint = f" did you mean {near!r}?" if near else ""
            shown = ", ".join(column[:40] for column in there) or "none"
            raise UserError(f"{table} has no column {name!r};{hint} give {option}; its columns: {shown}")


class TextTable:
    """CSV or TSV table with a header line, in UTF-8, plain or gzipped."""

    def __init__(
        self, path: Path, delimiter: str, image_column: str, caption_column: str, quotes: bool, padded: bool
    ) -> None:
        self.path, self.delimiter, self.quotes, self.padded = path, delimiter, quotes, padded
        with self._reader() as reader:
            header: list[str] = next(reader, [])
        if len(header) == 1:
            _check_delimiter(path, delimiter, header[0])
        _check_columns(path, header, image_column, caption_column)
        self.image, self.caption = header.index(image_column), header.index(caption_column)
        self.width = len(header)

    def rows(self) -> Iterator[TableRow]:
        with self._reader() as reader:
            next(reader)
            ended = reader.line_num
            for row in reader:
                where, ended = f"line {ended + 1}", reader.line_num
                if len(row) == self.width:
                    yield TableRow(where, row[self.image], [row[self.caption]])
                elif row:  # csv gives [] for an empty line
                    yield TableRow(where, "", [], f"{len(row)} values under {self.width} columns")

    @contextmanager
    def _reader(self) -> Iterator[Any]:
        open_text: Any = gzip.open if self.path.name.lower().endswith(".gz") else open
        reader = None
        try:
            with open_text(self.path, "rt", encoding="utf-8-sig", newline="") as file:
                quoting: Any = csv.QUOTE_MINIMAL if self.quotes else csv.QUOTE_NONE
                reader = csv.reader(
                    file, delimiter=self.delimiter, quoting=quoting, strict=True, skipinitialspace=self.padded
                )
                yield reader
        except csv.Error as error:
            line = reader.line_num if reader else 1
            hint = "; if its quotation marks are plain characters, give --no-quotes" if self.quotes else ""
            raise UserError(f"{self.path} line {line}: {error}{hint}") from None
        except UnicodeDecodeError:
            line = reader.line_num if reader else 0
            raise UserError(f"{self.path}: not UTF-8 text, soon after line {line}; convert it") from None
        except (OSError, EOFError, zlib.error) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise UserError(f"cannot read {self.path}: {reason}") from None


class ParquetTable:
    """Parquet table, read a few rows at a time; images may be paths, bytes, or structs with a field 'bytes'."""

    def __init__(self, path: Path, image_column: str, caption_column: str) -> None:
        import pyarrow as arrow
        from pyarrow import parquet

        self.path, self.parquet = path, parquet
        self.image, self.caption = image_column, caption_column
        try:
            schema = parquet.read_schema(path)
        except (OSError, arrow.ArrowException) as error:
            raise UserError(f"cannot read {path}: {_one_line(error)}") from None
        self.failures = (OSError, ValueError, arrow.ArrowException)  # ValueError: a text that is not UTF-8
        _check_columns(path, schema.names, image_column, caption_column)
        kinds = arrow.types
        image, caption = schema.field(image_column).type, schema.field(caption_column).type
        self.in_struct = kinds.is_struct(image) and image.get_field_index("bytes") >= 0
        if self.in_struct:
            image = image.field("bytes").type
        self.holds_images = kinds.is_binary(image) or kinds.is_large_binary(image)
        if not (self.holds_images or _is_text(image, kinds)):
            raise UserError(f"{path}: column {image_column!r} holds {image}, neither paths nor images")
        listed = kinds.is_list(caption) or kinds.is_large_list(caption)
        if not _is_text(caption.value_type if listed else caption, kinds):
            raise UserError(f"{path}: column {caption_column!r} holds {caption}, no text")

    def rows(self) -> Iterator[TableRow]:
        columns = [f"{self.image}.bytes" if self.in_struct else self.image, self.caption]
        number = 0
        try:
            # without pre_buffer and with buffer_size, pages are read as they are needed, not a whole row group
            with self.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20) as file:
                for batch in file.iter_batches(batch_size=32 if self.holds_images else 2048, columns=columns):
                    images = batch.column(self.image)
                    images = images.field("bytes") if self.in_struct else images
                    pairs = zip(images.to_pylist(), batch.column(self.caption).to_pylist(), strict=True)
                    for image, captions in pairs:
                        number += 1
                        given = captions if isinstance(captions, list) else [captions]
                        yield TableRow(f"row {number}", image or "", [caption or "" for caption in given])
        except self.failures as error:
            raise UserError(f"{self.path}: cannot be read after row {number}: {_one_line(error)}") from None


def _is_text(kind: Any, kinds: Any) -> bool:
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

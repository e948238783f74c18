"""One CSV or Parquet file becomes rows of a table, or is refused with the reason and the line.

The first file of a table decides its columns and their types. Later files may have the columns in another order and
narrower types (integers into a floating-point number, a date into a timestamp), but no column more, none less, and no
value that would change: 1.5 is not an integer. Rows are added; those of a keyed dataset replace rows with their key.
"""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import duckdb

Columns = Mapping[str, str]
"""Names and DuckDB types of columns."""

SAMPLED_ROWS = 20_000
HEADER_BYTES = 1_000_000
DELIMITERS = ",;\t|"

INTEGERS = {f"{sign}{size}INT" for sign in ("", "U") for size in ("TINY", "SMALL", "BIG", "HUGE")} | {
    "INTEGER",
    "UINTEGER",
}
FLOATS = {"FLOAT": 7, "DOUBLE": 15}
"""Types of floating-point numbers, and how many digits an integer may have that each of them holds, whatever it is."""
WIDENS = {("FLOAT", "DOUBLE"), ("DATE", "TIMESTAMP")} | {
    (f"TIMESTAMP_{unit}", "TIMESTAMP") for unit in ("S", "MS", "NS")
}

# What text looks like that a column of the type is made for. DuckDB would convert more than that, but not back into the
# same text: 007, +49, 20 digits and 01/02/2024 stay text.
DATE = r"\d{4}-\d\d-\d\d"
TIME = DATE + r"[ T]\d\d:\d\d(:\d\d(\.\d{1,6})?)?"
INFERRED = {
    "LONG": r"-?[1-9]\d{15,18}",  # a BIGINT that a DOUBLE does not hold
    "BIGINT": r"-?(0|[1-9]\d{0,14})",
    "DOUBLE": r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,2})?",
    "BOOLEAN": r"(?i)true|false",
    "DATE": DATE,
    "TIMESTAMP": TIME,
    "TIMESTAMP WITH TIME ZONE": TIME + r"(Z|[+-]\d\d(:?\d\d)?)",
}
MISFIT = "an integer that is too long for column"
BROKEN_LINES = {
    "UNQUOTED VALUE": "a quotation mark is not closed, or text follows the closing one",
    "INVALID ENCODING": "not UTF-8",
    "LINE SIZE OVER MAXIMUM": "longer than 2 MB",
}


class RefusedError(Exception):
    """A file that cannot be loaded as it is: why, and because of which line (None where there are no lines)."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        """Say why, and where."""
        super().__init__(reason)
        self.line = line


class MisfitError(RefusedError):
    """A value does not fit the type of its column."""


@dataclass(frozen=True)
class Keyed:
    """A dataset whose columns and natural key are known beforehand.

    Attributes:
        columns: Its columns.
        key: Columns that tell one row from another, never null.
        null: Text that stands for a missing value in CSV files, beside nothing at all.
        partition: SQL expression: the partition of the asset that a row belongs to.
    """

    columns: Columns
    key: Sequence[str]
    null: str
    partition: str


@dataclass(frozen=True)
class Loaded:
    """How many rows a file brought, and for a keyed dataset the partitions that they belong to."""

    rows: int
    partitions: frozenset[str] = frozenset()


def identifier(name: str) -> str:
    """Return a name as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def columns_of(connection: duckdb.DuckDBPyConnection, schema: str, table: str) -> Columns:
    """Return the columns of a table, none if it does not exist."""
    try:
        described = connection.execute(f"describe {schema}.{identifier(table)}").fetchall()
    except duckdb.CatalogException:
        return {}
    return {name: kind for name, kind, *_ in described}


def matched(names: Sequence[str], columns: Columns, line: int | None = None) -> dict[str, int]:
    """Return the place of each column of a table among a file's, whatever the case of their letters.

    Raises:
        RefusedError: One is missing, or there is another.
    """
    places = {name.casefold(): place for place, name in enumerate(names)}
    wanted = {name.casefold() for name in columns}
    missing = [f"the column {name} is missing" for name in columns if name.casefold() not in places]
    extra = [f"there is no column {name} in the table" for name in names if name.casefold() not in wanted]
    if missing or extra:
        raise RefusedError("; ".join(missing[:5] + extra[:5]), line)
    return {name: places[name.casefold()] for name in columns}


def widens(kind: str, wider: str) -> bool:
    """Say whether values of a type go into a column of another without a change, or else with an error."""
    if kind in INTEGERS and (wider in INTEGERS or wider in FLOATS):
        return True
    return kind == wider or (kind, wider) in WIDENS or (kind.startswith("DECIMAL") and wider == "DOUBLE")


def changes_as_integer(integer: str, kind: str) -> str:
    """Return an SQL condition: a type of floating-point numbers does not hold this integer."""
    return f"({integer} is distinct from try_cast(try_cast({integer} as {kind}) as hugeint))"


def changes(text: str, kind: str) -> str:
    """Return an SQL condition: converted to a type, DuckDB would take this text for something else than it says."""
    zone = f"regexp_matches({text}, ':.*[-+A-Za-z]')"
    if kind in INTEGERS or kind.startswith("DECIMAL"):
        suspicious = " or ".join(f"contains({text}, '{letter}')" for letter in ".eE")
        value = f"try_cast(try_cast({text} as {kind}) as double)"
        return f"(({suspicious}) and try_cast({text} as double) is distinct from {value})"
    if kind in FLOATS:
        long = f"length({text}) > {FLOATS[kind]} and not contains({text}, '.')"
        return f"({long} and {changes_as_integer(f'try_cast({text} as hugeint)', kind)})"
    if kind == "DATE":
        return f"length(trim({text})) > 10"
    if kind == "TIMESTAMP WITH TIME ZONE":
        return f"not {zone}"
    return zone if kind.startswith("TIMESTAMP") else "false"


class CsvFile:
    """A CSV file: UTF-8, the columns' names in the first line, quotation marks where a field needs them.

    All is read as text and converted by queries of our own: DuckDB's reader rounds 1.5 to an integer. Files are read
    one by one: of more than a few, DuckDB 1.5 silently leaves out what follows a quotation mark that is not closed.
    """

    def __init__(self, path: str, null: str = "") -> None:
        """Read the first line.

        Raises:
            RefusedError: It does not name the columns.
        """
        self.path = path
        self.nulls = sorted({"", null})
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES).decode("utf-8-sig", errors="surrogateescape")
        first = re.split(r"[\r\n]", head, maxsplit=1)[0]
        if "\0" in first or any("\udc80" <= letter <= "\udcff" for letter in first):
            raise RefusedError(BROKEN_LINES["INVALID ENCODING"], 1)
        self.delimiter = max(DELIMITERS, key=first.count)
        self.newline = b"\r" if "\r" in head and "\n" not in head else b"\n"
        try:
            names = next(csv.reader(io.StringIO(head, newline=""), delimiter=self.delimiter), [])
        except csv.Error as error:
            raise RefusedError(f"the names of the columns cannot be read ({error})", 1) from error
        self.names = [name.strip() for name in names]
        if any(
            re.search(r"[\r\n]", name) for name in names
        ):  # DuckDB would lose rows over it, if other lines end in CR LF
            raise RefusedError("the name of a column has a line break", 1)
        if not self.names or not all(self.names):
            raise RefusedError("the first line must name every column", 1)
        if len({name.casefold() for name in self.names}) < len(self.names):
            raise RefusedError("two columns have the same name", 1)

    def read(self, errors: str) -> str:
        """Return a table function that gives the fields as text, in columns c0, c1 and so on."""
        columns = ", ".join(f"c{place}: 'VARCHAR'" for place in range(len(self.names)))
        return (
            f"read_csv({literal(self.path)}, auto_detect = false, header = true, columns = {{{columns}}}, "
            f"delim = {literal(self.delimiter)}, quote = '\"', escape = '\"', "
            f"nullstr = [{', '.join(map(literal, self.nulls))}], {errors})"
        )

    def infer(self, connection: duckdb.DuckDBPyConnection, rows: int | None) -> Columns:
        """Return columns that hold the first `rows` rows (None: all) without changing a value.

        Raises:
            RefusedError: There are no rows, or nothing that can be told apart as lines.
        """
        kinds = []
        for place in range(len(self.names)):
            cases = " ".join(
                f"when regexp_full_match(c{place}, {literal(pattern)}) and try_cast(c{place} as {kind}) is not null "
                f"then {literal(kind)}"
                for kind, pattern in INFERRED.items()
            )
            kinds.append(f"list(distinct case when c{place} is null then null {cases} else 'VARCHAR' end)")
        limit = f"limit {rows}" if rows else ""
        query = f"select count(*), {', '.join(kinds)} from (from {self.read('ignore_errors = true')} {limit})"
        try:
            count, *found = connection.execute(query).fetchone()
        except duckdb.InvalidInputException as error:
            raise self.fault_of_lines(error) from error
        if not count:
            raise RefusedError("there are no rows, and the first file of a dataset shows the types of its columns", 1)
        return {name: common(set(kinds or ())) for name, kinds in zip(self.names, found, strict=True)}

    def select(self, columns: Columns) -> str:
        """Return a query for its rows as a table with these columns has them; it fails at a value that would change.

        Raises:
            RefusedError: It has other columns.
        """
        parts = [
            f"case when c{place} is null then null when {changes(f'c{place}', columns[name])} then error('misfit') "
            f"else cast(c{place} as {columns[name]}) end as {identifier(name)}"
            for name, place in matched(self.names, columns, 1).items()
        ]
        return f"select {', '.join(parts)} from {self.read('store_rejects = true, rejects_limit = 1000')}"

    def check_read(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Check that the query that just ran left no line out.

        Raises:
            RefusedError: It did: the first such line.
        """
        broken = connection.execute(
            "select error_type::varchar, error_message, byte_position from reject_errors order by byte_position limit 1"
        ).fetchone()
        if broken:
            kind, message, position = broken
            raise RefusedError(BROKEN_LINES.get(kind, message.splitlines()[0]), self.line_at(position))

    def fault(
        self, connection: duckdb.DuckDBPyConnection, columns: Columns, error: duckdb.Error
    ) -> RefusedError | None:
        """Return what about the file made its query fail, or None if it was something else, such as a full disk."""
        places = matched(self.names, columns, 1)
        fits = ", ".join(
            f"c{place} is null or (try_cast(c{place} as {columns[name]}) is not null "
            f"and not {changes(f'c{place}', columns[name])})"
            for name, place in places.items()
        )
        query = (
            f"select list_position([{fits}], false) as misfit, * from {self.read('ignore_errors = true')} "
            "where misfit is not null limit 1"
        )
        try:
            connection.execute("set preserve_insertion_order = true")
            found = connection.execute(query).fetchone()
        except duckdb.InvalidInputException as unreadable:
            return self.fault_of_lines(unreadable)
        finally:
            connection.execute("set preserve_insertion_order = false")
        if found is None:
            return None
        misfit, *values = found
        name, place = list(places.items())[misfit - 1]
        return MisfitError(
            f"{values[place]!r} in column {name} does not fit its type {columns[name]}",
            self.line_where(lambda fields: [None if text in self.nulls else text for text in fields] == values),
        )

    def fault_of_lines(self, error: duckdb.Error) -> RefusedError:
        """Return why DuckDB cannot tell lines apart: as a rule, because not all end in the same way."""
        usual, quoted = b"", 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                quoted ^= line.count(b'"') % 2
                ending = line[len(line.rstrip(b"\r\n")) :]
                usual = usual or ending
                if not quoted and ending not in (usual, b"") or b"\r" in line[: -len(usual)]:
                    return RefusedError("ends in another way (LF, CR LF) than the lines before", number)
        return RefusedError(first_line(error))

    def line_of_key(self, key: Sequence[str]) -> int | None:
        """Return the first line in which a part of the key is missing, or whose key was there before."""
        places = [
            place for place, name in enumerate(self.names) if name.casefold() in {part.casefold() for part in key}
        ]
        seen: set[tuple[str, ...]] = set()

        def is_wrong(fields: list[str]) -> bool:
            values = tuple(fields[place] for place in places)
            wrong = values in seen or any(value in self.nulls for value in values)
            seen.add(values)
            return wrong

        return self.line_where(is_wrong)

    def line_where(self, wanted: Callable[[list[str]], bool]) -> int | None:
        """Return the line in which the first row begins whose fields are wanted."""
        csv.field_size_limit(sys.maxsize)
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=self.delimiter)
            next(reader)
            line = reader.line_num + 1
            for fields in reader:
                if len(fields) >= len(self.names) and wanted(fields[: len(self.names)]):
                    return line
                line = reader.line_num + 1
        return None

    def line_at(self, position: int) -> int:
        """Return the line that a byte is in, both counted from 1."""
        line = 1
        with open(self.path, "rb") as file:
            rest = position - 1
            while rest > 0 and (block := file.read(min(rest, 1 << 20))):
                line += block.count(self.newline)
                rest -= len(block)
        return line


class ParquetFile:
    """A Parquet file."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: str) -> None:
        """Read its columns.

        Raises:
            RefusedError: It has none that can be read.
        """
        self.path = path
        self.relation = f"read_parquet({literal(path)}, hive_partitioning = false)"
        try:
            described = connection.execute(f"describe from {self.relation}").fetchall()
        except duckdb.Error as error:
            raise self.unreadable(error) from error
        self.columns = {name: kind for name, kind, *_ in described}

    def unreadable(self, error: duckdb.Error) -> RefusedError:
        """Return that it cannot be read."""
        return RefusedError(f"not a whole Parquet file: {first_line(error).replace(self.path, 'the file')}")

    def infer(self, connection: duckdb.DuckDBPyConnection, rows: int | None) -> Columns:
        """Return its columns."""
        return self.columns

    def select(self, columns: Columns) -> str:
        """Return a query for its rows as a table with these columns has them.

        Raises:
            RefusedError: It has other columns, or types that do not fit.
        """
        kinds = list(self.columns.items())
        parts = []
        for name, place in matched(list(self.columns), columns).items():
            own, kind = kinds[place]
            if not widens(kind, columns[name]):
                raise RefusedError(f"the column {name} is {kind}, and {columns[name]} in the table")
            value = f"cast({identifier(own)} as {columns[name]})"
            if kind in INTEGERS and columns[name] in FLOATS:
                misfit = changes_as_integer(f"{identifier(own)}::hugeint", columns[name])
                value = f"case when {misfit} then error({literal(f'{MISFIT} {name}')}) else {value} end"
            parts.append(f"{value} as {identifier(name)}")
        return f"select {', '.join(parts)} from {self.relation}"

    def check_read(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Do nothing: where a part cannot be read, the query fails."""

    def fault(
        self, connection: duckdb.DuckDBPyConnection, columns: Columns, error: duckdb.Error
    ) -> RefusedError | None:
        """Return what about the file made its query fail, or None if it was something else, such as a full disk."""
        if isinstance(error, duckdb.ConversionException):
            return MisfitError(first_line(error))
        if MISFIT in (text := first_line(error)):
            name = text.partition(f"{MISFIT} ")[2]
            return MisfitError(f"an integer in column {name} does not fit its type {columns.get(name, 'there')}")
        try:
            connection.execute(f"select bit_xor(hash({', '.join(map(identifier, self.columns))})) from {self.relation}")
        except duckdb.OutOfMemoryException:
            return None
        except duckdb.Error as unreadable:
            return self.unreadable(unreadable)
        return None

    def line_of_key(self, key: Sequence[str]) -> None:
        """Return None: there are no lines."""


DataFile = CsvFile | ParquetFile


def common(kinds: set[str | None]) -> str:
    """Return the type of a column that holds values of some types."""
    kinds = kinds - {None}
    for several, kind in (
        ({"LONG"}, "BIGINT"),
        ({"LONG", "BIGINT"}, "BIGINT"),
        ({"BIGINT", "DOUBLE"}, "DOUBLE"),
        ({"DATE", "TIMESTAMP"}, "TIMESTAMP"),
    ):
        if kinds == several:
            return kind
    return kinds.pop() if len(kinds) == 1 else "VARCHAR"


@contextmanager
def transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Commit what is done in the `with` block, or nothing of it."""
    connection.begin()
    try:
        yield
        connection.commit()
    except BaseException:
        with suppress(duckdb.TransactionException):  # DuckDB may have rolled back by itself
            connection.rollback()
        raise


def load(
    connection: duckdb.DuckDBPyConnection,
    dataset: str,
    file: DataFile,
    present: Columns,
    keyed: Keyed | None,
    finish: Callable[[int], None],
) -> Loaded:
    """Load a file into `raw.<dataset>` in one transaction.

    Args:
        connection: The warehouse.
        dataset: Name of the table.
        file: The file.
        present: Columns of the table, none if it does not exist.
        keyed: What is known of it beforehand.
        finish: Called in the transaction, last, with the number of rows.

    Raises:
        RefusedError: The file is broken, or does not fit.
        duckdb.Error: Something else than the file is wrong, such as a full disk.
    """
    known = present or (canonical(connection, keyed.columns) if keyed else {})
    for rows in (SAMPLED_ROWS, None):
        columns = known or file.infer(connection, rows)
        query = file.select(columns)
        try:
            with transaction(connection):
                if not present:
                    make_table(connection, "raw", dataset, columns)
                if keyed:
                    loaded = replace_rows(connection, dataset, file, keyed, query)
                else:
                    loaded = Loaded(add_rows(connection, f"raw.{identifier(dataset)}", columns, query))
                    file.check_read(connection)
                finish(loaded.rows)
            return loaded
        except duckdb.Error as error:
            refused = file.fault(connection, columns, error)
            if refused is None:
                raise
            if known or rows is None or not isinstance(refused, MisfitError):
                raise refused from error
    raise AssertionError("the types that all rows were looked at for do not fit them")


def canonical(connection: duckdb.DuckDBPyConnection, columns: Columns) -> Columns:
    """Return columns with DuckDB's own names of their types."""
    kinds = ", ".join(f"typeof(cast(null as {kind}))" for kind in columns.values())
    return dict(zip(columns, connection.execute(f"select {kinds}").fetchone(), strict=True))


def make_table(connection: duckdb.DuckDBPyConnection, schema: str, table: str, columns: Columns) -> None:
    """Make a table unless it is there."""
    definition = ", ".join(f"{identifier(name)} {kind}" for name, kind in columns.items())
    connection.execute(f"create table if not exists {schema}.{identifier(table)} ({definition})")


def add_rows(connection: duckdb.DuckDBPyConnection, table: str, columns: Columns, query: str) -> int:
    """Add the rows of a query to a table; return how many."""
    names = ", ".join(map(identifier, columns))
    return connection.execute(f"insert into {table} ({names}) select {names} from ({query})").fetchone()[0]


def replace_rows(
    connection: duckdb.DuckDBPyConnection, dataset: str, file: DataFile, keyed: Keyed, query: str
) -> Loaded:
    """Put the rows of a query into `raw.<dataset>` in the place of those with their keys; keep them in `landing` too.

    Raises:
        RefusedError: Two of its rows have the same key, or one has none.
    """
    connection.execute(f"create or replace temp table incoming as {query}")
    file.check_read(connection)
    key = ", ".join(map(identifier, keyed.key))
    absent = " or ".join(f"{identifier(name)} is null" for name in keyed.key)
    if connection.execute(f"from incoming where {absent} limit 1").fetchone():
        raise RefusedError(f"a part of the key ({', '.join(keyed.key)}) is missing", file.line_of_key(keyed.key))
    if connection.execute(f"select 1 from incoming group by {key} having count(*) > 1 limit 1").fetchone():
        raise RefusedError(f"two rows have the same key ({', '.join(keyed.key)})", file.line_of_key(keyed.key))
    make_table(connection, "landing", dataset, keyed.columns)
    upsert(connection, f"landing.{identifier(dataset)}", keyed, "incoming")
    rows = upsert(connection, f"raw.{identifier(dataset)}", keyed, "incoming")
    partitions = connection.execute(f"select distinct {keyed.partition} from incoming").fetchall()
    connection.execute("drop table incoming")
    return Loaded(rows, frozenset(name for (name,) in partitions))


def upsert(connection: duckdb.DuckDBPyConnection, table: str, keyed: Keyed, source: str) -> int:
    """Put the rows of a table or query, whose keys differ, in the place of those with their keys; return how many."""
    same = " and ".join(f"old.{identifier(name)} = new.{identifier(name)}" for name in keyed.key)
    connection.execute(f"delete from {table} as old using (from {source}) as new where {same}")
    return add_rows(connection, table, keyed.columns, f"from {source}")

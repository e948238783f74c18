"""Files that are dropped in the landing folder become rows, or go to quarantine with the line and the reason."""

import csv
import io
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest
from conftest import query

ORDERS = "id,day,price,note\n1,2024-01-31,10,first\n2,2024-02-01,2.5,\n"


class Folder:
    """A landing folder and a warehouse of its own."""

    def __init__(self, root: Path) -> None:
        from data_platform import landing, loading

        self.landing, self.loading, self.root = landing, loading, root / "landing"
        self.root.mkdir()
        self.connection = duckdb.connect(root / "warehouse.duckdb", config={"memory_limit": "400MB"})
        self.keyed = loading.Keyed({"day": "date", "shop": "varchar", "sold": "integer"}, ["day", "shop"], "NA", "day")

    def drop(self, path: str | bytes, content: str | bytes) -> Path:
        """Put a file below the folder."""
        file = self.root / os.fsdecode(path)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def drop_parquet(self, path: str, rows: str) -> Path:
        """Put a Parquet file with the rows of a query below the folder."""
        file = self.drop(path, b"")
        duckdb.execute(f"copy ({rows}) to '{file}' (format parquet)")
        return file

    def land(self) -> dict[str, Any]:
        """Land what waits; give what became of each file."""
        waiting = self.landing.scan(self.root, quiet=0)
        outcomes = self.landing.land(self.connection, self.root, waiting, "run", {"sales": self.keyed}, {"airlines"})
        return {outcome.path: outcome for outcome in outcomes}

    def rows(self, sql: str) -> list[tuple]:
        """Give the rows of a query."""
        return self.connection.execute(sql).fetchall()

    def files(self) -> set[str]:
        """Give the files below the folder."""
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if not path.is_dir()}


@pytest.fixture
def folder(defs: dg.Definitions, tmp_path: Path) -> Iterator[Folder]:
    """A landing folder."""
    folder = Folder(tmp_path)
    yield folder
    folder.connection.close()


@pytest.fixture
def orders(folder: Folder) -> Folder:
    """A landing folder that orders came from already."""
    folder.drop("orders/first.csv", ORDERS)
    assert [outcome.state for outcome in folder.land().values()] == ["landed"]
    return folder


def test_first_file_makes_the_table(orders: Folder) -> None:
    assert orders.rows("select column_name, column_type from (describe raw.orders)") == [
        ("id", "BIGINT"),
        ("day", "DATE"),
        ("price", "DOUBLE"),
        ("note", "VARCHAR"),
    ]
    assert orders.rows("select id, day::varchar, price, note from raw.orders order by id") == [
        (1, "2024-01-31", 10.0, "first"),
        (2, "2024-02-01", 2.5, None),
    ]
    assert orders.rows("select dataset, name, bytes, rows, run from landing.files") == [
        ("orders", "first.csv", len(ORDERS), 2, "run")
    ]
    assert orders.files() == {"landed/orders/first.csv"}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-20", ""], "BIGINT"),
        (["1234567890123456789"], "BIGINT"),
        (["12345678901234567890"], "VARCHAR"),
        (["1", "2.5", "-1e-3"], "DOUBLE"),
        (["01234", "1"], "VARCHAR"),
        (["+4930", "1"], "VARCHAR"),
        (["true", "False"], "BOOLEAN"),
        (["2024-02-29"], "DATE"),
        (["2023-02-29"], "VARCHAR"),
        (["01/02/2024"], "VARCHAR"),
        (["2024-02-29", "2024-02-29 10:11:12.5"], "TIMESTAMP"),
        (["2024-02-29T10:11:12Z", "2024-02-29 10:11:12.5+02:00"], "TIMESTAMP WITH TIME ZONE"),
        (["2024-02-29T10:11:12Z", "2024-02-29 10:11"], "VARCHAR"),
        (["", ""], "VARCHAR"),
        (["1", "x"], "VARCHAR"),
        ([str(number) for number in range(30_000)] + ["2.5"], "DOUBLE"),
    ],
)
def test_types_keep_every_value(folder: Folder, values: list[str], kind: str) -> None:
    folder.drop("things/a.csv", "thing,other\n" + "".join(f"{value},x\n" for value in values))
    assert [outcome.state for outcome in folder.land().values()] == ["landed"]
    assert folder.rows("select column_type from (describe raw.things) where column_name = 'thing'") == [(kind,)]
    assert folder.rows("select count(thing) from raw.things") == [(sum(value != "" for value in values),)]


@pytest.mark.parametrize(
    "content",
    [
        "id,day,price,note\n3,2024-03-01,7,third",
        "note,price,day,id\nthird,7.0,2024-03-01,3\n",
        "ID, Day, Price, Note\r\n3,2024-03-01,7,third\r\n",
        "id;day;price;note\n3;2024-03-01;7;third\n",
        "id\tday\tprice\tnote\r3\t2024-03-01\t7\tthird\r",
        "\ufeffid,day,price,note\n\n3.0,2024-03-01,7e0,third\n\n",
        '"id","day","price","note"\n"3","2024-03-01","7","third"\n',
    ],
)
def test_later_files_may_look_different(orders: Folder, content: str) -> None:
    orders.drop("orders/second.csv", content)
    assert [outcome.reason for outcome in orders.land().values()] == [""]
    assert orders.rows("select id, day::varchar, price, note from raw.orders where id > 2") == [
        (3, "2024-03-01", 7.0, "third")
    ]


HEADER = "id,day,price,note\n"
GOOD = "3,2024-03-01,7,third\n"
BAD_FILES = {
    "one field more": (HEADER + GOOD + "4,2024-03-01,7,x,y\n" + GOOD, 3, "Expected Number of Columns: 4 Found: 5"),
    "one field less": (HEADER + GOOD * 5 + "4,2024-03-01,7\n", 7, "Expected Number of Columns: 4 Found: 3"),
    "cut off": (HEADER + GOOD + "4,2024-", 3, "Expected Number of Columns: 4 Found: 2"),
    "text for a number": (HEADER + GOOD + "x,2024-03-01,7,\n", 3, "'x' in column id does not fit its type BIGINT"),
    "fraction for an integer": (HEADER + "3.5,2024-03-01,7,\n", 2, "'3.5' in column id does not fit its type BIGINT"),
    "too large": (HEADER + "9" * 30 + ",2024-03-01,7,\n", 2, "in column id does not fit its type BIGINT"),
    "time for a date": (HEADER + "3,2024-03-01 10:11,7,\n", 2, "in column day does not fit its type DATE"),
    "after lines in one field": (HEADER + '3,,1,"a\nb\nc"\n4,,1,d\n5,,z,e\n', 6, "'z' in column price does not fit"),
    "short, after lines in one field": (HEADER + '3,,1,"a\n\nb"\n\n5,z\n', 6, "Expected Number of Columns: 4 Found: 2"),
    "open quotation mark": (HEADER + GOOD + '4,2024-03-01,7,"x\n' + GOOD * 3, 3, "a quotation mark is not closed"),
    "text after quotation mark": (HEADER + GOOD + '4,2024-03-01,7,"x"y\n', 3, "text follows the closing one"),
    "other encoding": (HEADER.encode() + GOOD.encode() + "4,2024-03-01,7,é\n".encode("latin-1"), 3, "not UTF-8"),
    "UTF-16": ((HEADER + GOOD).encode("utf-16"), 1, "not UTF-8"),
    "mixed ends of lines": (HEADER + GOOD * 2 + GOOD.replace("\n", "\r\n") + GOOD, 4, "ends in another way"),
    "endless line": (HEADER + GOOD + "4,2024-03-01,7," + "x" * 2_100_000 + "\n", 3, "longer than 2 MB"),
    "missing column": ("id,day,price\n1,,\n", 1, "the column note is missing"),
    "extra column": ("id,day,price,note,more\n1,,,,\n", 1, "there is no column more in the table"),
    "renamed column": ("id,day,cost,note\n1,,,\n", 1, "the column price is missing; there is no column cost"),
    "column without a name": ("id,day,,note\n1,,,\n", 1, "the first line must name every column"),
    "line break in a name": ('id,day,price,"no\nte"\r\n1,,,\r\n', 1, "the name of a column has a line break"),
    "column twice": ("id,day,price,ID,note\n1,,,,\n", 1, "two columns have the same name"),
    "empty": ("", None, "empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_csv_goes_to_quarantine_with_line_and_reason(orders: Folder, name: str) -> None:
    content, line, reason = BAD_FILES[name]
    orders.drop("orders/bad.csv", content)
    orders.drop("orders/good.csv", HEADER + GOOD)
    outcomes = orders.land()
    bad = outcomes["orders/bad.csv"]
    assert (bad.state, bad.line) == ("refused", line)
    assert reason in bad.reason
    assert outcomes["orders/good.csv"].state == "landed"
    assert orders.rows("select id from raw.orders order by id") == [(1,), (2,), (3,)]
    assert orders.files() == {
        "landed/orders/first.csv",
        "landed/orders/good.csv",
        "quarantine/orders/bad.csv",
        "quarantine/orders/bad.csv.reason.txt",
    }
    where = f"orders/bad.csv, line {line}" if line else "orders/bad.csv"
    written = (orders.root / "quarantine/orders/bad.csv.reason.txt").read_text()
    assert written == f"{where}: {bad.reason}\n"


def test_bad_first_file_makes_no_table(folder: Folder) -> None:
    folder.drop("orders/a.csv", "id,day,price,note\n")
    folder.drop("orders/b.csv", ORDERS + "3,\n")
    outcomes = folder.land()
    assert "there are no rows" in outcomes["orders/a.csv"].reason
    assert outcomes["orders/b.csv"].line == 4
    assert folder.rows("select count(*) from duckdb_tables() where schema_name = 'raw'") == [(0,)]
    folder.drop("orders/c.csv", "something\nelse\n")
    assert folder.land()["orders/c.csv"].state == "landed"


def test_corrected_file_can_be_put_back(orders: Folder) -> None:
    for price, state in (("x", "refused"), ("y", "refused"), ("7", "landed")):
        orders.drop("orders/second.csv", f"{HEADER}3,2024-03-01,{price},\n")
        assert orders.land()["orders/second.csv"].state == state
    names = sorted(path.name for path in (orders.root / "quarantine/orders").iterdir())
    assert len(names) == 4, names
    assert {"second.csv", "second.csv.reason.txt"} <= set(names)
    texts = {(orders.root / "quarantine/orders" / name).read_text() for name in names if name.endswith(".csv")}
    assert texts == {f"{HEADER}3,2024-03-01,x,\n", f"{HEADER}3,2024-03-01,y,\n"}


def test_parquet_lands_beside_csv(orders: Folder) -> None:
    orders.drop_parquet(
        "orders/a.parquet", "select 'x' as note, 3::integer as ID, 7::float as price, date '2024-03-01' as day"
    )
    assert [outcome.reason for outcome in orders.land().values()] == [""]
    assert orders.rows("select id, price, note from raw.orders where id > 2") == [(3, 7.0, "x")]


PARQUET = "select 3 as id, date '2024-03-01' as day, 7.0::double as price, 'x' as note"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (PARQUET + ", 1 as more", "there is no column more"),
        (PARQUET.replace("3 as id", "3.0::double as id"), "the column id is DOUBLE, and BIGINT in the table"),
        (PARQUET.replace("3 as id", "'3' as id"), "the column id is VARCHAR, and BIGINT in the table"),
        (PARQUET.replace("3 as id", "10::hugeint ** 30 as id"), "the column id is DOUBLE"),
        (PARQUET.replace("3 as id", "(2 ** 63)::ubigint as id"), "out of range"),
        (PARQUET.replace("date '2024-03-01'", "timestamp '2024-03-01 10:00'"), "the column day is TIMESTAMP, and DATE"),
    ],
)
def test_parquet_that_does_not_fit(orders: Folder, rows: str, reason: str) -> None:
    orders.drop_parquet("orders/a.parquet", rows)
    (outcome,) = orders.land().values()
    assert (outcome.state, outcome.line) == ("refused", None)
    assert reason in outcome.reason


def test_broken_parquet_is_refused_wherever_it_is_broken(orders: Folder) -> None:
    whole = orders.drop_parquet(
        "whole",
        "select range as id, date '2024-03-01' as day, random() as price, 'x' || range as note from range(5000)",
    ).read_bytes()
    (orders.root / "whole").unlink()
    broken = {
        "cut": whole[:-1],
        "half": whole[: len(whole) // 2],
        "start": whole[:4],
        "text": b"PAR1 is not enough PAR1",
        "middle": whole[:9000] + b"\0" * 9000 + whole[18000:],
    }
    for name, content in broken.items():
        orders.drop(f"orders/{name}.parquet", content)
    outcomes = orders.land()
    assert {outcome.state for outcome in outcomes.values()} == {"refused"}
    assert all("not a whole Parquet file" in outcome.reason for outcome in outcomes.values())
    assert orders.rows("select count(*) from raw.orders") == [(2,)]


def test_same_content_changes_nothing_whatever_its_name(orders: Folder) -> None:
    orders.drop("orders/first.csv", ORDERS)
    orders.drop("orders/other name.csv", ORDERS)
    orders.drop("copies/first.csv", ORDERS)
    assert {path: outcome.state for path, outcome in orders.land().items()} == {
        "orders/first.csv": "duplicate",
        "orders/other name.csv": "duplicate",
        "copies/first.csv": "landed",
    }
    assert orders.rows("select count(*) from raw.orders") == [(2,)]
    assert len([name for name in orders.files() if name.startswith("landed/orders/")]) == 3


def test_dropping_the_table_starts_anew(orders: Folder) -> None:
    orders.connection.execute("drop table raw.orders")
    orders.drop("orders/again.csv", ORDERS)
    assert [outcome.state for outcome in orders.land().values()] == ["landed"]
    assert orders.rows("select count(*) from raw.orders") == [(2,)]


def test_crash_before_the_move_loads_nothing_twice(orders: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    orders.drop("orders/second.csv", HEADER + GOOD)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(orders.landing, "move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        orders.land()
    assert orders.rows("select count(*) from raw.orders") == [(3,)]
    assert [outcome.state for outcome in orders.land().values()] == ["duplicate"]
    assert orders.rows("select count(*) from raw.orders") == [(3,)]
    assert "landed/orders/second.csv" in orders.files()


def test_crash_in_the_transaction_loads_nothing(orders: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    orders.drop("orders/second.csv", HEADER + GOOD)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(orders.landing.Entry, "check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        orders.land()
    assert orders.rows("select count(*) from raw.orders") == [(2,)]
    assert [outcome.state for outcome in orders.land().values()] == ["landed"]


def test_full_disk_is_not_the_files_fault(orders: Folder) -> None:
    orders.drop("orders/a.csv", HEADER + "".join(f"{n},2024-01-01,{n}.5,{n * 7919}\n" for n in range(600_000)))
    orders.drop("orders/b.csv", HEADER + GOOD)
    orders.connection.execute("set memory_limit = '12MB'; set temp_directory = ''")
    outcomes = orders.land()
    assert outcomes["orders/a.csv"].state == "failed"
    assert "orders/a.csv" in orders.files()
    orders.connection.execute("set memory_limit = '400MB'")
    assert orders.land()["orders/a.csv"].state == "landed"


def test_file_is_left_alone_while_it_is_copied(orders: Folder) -> None:
    scan, path = orders.landing.scan, orders.drop("orders/slow.csv", HEADER)
    for name in (".slow.csv.Ab12", "slow.csv.part", "slow.csv.tmp", "slow.csv.filepart"):
        orders.drop(f"orders/{name}", ORDERS)
    os.utime(path, (0, 0))
    assert scan(orders.root, quiet=60).files == []
    waiting = scan(orders.root, quiet=0)
    assert [entry.path for entry in waiting.files] == ["orders/slow.csv"]
    with path.open("a") as file:
        file.write(GOOD)
    assert list(orders.landing.land(orders.connection, orders.root, waiting, "run", {}, set())) == []
    assert "orders/slow.csv" in orders.files()
    time.sleep(0.3)
    assert [entry.path for entry in scan(orders.root, quiet=0.2).files] == ["orders/slow.csv"]
    assert [outcome.loaded.rows for outcome in orders.land().values()] == [1]


def test_file_that_is_gone_is_no_failure(orders: Folder) -> None:
    for folder in ("orders", "others"):
        orders.drop(f"{folder}/gone.csv", HEADER + GOOD)
    waiting = orders.landing.scan(orders.root, quiet=0)
    (orders.root / "orders/gone.csv").unlink()
    shutil.rmtree(orders.root / "others")
    assert list(orders.landing.land(orders.connection, orders.root, waiting, "run", {}, set())) == []


def test_file_that_grows_while_it_is_loaded_is_left_alone(orders: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = orders.drop("orders/slow.csv", HEADER + GOOD)
    add_rows = orders.loading.add_rows

    def grow(*arguments: Any) -> int:
        rows = add_rows(*arguments)
        path.write_text(HEADER + GOOD * 2)
        return rows

    with monkeypatch.context() as patched:
        patched.setattr(orders.loading, "add_rows", grow)
        assert orders.land() == {}
    assert orders.rows("select count(*) from raw.orders") == [(2,)]
    assert orders.land()["orders/slow.csv"].loaded.rows == 2


def test_file_put_in_the_place_of_one_just_loaded_is_kept(orders: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = orders.drop("orders/second.csv", HEADER + GOOD)
    free_name, replaced = orders.landing.free_name, []

    def replace(target: int, name: str) -> str:
        if not replaced:
            replaced.append(orders.drop("orders/new", HEADER + GOOD.replace("3,", "4,")).rename(path))
        return free_name(target, name)

    with monkeypatch.context() as patched:
        patched.setattr(orders.landing, "free_name", replace)
        orders.land()
    assert "orders/second.csv" in orders.files()
    orders.land()
    assert orders.rows("select id from raw.orders order by id") == [(1,), (2,), (3,), (4,)]


HOSTILE = [
    "a\nb.csv",
    "a'b.csv",
    'a"b.csv',
    "*.csv",
    "[a-z].csv",
    "-rf.csv",
    "a,b;c.csv",
    "$(reboot).csv",
    "é.CSV",
    b"\xff\xfe.csv",
    "x" * 251 + ".csv",
    "s3:\\\\bucket\\x.csv",
    "..a.csv".lstrip("."),
]


def test_hostile_names_are_only_names(orders: Folder) -> None:
    for number, name in enumerate(HOSTILE):
        path = b"orders/" + name if isinstance(name, bytes) else f"orders/{name}"
        orders.drop(path, HEADER + f"{100 + number},2024-01-01,1,\n")
    outcomes = orders.land()
    assert [outcome.state for outcome in outcomes.values()] == ["landed"] * len(HOSTILE)
    assert all(path.isprintable() for path in outcomes)
    assert orders.rows("select count(*) from raw.orders where id >= 100") == [(len(HOSTILE),)]
    assert len(list((orders.root / "landed/orders").iterdir())) == 1 + len(HOSTILE)
    for name in HOSTILE:
        path = b"orders/" + name if isinstance(name, bytes) else f"orders/{name}"
        orders.drop(path, "x\n")
    assert {outcome.state for outcome in orders.land().values()} == {"refused"}
    assert len(list((orders.root / "quarantine/orders").iterdir())) == 2 * len(HOSTILE)


def test_hostile_columns_are_only_columns(folder: Folder) -> None:
    names = ['a"b', "c'); drop table landing.files; --", "select", "é f", "{x}"]
    content = io.StringIO()
    csv.writer(content).writerows([names, [1, 2, 3, 4, 5]])
    folder.drop("select/a.csv", content.getvalue())
    assert [outcome.reason for outcome in folder.land().values()] == [""]
    assert folder.rows('select column_name from (describe raw."select")') == [(name,) for name in names]
    assert folder.rows("select count(*) from landing.files") == [(1,)]


def test_links_pipes_and_other_things_are_not_read(orders: Folder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("password\nhunter2\n")
    (orders.root / "orders").mkdir(exist_ok=True)
    (orders.root / "orders/link.csv").symlink_to(tmp_path / "secret")
    os.mkfifo(orders.root / "orders/pipe.csv")
    (orders.root / "elsewhere").symlink_to(tmp_path)
    orders.drop("orders/table.xlsx", "x")
    orders.drop("loose.csv", ORDERS)
    outcomes = orders.land()
    assert {path: outcome.reason.split(",")[0] for path, outcome in outcomes.items()} == {
        "elsewhere": "belongs into a folder with the name of its dataset",
        "loose.csv": "belongs into a folder with the name of its dataset",
        "orders/link.csv": "a symbolic link",
        "orders/pipe.csv": "not a file",
        "orders/table.xlsx": "the name ends neither in .csv nor in .parquet",
    }
    assert (tmp_path / "secret").exists()
    assert (orders.root / "quarantine/orders/link.csv").is_symlink()
    assert orders.rows("select count(*) from raw.orders") == [(2,)]


def test_link_in_the_place_of_the_archive_is_not_followed(orders: Folder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (orders.root / "quarantine").mkdir()
    (orders.root / "quarantine/orders").symlink_to(tmp_path / "elsewhere")
    orders.drop("orders/bad.csv", "x\n")
    assert orders.land()["orders/bad.csv"].state == "failed"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert "orders/bad.csv" in orders.files()


@pytest.mark.parametrize("name", ["airlines", "Orders", "my orders", "1st", "a.b", "x" * 64, "é"])
def test_names_that_no_dataset_can_have(folder: Folder, name: str) -> None:
    folder.drop(f"{name}/a.csv", ORDERS)
    (outcome,) = folder.land().values()
    assert outcome.state == "refused"
    assert ("belongs to another asset" if name == "airlines" else "a dataset's name has") in outcome.reason
    assert folder.files() == {f"quarantine/{name}/a.csv", f"quarantine/{name}/a.csv.reason.txt"}


def test_table_of_somebody_else_is_not_touched(folder: Folder) -> None:
    folder.connection.execute("create schema raw")
    folder.connection.execute("create table raw.theirs as select 1 as id")
    folder.drop("theirs/a.csv", "id\n2\n")
    assert "was not made here" in folder.land()["theirs/a.csv"].reason
    assert folder.rows("from raw.theirs") == [(1,)]


def test_folders_in_folders_are_named_and_left(orders: Folder) -> None:
    (orders.root / "orders/2024").mkdir(parents=True, exist_ok=True)
    orders.drop("orders/2024/a.csv", ORDERS)
    waiting = orders.landing.scan(orders.root, quiet=0)
    assert waiting.files == []
    assert waiting.stuck == {"orders/2024": "folders inside that of a dataset are not looked into"}


def test_keyed_rows_replace_those_with_their_key(folder: Folder) -> None:
    folder.drop("sales/a.csv", "day,shop,sold\n2024-01-01,north,1\n2024-01-01,south,2\n2024-01-02,north,NA\n")
    folder.drop("sales/b.csv", "shop,sold,day\nsouth,20,2024-01-01\neast,3,2024-01-01\n")
    outcomes = folder.land()
    assert [outcome.loaded.rows for outcome in outcomes.values()] == [3, 2]
    expected = [("2024-01-01", "east", 3), ("2024-01-01", "north", 1), ("2024-01-01", "south", 20)]
    expected += [("2024-01-02", "north", None)]
    for schema in ("raw", "landing"):
        assert folder.rows(f"select day::varchar, shop, sold from {schema}.sales order by all") == expected


@pytest.mark.parametrize(
    ("lines", "line", "reason"),
    [
        ("2024-01-01,north,1\n2024-01-01,,2\n", 3, r"a part of the key \(day, shop\) is missing"),
        ("2024-01-01,north,1\n2024-01-01,NA,2\n", 3, r"a part of the key \(day, shop\) is missing"),
        ("2024-01-01,north,1\n2024-01-02,north,2\n2024-01-01,north,1\n", 4, "two rows have the same key"),
        ("2024-01-01,north,1\n2024-01-02,north,many\n", 3, "'many' in column sold does not fit its type INTEGER"),
        ("2024-01-01,north,1\n2024-01-02\n", 3, "Expected Number of Columns: 3 Found: 1"),
    ],
)
def test_keyed_rows_without_a_key_of_their_own(folder: Folder, lines: str, line: int, reason: str) -> None:
    folder.drop("sales/a.csv", "day,shop,sold\n" + lines)
    (outcome,) = folder.land().values()
    with pytest.raises(folder.loading.RefusedError, match=reason):
        raise folder.loading.RefusedError(outcome.reason)
    assert (outcome.state, outcome.line) == ("refused", line)
    assert folder.rows("select count(*) from duckdb_tables() where table_name = 'sales'") == [(0,)]


def test_what_is_accepted_is_what_the_standard_library_reads(folder: Folder) -> None:
    chance = random.Random(7)
    fields = ["1", "22", "", "x y", '"q"', '"a,b"', '"a""b"', '"m\nn"', '""', "é"]
    contents = {}
    for number in range(150):
        end = chance.choice(["\n", "\r\n"])
        lines = [",".join(chance.choices(fields, k=3)) for _ in range(chance.choice([2, 30]))]
        content = bytearray(end.join(["a,b,c", *lines, f"{number},,{end}"]).encode())
        for _ in range(chance.choice([0, 1, 2])):
            place = chance.randrange(6, len(content))
            content[place : place + chance.choice([0, 1])] = chance.choice([b'"', b",", b"\n", b"\r", b"\xff", b""])
        contents[f"f{number}/a.csv"] = bytes(content)
        folder.drop(f"f{number}/a.csv", bytes(content))
    outcomes = folder.land()
    landed = [path for path, outcome in outcomes.items() if outcome.state == "landed"]
    assert 40 < len(landed) < 140
    for path in landed:
        records = [row for row in csv.reader(io.StringIO(contents[path].decode(), newline="")) if row][1:]
        read = folder.rows(f"select columns(*)::varchar from raw.{path.split('/')[0]}")
        expected = [tuple(value or None for value in row[:3]) for row in records]
        assert sorted(map(str, read)) == sorted(map(str, expected)), contents[path]
    assert all(outcomes[path].line for path in contents if path not in landed)


def test_a_thousand_small_files_take_seconds(folder: Folder) -> None:
    for number in range(1000):
        folder.drop(f"readings/{number}.csv", f"sensor,value\n{number},{number / 7}\n")
    started = time.process_time()
    assert {outcome.state for outcome in folder.land().values()} == {"landed"}
    seconds = time.process_time() - started
    assert folder.rows("select count(distinct sensor) from raw.readings") == [(1000,)]
    assert seconds < 20


@pytest.fixture
def platform(
    defs: dg.Definitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dg.ExecuteInProcessResult]:
    """Run a job on a landing folder and a warehouse of its own; files in it count as copied at once."""
    from data_platform import assets, landing, sensors

    (tmp_path / "landing").mkdir()
    monkeypatch.setenv("DATA_PLATFORM_LANDING", str(tmp_path / "landing"))
    monkeypatch.setenv("DATA_PLATFORM_WAREHOUSE", str(tmp_path / "warehouse.duckdb"))
    for module in (assets.landing, sensors):
        monkeypatch.setattr(module, "scan", lambda root: landing.scan(root, quiet=0))

    def run(instance: dg.DagsterInstance, job: str = "land_files", **options: Any) -> dg.ExecuteInProcessResult:
        return defs.resolve_job_def(job).execute_in_process(instance=instance, raise_on_error=False, **options)

    return run


@pytest.fixture
def own_instance() -> Iterator[dg.DagsterInstance]:
    """A Dagster instance that no other test knows."""
    with dg.instance_for_test() as instance:
        yield instance


def drop(root: Path, path: str, content: str) -> None:
    (root / "landing" / path).parent.mkdir(exist_ok=True)
    (root / "landing" / path).write_text(content)


def test_run_shows_datasets_and_refused_files(
    platform: Callable[..., dg.ExecuteInProcessResult], own_instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    drop(tmp_path, "orders/good.csv", ORDERS)
    drop(tmp_path, "orders/good too.csv", ORDERS)
    drop(tmp_path, "orders/worse.csv", HEADER + "x,,,\n")
    drop(tmp_path, "planes/a.csv", ORDERS)
    result = platform(own_instance)
    assert result.success
    (check,) = result.get_asset_check_evaluations()
    assert (check.check_name, check.passed) == ("every_file_was_accepted", False)
    assert [record.data for record in check.metadata["reasons"].value.records] == [
        {"file": "orders/worse.csv", "line": 2, "reason": "'x' in column id does not fit its type BIGINT"},
        {
            "file": "planes/a.csv",
            "line": None,
            "reason": "the table raw.planes belongs to another asset: choose another name for the folder",
        },
    ]
    events = {event.asset_key.to_user_string(): event for event in result.get_asset_materialization_events()}
    assert events.keys() == {"landing/files", "raw/orders"}
    metadata = events["raw/orders"].materialization.metadata
    assert metadata["dagster/row_count"].value == 2
    assert metadata["landed_files"].value == 1
    assert "2024-01-31" in metadata["preview"].value
    ledger = events["landing/files"].materialization.metadata
    assert {name: ledger[name].value for name in ("landed", "duplicate", "refused")} == {
        "landed": 1,
        "duplicate": 1,
        "refused": 2,
    }

    drop(tmp_path, "orders/worse.csv", HEADER + GOOD)
    assert [check.passed for check in platform(own_instance).get_asset_check_evaluations()] == [True]


def test_run_fails_for_what_is_not_a_files_fault_and_loads_the_rest(
    platform: Callable[..., dg.ExecuteInProcessResult], own_instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    drop(tmp_path, "orders/good.csv", ORDERS)
    drop(tmp_path, "bad/bad.csv", "x\n")
    (tmp_path / "landing/quarantine").mkdir()
    (tmp_path / "landing/quarantine/bad").symlink_to(tmp_path)
    result = platform(own_instance)
    assert not result.success
    (failure,) = result.get_failed_step_keys()
    assert "1 files wait on" in str(result.failure_data_for_node(failure).user_failure_data.description)
    assert query(tmp_path / "warehouse.duckdb", "select count(*) from raw.orders") == [(2,)]
    assert (tmp_path / "landing/bad/bad.csv").exists()


FLIGHT = "2013,2,1,517,515,{delay},830,819,11,UA,{number},N14228,EWR,IAH,227,1400,5,15,2013-02-01T10:00:00Z\n"


def test_landed_flights_join_those_of_the_source(
    platform: Callable[..., dg.ExecuteInProcessResult],
    own_instance: dg.DagsterInstance,
    defs: dg.Definitions,
    tmp_path: Path,
) -> None:
    from data_platform.assets.ingest import SCHEMAS

    header = ",".join(SCHEMAS["flights"]) + "\n"
    flights = dg.AssetKey(["raw", "flights"])
    figures = "select count(*), count(*) filter (flight = 9999), sum(dep_delay) filter (flight = 9999) from raw.flights"
    february = {"partition_key": "2013-02-01", "asset_selection": [flights]}

    drop(tmp_path, "flights/new.csv", header + FLIGHT.format(delay=2, number=9999))
    (event, _) = platform(own_instance).get_asset_materialization_events()
    assert (event.asset_key, event.partition) == (flights, None)
    assert query(tmp_path / "warehouse.duckdb", figures) == [(1, 1, 2)]

    assert platform(own_instance, "everything", **february).success
    assert query(tmp_path / "warehouse.duckdb", figures) == [(24_952, 1, 2)]

    drop(tmp_path, "flights/corrected.csv", header + FLIGHT.format(delay="NA", number=9999))
    (event, _) = platform(own_instance).get_asset_materialization_events()
    assert (event.asset_key, event.partition) == (flights, "2013-02-01")
    assert event.materialization.metadata["dagster/partition_row_count"].value == 24_952
    assert platform(own_instance, "everything", **february).success
    assert query(tmp_path / "warehouse.duckdb", figures) == [(24_952, 1, None)]


def test_key_of_flights_tells_the_sources_flights_apart(
    everything: dg.ExecuteInProcessResult, warehouse_path: Path
) -> None:
    from data_platform.assets.ingest import LANDED_FLIGHTS

    key = ", ".join(LANDED_FLIGHTS.key)
    assert query(warehouse_path, f"select {key} from raw.flights group by all having count(*) > 1") == []
    assert query(warehouse_path, f"from raw.flights where {' is null or '.join(LANDED_FLIGHTS.key)} is null") == []


def evaluate(defs: dg.Definitions, instance: dg.DagsterInstance) -> dg.RunRequest | str:
    """Give what the sensor asks for, or why it does not."""
    sensor = defs.resolve_sensor_def("landing_folder")
    context = dg.build_sensor_context(instance=instance, resources={"landing": defs.resources["landing"]})
    tick = sensor.evaluate_tick(context)
    return tick.run_requests[0] if tick.run_requests else tick.skip_message


def test_sensor_launches_one_run_for_what_waits(
    platform: Callable[..., dg.ExecuteInProcessResult],
    own_instance: dg.DagsterInstance,
    defs: dg.Definitions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sensor = defs.resolve_sensor_def("landing_folder")
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    assert evaluate(defs, own_instance) == "No file waits."

    drop(tmp_path, "orders/a.csv", ORDERS)
    request = evaluate(defs, own_instance)
    assert "data_platform/waiting" in request.tags
    job = defs.resolve_job_def("land_files")
    with monkeypatch.context() as patched:
        patched.setattr("data_platform.assets.landing.land", lambda *_: iter(()))
        launched = own_instance.create_run_for_job(job, tags=request.tags, status=dg.DagsterRunStatus.STARTED)
        assert evaluate(defs, own_instance) == f"The run {launched.run_id} is on its way."
        own_instance.report_run_failed(launched)
        assert "failed for the same" in evaluate(defs, own_instance)
        patched.setattr("data_platform.sensors.RETRY_SECONDS", 0)
        assert evaluate(defs, own_instance).tags == request.tags
    drop(tmp_path, "orders/b.csv", ORDERS)
    request = evaluate(defs, own_instance)
    assert platform(own_instance, tags=request.tags).success
    assert evaluate(defs, own_instance) == "No file waits."


def test_sensor_does_not_repeat_what_a_run_has_said(
    platform: Callable[..., dg.ExecuteInProcessResult],
    own_instance: dg.DagsterInstance,
    defs: dg.Definitions,
    tmp_path: Path,
) -> None:
    (tmp_path / "landing/orders/2024").mkdir(parents=True)
    result = platform(own_instance, tags=evaluate(defs, own_instance).tags)
    assert [check.passed for check in result.get_asset_check_evaluations()] == [False]
    assert "said what is wrong" in evaluate(defs, own_instance)
    (tmp_path / "landing/orders/2024").rmdir()
    assert evaluate(defs, own_instance) == "No file waits."


def test_missing_folder_is_made(
    platform: Callable[..., dg.ExecuteInProcessResult],
    own_instance: dg.DagsterInstance,
    defs: dg.Definitions,
    tmp_path: Path,
) -> None:
    (tmp_path / "landing").rmdir()
    assert evaluate(defs, own_instance) == "No file waits."
    assert (tmp_path / "landing").is_dir()


def test_file_that_was_put_beside_the_folders_blocks_no_dataset(folder: Folder) -> None:
    folder.drop("orders", "id\n1\n")
    assert folder.land()["orders"].state == "refused"
    folder.drop("orders/bad.csv", "id\n1,2\n")
    assert folder.land()["orders/bad.csv"].state == "refused"
    assert folder.files() == {
        "quarantine/no-dataset/orders",
        "quarantine/no-dataset/orders.reason.txt",
        "quarantine/orders/bad.csv",
        "quarantine/orders/bad.csv.reason.txt",
    }


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["123456789012345678", "1"], "BIGINT"),
        (["123456789012345678", "1.5"], "VARCHAR"),
        (["123456789012345", "1.5"], "DOUBLE"),
        (["9007199254740993.5"], "VARCHAR"),
    ],
)
def test_long_integers_are_not_taken_for_floating_point_numbers(folder: Folder, values: list[str], kind: str) -> None:
    folder.drop("orders/a.csv", "\n".join(["id", *values, ""]))
    assert folder.land()["orders/a.csv"].state == "landed"
    assert folder.rows("select typeof(id), count(*) from raw.orders group by all") == [(kind, len(values))]
    assert kind == "DOUBLE" or sorted(str(row) for (row,) in folder.rows("select id from raw.orders")) == sorted(values)


@pytest.mark.parametrize(("kind", "right", "wrong"), [("float", 2**24, 2**24 + 1), ("double", 2**53, 2**53 + 1)])
def test_integer_that_a_floating_point_column_does_not_hold_is_refused(
    folder: Folder, kind: str, right: int, wrong: int
) -> None:
    folder.drop_parquet("orders/a.parquet", f"select 1.5::{kind} as size")
    for number in (right, wrong):
        folder.drop(f"orders/{number}.csv", f"size\n{number}\n")
        folder.drop_parquet(f"orders/{number}.parquet", f"select {number}::bigint as size")
    said = folder.land()
    assert {name: outcome.state for name, outcome in said.items()} == {
        "orders/a.parquet": "landed",
        f"orders/{right}.csv": "landed",
        f"orders/{right}.parquet": "landed",
        f"orders/{wrong}.csv": "refused",
        f"orders/{wrong}.parquet": "refused",
    }
    assert "column size" in said[f"orders/{wrong}.csv"].reason
    assert said[f"orders/{wrong}.parquet"].reason == f"an integer in column size does not fit its type {kind.upper()}"
    assert folder.rows("select sum(size)::hugeint from raw.orders where size > 2") == [(2 * right,)]

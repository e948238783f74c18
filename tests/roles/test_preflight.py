"""What preflight finds wrong with variables, ports, package indexes and apt sources, in its own words."""

import datetime
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from conftest import ROLES, ROOT, entry_points, module_at, wiring
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROLE = ROOT / "roles/preflight"
plugin = module_at(ROLE / "lookup_plugins/problems.py")
measure = module_at(ROLE / "library/preflight_measure.py")
reach = module_at(ROLE / "library/preflight_reach.py")

SPECS = {
    "shop": {
        "main": {
            "shop_name": {"type": "str", "required": True},
            "shop_open": {"type": "bool", "default": True},
            "shop_floor": {"type": "int", "default": 1, "choices": [1, 2]},
            "shop_sizes": {"type": "list", "elements": "int", "default": []},
            "shop_labels": {"type": "dict", "default": {}},
            "shop_owner": {"type": "str"},
            "shop_shelves": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "mutually_exclusive": [["width", "deep"]],
                "options": {
                    "name": {"type": "str", "required": True},
                    "width": {"type": "int"},
                    "deep": {"type": "float"},
                    "colour": {"type": "str", "choices": ["red", "blue"]},
                    "labels": {"type": "dict"},
                },
            },
        },
        "sale": {"shop_discount": {"type": "int", "required": True}},
    },
    "shop_window": {"main": {"shop_window_light": {"type": "bool", "default": False}}},
    "elsewhere": {"main": {"elsewhere_name": {"type": "str", "required": True}}},
}
DEFAULTS = {"shop_open": True, "shop_floor": 1, "shop_sizes": [], "shop_labels": {}, "shop_shelves": []}
GIVEN = {"shop_name": "{{ shop_published }}"}
SECRET = "do-not-show-this"
ACCOUNT = "user:p%40ss"


class Inventory:
    """Asks the plugin about variables, where ``SPECS`` are the roles, and ``GIVEN`` is the wiring."""

    def __init__(self, folder: Path) -> None:
        self.playbooks = folder / "playbooks"
        for role, entries in SPECS.items():
            file = folder / "roles" / role / "meta" / "argument_specs.yml"
            file.parent.mkdir(parents=True)
            specs = {name: {"options": options} for name, options in entries.items()}
            file.write_text(yaml.safe_dump({"argument_specs": specs}))
        (self.playbooks / "group_vars/all").mkdir(parents=True)
        (self.playbooks / "group_vars/all/wiring.yml").write_text(yaml.safe_dump(GIVEN))

    def problems(self, *terms: str, **variables: Any) -> list[str]:
        """Give what the plugin says of variables, on top of what the roles and the wiring set."""
        given = {
            **DEFAULTS,
            **GIVEN,
            "ansible_play_role_names": ["shop"],
            "playbook_dir": str(self.playbooks),
            "preflight_options": {"data_platform_proxy": {"type": "dict"}},
            **variables,
        }
        loader = DataLoader()
        trusted = trust(given)
        return plugin.LookupModule(loader, Templar(loader, trusted)).run(list(terms), trusted)


def trust(value: Any) -> Any:
    """Mark templates as Ansible does where they come from an inventory."""
    if isinstance(value, dict):
        return {name: trust(part) for name, part in value.items()}
    if isinstance(value, list):
        return [trust(part) for part in value]
    return trust_as_template(value) if isinstance(value, str) else value


@pytest.fixture
def inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inventory:
    """An inventory for small roles of this test's own."""
    monkeypatch.setattr(plugin, "ROLES", tmp_path / "roles")
    return Inventory(tmp_path)


def test_defaults_and_wiring_are_no_problem(inventory: Inventory) -> None:
    assert inventory.problems() == []


@pytest.mark.parametrize(
    "variables",
    [
        {"shop_floor": "2", "shop_open": "no", "shop_sizes": ["1", 2], "shop_labels": {1: None}},
        {"shop_floor": "{{ shop_sizes[0] }}", "shop_sizes": "{{ [1, 2] }}"},
        {"shop_shelves": [{"name": "a", "width": None, "colour": "red"}, {"name": 1, "deep": "1.5"}]},
        {"shop_name": "{{ shop_published ~ '!' }}", "shop_published": "set by a role as it ran"},
        {"shop_owner": None},
        {"shop_discount": 5, "data_platform_proxy": {"http_proxy": "http://proxy.example.com"}},
        {"elsewhere_name": 3, "lab": 1, "shops_open": 1, "my_shop_open": 1, "__shop_private": 1, "data_platform": 1},
        {"ansible_shop_x": 1, "groups": {"shop_all": []}, "hostvars": {"shop_x": {}}},
    ],
)
def test_what_is_right_is_no_problem(inventory: Inventory, variables: dict[str, Any]) -> None:
    assert inventory.problems(**variables) == []


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"shop_opne": 1}, "Role shop has no variable shop_opne: write shop_open, or give your own another prefix."),
        ({"shop_zzzzzz": 1}, "Role shop has no variable shop_zzzzzz: remove it, or give your own another prefix."),
        (
            {"shop_window_l": 1},
            "Role shop_window has no variable shop_window_l: write shop_window_light, or give your own another prefix.",
        ),
        (
            {"data_platform_p": {}},
            "The platform has no variable data_platform_p: write data_platform_proxy, or give your own another prefix.",
        ),
        ({"data_platform_proxy": "http://x"}, "data_platform_proxy is a str: make it a dict."),
        ({"shop_floor": "many"}, "shop_floor is a str: make it an int."),
        ({"shop_floor": True}, "shop_floor is a bool: make it an int."),
        ({"shop_floor": "{{ 'ma' ~ 'ny' }}"}, "shop_floor is a str: make it an int."),
        ({"shop_floor": None}, "shop_floor has no value: give it an int, or remove it."),
        ({"shop_floor": "3"}, "shop_floor has a value that is not known: make it 1 or 2."),
        ({"shop_open": "perhaps"}, "shop_open is a str: make it a bool."),
        ({"shop_sizes": "1,2"}, "shop_sizes is a str: make it a list."),
        ({"shop_sizes": [1, "x"]}, "shop_sizes[1] is a str: make it an int."),
        ({"shop_labels": "a=b"}, "shop_labels is a str: make it a dict."),
        ({"shop_owner": ["x"]}, "shop_owner is a list: make it a str."),
        ({"shop_discount": "x"}, "shop_discount is a str: make it an int."),
        ({"shop_shelves": [{"name": "a"}, "b"]}, "shop_shelves[1] is a str: make it a dict."),
        ({"shop_shelves": [{"width": 1}]}, "shop_shelves[0] lacks name: add it."),
        ({"shop_shelves": [{"name": "a", "with": 1}]}, "shop_shelves[0] has no option with: write width."),
        ({"shop_shelves": [{"name": "a", "x": 1}]}, "shop_shelves[0] has no option x: remove it."),
        ({"shop_shelves": [{"name": None}]}, "shop_shelves[0].name has no value: give it a str, or remove it."),
        ({"shop_shelves": [{"name": "a", "labels": []}]}, "shop_shelves[0].labels is a list: make it a dict."),
        (
            {"shop_shelves": [{"name": "a", "colour": "green"}]},
            "shop_shelves[0].colour has a value that is not known: make it red or blue.",
        ),
        (
            {"shop_shelves": [{"name": "a", "width": 1, "deep": 1.0}]},
            "shop_shelves is refused: parameters are mutually exclusive: width|deep found in shop_shelves; correct it.",
        ),
        ({"shop_labels": "{{ nowhere }}"}, "shop_labels cannot be resolved: 'nowhere' is undefined."),
    ],
)
def test_what_is_wrong_is_one_sentence(inventory: Inventory, variables: dict[str, Any], sentence: str) -> None:
    assert inventory.problems(**variables) == [sentence]


def test_what_is_required_and_missing_is_named(inventory: Inventory) -> None:
    sentence = "elsewhere_name is not set, and has no default: set it in the inventory."
    assert inventory.problems(ansible_play_role_names=["elsewhere"]) == [sentence]


def test_no_value_is_quoted(inventory: Inventory) -> None:
    variables = {name: SECRET for name in ("shop_floor", "shop_open", "shop_sizes", "shop_labels")}
    shelf = {"name": "a", "width": SECRET, "colour": SECRET, "labels": SECRET}
    found = inventory.problems(**variables, shop_shelves=[shelf, SECRET])
    assert len(found) == 8
    assert SECRET not in str(found)


def test_sentences_say_where(inventory: Inventory, tmp_path: Path) -> None:
    file = tmp_path / "vars.yml"
    file.write_text("shop_floor: many\n\nshop_opne: true\nshop_shelves:\n  - name: a\n  - name: b\n    width: wide\n")
    found = inventory.problems(**DataLoader().load_from_file(str(file)))
    assert [sentence.split("(")[1].split(")")[0] for sentence in found] == [f"{file}:{line}" for line in (3, 1, 7)]


def test_further_checks_are_made_one_by_one(inventory: Inventory) -> None:
    checks = [
        {"holds": True, "else": "not said"},
        {"holds": "{{ shop_floor | int > 1 }}", "else": "The shop is on floor {{ shop_floor }}."},
        {"holds": "{{ shop_labels.x.y }}", "else": "not said"},
    ]
    assert inventory.problems("more", more=checks) == ["The shop is on floor 1."]
    del checks[1]
    [broken] = inventory.problems("more", more=checks)
    assert broken.startswith("A check in more cannot be evaluated: ")
    assert inventory.problems("more", more=checks, shop_labels=3) == ["shop_labels is an int: make it a dict."]


def test_the_roles_own_defaults_and_the_wiring_are_no_problem() -> None:
    loader = DataLoader()
    defaults = {
        name: value
        for role in ROLES
        for name, value in (yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text()) or {}).items()
    }
    own = {"playbook_dir": str(ROOT / "playbooks"), "ansible_play_role_names": ROLES}
    variables = trust({**defaults, **wiring(), **own})
    required = {name for role in ROLES for name, one in entry_points(role)["main"].items() if one.get("required")}
    assert required <= set(variables)
    assert plugin.LookupModule(loader, Templar(loader, variables)).run(["preflight_checks"], variables) == []


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of the loopback that this test listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_taken_port_is_told_with_its_holder(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"docker": "", "ss": f'LISTEN 0 5 127.0.0.1:{taken} *:* users:(("nginx",pid=12,fd=3))\n'}
    monkeypatch.setattr(measure, "output", lambda command, *_: answers[command])
    for bind in ("127.0.0.1", "0.0.0.0", ""):
        assert measure.listen_error(bind, str(taken)) == "nginx (process 12) listens there"
    answers["ss"] = ""
    assert measure.listen_error("127.0.0.1", str(taken)) == "another process listens there"
    answers["docker"] = "grafana \n"
    assert measure.listen_error("127.0.0.1", str(taken)) == "container grafana listens there"
    answers["docker"] = "dagster-webserver 0123abcd\n"
    assert measure.listen_error("127.0.0.1", str(taken)) == ""


@pytest.mark.parametrize(
    ("bind", "port", "error"),
    [
        ("192.0.2.1", "3001", "the host has no such address"),
        ("localhost", "3001", "it is not an IP address"),
        ("127.0.0.1", "70000", "there is no such port"),
        ("127.0.0.1", "many", ""),
    ],
)
def test_impossible_address_is_told(bind: str, port: str, error: str) -> None:
    assert measure.listen_error(bind, port) == error


def test_the_fullest_directory_is_the_one_that_counts(tmp_path: Path) -> None:
    assert measure.disk((tmp_path, tmp_path / "missing", Path("/proc"))) == {"path": "/proc", "free": 0}


@pytest.mark.parametrize(
    ("there", "system", "needed"), [(0, "ext2/ext3", 6), (2, "ext2/ext3", 2), (3, "ext2/ext3", 2), (2, "xfs", 0)]
)
def test_room_for_the_next_snapshots_is_measured(
    there: int, system: str, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "output", lambda *_: f"{system}\n")
    warehouse = tmp_path / "warehouse.duckdb"
    assert measure.snapshots(warehouse, tmp_path, 2) == {"need": 0, "free": 0}
    warehouse.write_bytes(b"x" * (2 << 20))
    for number in range(there):
        (tmp_path / f"warehouse-{number}.duckdb").touch()
    measured = measure.snapshots(warehouse, tmp_path, 2)
    assert measured["need"] == needed + 1024
    assert 0 < measured["free"] < 1 << 40


def test_room_for_snapshots_is_that_of_their_own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, statvfs = [], os.statvfs
    monkeypatch.setattr(measure.os, "statvfs", lambda path: asked.append(path) or statvfs(path))
    for name in ("warehouse", "snapshots/more"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "warehouse/warehouse.duckdb").touch()
    for published in ("snapshots", "snapshots/more", "snapshots/yet/to/be/made"):
        measure.snapshots(tmp_path / "warehouse/warehouse.duckdb", tmp_path / published, 2)
    assert asked == [tmp_path / "snapshots", tmp_path / "snapshots/more", tmp_path / "snapshots"]


def test_versions_are_those_that_the_data_belong_to(tmp_path: Path) -> None:
    units, data = tmp_path / "units", tmp_path / "data"
    kept = data / "upgrade/from" / units.relative_to("/")
    for folder in (units, kept, data / "postgres/9", data / "postgres/17", data / "postgres/18.new"):
        folder.mkdir(parents=True)
    assert (measure.versions(units, data), measure.postgres(units, data), measure.journal(data)) == ({}, "", {})
    (data / "dagster").mkdir()
    (data / "dagster/last-unit").write_text("Versions=dagster=0.5\n")
    assert measure.versions(units, data) == {"dagster": "0.5"}
    (units / "dagster-webserver.service").write_text("[X-Container]\nImage=x\n")
    assert measure.versions(units, data) == {}
    (units / "dagster-webserver.service").write_text("Image=x\nVersions=dagster=2.0 duckdb=1.5\n")
    (kept / "dagster-webserver.service").write_text("Versions=dagster=1.0 duckdb=1.5\n")
    assert measure.versions(units, data) == {"dagster": "2.0", "duckdb": "1.5"}
    (data / "postgres/9/PG_VERSION").write_text("9\n")
    (data / "postgres/18.new/PG_VERSION").write_text("18\n")
    (units / "dagster-postgres.service").write_text('--env "PGDATA=/data/postgres/17" \\')
    (kept / "dagster-postgres.service").write_text('--env "PGDATA=/data/postgres/9" \\')
    assert measure.postgres(units, data) == "9"
    (data / "postgres/17/PG_VERSION").write_text("17\n")
    assert measure.postgres(units, data) == "17"
    journal = data / "upgrade/unfinished"
    for step, dagster, postgres in (("saving", "2.0", "17"), ("saved", "1.0", "9"), ("migrating", "1.0", "9")):
        journal.write_text(f'{{"step": "{step}", "since": "then"}}')
        assert measure.versions(units, data)["dagster"] == dagster
        assert measure.postgres(units, data) == postgres
        assert measure.journal(data)["since"] == "then"


@pytest.mark.parametrize(
    ("there", "upgrades", "installed", "sentences"),
    [
        ({}, False, True, []),
        ({"dagster": "1.10.0", "duckdb": "1.5.5", "dbt-core": "1.0"}, False, True, []),
        (
            {"dagster": "1.9.0"},
            False,
            True,
            ["belong to Dagster 1.9.0, and this project has 1.10.0: run playbooks/upgrade.yml"],
        ),
        ({"dagster": "1.9.0"}, True, True, []),
        ({"dagster": "1.9.0"}, False, False, ["install the project as it was then first"]),
        (
            {"dagster": "1.11.0"},
            True,
            True,
            ["were written by Dagster 1.11.0, and this project has the older 1.10.0, which"],
        ),
        (
            {"dagster": "1.9.0", "duckdb": "2.0.0"},
            False,
            True,
            ["belong to Dagster 1.9.0", "were written by DuckDB 2.0.0, and this project has the older 1.5.5"],
        ),
    ],
)
def test_other_versions_are_refused_unless_they_are_upgraded(
    there: dict[str, str], upgrades: bool, installed: bool, sentences: list[str]
) -> None:
    own = {name: trust(value) for name, value in yaml.safe_load((ROLE / "vars/main.yml").read_text()).items()}
    variables = {
        **own,
        "__preflight_measured": {"versions": there, "installed": installed},
        "preflight_versions": {"dagster": "1.10.0", "duckdb": "1.5.5", "dbt-core": "1.11"},
        "preflight_upgrades": upgrades,
    }
    said = Templar(DataLoader(), variables=variables).template(own["__preflight_other_versions"])
    assert len(said) == len(sentences)
    assert [sentence for sentence, line in zip(sentences, said, strict=True) if sentence not in line] == []


@pytest.mark.parametrize(
    ("there", "wanted", "moves", "installed", "sentence"),
    [
        ("", 17, False, True, ""),
        ("17", 17, False, True, ""),
        ("17", "", False, True, ""),
        ("17", 18, True, True, ""),
        ("9", 17, True, True, ""),
        ("17", 18, False, True, "run playbooks/upgrade_postgres.yml, which moves them, or leave it at 17."),
        (
            "17",
            18,
            True,
            False,
            "install the project with 17 first, and run playbooks/upgrade_postgres.yml after that.",
        ),
        ("17", 15, True, True, "leave it at 17."),
        ("17", 9, False, True, "leave it at 17."),
    ],
)
def test_another_postgresql_is_refused_unless_it_is_moved(
    there: str, wanted: int | str, moves: bool, installed: bool, sentence: str
) -> None:
    own = {name: trust(value) for name, value in yaml.safe_load((ROLE / "vars/main.yml").read_text()).items()}
    variables = {
        **own,
        "__preflight_measured": {"postgres": there, "installed": installed},
        "preflight_postgres_version": wanted,
        "preflight_moves_postgres": moves,
    }
    said = Templar(DataLoader(), variables=variables).template(own["__preflight_other_postgres"])
    start = (
        f"The metadata of this host are of PostgreSQL {there}, and images_postgres_version is {wanted}, which cannot"
    )
    assert (said or "").strip() == (f"{start} read them: {sentence}" if sentence else "")


def test_users_that_the_host_does_not_know_are_found() -> None:
    assert measure.unknown(["root", "nobody-of-this-name", "--help", "", "0"]) == [
        "nobody-of-this-name",
        "--help",
        "",
        "0",
    ]
    assert measure.unknown([]) == []


class Answer(BaseHTTPRequestHandler):
    """Answers as a package index that wants a password, and has the package uv only."""

    def do_GET(self) -> None:  # noqa: N802 (the name is the library's)
        """Answer."""
        allowed = self.headers["Authorization"] == "Basic dXNlcjpwQHNz"
        self.send_response((200 if self.path == "/python/uv/" else 404) if allowed else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def self_signed() -> tuple[str, str]:
    """Give a key and a certificate of 127.0.0.1 that it signed itself, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    until, serial = now + datetime.timedelta(1), x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, str(serial))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), serial, now, until)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8, open_key = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(pem, pkcs8, open_key).decode(), made.public_bytes(pem).decode()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and its certificate."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_text("".join(self_signed()))
    return file


@pytest.fixture(scope="module")
def index(certificate: Path) -> Iterator[str]:
    """Address and port of a package index with that certificate."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def authorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of Debian's authorities, with none in it."""
    monkeypatch.setattr(reach, "AUTHORITIES", tmp_path)
    return tmp_path


def test_index_is_asked_with_its_password_and_the_images_trust(
    index: str, certificate: Path, authorities: Path
) -> None:
    (authorities / "another.crt").write_text(self_signed()[1])
    bundle = f"# Ő, a comment\n{certificate.read_text()}"
    with_password = f"https://{ACCOUNT}@{index}/python"
    assert reach.index_error(with_password, bundle, 5) == ("", False)
    assert reach.index_error(f"{with_password}/", bundle, 5) == ("", False)
    assert reach.index_error(f"https://{index}/python", bundle, 5) == ("it answers 401 Unauthorized", False)
    assert reach.index_error(f"https://{ACCOUNT}@{index}/other", bundle, 5) == ("it answers 404 Not Found", False)
    assert reach.index_error(with_password, "", 5) == ("self-signed certificate", True)


def test_nothing_is_said_of_trust_where_nothing_is_known(index: str, authorities: Path) -> None:
    assert reach.index_error(f"https://{ACCOUNT}@{index}/python", "", 5) == ("", False)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (f"http://user:{SECRET}@127.0.0.1:9/python", "Connection refused"),
        (f"https://user:{SECRET}@nowhere.invalid/python", "Name or service not known"),
        (f"https://user:{SECRET}@[/python", "no address of http"),
        (SECRET, "no address of http"),
        (f"file:///{SECRET}", "no address of http"),
    ],
)
def test_index_that_is_not_there_is_told_without_its_password(address: str, reason: str) -> None:
    error, untrusted = reach.index_error(address, "", 5)
    assert reason in error
    assert not untrusted
    assert SECRET not in error


def test_no_index_is_no_problem() -> None:
    assert reach.index_error("", "", 5) == ("", False)


def test_reason_of_apt_is_one_line_without_double_spaces() -> None:
    text = "W: Something\nE: Failed to fetch http://x.example/InRelease  404  Not Found [IP: ::1]\nE: Download Failed\n"
    assert reach.first_error(text) == "http://x.example/InRelease: 404 Not Found [IP: ::1]"
    assert reach.first_error("") == "it gives no reason"


@pytest.mark.parametrize(
    ("installed", "unfinished", "upgrades", "asked"),
    [
        (False, "", False, ["preflight_disk", 6]),
        (True, "", False, ["", 0]),
        (True, "", True, ["preflight_upgrade_disk", 3]),
        (True, "2026-01-31", True, ["", 0]),
    ],
    ids=["first installation", "installed", "upgrade", "upgrade that was not finished"],
)
def test_room_for_images_is_asked_before_they_are_built(
    installed: bool, unfinished: str, upgrades: bool, asked: list[Any]
) -> None:
    own = {name: trust(value) for name, value in yaml.safe_load((ROLE / "vars/main.yml").read_text()).items()}
    variables = {
        **own,
        "__preflight_measured": {"installed": installed, "unfinished": unfinished},
        "preflight_disk": 6,
        "preflight_upgrade_disk": 3,
        "preflight_upgrades": upgrades,
    }
    assert Templar(DataLoader(), variables=variables).template(own["__preflight_disk"]) == asked

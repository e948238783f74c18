"""Promises that all tasks keep: what is said to change nothing reads, secrets are not logged, names speak."""

import re
import shlex
from typing import Any

import jinja2
import jinja2.nodes
import pytest
from conftest import ROLES, ROOT, Task, all_tasks, role_files, strings

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")
READING = [
    "/usr/local/lib/data-platform/deployment status",
    "{{ docker_busy_command }}",
    "awk",
    "command -v",
    "df",
    "docker build --help",
    "docker container inspect",
    "docker container ls",
    "docker image inspect",
    "docker image ls",
    "docker info",
    "docker network inspect",
    "docker run --rm --network none --entrypoint cat",
    "docker version",
    "du",
    "dpkg-query --show",
    "echo",
    "find",
    "getent",
    "getfacl",
    "grep",
    "ls",
    "nft list",
    "systemctl is-active",
    "systemctl is-enabled",
    "ssh -V",
    "systemctl is-system-running",
    "systemctl show",
    "tail",
    "test",
    "timeout 10 qemu-system-x86_64 -accel kvm -cpu host -nodefaults -display none -no-reboot -kernel",
    "uname -m",
    "unshare --user --map-root-user --map-auto echo",
    "uv pip compile",
]
LOCK = [
    "/usr/local/lib/data-platform/deployment begin",
    "/usr/local/lib/data-platform/deployment finish",
]
"""The play's own lock, taken and freed: nothing that a host is to be."""
WRITING_OPTIONS = {
    "find": {"-delete", "-execdir", "-fls", "-fprint", "-fprint0", "-fprintf", "-ok", "-okdir"},
    "timeout 10 qemu-system-x86_64 -accel kvm -cpu host -nodefaults -display none -no-reboot -kernel": {
        "-blockdev",
        "-drive",
        "-hda",
        "-serial",
    },
    "uv pip compile": {"-o", "--output-file"},
}
PROGRAM = "/usr/local/lib/data-platform/container-unit"
LOOKS_ONLY_IN_CHECK_MODE = (
    f"{PROGRAM} converge {{{{ '--check ' if ansible_check_mode else '' }}}}",
    "{{ ['/usr/local/lib/data-platform/deployment', 'begin', deployments_what] + (['--check'] if ansible_check_mode",
    f"{PROGRAM} remove{{{{ ' --check' if ansible_check_mode else '' }}}}",
    "/usr/local/lib/data-platform/retention.py{{ ' --check' if ansible_check_mode else '' }}",
)
COMMANDS = ("command", "shell", "raw", "script")
CONTENT = (
    *COMMANDS,
    "assert",
    "blockinfile",
    "copy",
    "debug",
    "fail",
    "host_files",
    "lineinfile",
    "replace",
    "set_fact",
    "slurp",
    "template",
)
SECRETS = "/etc/data-platform/secrets/"
SECRET_OPTIONS = {
    "__images_registry_login",
    "code_location_package_index",
    "code_location_secrets",
    "dagster_code_locations",
    "images_package_index",
    "images_registry_password",
}


def command_line(task: Task) -> str:
    given = task.arguments
    if isinstance(given, dict):
        given = given.get("argv", given.get("cmd", ""))
    return shlex.join(given) if isinstance(given, list) else given


def asked(task: Task) -> str:
    """Give what a call of host_files asks the host, as a command line."""
    ask = task.content.get("host_files", {}).get("ask", "")
    lines = re.sub(r"{% raw %}.*?{% endraw %}|{{.*?}}|\\\n", " ", ask)
    return shlex.join(["sh", "-c", "; ".join(lines.splitlines())])


def simple_commands(line: str) -> list[str]:
    """The commands that a command line comes to: those of its shell program or of find, the one of a container."""
    line = re.sub(r"{%.*?%}", "", line)
    listed = jinja2.Environment().parse(line).find(jinja2.nodes.List) if line.startswith("{{") else None
    words = (
        [item.value for item in listed.items if isinstance(item, jinja2.nodes.Const)] if listed else shlex.split(line)
    )
    if words[:2] == ["sh", "-c"]:
        lexer = shlex.shlex(words[2], posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        parts = " ".join(f"\n{word}\n" if set(word) <= set(";|&") else word for word in lexer)
        return [part.strip() for part in parts.split("\n") if part.strip(" ;|&")]
    if words[:2] == ["docker", "exec"]:
        words = words[3:] if words[2:3] != ["{{"] else words[words.index("}}") + 1 :]
    return " ".join(words).split(" -exec ")  # find's


def only_reads(command: str) -> bool:
    known = [start for start in (*READING, *LOCK) if f"{command} ".startswith(f"{start} ")]
    options = {word.partition("=")[0] for word in command.split()}
    return any(not WRITING_OPTIONS.get(start, set()) & options for start in known) and ">" not in command


def reads(line: str) -> bool:
    return all(map(only_reads, simple_commands(line)))


def fetches_to_look(task: Task) -> bool:
    """Whether a task only brings code to the controller's cache, for the play to know what it would ship."""
    return (
        task.module == "git"
        and task.content.get("delegate_to") == "localhost"
        and task.arguments["dest"] == "{{ item.path }}"
        and task.content["loop"] == "{{ preflight_code_locations | selectattr('git') }}"
    )


def hides_a_change(task: Task) -> bool:
    looks = fetches_to_look(task) or (task.module in COMMANDS and reads(command_line(task)))
    return task.content.get("changed_when") is False and not looks


def acts_in_check_mode(task: Task) -> bool:
    line = command_line(task) if task.module in COMMANDS else ""
    looks = fetches_to_look(task) or line.startswith(LOOKS_ONLY_IN_CHECK_MODE) or (line and reads(line))
    return task.content.get("check_mode") is False and not looks


def own_modules(task: Task) -> set[str]:
    """Modules of the role that a task belongs to; they have no collection."""
    return {module.stem for module in (task.file.parents[1] / "library").glob("*.py")}


def secret_names(tasks: list[Task]) -> set[str]:
    """Variables that hold a secret: options that may, and results of tasks that handle one."""
    return SECRET_OPTIONS | {
        task.content["register"] for task in tasks if "register" in task.content and handles(task, set())
    }


def handles(task: Task, names: set[str]) -> bool:
    """Whether the content of a secret passes through this task."""
    texts: list[Any] = list(strings([task.arguments, task.content.get("vars"), task.content.get("environment")]))
    named = any(re.search(rf"\b{name}\b", text) for name in names for text in texts)
    return task.module in CONTENT and (named or any(SECRETS in text for text in texts))


@pytest.mark.parametrize(
    "line",
    [
        "docker image rm x",
        "docker exec box rm /etc/passwd",
        "docker exec {{ box }} systemctl stop x",
        "sh -c 'df /; rm x'",
        "sh -c 'echo x > /etc/passwd'",
        "sh -c 'df | tee /etc/passwd'",
        "{{ ['rm', '--force'] + things }}",
        "dpkg-query-and-more --show",
        "uv pip compile --quiet -o requirements.txt requirements.in",
        "uv pip compile --output-file=requirements.txt requirements.in",
        "uv pip sync requirements.txt",
        "find /etc -delete",
        "find /etc -name x -exec rm {} +",
        "find /etc -exec du {} + -exec rm {} +",
    ],
)
def test_commands_that_write_are_told_from_those_that_read(line: str) -> None:
    assert not reads(line)


def test_only_commands_that_read_are_said_to_change_nothing() -> None:
    assert [task.name for task in all_tasks() if hides_a_change(task)] == []


def test_only_commands_that_read_run_in_check_mode() -> None:
    assert [task.name for task in all_tasks() if acts_in_check_mode(task)] == []


def test_host_is_asked_by_commands_that_read() -> None:
    asking = [task for task in all_tasks() if "ask" in task.content.get("host_files", {})]
    assert asking
    assert [task.name for task in asking if not reads(asked(task))] == []


def test_every_command_says_when_it_changes_something() -> None:
    says = {"changed_when", "creates", "removes"}
    commands = [task for task in all_tasks() if task.module in COMMANDS and task.module != "script"]
    given = {
        task.name: says & {*task.content, *(task.arguments if isinstance(task.arguments, dict) else ())}
        for task in commands
    }
    assert [name for name, found in given.items() if not found] == []


def test_tasks_that_handle_secrets_log_nothing() -> None:
    tasks = all_tasks()
    handling = [task for task in tasks if handles(task, secret_names(tasks))]
    assert handling
    assert [task.name for task in handling if task.content.get("no_log") is not True] == []


def test_every_task_has_a_name_and_a_qualified_module() -> None:
    bare = [
        task.name
        for task in all_tasks()
        if not task.module and not {"block", "hosts", "import_playbook", *own_modules(task)} & set(task.content)
    ]
    assert bare + [task.name for task in all_tasks() if not task.content.get("name")] == []


def test_comments_are_few() -> None:
    lines = [
        line.strip() for role in ROLES for file in role_files(role, "tasks") for line in file.read_text().splitlines()
    ]
    written = [line for line in lines if line]
    assert len([line for line in written if line.startswith("#")]) <= 0.05 * len(written)


@pytest.mark.parametrize("role", ROLES)
def test_role_has_its_files(role: str) -> None:
    folder = ROOT / "roles" / role
    assert (folder / "meta" / "argument_specs.yml").is_file()
    assert (folder / "defaults" / "main.yml").is_file() or (folder / "vars" / "main.yml").is_file()
    assert (folder / "tasks" / "main.yml").is_file()


def test_tasks_in_which_a_test_kills_the_play_are_there() -> None:
    tests = ("molecule/default/tests/test_wiped.py", "molecule/deploy/tests/test_deploy.py")
    killed = [name for test in tests for name in re.findall(r'"(\w+) : ([^"]+)"', (ROOT / test).read_text())]
    assert len(killed) > 5
    for role, name in killed:
        files = (ROOT / "roles" / role / "tasks").glob("*.yml")
        assert any(f"name: {name}" in file.read_text() for file in files), f"{role} : {name}"

"""Variables: documented, typed, each role's own; told from role to role by the wiring alone."""

import re
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
import pytest
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from conftest import (
    ROLES,
    ROOT,
    Task,
    all_tasks,
    entry_points,
    load,
    options,
    role_files,
    role_tasks,
    strings,
    wiring,
    words_in,
)

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")
ANSIBLES_OWN = {
    "ansible_check_mode",
    "ansible_facts",
    "ansible_failed_result",
    "ansible_failed_task",
    "ansible_managed",
    "ansible_playbook_python",
    "ansible_version",
    "inventory_hostname",
    "item",
    "omit",
    "role_path",
}
FUNCTIONS = {"dict", "lookup", "query"}
PLACES = {"inventory_dir", "playbook_dir"}
CONDITIONS = ("when", "that", "until", "failed_when", "changed_when")
EMPTY = ("", None, [], {})
OF_ANOTHER_SOURCE = {  # of images; the scenario has one, and default's test_image_sources.py the other
    "images_registry_ca",
    "images_registry_image",
    "images_registry_password",
    "images_registry_username",
    "dagster_run_isolation",  # units has it
    "postgres_external",  # units has it
}
INCLUDES = [task for task in all_tasks() if task.module == "include_role"]
INVENTORY_FILES = [
    file
    for folder in (ROOT / "inventories", ROOT / "molecule")
    for file in sorted(folder.rglob("*.yml"))
    if {"group_vars", "host_vars"} & set(file.parts) or file.name == "hosts.yml"
]


def defaults(role: str) -> dict[str, Any]:
    return load(ROOT / "roles" / role / "defaults" / "main.yml")


def private(role: str) -> dict[str, Any]:
    return {name: value for file in role_files(role, "vars") for name, value in load(file).items()}


def is_own(role: str, name: str) -> bool:
    return name.startswith((f"{role}_", f"__{role}_"))


def public_facts(task: Task) -> set[str]:
    return set(task.arguments) - {"cacheable"} if task.module == "set_fact" else set()


def names_made_by(task: Task) -> set[str]:
    """Names that a task gives a value to, apart from what it hands to another role."""
    loop_variable = task.content.get("loop_control", {}).get("loop_var")
    handed = set() if task.module == "include_role" else set(task.content.get("vars", {}))
    return handed | public_facts(task) | {name for name in (task.content.get("register"), loop_variable) if name}


def references(text: str) -> set[str]:
    """Names that a template reads and does not itself give a value to."""
    template = jinja2.Environment().parse(text)
    names = list(template.find_all(jinja2.nodes.Name))
    given = {name.name for name in names if name.ctx != "load"}
    macros = {macro.name for macro in template.find_all(jinja2.nodes.Macro)}
    return {name.name for name in names} - given - macros


def names_read(value: Any, condition: bool = False) -> set[str]:
    """Variables that a piece of a task reads; conditions are expressions without braces."""
    if isinstance(value, dict):
        return set().union(*(names_read(part, key in CONDITIONS) for key, part in value.items()))
    if isinstance(value, list):
        return set().union(*(names_read(part, condition) for part in value))
    return references(f"{{{{ {value} }}}}" if condition else value) if isinstance(value, str) else set()


def without_what_is_left_out(value: Any) -> Any:
    """Drop the parts of dictionaries that are None: a validator puts it where a part is left out."""
    if isinstance(value, dict):
        return {key: without_what_is_left_out(part) for key, part in value.items() if part is not None}
    return [without_what_is_left_out(part) for part in value] if isinstance(value, list) else value


def known() -> set[str]:
    return {name for role in ROLES for name in options(role)}


@pytest.mark.parametrize("role", ROLES)
def test_specification_has_the_options_that_the_defaults_document(role: str) -> None:
    optional = {name for name, option in options(role).items() if not option.get("required")}
    assert optional <= set(defaults(role)) <= set(options(role))


@pytest.mark.parametrize("role", ROLES)
def test_specification_and_defaults_agree_on_the_value(role: str) -> None:
    for name, option in options(role).items():
        if option.get("required"):
            assert "default" not in option
            assert defaults(role).get(name) in EMPTY, f"{name} is required: a default would hide that it is missing"
        elif "default" in option or option["type"] not in ("dict", "list"):
            assert option.get("default") == defaults(role)[name], name


@pytest.mark.parametrize("role", ROLES)
def test_defaults_satisfy_their_specification(role: str) -> None:
    optional = {name: option for name, option in options(role).items() if not option.get("required")}
    values = {name: defaults(role)[name] for name in optional}
    result = ArgumentSpecValidator(optional).validate(values)
    assert result.error_messages == []
    given = without_what_is_left_out(result.validated_parameters)
    assert given == without_what_is_left_out(values), "Ansible would have to convert a default to its type"


@pytest.mark.parametrize("role", ROLES)
def test_entry_points_are_files_and_agree_with_each_other(role: str) -> None:
    for entry, given in entry_points(role).items():
        assert (ROOT / "roles" / role / "tasks" / f"{entry}.yml").is_file()
        assert {name: options(role)[name] for name in given} == given
        assert all(option.get("description") for option in given.values())


@pytest.mark.parametrize("role", ROLES)
def test_variables_are_named_after_their_role(role: str) -> None:
    tasks = role_tasks(role)
    made = {name for task in tasks for name in names_made_by(task)}.union(defaults(role), options(role), private(role))
    assert {name for name in made if not is_own(role, name)} == set()


@pytest.mark.parametrize("role", ROLES)
def test_inner_variables_are_marked_as_such(role: str) -> None:
    registered = {task.content["register"] for task in role_tasks(role) if "register" in task.content}
    assert {name for name in registered.union(private(role)) if not name.startswith("__")} == set()


@pytest.mark.parametrize("role", ROLES)
def test_role_reads_only_variables_that_it_has(role: str) -> None:
    own = set().union(options(role), private(role), *map(names_made_by, role_tasks(role)))
    texts = [file.read_text() for file in role_files(role, "templates")]
    read = names_read([private(role), *(task.content for task in role_tasks(role))]).union(*map(references, texts))
    assert read - own - ANSIBLES_OWN - FUNCTIONS == set()


@pytest.mark.parametrize("role", ROLES)
def test_every_option_is_read(role: str) -> None:
    text = "".join(
        file.read_text() for file in role_files(role, "tasks", "handlers", "templates", "vars", "lookup_plugins")
    )
    assert set(options(role)) - words_in(text) - names_read(wiring()) == set()


def test_no_role_calls_another_but_the_shared_mechanic() -> None:
    called = {
        task.arguments["name"]
        for role in ROLES
        for task in role_tasks(role)
        if task.module in ("include_role", "import_role")
    }
    assert called == {"service"}
    assert [role for role in ROLES if load(ROOT / "roles" / role / "meta" / "main.yml").get("dependencies")] == []


@pytest.mark.parametrize("task", INCLUDES, ids=lambda task: task.name)
def test_shared_mechanic_is_given_what_it_asks_for(task: Task) -> None:
    asked = entry_points("service")[Path(task.arguments["tasks_from"]).stem]
    required = {name for name, option in asked.items() if option.get("required")}
    assert required <= set(task.content["vars"]) <= set(asked)


def test_wiring_sets_only_options_of_roles_and_what_it_makes_them_of() -> None:
    own = {name for name in wiring() if name.startswith(("__", "data_platform_"))}
    assert set(wiring()) - known() == own <= names_read(wiring())


def test_wiring_gives_every_required_option_of_the_roles_in_the_playbooks() -> None:
    imports = [task.arguments for task in all_tasks() if task.module == "import_role"]
    assert imports
    entries = [(imported["name"], imported.get("tasks_from", "main")) for imported in imports]
    asked = [entry_points(role).get(entry, {}) for role, entry in entries]
    required = {name for entry in asked for name, option in entry.items() if option.get("required")}
    assert required - set(wiring()) == set()


def test_wiring_reads_only_what_roles_or_the_user_give() -> None:
    facts = {name for role in ROLES for task in role_tasks(role) for name in public_facts(task)} | {"ansible_facts"}
    read = {name for name in names_read(wiring()) if not name.startswith("data_platform_")}
    assert read - known() - facts - set(wiring()) - FUNCTIONS - PLACES == set()


def test_roles_publish_only_what_the_wiring_reads() -> None:
    facts = {name for role in ROLES for task in role_tasks(role) for name in public_facts(task)}
    assert facts - names_read(wiring()) == set(), "preflight would take them for misspelt variables"


def inventory_variables(file: Path) -> set[str]:
    """Names that an inventory file sets, or offers in a comment."""
    if file.name == "hosts.yml":
        groups = list(load(file).values())
        hosts = [host for group in groups for host in (group.get("hosts") or {}).values()]
        return set().union(*(group.get("vars") or {} for group in groups), *(host or {} for host in hosts))
    return set(re.findall(r"^(?:# ?)?([a-z]\w*_\w+):", file.read_text(), re.MULTILINE))


@pytest.mark.parametrize("file", INVENTORY_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_inventory_sets_only_known_variables(file: Path) -> None:
    unknown = {name for name in inventory_variables(file) - known() if not name.startswith("ansible_")}
    asked = {name for name in names_read(wiring()) if name.startswith("data_platform_")}
    assert unknown <= asked - set(wiring())


def test_scenario_ssh_overrides_all_that_a_user_may_set() -> None:
    site = ROOT / "playbooks" / "site.yml"
    imports = [task for task in all_tasks() if task.module == "import_role"]
    roles = {task.arguments["name"] for task in imports if task.file == site}
    given = {name for task in imports for name in task.content.get("vars", {})}
    given |= {
        name for file in (ROOT / "playbooks").glob("*.yml") for play in load(file) for name in play.get("vars", {})
    }
    offered = {name: option for role in roles for name, option in entry_points(role).get("main", {}).items()}
    of_choice = {name for name, option in offered.items() if len(option.get("choices", [0, 1])) > 1}
    overridden = load(ROOT / "molecule/ssh/inventory/group_vars/data_platform/overridden.yml")
    assert of_choice - set(wiring()) - given - set(overridden) == OF_ANOTHER_SOURCE
    assert [name for name in set(overridden) & set(offered) if overridden[name] == offered[name].get("default")] == []


def test_inventories_set_nothing_where_the_wiring_comes_first() -> None:
    assert [file for file in INVENTORY_FILES if re.search(r"group_vars/all\b", str(file))] == []


def test_no_role_knows_groups_or_other_hosts() -> None:
    texts = "".join("\n".join(strings(task.content)) for role in ROLES for task in role_tasks(role))
    assert re.findall(r"\b(?:groups|group_names|hostvars)\b\W", texts) == []

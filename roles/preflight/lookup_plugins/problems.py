"""Lookup plugin ``problems``: what is wrong with the variables of a host, a sentence each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.common.parameters import DEFAULT_TYPE_VALIDATORS
from ansible.plugins.lookup import LookupBase

try:  # Where a value was written is for people only; older releases of Ansible do not say.
    from ansible._internal._datatag._tags import Origin
except ImportError:
    Origin = None

DOCUMENTATION = """
name: problems
short_description: What is wrong with the variables of a host, a sentence each
description:
  - Checks all variables of a host against the argument specs of the roles in the play, those of roles that are not
    reached yet included, and gives a sentence for each that does not fit.
  - Names variables that carry the prefix of a role, or C(data_platform_), and are in no spec.
  - Leaves what the wiring sets to the roles, since part of it exists only once other roles have run.
options:
  _terms:
    description:
      - Names of variables that each hold a list of further checks, dictionaries with C(holds) and C(else), the sentence
        that is given where it does not hold.
      - A check that cannot be evaluated is left out where the reason is among the other sentences.
"""

ROLE, ROLES = Path(__file__).parents[1].name, Path(__file__).parents[2]
PLATFORM = "data_platform"
WIRING = "group_vars/all/*.yml"
CONTAINERS = ("list", "dict")

Option = Mapping[str, Any]
Options = dict[str, Option]
Entries = dict[str, dict[str, Options]]


def place(*values: object) -> str:
    """Say in brackets where the first of ``values`` of which Ansible knows it was written; empty if of none."""
    for value in values:
        if origin := Origin and Origin.get_tag(value):
            where = origin.path or origin.description.strip("<>")
            if where.startswith(f"{Path.cwd()}/"):
                where = str(Path(where).relative_to(Path.cwd()))
            return f" ({where}:{origin.line_num})" if origin.path and origin.line_num else f" ({where})"
    return ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Give the one of ``known`` that is most like ``name``, if any is."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def owner(name: str, owners: Iterable[str]) -> str | None:
    """Give the one of ``owners``, roles or the platform, whose prefix a variable carries."""
    return max((one for one in owners if name.startswith(f"{one}_")), key=len, default=None)


def unknown_names(names: Iterable[str], known: set[str], owners: Iterable[str]) -> Iterator[str]:
    """Name variables that carry the prefix of an owner, and are none of its own.

    Args:
        names: Variables of a host.
        known: Variables that there are.
        owners: Roles, and the platform itself.

    Yields:
        A sentence for each.
    """
    for name in sorted(set(names) - known):
        if role := owner(name, owners):
            near = nearest(name, known)
            remedy = f"write {near}" if near else "remove it"
            whose = "The platform" if role == PLATFORM else f"Role {role}"
            yield f"{whose} has no variable {name}{place(name)}: {remedy}, or give your own another prefix."


def kind(value: object) -> str:
    """Name the type of a value as argument specs do."""
    kinds = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": Mapping}
    return next((name for name, one in kinds.items() if isinstance(value, one)), type(value).__name__)


def fits(value: object, wanted: str) -> bool:
    """Say whether a value is of a type, a scalar one perhaps once Ansible converts it."""
    if wanted in CONTAINERS or kind(value) in CONTAINERS:
        return kind(value) == wanted or wanted in ("raw", "json")
    try:
        DEFAULT_TYPE_VALIDATORS[wanted](value)
    except (TypeError, ValueError):
        return False
    return wanted != "int" or kind(value) != "bool"


def misfits(path: str, value: object, option: Option, where: str = "") -> Iterator[str]:
    """Compare a value with its specification; no value is ever quoted, since it may be a secret.

    Args:
        path: What to call the value.
        value: The value, resolved.
        option: Its part of an argument spec.
        where: Where it was written, if Ansible does not know better.

    Yields:
        A sentence for each difference.
    """
    where = place(value) or where
    wanted = option.get("type", "str")
    if value is None:
        if option.get("required") or "default" in option or wanted in CONTAINERS:
            yield f"{path}{where} has no value: give it {an(wanted)}, or remove it."
    elif not fits(value, wanted):
        yield f"{path}{where} is {an(kind(value))}: make it {an(wanted)}."
    elif wanted == "list" and (elements := option.get("elements")):
        for number, element in enumerate(value):
            yield from misfits(f"{path}[{number}]", element, {**option, "type": elements, "elements": None}, where)
    elif wanted == "dict" and (options := option.get("options")):
        for name in sorted({*value} - {*options}, key=str):
            near = nearest(str(name), options)
            yield f"{path}{where} has no option {name}: {f'write {near}' if near else 'remove it'}."
        for name, inner in options.items():
            if name in value:
                yield from misfits(f"{path}.{name}", value[name], inner, where)
            elif inner.get("required"):
                yield f"{path}{where} lacks {name}: add it."
    elif (choices := option.get("choices")) and DEFAULT_TYPE_VALIDATORS[wanted](value) not in choices:
        yield f"{path}{where} has a value that is not known: make it {' or '.join(map(str, choices))}."


def an(name: str) -> str:
    """Give a name with its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def options_of(roles: Iterable[Entries]) -> Options:
    """Give the options of roles; those that only other entry points than main ask for are not required."""
    given: Options = {}
    for entries in roles:
        for entry, spec in entries.items():
            for name, option in spec["options"].items():
                given.setdefault(name, {**option, "required": entry == "main" and option.get("required", False)})
    return given


def sentences(name: str, value: object, option: Option, where: str) -> list[str]:
    """Say how a value differs from its specification, in Ansible's own words where only Ansible sees it."""
    return list(misfits(name, value, option, where)) or [
        f"{name}{where} is refused: {message.rstrip('.')}; correct it."
        for message in ArgumentSpecValidator({name: option}).validate({name: value}).error_messages
    ]


class LookupModule(LookupBase):
    """Entry point for Ansible."""

    def run(self, terms: list[str], variables: Mapping[str, Any] | None = None, **kwargs: object) -> list[str]:
        """Give a sentence for each thing that is wrong.

        Args:
            terms: Names of variables with further checks.
            variables: All variables of the host.
            **kwargs: None.
        """
        self.variables = variables or {}
        self.wiring = self.read(Path(self.variables["playbook_dir"]).glob(WIRING))
        specs = self.specifications()
        known = {name for entries in specs.values() for spec in entries.values() for name in spec["options"]}
        read = set(re.findall(r"\w+", str(list(self.wiring.values()))))
        published = {name for name in read - known if owner(name, specs)}
        roles = (ROLE, *self.variables["ansible_play_role_names"], PLATFORM)
        found = [
            *unknown_names(self.variables, known | published, specs),
            *self.wrong_values(options_of(specs[role] for role in roles if role in specs), published),
        ]
        return self.checked(terms, found)

    def resolve(self, value: Any) -> Any:
        """Give a value as a task of the host would see it.

        Raises:
            AnsibleError: It cannot be resolved.
        """
        return self._templar.template(value)

    def read(self, files: Iterable[Path]) -> dict[str, Any]:
        """Give what some YAML files hold, in one dictionary."""
        return {name: value for file in sorted(files) for name, value in self._loader.load_from_file(str(file)).items()}

    def specifications(self) -> dict[str, Entries]:
        """Give the argument specs of all roles beside this one, and those of the platform itself."""
        files = {file.parents[1].name: file for file in sorted(ROLES.glob("*/meta/argument_specs.yml"))}
        specs = {role: self.read([file])["argument_specs"] for role, file in files.items()}
        specs[PLATFORM] = {"main": {"options": self.resolve(self.variables["preflight_options"])}}
        return {
            role: {entry: {**spec, "options": spec.get("options") or {}} for entry, spec in entries.items()}
            for role, entries in specs.items()
        }

    def wrong_values(self, options: Options, published: set[str]) -> Iterator[str]:
        """Compare what is set, by an inventory or by defaults, with its specification.

        Args:
            options: What may be set.
            published: Variables that only exist once the roles run which set them.

        Yields:
            A sentence for each difference.
        """
        for name, option in options.items():
            value = self.variables.get(name)
            if name not in self.variables:
                if option["required"]:
                    yield f"{name} is not set, and has no default: set it in the inventory."
            elif name not in self.wiring or value != self.wiring[name]:
                where = place(value)
                try:
                    yield from sentences(name, self.resolve(value), option, where)
                except AnsibleError as error:
                    if not published & set(re.findall(r"\w+", str(error))):
                        yield f"{name}{where} cannot be resolved: {str(error).rstrip('.')}."

    def checked(self, terms: list[str], problems: list[str]) -> list[str]:
        """Give the problems, and those that further checks find.

        Args:
            terms: Names of variables with checks.
            problems: What is known to be wrong.
        """
        found, broken = list(problems), []
        for term in terms:
            checks = self.variables[term]
            for check in checks if isinstance(checks, list) else self.resolve(checks):
                try:
                    if not self.resolve(check["holds"]):
                        found.append(self.resolve(check["else"]))
                except AnsibleError as error:
                    broken.append(f"A check in {term} cannot be evaluated: {str(error).rstrip('.')}.")
        return found or broken

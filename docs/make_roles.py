"""Write the tables of variables in roles/*/README.md from argument specs: python docs/make_roles.py [--check]

--check changes nothing: it names what is stale, and what defaults/main.yml and meta/argument_specs.yml say differently.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).parents[1] / "roles"
BEGIN = "<!-- variables, written by docs/make_roles.py -->"
END = "<!-- end of variables -->"


def roles() -> list[Path]:
    return sorted(path.parents[1] for path in ROLES.glob("*/meta/argument_specs.yml"))


def specs(role: Path) -> dict[str, dict[str, Any]]:
    """Entry points by name, `main` first."""
    text = (role / "meta" / "argument_specs.yml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["argument_specs"]
    return dict(sorted(found.items(), key=lambda entry: (entry[0] != "main", entry[0])))


def defaults(role: Path) -> dict[str, Any]:
    path = role / "defaults" / "main.yml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def page(role: Path) -> str:
    """The README as it has to be: each entry point's variables between the marks, the rest as it is."""
    before, _begin, rest = (role / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    _tables, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{role.name}/README.md: needs a line {BEGIN} and after it a line {END}")
    known = defaults(role)
    found = specs(role)
    tables = [table(name, spec, found["main"], known) for name, spec in found.items()]
    return f"{before}{BEGIN}\n\n" + "\n".join(tables) + f"\n{END}{after}"


def table(entry: str, spec: dict[str, Any], main: dict[str, Any], known: dict[str, Any]) -> str:
    options = spec.get("options") or {}
    title = f"With `tasks_from: {entry}` ({spec['short_description']})"
    if spec is not main and options in ({}, main.get("options")):
        return f"{title}: {'the same' if options else 'none'}.\n"
    lines = [] if spec is main else [f"{title}:", ""]
    lines += ["| variable | default | meaning |", "|---|---|---|"]
    for name, option in options.items():
        lines.append(f"| `{name}` | {cell(default(option, known.get(name)))} | {cell(meaning(option))} |")
    return "\n".join([*lines, ""])


def default(option: dict[str, Any], value: Any) -> str:
    if option.get("required"):
        return "required"
    if value in ("", None):
        return ""
    template = re.fullmatch(r"\{\{ (\w+)( .*)?\}\}", value) if isinstance(value, str) else None
    if template:
        return f"{'from ' if template[2].strip() else ''}`{template[1]}`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def meaning(option: dict[str, Any]) -> str:
    said = option["description"]
    text = said if isinstance(said, str) else " ".join(said)
    choices = ", ".join(f"`{choice}`" for choice in option.get("choices", []))
    return f"{text} One of {choices}." if choices else text


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def differences(role: Path) -> list[str]:
    """A variable is either required or has a default; a default is of a variable that is known."""
    known, declared = defaults(role), {}
    for spec in specs(role).values():
        declared.update(spec.get("options") or {})
    where = f"{role.name}: "
    unknown = [name for name in known if name not in declared]
    found = [f"{where}{name} is in defaults/main.yml, but in no argument spec" for name in unknown]
    for name, option in declared.items():
        if bool(option.get("required")) == (name in known):
            found.append(f"{where}{name} must be required or have a default in defaults/main.yml, and not both")
        if "default" in option:
            found.append(f"{where}{name}: its default belongs into defaults/main.yml only")
        if not name.startswith(f"{role.name}_"):
            found.append(f"{where}{name} does not begin with {role.name}_")
    return found


def problems() -> list[str]:
    found: list[str] = []
    for role in roles():
        found += differences(role)
        if (role / "README.md").read_text(encoding="utf-8") != page(role):
            found.append(f"{role.name}/README.md is stale: python docs/make_roles.py")
    return found


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        found = problems()
        print("\n".join(found), end="\n" if found else "")
        return bool(found)
    for role in roles():
        (role / "README.md").write_text(page(role), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

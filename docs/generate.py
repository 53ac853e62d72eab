"""Write the parts of the documentation that are in the code already: docs/cli.md, and tables in other pages.

`make docs` writes them; with --check it only says what would change, and fails if anything would.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import attrs
import click

from edm import cli
from edm.config.arguments import shown_default
from edm.config.settings import SECTIONS, setting_fields
from edm.faultpoints import points
from edm.hookspecs import Hooks
from edm.registry import KINDS, Registry

DOCS = Path(__file__).parent
BEGIN, END = "<!-- generated: {} -->", "<!-- end -->"


def cli_page() -> str:
    """Each command's help, as it is printed on 80 columns."""
    parts = [
        "# The commands\n",
        "What `edm COMMAND --help` prints. A user's mistake is one line on stderr and exit 2.\n",
    ]
    with cli.group.make_context("edm", [], resilient_parsing=True, terminal_width=80, max_content_width=80) as context:
        parts += _help(cli.group, context, "edm")
    return "\n".join(parts)


def _help(command: click.Command, context: click.Context, path: str) -> list[str]:
    parts = [f"## `{path}`\n\n```text\n{command.get_help(context).rstrip()}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            member = command.get_command(context, name)
            assert member is not None
            with click.Context(member, info_name=name, parent=context, terminal_width=80) as inner:
                parts += _help(member, inner, f"{path} {name}")
    return parts


def settings_table() -> str:
    """Every setting in the four ways to say it."""
    rows = ["| key in `edm.toml` | argument | variable | default | what it is |", "| --- | --- | --- | --- | --- |"]
    for field in setting_fields():
        argument = f"--{field.name.replace('_', '-')}"
        if not field.metadata["metavar"]:
            argument = f"{argument}, --no-{argument[2:]}"
        default = "" if field.default is None else f"`{shown_default(field.default)}`"
        text = field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{argument}` | `EDM_{field.name.upper()}` | {default} | {text} |")
    return "\n".join(rows)


def options_tables() -> str:
    """The options of every built-in plugin."""
    sections: dict[str, dict[str, str]] = {}
    for offer in Registry().builtins():
        section = SECTIONS.get(offer.kind.name)
        if section is None:  # not a setting of a run
            continue
        defaults = offer.spec.options()
        for field in attrs.fields(offer.spec.options):
            default = getattr(defaults, field.name)
            shown = "" if default is None else f"`{shown_default(default)}`"
            row = f"| `{field.name}` | {shown} | {field.metadata.get('help', '')} |"
            sections.setdefault(f"{section}.{offer.spec.name}", {})[field.name] = row
    parts = []
    for section, rows in sorted(sections.items()):
        table = "\n".join(rows.values())
        parts.append(f"### `[{section}]`\n\n| key | default | what it is |\n| --- | --- | --- |\n{table}")
    return "\n\n".join(parts) or "The built-in plugins have no options."


def hooks_table() -> str:
    """The built-ins of each kind."""
    rows = ["| hook | kind | spec | built in |", "| --- | --- | --- | --- |"]
    for kind in KINDS.values():
        names = ", ".join(f"`{offer.spec.name}`" for offer in Registry().builtins() if offer.kind is kind)
        rows.append(f"| `{kind.hook}` | {kind.title} | `{kind.spec.__name__}` | {names} |")
    return "\n".join(rows)


def points_table() -> str:
    """Every fault point."""
    rows = ["| | point | reached when | `fail` | `corrupt` |", "| --- | --- | --- | --- | --- |"]
    for number, point in enumerate(points(), 1):
        rows.append(f"| {number} | `{point.name}` | {point.what} | {point.fails} | {point.damaged} |")
    return "\n".join(rows)


def hook_heading(hook: str) -> str:
    """The heading a hook must have in plugins.md: its exact signature."""
    function = getattr(Hooks, hook)
    signature = inspect.signature(function)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    return f"### `{hook}{signature.replace(parameters=parameters)}`".replace("'", "")


def with_generated(text: str, name: str, generated: str) -> str:
    """The page's text with what stands between the marks of that name replaced."""
    begin = BEGIN.format(name)
    before, found, after = text.partition(begin)
    if not found:
        raise SystemExit(f"docs/generate.py: no '{begin}' in the page")
    rest = after.partition(END)[2]
    return f"{before}{begin}\n\n{generated}\n\n{END}{rest}"


def pages() -> dict[Path, str]:
    """Every generated page's path and what it should say."""
    configuration = DOCS / "configuration.md"
    text = with_generated(configuration.read_text(), "settings", settings_table())
    plugins, reliability = DOCS / "plugins.md", DOCS / "reliability.md"
    return {
        DOCS / "cli.md": cli_page(),
        configuration: with_generated(text, "options", options_tables()),
        plugins: with_generated(plugins.read_text(), "hooks", hooks_table()),
        reliability: with_generated(reliability.read_text(), "points", points_table()),
    }


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if not check:
            path.write_text(pages()[path])
        sys.stderr.write(f"{'stale' if check else 'written'}: {path.relative_to(DOCS.parent)}\n")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()

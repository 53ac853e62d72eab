"""The documentation is held to the code: generated parts are current, its programs run, its links lead somewhere."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest

from edm import cli
from edm.errors import Corrupt, StoreFull
from edm.hookspecs import Hooks
from edm.registry import KINDS, Registry
from edm.types import PAGE_BYTES

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    """Every code block of a language: (page, code) parameters."""
    return [
        pytest.param(page, code, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, (found, code) in enumerate(BLOCK.findall(page.read_text()), 1)
        if found == language
    ]


def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current():
    stale = [path.name for path, text in generator().pages().items() if not path.exists() or path.read_text() != text]
    assert not stale, "run: make docs"


@pytest.mark.parametrize("hook", [kind.hook for kind in KINDS.values()])
def test_every_hook_has_a_heading_with_its_signature(hook):
    assert generator().hook_heading(hook) in (ROOT / "docs" / "plugins.md").read_text().splitlines()


def test_every_hook_has_a_kind():
    hooks = {name for name in vars(Hooks) if name.startswith("edm_")}
    assert hooks == {kind.hook for kind in KINDS.values()}


@pytest.mark.parametrize("hook", [kind.hook for kind in KINDS.values()])
def test_every_hook_has_a_test(hook):
    assert f"def test_{hook}_" in (ROOT / "tests" / "test_hooks.py").read_text()


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_in_the_docs_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize(("page", "code"), blocks("toml"))
def test_toml_in_the_docs_is_toml(page, code):
    assert tomllib.loads(code) is not None


def commands():
    """Each `edm …` command line of the docs' shell blocks."""
    for parameter in blocks("sh"):
        page, code = parameter.values
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and ("=" in words[0] or words[0] in {"sudo", "time"}):
                words.pop(0)
            if words and words[0] == "edm":
                yield pytest.param(words[1:], id=f"{page.stem}: {line.strip()}")


@pytest.mark.parametrize("words", list(commands()))
def test_command_in_the_docs_has_arguments_that_exist(words):
    command = cli.group
    context = command.make_context("edm", [], resilient_parsing=True)
    while isinstance(command, click.Group):
        assert words, "a group needs a command"
        if words[0].startswith("-"):
            return
        command = command.get_command(context, words[0])
        assert command is not None, f"no command {words[0]}"
        words = words[1:]
    known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    own = words[: words.index("--")] if "--" in words else words
    for word in own:
        if word.startswith("-"):
            assert word.split("=")[0] in known | {"-h", "--help"}, f"no argument {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", sorted((ROOT / "docs/decisions").glob("0*.md")), ids=lambda page: page.stem)
def test_decision_fits_a_page_and_has_its_parts(page):
    lines = page.read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith(f"# {int(page.name[:4])}. ")
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## Context", "## Choice", "## Rejected", "## Evidence", "## Consequences"]
    assert f"]({page.name})" in (page.parent / "README.md").read_text()


def worked_example(what):
    """The code block of docs/plugins.md that holds `what`."""
    (found,) = [code for language, code in BLOCK.findall((ROOT / "docs" / "plugins.md").read_text()) if what in code]
    return found


@pytest.fixture
def zlib_plugin(install):
    """The worked example of docs/plugins.md, installed as it says."""
    project = tomllib.loads(worked_example("[project]"))["project"]
    ((entry_point, module),) = project["entry-points"]["edm"].items()
    install(project["name"], module, worked_example("class ZlibStore"), entry_point=entry_point)
    return Registry().page_store("zlib")


_NAMES = {"__name__": __name__}
exec(compile(worked_example("class TestZlib"), "docs/plugins.md", "exec"), _NAMES)


@pytest.mark.usefixtures("zlib_plugin")
class TestWorkedExample(_NAMES["TestZlib"]):
    """The contract, as the example subclasses it."""


def test_worked_example_keeps_pages(zlib_plugin):
    store = zlib_plugin.open(zlib_plugin.options(), None)
    pages = bytearray(np.random.default_rng(1).bytes(2 * PAGE_BYTES)) + bytearray(PAGE_BYTES)
    slots = store.put(memoryview(pages), None)
    into = bytearray(3 * PAGE_BYTES)
    store.get(slots[::-1].copy(), memoryview(into))
    assert into == bytearray(PAGE_BYTES) + pages[PAGE_BYTES : 2 * PAGE_BYTES] + pages[:PAGE_BYTES]
    store.free(slots[:1])
    assert store.stat()["pages"] == 2
    with pytest.raises(Corrupt, match="slot 0"):
        store.get(slots, memoryview(into))


def test_worked_example_refuses_a_batch_whole(zlib_plugin):
    store = zlib_plugin.open(zlib_plugin.options(limit=6000), None)
    with pytest.raises(StoreFull):
        store.put(memoryview(np.random.default_rng(1).bytes(2 * PAGE_BYTES)), None)
    assert store.stat() == {"pages": 0, "bytes": 0}


def test_names_that_are_linked_to_their_code_are_there():
    references = [
        (page, name, page.parent / target)
        for page in PAGES
        for name, target in re.findall(r"\[`(\w+)`\]\(([^)]+\.(?:py|c|h))\)", page.read_text())
    ]
    assert len(references) > 30
    for page, name, target in references:
        assert re.search(rf"\b{name}\b", target.read_text()), f"{page.name}: no {name} in {target.name}"


def test_every_step_of_a_page_fault_is_named_in_the_code():
    """The numbers that docs/page-fault.md promises to be in the modules on the path."""
    sources = [*(ROOT / "edm").rglob("*.py"), *(ROOT / "native").rglob("*.[ch]")]
    text = "\n".join(path.read_text() for path in sources)
    steps = set()
    for found in re.findall(r"\[(\d+(?:[-, ]+\d+)*)\]", text):
        for part in found.replace(" ", "").split(","):
            first, _, last = part.partition("-")
            steps.update(range(int(first), int(last or first) + 1))
    assert set(range(3, 16)) <= steps

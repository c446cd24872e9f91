"""The documentation says what is so: its code runs, its commands are taken, its tables are complete."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import pixcontrast_ext
from pixcontrast_ext import info
from tests.support.pages import PAGES, ROOT, Block, blocks, name_of, needs
from tools.torchvision_ops import declare_missing_ops

pytestmark = pytest.mark.whole  # a page that is not run may say anything

with_python = [page for page in PAGES if blocks(page, "python")]
with_commands = [page for page in PAGES if blocks(page, "console", "sh", "bash")]
BACKENDS_PAGE, API_PAGE = ROOT / "docs" / "backends.md", ROOT / "docs" / "api.md"


def missing(modules: list[str]) -> list[str]:
    """Those that are not installed, or, like torchvision beside a torch of another build, do not load."""

    def loads(name: str) -> bool:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError):
            return False
        return True

    return [name for name in modules if not loads(name)]


@pytest.mark.parametrize("page", with_python, ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, in their order and in one namespace, in an empty folder."""
    declare_missing_ops()  # of the torchvision beside a CPU-only torch
    if absent := missing(needs(page)):
        pytest.skip(f"needs {', '.join(absent)}, which `make test-examples` has")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": name_of(page)}
    for block in blocks(page, "python"):
        block.run(names)


# Commands


def commands(block: Block) -> list[str]:
    """Its commands, without prompts and comments; a line that ends in a backslash goes on in the next."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [shlex.join(command) for command in words if command]


def take_make(arguments: list[str]) -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    wanted = [argument for argument in arguments if "=" not in argument]
    assert set(wanted) <= set(targets), f"no such target among {wanted}"
    settings = {argument.partition("=")[0] for argument in arguments if "=" in argument}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"\$\({name}\)", makefile) for name in settings), f"{settings} are not all read"


def take_pip(arguments: list[str]) -> None:
    """An install of the package itself with extras that it has, or of other packages."""
    assert arguments[0] == "install"
    extras = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    known = re.findall(r"^([\w-]+) = \[", extras[1], re.M)
    for argument in arguments[1:]:
        if found := re.fullmatch(r"\.\[(.*)\]", argument):
            assert set(found[1].split(",")) <= set(known), argument


def take_trainer(arguments: list[str]) -> None:
    """The flags of a command of the trainer, checked by its own parser; nothing is run."""
    pytest.importorskip("tyro")
    from pixcontrast_ext.trainer import __main__ as trainer
    from pixcontrast_ext.trainer.config import flags_of_file, parse_flags
    from pixcontrast_ext.trainer.demo import DemoConfig

    if not arguments:
        return
    command, *flags = arguments
    assert command in trainer.COMMANDS
    if flags == ["--help"]:
        return
    parsers = {
        "train": trainer.TrainCommand,
        "eval": trainer.EvalCommand,
        "predict": trainer.PredictCommand,
        "export": trainer.ExportCommand,
        "compare": trainer.CompareCommand,
        "probe": trainer.ProbeCommand,
        "check-data": trainer.CheckDataCommand,
        "demo": DemoConfig,
    }
    if command == "compare":
        flags = trainer.joined_arms(flags)
    given = parse_flags(parsers[command], flags)
    if config := getattr(given, "config", None):
        given = parse_flags(parsers[command], [*flags_of_file(config), *flags])
    run = getattr(given, "run", None) or getattr(getattr(given, "compare", None), "run", None)
    if run is not None:
        run.validate()
    if command == "compare":
        given.compare.validate()
        given.compare.runs()


def take_benchmarks(arguments: list[str]) -> None:
    from benchmarks import OPS

    source = (ROOT / "benchmarks" / "__main__.py").read_text()
    names = [argument for argument in arguments if argument.startswith("--")]
    assert all(f'"{name}"' in source for name in names), names
    assert not arguments or arguments[0].startswith("--") or arguments[0] in OPS


def take_module(name: str, arguments: list[str]) -> None:
    if name == "pixcontrast_ext.trainer":
        take_trainer(arguments)
    elif name == "benchmarks":
        take_benchmarks(arguments)
    elif name == "pip":
        take_pip(arguments)
    else:
        assert importlib.util.find_spec(name), name


def take_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        take_module(arguments[1], arguments[2:])
    else:
        assert (ROOT / arguments[0]).is_file(), arguments[0]


def take_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(arguments)
    take_python([*(["-m"] if given.module else []), given.training_script, *given.training_script_args])


def take_script(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).is_file(), arguments[0]


TAKEN_BY: dict[str, Callable[[list[str]], None]] = {
    "make": take_make,
    "pip": take_pip,
    "python": take_python,
    "torchrun": take_torchrun,
    "bash": take_script,
    "sh": take_script,
    "pytest": lambda arguments: take_script(arguments[:1]),
}


def take(command: str) -> None:
    """Fails unless a command line is one that this version takes."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of the environment
        words.pop(0)
    assert words[0] in TAKEN_BY, f"no test knows {words[0]}: {command}"
    try:
        TAKEN_BY[words[0]](words[1:])
    except SystemExit as refused:
        raise AssertionError(f"refused: {command}") from refused


@pytest.mark.parametrize("page", with_commands, ids=name_of)
def test_commands_are_taken(page):
    for block in blocks(page, "console", "sh", "bash"):
        for command in commands(block):
            take(command)


def test_commands_in_the_text_are_taken():
    """`make TARGET` and `python -m MODULE` in the running text; a placeholder in capitals stands for anything."""
    found = set()
    for page in PAGES:
        for command in re.findall(r"`((?:make|python -m) [^`]+)`", page.read_text()):
            if not re.search(r"\b[A-Z]{4,}\b(?!=)|\.\.\.", command):
                found.add(command)
    assert {"make test", "make demo", "python -m pixcontrast_ext.info"} <= found
    for command in sorted(found):
        take(command)


def test_a_command_that_is_not_taken_is_noticed():
    for command in (
        "make tset",
        "python -m pixcontrast_ext.trainer train --contrats bank",
        "pip install '.[trian]'",
    ):
        with pytest.raises(AssertionError):
            take(command)


def test_the_table_of_recipes_has_flags_that_the_trainer_takes():
    flags = re.findall(r"`(--config [^`]+)`", (ROOT / "docs" / "trainer.md").read_text())
    assert len(flags) > 15
    for each in flags:
        if each != "--config FILE":
            take(f"python -m pixcontrast_ext.trainer train {each}")


# Tables


def read_variables() -> set[str]:
    """The variables of the environment that anything in the repository reads or sets."""
    folders = ("pixcontrast_ext", "tests", "tools", "benchmarks", "csrc")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp")
    ]
    files += [ROOT / "Makefile", ROOT / "setup.py"]
    texts = "\n".join(path.read_text() for path in files if path != Path(__file__))
    return set(re.findall(r"\b(?:PIXCONTRAST|TRITON)_[A-Z]+(?:_[A-Z]+)*\b", texts))


def test_every_variable_of_the_environment_is_in_the_table():
    listed = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", BACKENDS_PAGE.read_text()))
    assert read_variables() <= listed
    assert {name for name in listed if name.startswith("PIXCONTRAST_")} <= read_variables()


def test_what_info_says_has_the_lines_it_has():
    (sample,) = [block for block in blocks(BACKENDS_PAGE, "text") if "native module" in block.text]

    def subjects(text: str) -> list[str]:
        return [re.split(r" {2,}", line)[0] for line in text.strip().splitlines()]

    assert subjects(sample.text) == subjects(info.report())


def test_the_api_has_every_public_name():
    described = re.findall(r"^::: pixcontrast_ext\.(\w+)$", API_PAGE.read_text(), re.M)
    assert sorted(described) == sorted(pixcontrast_ext.__all__)


# Pages


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs") for page in PAGES if page.is_relative_to(ROOT / "docs")]
    # Those per device are made by benchmarks/pages.py and linked from BENCHMARKS.md.
    absent = [
        page for page in pages if page.parts[0] != "benchmarks" and f" {page.as_posix()}\n" not in navigation
    ]
    assert not absent


def test_links_lead_to_files():
    """Those within the repository, on the pages themselves; `make docs` also follows anchors."""
    broken = []
    for page in PAGES:
        text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S)
        targets = re.findall(r"\]\(([^()\s#]+)(?:#[^()\s]*)?\)", text)
        broken += [
            f"{name_of(page)}: {target}"
            for target in targets
            if "://" not in target and not (page.parent / target).exists()
        ]
    assert not broken


def test_the_mixin_on_the_page_is_the_one_of_the_example():
    source = (ROOT / "examples/mmseg_config/pixel_contrast.py").read_text()
    mixin = source[source.index("class WithContrast:") : source.index("@MODELS.register_module()")]
    assert mixin in (ROOT / "docs/guide/mmsegmentation.md").read_text()


def test_files_of_the_package_are_short():
    """Rule 9 of CONTRIBUTING."""
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / "pixcontrast_ext").rglob("*.py")}
    assert len(lines) > 50
    assert not {path: count for path, count in lines.items() if count > 600}


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1000

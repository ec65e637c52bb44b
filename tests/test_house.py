"""The rules of the house (docs: design, section 4), each a test over the syntax tree of every file of system/deltal.

Imports inside functions and under TYPE_CHECKING count: that is where circles hide.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "system" / "deltal"
TESTS = ROOT / "tests"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [file.relative_to(PACKAGE).as_posix() for file in FILES]

FLOORS = {
    "__main__.py": 10,
    "cli": 9,
    "run": 8,
    "results": 7,
    "plan": 6,
    "rollout": 5,
    "verify": 5,
    "learner": 5,
    "replay": 4,
    "queues": 4,
    "policy": 4,
    "folder.py": 4,
    "data": 3,
    "algorithm": 3,
    "monitor": 2,
    "config": 2,
    "types.py": 1,
    "errors.py": 1,
    "__init__.py": 1,
}
"""Place to floor; an import goes down, or stays in its own place. Floor 1 is one place."""

RAY = (
    r"[a-z_]+/actor\.py|queues/object_queue\.py|policy/store\.py|cli/\w+\.py"
    r"|run/(controller|supervisor|driver|attach|submit)\.py"
)
ALLOWED = {
    "ray": RAY,
    "vllm": r"rollout/vllm_engine\.py",
    "torch": r"(algorithm|learner)/\w+\.py|rollout/vllm_engine\.py|policy/direct\.py",
    "transformers": r"learner/(model|export|published)\.py|data/tokenizer\.py",
    "peft": r"learner/lora\.py",
    "prometheus_client": r"monitor/\w+\.py",
    "subprocess": r"verify/sandbox/pool\.py|run/submit\.py|cli/\w+\.py",
}
"""Library to the files that may import it, as a pattern."""

LIGHT = (
    r"(replay|verify)/actor\.py|(queues|monitor)/\w+\.py|policy/store\.py|plan/\w+\.py|"
    r"run/(controller|supervisor|progress)\.py|results/(report|rows|statistics)\.py"
)
"""Files whose processes start in about a second and stay small, as a pattern."""

LONGEST_FILE = 400
LONGEST_FUNCTION = 80
"""Lines; a screen is about 60, a docstring and a signature come on top."""
FORBIDDEN_STEMS = re.compile(r"(^|_)(utils?|helpers?|managers?|misc|common)(_|$)")


@dataclass(frozen=True)
class Import:
    """One imported thing: `module`, or `name` out of it, in line `line`."""

    module: str
    name: str | None
    line: int


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(), name)


@cache
def imports(name: str) -> tuple[Import, ...]:
    """Every import of a file wherever it stands, `importlib.import_module("…")` and `__import__("…")` included."""
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, None, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [Import(absolute(name, node), alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append(Import(node.args[0].value, None, node.lineno))
    return tuple(found)


def absolute(name: str, node: ast.ImportFrom) -> str:
    """The full name of the module a `from … import` names, relative ones resolved."""
    if node.level == 0:
        return node.module or ""
    folders = ["deltal", *name.split("/")[:-1]]
    return ".".join(folders[: len(folders) - node.level + 1] + ([node.module] if node.module else []))


def target(found: Import) -> str | None:
    """The file of ours an import leads to; None for a library."""
    if found.module.split(".")[0] != "deltal":
        return None
    parts = found.module.split(".")[1:]
    candidates = [[*parts, found.name], parts] if found.name else [parts]
    for candidate in candidates:
        path = "/".join(filter(None, candidate))
        for file in (f"{path}.py", f"{path}/__init__.py" if path else "__init__.py"):
            if file in NAMES:
                return file
    raise AssertionError(f"line {found.line}: {found.module}.{found.name} is no file of deltal")


def ours(name: str) -> list[tuple[int, str]]:
    """Line and file of every import of a file of ours."""
    return [(found.line, file) for found in imports(name) if (file := target(found)) is not None]


def place(name: str) -> str:
    return name.split("/")[0]


def every_file(law: Callable[[str], None]) -> Callable[[], None]:
    """A test that holds `law` against every file and names all that break it, not only the first."""

    def test() -> None:
        broken = []
        for name in NAMES:
            try:
                law(name)
            except AssertionError as error:
                broken.append(str(error).partition("\n")[0])
        assert not broken, "\n".join(broken)

    test.__name__, test.__doc__ = law.__name__, law.__doc__
    return test


@every_file
def test_every_file_stands_on_a_floor(name: str) -> None:
    assert place(name) in FLOORS, f"{name}: give {place(name)} a floor in this table and in the design"


@every_file
def test_imports_run_downwards_only_and_rooms_do_not_know_each_other(name: str) -> None:
    here = place(name)
    for line, file in ours(name):
        there = place(file)
        both_ground = FLOORS[here] == FLOORS[there] == 1
        # `deltal/__init__.py` holds the version and nothing else; every floor may read it.
        assert there == here or both_ground or FLOORS[there] < FLOORS[here], (
            f"{name}:{line} imports {file}: floor {FLOORS[here]} may only import floors below it and its own folder"
        )


def test_no_imports_go_in_a_circle() -> None:
    # A package's __init__ re-exports its files; a file that imports a neighbour does not need the __init__ for it.
    graph = {name: {file for _, file in ours(name)} - {name} for name in NAMES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " -> ".join(error.args[1]))


@every_file
def test_nobody_imports_the_command_line(name: str) -> None:
    for line, file in ours(name):
        assert place(file) != "cli" or place(name) in ("cli", "__main__.py"), f"{name}:{line} imports cli"


def private(name: str) -> bool:
    """`_name`, but not `__version__`."""
    return re.match(r"_(?!_)", name) is not None


def modules_at_hand(name: str) -> set[str]:
    """Local names that a file gave to modules of ours with `from … import module [as name]`."""
    nodes = [node for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name
        for node in nodes
        for alias in node.names
        if f"{absolute(name, node)}.{alias.name}".replace(".", "/").removeprefix("deltal/") + ".py" in NAMES
    }


@every_file
def test_nobody_imports_or_touches_another_file_s_private_name(name: str) -> None:
    for found in imports(name):
        if target(found) is not None:
            for part in (*found.module.split("."), found.name or ""):
                assert not private(part), f"{name}:{found.line} imports {part}, which belongs to its own file"
    modules = modules_at_hand(name)
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert not private(node.attr), f"{name}:{node.lineno} touches {node.value.id}.{node.attr}"


@every_file
def test_heavy_libraries_are_imported_only_where_they_are_meant_to_be(name: str) -> None:
    for found in imports(name):
        library = found.module.split(".")[0]
        assert re.fullmatch(ALLOWED.get(library, ".*"), name), f"{name}:{found.line} imports {library}"


def test_vllm_is_imported_inside_functions_only() -> None:
    for name in NAMES:
        for node in tree(name).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0] == "vllm" for module in modules), f"{name}:{node.lineno}"


def loaded_with(name: str) -> set[str]:
    """The files of ours that run when `name` is imported: top-level imports only, the packages' `__init__` included."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        top = {node.lineno for node in tree(file).body if isinstance(node, ast.Import | ast.ImportFrom)}
        waiting += [found for line, found in ours(file) if line in top]
        parents = [f"{parent.as_posix()}/__init__.py" for parent in Path(file).parents if parent.name]
        waiting += [parent for parent in parents if parent in NAMES]
    return seen


@every_file
def test_a_process_without_a_model_does_not_load_torch(name: str) -> None:
    for file in loaded_with(name) if re.fullmatch(LIGHT, name) else ():
        for node in tree(file).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {module.split(".")[0] for module in modules} & {"torch", "vllm", "transformers"}
            assert not heavy, f"{name} loads {heavy} through {file}:{node.lineno}"


def test_importing_deltal_loads_neither_ray_nor_torch_nor_vllm() -> None:
    code = "import sys, deltal; print(sorted({'ray', 'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"


@every_file
def test_a_file_is_short_and_says_what_it_is(name: str) -> None:
    text = (PACKAGE / name).read_text()
    assert len(text.splitlines()) <= LONGEST_FILE, f"{name} is longer than {LONGEST_FILE} lines: make it two files"
    if text.strip():
        assert ast.get_docstring(tree(name)), f"{name} has no docstring"


def test_no_room_is_a_hall() -> None:
    """No room holds over a fifth of all lines: what grows beyond it is two rooms."""
    lines = Counter[str]()
    for name in NAMES:
        lines[place(name)] += len((PACKAGE / name).read_text().splitlines())
    halls = {room: count for room, count in lines.items() if count > 0.2 * lines.total()}
    assert not halls, f"of {lines.total()} lines: {halls}"


@every_file
def test_a_function_fits_a_screen(name: str) -> None:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{name}:{node.lineno} {node.name} has {length} lines"


@every_file
def test_no_file_is_a_drawer_for_odds_and_ends(name: str) -> None:
    for part in Path(name).with_suffix("").parts:
        assert not FORBIDDEN_STEMS.search(part), f"{name}: name it after what it is about"


@every_file
def test_nothing_is_left_to_be_done_later(name: str) -> None:
    for token in tokenize.generate_tokens(io.StringIO((PACKAGE / name).read_text()).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string), f"{name}:{token.start[0]}"


def test_tests_are_named_after_laws() -> None:
    """A law is a sentence: at least three words after `test_`."""
    silent = []
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                words = node.name.removeprefix("test_").split("_")
                silent += [f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"] if len(words) < 3 else []
    assert not silent, "these names say no law:\n" + "\n".join(silent)


def test_tests_mirror_the_tree() -> None:
    folders = {file.relative_to(TESTS).parts[0] for file in TESTS.rglob("test_*.py") if file.parent != TESTS}
    assert folders <= {"unit", "system", "faults", "bench"}

"""What stands where: no circles of imports, and each piece of knowledge in one module."""

import ast
from functools import cache
from graphlib import TopologicalSorter

from conftest import ROOT

from common.results import hashes, reuse

FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / "common").rglob("*.py")
}


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, anywhere in it but for the type checker
    alone."""
    found = set()
    waiting = [ast.parse(FILES[name].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in FILES else node.module for part in parts}
        waiting += ast.iter_child_nodes(node)
    return found & set(FILES)


def test_what_is_imported_is_there():
    """Of the project's modules; by the benchmarks as well, which no test runs all of."""
    here = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *FILES.values()]
    wanted = {
        (node.module, alias.name, file.name)
        for file in here
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "") in FILES
        for alias in node.names
    }
    assert len(wanted) > 500
    missing = [
        (module, name, file)
        for module, name, file in sorted(wanted)
        if f"{module}.{name}" not in FILES and name not in names_of(module)
    ]
    assert missing == []


@cache
def names_of(module: str) -> set[str]:
    """What a module defines or imports at its top."""
    found = set()
    for node in ast.parse(FILES[module].read_text()).body:
        for part in ast.walk(node) if isinstance(node, ast.If | ast.Try) else [node]:
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                found.add(part.name)
            elif isinstance(part, ast.Import | ast.ImportFrom):
                found |= {(alias.asname or alias.name).split(".")[0] for alias in part.names}
            elif isinstance(part, ast.Assign | ast.AnnAssign):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                found |= {
                    name.id
                    for target in targets
                    for name in ast.walk(target)
                    if isinstance(name, ast.Name)
                }
    return found


def test_no_circle_of_imports():
    """Those inside functions included."""
    TopologicalSorter(
        {name: imports(name) for name in FILES}
    ).prepare()  # raises CycleError, which names it


def test_the_grid_calls_no_kernel():
    assert imports("common.numerics.grid") == {"common.base.errors"}


def test_one_module_knows_the_checkpoint_format():
    assert [name for name, file in FILES.items() if "config_groups" in file.read_text()] == [
        "common.checkpoint.format"
    ]


def test_triton_is_imported_in_one_place():
    """Elsewhere only by the kernels themselves."""
    importing = {name for name in FILES if any(part.endswith("_triton") for part in imports(name))}
    assert {name for name in importing if not name.endswith("_triton")} == {
        "common.kernels.dispatch"
    }


# From the bottom up: a module imports from its own room and from those above it in this list.
# Between the rooms stand the few modules of `common` itself.
ROOMS = (
    "base",
    "demo",
    "numerics",
    "kernels",
    "text",
    "model",
    "solvers",
    "walk",
    "checkpoint",
    "exporting",
    "metadata",
    "results",
    "running",
    "cli",
    "gguf_export",
    "tasks",
    "verification",
    "reporting",
    "quantization",
    "evaluation",
    "baseline",
    "run_all",
    "batch",
)


def room(name: str) -> str:
    return name.split(".")[1]


def test_imports_go_downwards():
    upwards = {
        (name, other)
        for name in FILES
        if name != "common"
        for other in imports(name)
        if other != "common"
        if ROOMS.index(room(other)) > ROOMS.index(room(name))
    }
    assert not upwards


def test_rooms_are_small():
    assert len(list((ROOT / "common").glob("*.*"))) <= 10
    assert {room(name) for name in FILES if name != "common"} == set(ROOMS)
    sources = [
        file
        for folder in (ROOT, ROOT / "common", ROOT / "tests", ROOT / "benchmarks")
        for file in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"))
    ]
    assert {
        file.name: lines for file in sources if (lines := len(file.read_text().splitlines())) > 350
    } == {}


def test_nothing_hides_from_the_tests_above():
    """No relative imports, none of the scripts, Triton itself in its kernels alone; modules that
    are named in words exist.
    """
    scripts = {file.stem for file in ROOT.glob("*.py")}
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, name
                roots = {node.module.split(".")[0]}
            elif isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            else:
                continue
            assert not roots & scripts, name
            assert "triton" not in roots or name.endswith("_triton"), name
    assert {*reuse._BESIDE_CODES, hashes._ENTRY} <= set(FILES)

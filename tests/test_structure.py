"""The structure of the package: floors that imports go down, and the sizes that keep it readable."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT

import dpopt

# From the ground up: a folder or file imports from lower floors and from its own, never upwards.
FLOORS = (
    *(
        "rng",
        "files",
        "machine",
        "native",
        "ranks",
        "models",
        "optim",
        "data",
        "grad_sample",
        "privacy",
        "tasks",
        "filters",
        "config",
    ),
    *("runs", "training", "tables", "cli"),
)
MODULES = sorted((ROOT / "dpopt").rglob("*.py"))
SOURCES = [*MODULES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "run.py"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The modules of dpopt that a file imports, wherever in the file."""
    known = {module_name(p) for p in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [n if (n := f"{node.module}.{alias.name}") in known else node.module for alias in node.names]
        found |= {name for name in names if name in known}
    return found - {module_name(path), "dpopt"}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that lead back to themselves."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        return seen

    return [node for node in graph if node in reach(node)]


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


def test_imports_run_downwards():
    upward = []
    for path in MODULES:
        if (module := module_name(path)) == "dpopt":
            continue  # the lazy map of public names
        upward += [f"{module} imports {other}" for other in imports_of(path) if floor(other) > floor(module)]
    assert not upward


def test_no_circle_of_files():
    graph = {module_name(path): imports_of(path) for path in MODULES if module_name(path) != "dpopt"}
    # A package's __init__ names what lies in it; its files may import each other past it.
    packages = {name for name in graph if any(other.startswith(f"{name}.") for other in graph)}
    assert not circles({name: others - packages for name, others in graph.items() if name not in packages})
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    """At most 350 lines per file, 60 per function, 8 parameters; kernels and constructors may have more."""
    assert len(path.read_text().splitlines()) <= 350
    for function in functions(path):
        if is_kernel(function):
            continue
        lines = function.end_lineno - function.lineno + 1
        assert lines <= 60, f"{function.name} has {lines} lines"
        many = function.name in ("__init__", "calibrate") or (
            function.name.startswith("test_")
            and any("parametrize" in (text := ast.unparse(d)) or "given" in text for d in function.decorator_list)
        )
        assert many or parameters(function) <= 8, f"{function.name} has {parameters(function)} parameters"


def test_components_are_built_in_one_file():
    calls = {
        module_name(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "build"
    }
    assert calls == {"dpopt.training.build"}


def test_few_files_receive_the_configuration():
    receiving = {
        module_name(path)
        for path in MODULES
        for function in functions(path)
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None and "Config" in ast.unparse(argument.annotation).replace("DictConfig", "")
    }
    assert len(receiving) <= 8, sorted(receiving)


def bound_twice(source: str) -> list[str]:
    """Names that a file binds twice at its top level: the second silently replaces the first."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name, count in Counter(names).items() if count > 1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_is_bound_twice(path):
    assert not bound_twice(path.read_text())


def test_a_name_that_is_bound_twice_is_found():
    assert bound_twice("pytestmark = 1\ndef f(): pass\npytestmark: int = 2\ndef f(): pass\ng = 1") == [
        "pytestmark",
        "f",
    ]


def test_public_names_are_listed_where_python_looks():
    assert set(dpopt.__all__) <= set(dir(dpopt))

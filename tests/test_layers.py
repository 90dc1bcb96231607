"""The shape of the code: imports go down, never up and never round; what stands in one place stands in one place."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "durable_cluster"
FLOORS = {"sql": 0, "cluster": 1, "shards": 2, "ops": 3, "loadtest": 4}
ROOMS = [*FLOORS, "examples"]
EXAMPLES_MAY_USE = {"cluster", "examples"}
MODULE_LINES_MAX = 400


def sources() -> dict[str, Path]:
    """Every module of the product by its import name."""
    found: dict[str, Path] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            inside = path.relative_to(ROOT / room).with_suffix("").parts
            parts = [PACKAGE, *([] if room == "cluster" else [room]), *inside]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


@functools.cache
def tree_of(module: str) -> ast.Module:
    """Its code, to be read only."""
    return ast.parse(SOURCES[module].read_text("utf-8"))


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "cluster"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements_at_run_time(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """Every node that runs, without what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            yield from (deep for other in child.orelse for deep in ast.walk(other))  # type: ignore[attr-defined]
            continue
        yield child
        if inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements_at_run_time(child, inside_functions=inside_functions)


@functools.cache
def imports(module: str, *, inside_functions: bool = True) -> frozenset[str]:
    """The product's modules that ``module`` imports."""
    found: set[str] = set()
    for node in statements_at_run_time(tree_of(module), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                found.add(deeper if deeper in SOURCES else str(node.module))
    return frozenset(name for name in found if name == PACKAGE or name.startswith(f"{PACKAGE}.")) - {module}


@functools.cache
def outside_imports(module: str) -> frozenset[str]:
    """The top-level names of everything else it imports."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return frozenset(found)


def those_that(matches: re.Pattern[str]) -> set[str]:
    """Modules whose code, without comments and strings, matches."""
    return {module for module in SOURCES if matches.search(code_of(module))}


@functools.cache
def code_of(module: str) -> str:
    """Its code without comments and strings."""

    class Blank(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.Constant("") if isinstance(node.value, str) else node

    return ast.unparse(Blank().visit(ast.parse(SOURCES[module].read_text("utf-8"))))


def test_the_product_is_found() -> None:
    assert {room_of(module) for module in SOURCES} >= {"sql", "cluster", "shards"}
    assert f"{PACKAGE}.statements" in SOURCES
    assert f"{PACKAGE}.statements" in imports(f"{PACKAGE}.client")


@pytest.mark.parametrize("module", SOURCES)
def test_imports_never_go_up(module: str) -> None:
    here = room_of(module)
    for imported in imports(module):
        assert imported in SOURCES, f"{module} imports {imported}, which is not there"
        there = room_of(imported)
        if here == "examples":
            assert there in EXAMPLES_MAY_USE, f"{module} imports {imported}"
        elif there == "examples":
            assert FLOORS[here] >= FLOORS["ops"], f"{module} imports {imported}"
        else:
            assert FLOORS[there] <= FLOORS[here], (
                f"{module} (floor {FLOORS[here]}) imports {imported} ({FLOORS[there]})"
            )


def test_imports_never_go_round() -> None:
    graph = {module: imports(module) for module in SOURCES}

    def cycle_from(module: str, path: tuple[str, ...]) -> tuple[str, ...] | None:
        if module in path:
            return (*path[path.index(module) :], module)
        if module in done:
            return None
        for imported in sorted(graph.get(module, ())):
            if imported == PACKAGE:
                continue  # the façade imports everything and is imported by nobody below
            if found := cycle_from(imported, (*path, module)):
                return found
        done.add(module)
        return None

    done: set[str] = set()
    assert [found for module in graph if (found := cycle_from(module, ()))] == []


def test_nobody_inside_the_package_imports_its_facade() -> None:
    inside = {module for module in SOURCES if room_of(module) in ("sql", "cluster", "shards", "ops")} - {PACKAGE}
    assert {module for module in inside if PACKAGE in imports(module)} == set()


def test_one_module_reads_the_environment() -> None:
    """Of the product: the load tests pass their own variables to the workers they start."""
    readers = {name for name in those_that(re.compile(r"\b(environ|getenv)\b")) if room_of(name) != "loadtest"}
    assert [name for name in readers - {f"{PACKAGE}.settings"} if not passes_the_environment_on(name)] == []


def passes_the_environment_on(module: str) -> bool:
    """Whether its only uses hand a copy of the whole environment to a child process."""
    uses = re.findall(r".*\b(?:environ|getenv)\b.*", code_of(module))
    return all(re.search(r"env=|\*\*os\.environ|dict\(os\.environ\)|os\.environ\.copy\(\)", use) for use in uses)


def test_three_modules_import_opentelemetry() -> None:
    users = {module for module in SOURCES if "opentelemetry" in outside_imports(module)}
    assert users == {f"{PACKAGE}.{module}" for module in ("telemetry", "spans", "span_export", "metric_export")}


def test_one_module_works_out_due_times() -> None:
    assert {module for module in SOURCES if "cronsim" in outside_imports(module)} == {f"{PACKAGE}.cron"}


def test_one_module_maps_sqlstates_to_errors() -> None:
    sqlstate = re.compile(r"^(DC\d{3}|3F000|42P01|42883)$")
    holders = {
        module
        for module in SOURCES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and sqlstate.match(node.value)
    }
    assert holders == {f"{PACKAGE}.errors"}


def test_the_sql_of_the_path_of_a_step_is_called_from_one_module() -> None:
    on_the_path = re.compile(r"durable\.(claim|fence|commit_page|commit_plain_page|page|start|start_many|probe)\(")
    holders = {
        module
        for module in SOURCES
        if room_of(module) in ("cluster", "shards")
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and on_the_path.search(node.value)
    }
    assert holders == {f"{PACKAGE}.statements"}


def test_nothing_is_pickled() -> None:
    assert {
        module for module in SOURCES if outside_imports(module) & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    } == set()


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_a_room_and_not_a_hall(module: str) -> None:
    assert len(SOURCES[module].read_text("utf-8").splitlines()) <= MODULE_LINES_MAX


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_opens_with_a_sentence(module: str) -> None:
    assert not SOURCES[module].read_text("utf-8").strip() or ast.get_docstring(tree_of(module))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sql").rglob("*.sql")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_each_sql_file_is_installed(path: Path) -> None:
    from durable_cluster import sql

    listed = {"migrations": sql.MIGRATIONS, "engine": sql.ENGINE, "durable": sql.DURABLE, "testing": sql.TESTING}
    assert path.stem in listed[path.parent.name]


def test_definer_functions_pin_their_search_path() -> None:
    for path in (ROOT / "sql").rglob("*.sql"):
        for header in re.findall(r"create or replace function.*?\bas \$", path.read_text("utf-8"), re.DOTALL):
            if "security definer" in header:
                assert re.search(r"set search_path = pg_catalog, \w+, pg_temp", header), f"{path.name}: {header[:80]}"

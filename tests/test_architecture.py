"""Who may import whom, and what importing costs."""

import ast
import graphlib
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

IMPORT_LIMIT_SECONDS = 0.3


def modules_below(project: Path, *folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((project / folder).rglob("*.py"))]
    assert found, f"no Python files in {folders}"
    return found


def imported_packages(nodes: Iterable[ast.AST]) -> set[str]:
    """The top-level packages named by import statements among `nodes`."""
    packages: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(str(node.module).split(".")[0])
    return packages


def modules_of_qvl_named_in(path: Path, known: set[str]) -> set[str]:
    """Modules of qvl that a file imports anywhere, for types alone too."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "qvl":
            named |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    return {name.removeprefix("qvl.") for name in named} & known


def everywhere_in(path: Path) -> set[str]:
    return imported_packages(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def at_import_of(path: Path) -> set[str]:
    """Packages imported outside functions and outside `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    reached: list[ast.AST] = []
    while waiting:
        node = waiting.pop()
        reached.append(node)
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not is_for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return imported_packages(reached)


def test_qvl_imports_neither_ray_nor_what_stands_above_it(project: Path) -> None:
    offenders = {
        path.name: wrong
        for path in modules_below(project, "qvl")
        if (wrong := everywhere_in(path) & {"ray", "recipes", "ray_jobs"})
    }
    assert offenders == {}


@pytest.fixture(scope="module")
def imported(project: Path) -> dict[str, set[str]]:
    """Of each module of qvl those that it imports."""
    paths = {path.stem: path for path in modules_below(project, "qvl") if path.stem != "__init__"}
    found = {name: modules_of_qvl_named_in(path, set(paths)) for name, path in paths.items()}
    assert {"active_run", "adapters"} <= found["train_stage"]
    return found


def test_imports_within_qvl_have_no_circle(imported: dict[str, set[str]]) -> None:
    # Raises CycleError, which names the modules of a circle.
    assert len(list(graphlib.TopologicalSorter(imported).static_order())) == len(imported)


def test_the_groups_of_modules_are_those_of_contributing(project: Path, imported: dict[str, set[str]]) -> None:
    text = (project / "CONTRIBUTING.md").read_text(encoding="utf-8")
    groups = text.split("There are five groups of modules", 1)[1].split("###", 1)[0].split("\n1. ", 1)[1]
    listed = [
        (name, number)
        for number, group in enumerate(re.split(r"\n\d\. ", groups))
        for name in re.findall(r"`(\w+)`", group)
    ]
    assert sorted(name for name, _ in listed) == sorted(imported), "each of them once"
    group_of = dict(listed)
    upwards = [(name, other) for name in imported for other in imported[name] if group_of[other] > group_of[name]]
    assert upwards == []


def test_recipes_import_only_the_standard_library_and_qvl(project: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"qvl"}
    offenders = {
        path.name: wrong for path in modules_below(project, "recipes") if (wrong := everywhere_in(path) - allowed)
    }
    assert offenders == {}


def test_ray_is_imported_below_ray_jobs_and_by_its_tests_only(project: Path) -> None:
    offenders = [
        path.name
        for path in modules_below(project, "qvl", "recipes", "tests")
        if "ray" in everywhere_in(path) and not path.name.startswith("test_ray_")
    ]
    assert offenders == []


def test_a_job_is_put_in_a_recipes_place_without_an_import(project: Path) -> None:
    # The one mention of ray_jobs in qvl is a command line.
    text = (project / "qvl" / "recipe.py").read_text(encoding="utf-8")
    assert 'os.execv(sys.executable, [sys.executable, "-m", "ray_jobs.task"' in text


def test_mlflow_is_imported_inside_functions_only(project: Path) -> None:
    assert [path.name for path in modules_below(project, "qvl") if "mlflow" in at_import_of(path)] == []


def test_importing_qvl_is_fast(project: Path) -> None:
    def seconds_to_run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=project)
        return time.perf_counter() - start

    # The interpreter's own start is not ours; the best of three is what the import costs on an idle machine.
    assert min(seconds_to_run("import qvl") - seconds_to_run("pass") for _ in range(3)) < IMPORT_LIMIT_SECONDS


def test_training_does_without_bitsandbytes(project: Path) -> None:
    code = "import sys; sys.modules['bitsandbytes'] = None; import qvl.train_stage"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project)


@pytest.mark.parametrize(("folder", "files"), [("recipes", "*.py"), ("ray_jobs", "*_lora.py")])
def test_importing_a_recipe_or_a_sweep_starts_nothing(project: Path, folder: str, files: str) -> None:
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('recipe', sys.argv[1])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "heavy = {'torch', 'transformers', 'trl', 'mlflow', 'ray', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)\n"
    )
    paths = sorted((project / folder).glob(files))
    assert paths
    for path in paths:
        finished = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=project, check=False
        )
        assert finished.returncode == 0, f"{path.name}: {finished.stderr}"


def test_a_file_of_tests_stays_in_one_process(request: pytest.FixtureRequest) -> None:
    """Versions of pytest and pytest-xdist that do not fit drop the groups of tests/conftest.py without a word."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not under `pytest --dist loadgroup`, as `make test` runs it")
    assert request.node.nodeid.endswith("@test_architecture")

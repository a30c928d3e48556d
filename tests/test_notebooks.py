"""The notebooks: committed without outputs; they run from top to bottom, the one of Unsloth with the other loader."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from qvl.free_photos import photo_paths

FOLDER = Path(__file__).parents[1] / "recipes" / "notebooks"
NOTEBOOKS = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)

SHORT = {"num_train_examples": 24, "num_eval_examples": 12, "max_steps": 4, "max_new_tokens": 16}
# Unsloth needs a GPU and an environment of its own; every other line of its notebook runs here.
CHANGES = [
    (FOLDER / "qwen2_5_vl_qlora.ipynb", {}),
    (FOLDER / "qwen2_5_vl_unsloth.ipynb", {"loader": "transformers", "smoke": True}),
]


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@NOTEBOOKS
def test_it_is_short_valid_and_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None]
    assert len(notebook.cells) <= 12
    assert "importlib.util.find_spec" in code_cells(notebook)[0].source, "the first cell installs"
    assert "from recipes.qwen2_5_vl import RECIPE" in "".join(cell.source for cell in code_cells(notebook))


@NOTEBOOKS
def test_the_first_cell_says_what_a_machine_without_qvl_needs(path: Path, tmp_path: Path) -> None:
    """An isolated interpreter finds no packages, and no checkout above a temporary folder."""
    cell = code_cells(nbformat.read(path, as_version=4))[0].source
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", cell], cwd=tmp_path, env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "put the git URL" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("path", "changes"), CHANGES, ids=lambda value: getattr(value, "stem", ""))
@pytest.mark.slow
def test_it_runs_from_top_to_bottom(
    path: Path, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    spec = tmp_path / "kernels" / "this_python"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    described = {"argv": command, "display_name": "this Python", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(described), encoding="utf-8")
    kernels = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")])

    notebook = nbformat.read(path, as_version=4)
    settings = next(cell for cell in code_cells(notebook) if "\nflags = {" in cell.source)
    settings.source += f"\nflags |= {SHORT | changes!r}"
    manager = AsyncKernelManager(kernel_name=spec.name, kernel_spec_manager=kernels)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, km=manager, timeout=600, resources=where).execute()

    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    pictures = [o for o in outputs if o.output_type == "display_data" and "image/png" in o.data]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert len(pictures) == len(photo_paths())
    assert printed.count("fine-tuned:  ") == len(photo_paths())
    assert "The free photos, as the base model sees them:" in printed
    (run_folder,) = (tmp_path / "outputs" / "qwen2_5_vl").glob("notebook*")
    checks = json.loads((run_folder / "checks.json").read_text(encoding="utf-8"))
    assert len(checks) > 20 and all(check["passed"] for check in checks)
    assert (run_folder / "report.html").is_file()


def test_that_of_unsloth_asks_for_unsloth_before_anything_is_imported_that_it_patches() -> None:
    cells = [cell.source for cell in code_cells(nbformat.read(FOLDER / "qwen2_5_vl_unsloth.ipynb", as_version=4))]
    flags: dict[str, Any] = {}
    exec(cells[1], flags)
    assert flags["flags"]["loader"] == "unsloth"
    ours = ("qvl", "qvl.recipe", "recipes.qwen2_5_vl")
    imported = re.findall(r"^ *(?:import|from) ([\w.]+)", "\n".join(cells[:3]), re.MULTILINE)
    assert [name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names] == list(ours)

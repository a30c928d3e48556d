"""What an installation holds, and that `environments/setup_gpu_env.sh` leaves torch alone or says that it could not."""

import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import qvl


@pytest.fixture
def checkout(project: Path, tmp_path: Path) -> Path:
    """A copy of what an installation reads, so that nothing is written into the real one."""
    copy = tmp_path / "checkout"
    shutil.copytree(project / "qvl", copy / "qvl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(project / "environments", copy / "environments")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project / name, copy)
    return copy


def pip_environment(wheels: Path) -> dict[str, str]:
    """Settings under which pip reads no index, builds with the setuptools at hand and finds `wheels`."""
    return {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
    }


def new_environment(folder: Path, sees_our_packages: bool) -> Path:
    """Makes a virtual environment, on top of the one that runs the tests or empty, and returns its Python."""
    venv.create(folder, with_pip=False)
    if sees_our_packages:
        packages = next(folder.glob("lib/python*/site-packages"))
        (packages / "ours.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return folder / "bin" / "python"


def write_wheel(folder: Path, name: str, requires: str = "", files: dict[str, str] | None = None) -> None:
    """Writes `name`-1.0 as a wheel into `folder`."""
    folder.mkdir(exist_ok=True)
    information = f"{name}-1.0.dist-info"
    contents = {
        **(files or {}),
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*contents, f"{information}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in {**contents, f"{information}/RECORD": record}.items():
            wheel.writestr(path, text)


def add_extra(checkout: Path, name: str, requirement: str) -> None:
    settings = checkout / "pyproject.toml"
    section = "[project.optional-dependencies]\n"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace(section, f'{section}{name} = ["{requirement}"]\n'), encoding="utf-8")


def run_setup(checkout: Path, python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(checkout / "environments" / "setup_gpu_env.sh"), *arguments],
        env={**pip_environment(checkout / "wheels"), "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_wheel_holds_every_file_of_the_package(checkout: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(checkout)],
        env=pip_environment(tmp_path),
        check=True,
    )
    (wheel,) = tmp_path.glob("qvl-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("qvl/")}
    files = {str(path.relative_to(checkout)) for path in (checkout / "qvl").rglob("*") if path.is_file()}
    assert held == files
    assert f"-{qvl.__version__}-" in wheel.name


def test_lower_bounds_are_the_versions_that_are_tested(project: Path) -> None:
    settings = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    pins = (project / "environments" / "lowest.txt").read_text(encoding="utf-8")
    for name in ("trl", "transformers", "datasets"):
        (bound,) = [line.split(">=")[1] for line in settings["project"]["dependencies"] if line.startswith(f"{name}>=")]
        assert re.search(rf"^{name}=={re.escape(bound)}\.0$", pins, re.MULTILINE), name


def test_torch_has_a_lower_bound_and_no_pin(project: Path) -> None:
    settings = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    (requirement,) = [line for line in settings["project"]["dependencies"] if re.match(r"torch\b", line)]
    assert re.fullmatch(r"torch>=[\d.]+", requirement)


def test_the_lock_names_versions_only(project: Path) -> None:
    lines = (project / "environments" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert len(packages) > 100
    assert [line for line in packages if not re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.!+]+", line)] == []


@pytest.mark.slow
def test_setup_installs_and_leaves_torch_alone(checkout: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "gpu", sees_our_packages=True)
    finished = run_setup(checkout, python, "--allow_cpu")
    assert finished.returncode == 0, finished.stderr
    assert "torch is still" in finished.stdout
    code = "import qvl; print(qvl.__file__)"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert where.strip() == str(checkout / "qvl" / "__init__.py")


@pytest.mark.slow
def test_setup_stops_at_a_dependency_that_wants_another_torch(checkout: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "gpu", sees_our_packages=True)
    write_wheel(checkout / "wheels", "wants_old_torch", requires="Requires-Dist: torch==0.0\n")
    add_extra(checkout, "old", "wants_old_torch")
    finished = run_setup(checkout, python, "--allow_cpu", "old")
    assert finished.returncode == 1
    assert "beside the constraints torch==" in finished.stderr
    assert "torch is untouched" in finished.stderr


@pytest.mark.slow
def test_setup_notices_a_torch_that_changed_all_the_same(checkout: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "gpu", sees_our_packages=True)
    other_torch = {"torch/__init__.py": "__version__ = '0.1'\nclass version:\n    cuda = None\n"}
    write_wheel(checkout / "wheels", "overwrites_torch", files=other_torch)
    add_extra(checkout, "careless", "overwrites_torch")
    finished = run_setup(checkout, python, "--allow_cpu", "careless")
    assert finished.returncode == 1
    assert re.search(r"torch changed from \S+ \S+ to 0\.1 None", finished.stderr)


def test_setup_refuses_a_cpu_build_of_torch(checkout: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "cpu", sees_our_packages=False)
    packages = next((tmp_path / "cpu").glob("lib/python*/site-packages"))
    (packages / "torch.py").write_text("__version__ = '2.12.0'\nclass version:\n    cuda = None\n", encoding="utf-8")
    finished = run_setup(checkout, python)
    assert finished.returncode == 1
    assert "torch 2.12.0" in finished.stderr
    assert "is a CPU build" in finished.stderr


def test_setup_refuses_an_environment_without_torch(checkout: Path, tmp_path: Path) -> None:
    finished = run_setup(checkout, new_environment(tmp_path / "empty", sees_our_packages=False))
    assert finished.returncode == 1
    assert "has no working torch" in finished.stderr


def test_setup_refuses_unknown_options(checkout: Path) -> None:
    finished = run_setup(checkout, Path(sys.executable), "--alow_cpu")
    assert finished.returncode == 1
    assert "unknown option --alow_cpu" in finished.stderr


def test_the_makefile_explains_its_targets(project: Path) -> None:
    finished = subprocess.run(["make"], cwd=project, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "check", "venv", "clean"):
        assert f"make {target}" in finished.stdout


def test_shell_scripts_are_clean(project: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    scripts = [project / ".ci" / "run", *sorted((project / "environments").glob("*.sh"))]
    finished = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout

"""The locks in environments/ satisfy pyproject.toml and agree with each other, and the image installs one of them."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# Which extras of pyproject.toml a lock holds.
EXTRAS = {"cpu": ("test",), "cuda": ("ray",), "t4": (), "unsloth": ()}
# torch pins these to the letter; a lock for several of its builds leaves them to it.
LEFT_TO_TORCH = re.compile(r"triton|cuda-.*|nvidia-.*")
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}


def pins(project: Path, name: str) -> dict[str, str]:
    """Versions by canonical name; a lock holds nothing but comments and pins."""
    lines = (project / "environments" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([A-Za-z0-9_.\-]+)==([A-Za-z0-9_.!+]+)", line) for line in lines if line[:1] != "#"]
    assert None not in found, name
    held = {canonicalize_name(match[1]): match[2] for match in found if match}
    assert len(held) == len(found) > 100, f"{name} names a package twice"
    return held


def requirements(project: Path, extras: tuple[str, ...]) -> Iterator[Requirement]:
    """What pyproject.toml asks for, an extra that names another followed."""
    settings = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [
        *settings["dependencies"],
        *(line for extra in extras for line in settings["optional-dependencies"][extra]),
    ]
    while waiting:
        wanted = Requirement(waiting.pop())
        if wanted.name == settings["name"]:
            waiting += [line for extra in wanted.extras for line in settings["optional-dependencies"][extra]]
        else:
            yield wanted


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_satisfies_pyproject(project: Path, name: str) -> None:
    held = pins(project, name)
    wanted = list(requirements(project, EXTRAS[name]))
    assert len(wanted) > 15
    unmet = [str(item) for item in wanted if held.get(canonicalize_name(item.name), "0") not in item.specifier]
    assert unmet == []


@functools.cache
def installed() -> dict[str, tuple[str, list[str]]]:
    """Version and requirements of everything installed here, by canonical name.

    Of this environment's folder, not of `sys.path`: Ray puts packages of its own there when it is imported.
    """
    found = distributions(path=[sysconfig.get_path("purelib")])
    return {canonicalize_name(item.name): (item.version.partition("+")[0], item.requires or []) for item in found}


def needed_by(package: str, extras: set[str]) -> Iterator[Requirement]:
    """What an installed package needs on Linux, where this one's Python runs."""
    for line in installed()[package][1]:
        wanted = Requirement(line)
        if wanted.marker is None or any(wanted.marker.evaluate({**LINUX, "extra": extra}) for extra in extras | {""}):
            yield wanted


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_lock_is_complete_and_consistent(project: Path, name: str) -> None:
    """Follows what every package says it needs; possible where its version is the one installed here."""
    held = pins(project, name)
    waiting, seen, num_looked_at = list(requirements(project, EXTRAS[name])), set(), 0
    while waiting:
        wanted = waiting.pop()
        package = canonicalize_name(wanted.name)
        assert package in held, f"{name}.txt lacks {wanted}"
        assert Version(held[package]) in wanted.specifier, f"{name}.txt has {held[package]}, wanted is {wanted}"
        if (package, frozenset(wanted.extras)) in seen:
            continue
        seen.add((package, frozenset(wanted.extras)))
        if installed().get(package, ("", []))[0] == held[package]:
            num_looked_at += 1
            waiting += needed_by(package, wanted.extras)
    assert num_looked_at > 20
    if name == "cuda" and in_make_test(project):
        assert held.keys() - {package for package, _ in seen} == set(), "nobody needs these"


def in_make_test(project: Path) -> bool:
    """Whether this is the environment that the Makefile makes."""
    return Path(sys.prefix) == project / ".venv"


def test_make_test_installs_the_cpu_lock(project: Path) -> None:
    makefile = (project / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^\t.*pip install .*-r environments/cpu\.txt$", makefile, re.MULTILINE)
    if not in_make_test(project):
        pytest.skip("this is another environment than the Makefile's")
    here = {name: version for name, (version, _) in installed().items()}
    held = pins(project, "cpu")
    assert {name: here.get(name) for name in held} == held
    assert here.keys() - held.keys() <= {"qvl", "pip"}


def test_the_gpu_host_runs_what_is_tested_here(project: Path) -> None:
    """cuda.txt is part of cpu.txt; t4.txt differs in torch and in what goes with it."""
    tested, cuda, t4 = (pins(project, name) for name in ("cpu", "cuda", "t4"))
    assert cuda.items() <= tested.items()
    differing = {name for name, held in t4.items() if tested.get(name) != held}
    assert differing <= {"torch", "torchvision", "setuptools"}
    assert not [name for name in t4 if LEFT_TO_TORCH.fullmatch(name)]
    lowest = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"torch>={t4['torch'].rpartition('.')[0]}" in lowest


def test_unsloth_is_the_one_that_was_compared_with(project: Path) -> None:
    held = pins(project, "unsloth")
    names = ("unsloth", "unsloth-zoo", "trl", "datasets", "transformers", "torch")
    assert [held[name] for name in names] == ["2026.10.9", "2026.10.9", "1.15.0", "4.8.5", "5.17.0", "2.11.0"]


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_says_how_to_refresh_it(project: Path, name: str) -> None:
    text = (project / "environments" / f"{name}.txt").read_text(encoding="utf-8")
    assert re.match(r"(#.*\n)*?# (To|.* To) refresh", text)


# --- the image


def instructions(project: Path) -> list[tuple[str, str]]:
    """The Dockerfile's, in order, with continued lines joined."""
    text = (project / "environments" / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [(word, " ".join(rest.split())) for line in lines if line for word, _, rest in [line.partition(" ")]]


def test_the_image_is_built_from_a_pinned_base_and_the_lock(project: Path) -> None:
    found = instructions(project)
    (base,) = [rest for word, rest in found if word == "FROM"]
    image, _, tag = base.partition(":")
    # The CUDA of torch's wheel, so that what is compiled at run time meets the same one.
    cuda = re.search(
        r"^nvidia-cuda-runtime==(\d+\.\d+)\.", (project / "environments/cuda.txt").read_text(), re.MULTILINE
    )
    assert cuda and re.fullmatch(rf"{re.escape(cuda[1])}\.\d+-base-ubuntu24\.04", tag), tag
    assert image == "nvidia/cuda"
    runs = [rest for word, rest in found if word == "RUN"]
    installs = [part.strip() for rest in runs for part in rest.split("&&") if "pip install" in part]
    assert [shlex.split(part)[3:] for part in installs] == [
        ["--requirement", "/opt/cuda.txt"],
        ["--no-deps", "--no-build-isolation", "--editable", "."],
    ]
    assert all("--no-cache-dir" in part for part in installs)
    assert ("COPY", "environments/cuda.txt /opt/cuda.txt") in found
    assert any("pip check" in rest for rest in runs)


def test_the_image_does_not_run_as_root(project: Path) -> None:
    found = instructions(project)
    users = [rest for word, rest in found if word == "USER"]
    assert len(users) == 1 and users[0].isdigit() and int(users[0]) >= 1000
    assert any(f"--uid {users[0]} " in rest for word, rest in found if word == "RUN")
    assert [word for word, _ in found][-2:] == ["USER", "CMD"]


def test_what_the_image_copies_is_there_and_in_its_context(project: Path) -> None:
    ignored = (project / "environments" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {
        source
        for word, rest in instructions(project)
        if word == "COPY"
        for source in [part for part in rest.split() if not part.startswith("--")][:-1]
    }
    assert {source.split("/")[0] for source in copied} == kept
    assert [source for source in copied if not (project / source).exists()] == []
    command = json.loads(next(rest for word, rest in instructions(project) if word == "CMD"))
    assert (project / command[1]).is_file()


def test_hadolint_has_nothing_to_say(project: Path) -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("no hadolint: the extra test installs it")
    finished = subprocess.run(
        [hadolint, str(project / "environments" / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (0, "")

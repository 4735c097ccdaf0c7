"""setup.bash chooses the build of torch; the interpreter, pip and uv are stand-ins that record how they are called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import REPOSITORY

PYTHON = """#!/usr/bin/env bash
[ "$2" != venv ] || { mkdir -p .venv/bin; touch .venv/bin/activate; cp stubs/pip .venv/bin/python; }
"""
PIP = """#!/usr/bin/env bash
echo "pip ${@:3}" >> calls
[[ "$*" != *+cpu* ]] || [ -e index-has-cpu-build ] || exit 1
[[ "$*" != *" uv" ]] || cp stubs/uv .venv/bin/uv
"""
UV = '#!/usr/bin/env bash\necho "uv $*" >> calls\n[ -e uv-reaches-its-index ]\n'
REST = "-r requirements.txt"


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A function that sources setup.bash in a directory of stand-ins and returns the calls of pip and uv."""
    for name in ("setup.bash", "requirements.txt", "requirements-extra.txt", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    stubs = {"python": PYTHON, "pip": PIP, "uv": UV, "uname": "#!/bin/sh\necho Linux\n"}
    (tmp_path / "stubs").mkdir()
    for name, text in stubs.items():
        (tmp_path / "stubs" / name).write_text(text)
        (tmp_path / "stubs" / name).chmod(0o755)
    for name in ("CPU", "GPU", "TORCH_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)

    def run(**variables: str) -> list[str]:
        path = f"{tmp_path / 'stubs'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHON": "stubs/python", **variables}
        subprocess.run(["bash", "-c", "source setup.bash requirements.txt"], cwd=tmp_path, env=environment, check=True)
        calls = (tmp_path / "calls").read_text()
        calls = calls.replace("install --disable-pip-version-check -c requirements.lock ", "")
        return calls.splitlines()

    return run


def pinned_torch() -> str:
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def test_cpu_build_comes_from_a_configured_index(setup, tmp_path):
    (tmp_path / "index-has-cpu-build").touch()
    assert setup(CPU="1") == [f"pip {pinned_torch()}+cpu", f"pip {REST}"]


def test_cpu_build_comes_from_the_index_that_the_user_names(setup, tmp_path):
    (tmp_path / "index-has-cpu-build").touch()
    index = "--extra-index-url https://example.org/cpu"
    calls = setup(CPU="1", TORCH_INDEX_URL="https://example.org/cpu")
    assert calls == [f"pip {index} {pinned_torch()}+cpu", f"pip {index} {REST}"]


@pytest.mark.parametrize("reached", [True, False])
def test_cpu_build_comes_from_uv_where_no_index_has_it(setup, tmp_path, reached):
    if reached:
        (tmp_path / "uv-reaches-its-index").touch()
    uv = f"uv pip install --python .venv --torch-backend cpu -c requirements.lock {pinned_torch()}"
    assert setup(CPU="1") == [f"pip {pinned_torch()}+cpu", "pip --quiet uv", uv, f"pip {REST}"]


def test_gpu_by_hand_or_by_its_driver_takes_the_default_build(setup, tmp_path):
    assert setup(GPU="1") == [f"pip {REST}"]
    shutil.rmtree(tmp_path / ".venv")
    (tmp_path / "stubs" / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "stubs" / "nvidia-smi").chmod(0o755)
    assert setup()[1:] == [f"pip {REST}"]


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists() or bool(shutil.which("nvidia-smi")), reason="has a driver")
def test_without_a_driver_the_cpu_build_is_taken(setup, tmp_path):
    (tmp_path / "index-has-cpu-build").touch()
    assert setup()[0] == f"pip {pinned_torch()}+cpu"


def test_nothing_is_installed_twice(setup):
    assert setup(GPU="1") == setup(GPU="1")

"""The command line: demo, bench, collect-env, with and without the packages of the extra."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import effops
from effops import _load, cli, collect_env

BLOCKED = (
    "import sys; sys.modules['typer'] = None; sys.argv = ['effops', *{}]; from effops.cli import main; main()"
)


def effops_command(folder, *arguments, variables=None):
    """`python -m effops ...` in a folder that holds no sources."""
    return python(folder, "-m", "effops", *arguments, variables=variables)


def python(folder, *arguments, variables=None):
    environment = {**os.environ, "COLUMNS": "120", **(variables or {})}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def invoke():
    """Runs a command in this process."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.build_app(), list(arguments), env={"COLUMNS": "120"})


def test_collect_env_by_both_ways(tmp_path):
    by_command = effops_command(tmp_path, "collect-env")
    by_module = python(tmp_path, "-m", "effops.collect_env")
    assert by_command.returncode == by_module.returncode == 0
    assert by_command.stdout == by_module.stdout
    assert not by_command.stderr
    for fact in (effops.__version__, torch.__version__, effops.cpu_capability(), "threads", "architectures"):
        assert fact in by_command.stdout


def test_collect_env_tells_no_folders():
    text = collect_env.report()
    for folder in (Path.home(), Path.cwd(), _load.library_dir, Path(torch.__file__).parent):
        assert str(folder) not in text


def test_collect_env_says_why_cuda_is_missing(monkeypatch):
    reason = f"libeffops_cuda.so did not load: {_load.library_dir}/libeffops_cuda.so: undefined symbol: x"
    monkeypatch.setattr(_load, "cuda_missing_reason", reason)
    facts = collect_env.collect()["CUDA"]
    assert facts["library"] == "not loaded"
    assert facts["reason"] == "libeffops_cuda.so did not load: libeffops_cuda.so: undefined symbol: x"
    monkeypatch.setattr(_load, "cuda_missing_reason", None)
    assert collect_env.collect()["CUDA"]["library"] == "loaded"


def test_collect_env_shows_variables(monkeypatch):
    for name in collect_env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "  none set" in collect_env.report()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert collect_env.collect()["environment"] == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id: AuthenticAMD\ncpu family: 25\nmodel: 17\nmodel name: AMD EPYC", "AMD EPYC (Zen 4)"),
        ("vendor_id: AuthenticAMD\ncpu family: 25\nmodel: 1\nmodel name: AMD EPYC", "AMD EPYC (Zen 3)"),
        ("vendor_id: AuthenticAMD\ncpu family: 99\nmodel: 1\nmodel name: AMD X", "AMD X"),
        ("vendor_id: GenuineIntel\ncpu family: 6\nmodel: 143\nmodel name: Xeon", "Xeon (Sapphire Rapids)"),
        ("vendor_id: GenuineIntel\ncpu family: 6\nmodel: 1\nmodel name: Old", "Old"),
        ("model name: Arm", "Arm"),
    ],
)
def test_cpu_names(monkeypatch, cpuinfo, expected):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: cpuinfo + "\n\nprocessor: 1")
    assert collect_env.cpu_name() == expected


def test_hardware_line():
    assert collect_env.hardware("cpu").endswith(f"torch {torch.__version__.split('+')[0]}")
    assert f"{collect_env.cpu_cores()} core" in collect_env.hardware()


def test_without_typer(tmp_path):
    told = python(tmp_path, "-c", BLOCKED.format("['demo']"))
    assert told.returncode == 1
    assert 'pip install "effops[demo]"' in told.stderr
    assert "Traceback" not in told.stderr
    collected = python(tmp_path, "-c", BLOCKED.format("['collect-env']"))
    assert collected.returncode == 0
    assert torch.__version__ in collected.stdout


def test_demo_passes_its_options(invoke, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("effops.demo.run", seen.append)
    result = invoke("demo", "--output", str(tmp_path), "--device", "cpu", "--quick")
    assert result.exit_code == 0, result.output
    assert seen[0].output == tmp_path
    assert seen[0].device == "cpu"
    assert seen[0].photo_side < 640


@pytest.mark.parametrize("arguments", [["--sections", "nothing"], ["--device", "tpu"]])
def test_demo_refuses_wrong_options(invoke, arguments):
    result = invoke("demo", *arguments)
    assert result.exit_code == 2
    assert "expected" in result.output


def test_demo_without_its_packages(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr("effops.demo._extras.find_spec", lambda name: None)
    result = invoke("demo", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert 'pip install "effops[demo]"' in result.output


def test_bench_without_the_repository(invoke, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "effops" / "cli.py"))
    result = invoke("bench")
    assert result.exit_code == 1
    assert "source repository" in result.output


def test_bench_runs_the_folder(invoke, monkeypatch, tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "bench_ms_deform_attn.py").touch()
    (folder / "report.py").write_text("import sys; sys.exit(7 if sys.argv[1:] == ['run', '-x', 'a'] else 1)")
    monkeypatch.chdir(tmp_path)
    assert invoke("bench", "-x", "a").exit_code == 7


def test_help(invoke):
    for command in ("demo", "bench", "collect-env"):
        assert command in invoke("--help").output

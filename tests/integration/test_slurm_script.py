"""The sbatch script without Slurm: its commands are there, what it makes of a run's end is right.

Stand-ins for Slurm's four commands and torchrun record what they get; tools/check/slurm runs it on the real ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from torch.distributed.run import get_args_parser

from anyres_vlm.cli.main import app

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "cluster" / "slurm"
SCRIPT = FOLDER / "train.sbatch"
STANDINS = {
    "srun": """
        [ "$1" != --overlap ] || exit 0  # the watch over the first node
        printf "%s\\n" "$@" >srun.words
        [ -z "$INTERRUPT" ] || echo saved >"$OUTPUT/interrupted"
        exit "$STATUS"
        """,
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "$@" >>requeued; fi',
    "squeue": 'echo "$NODES_LEFT"',
    "scancel": "exit 1",
}
SLURM = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "run", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


def submit(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, body in STANDINS.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv" / "bin" / "activate").touch()
    given = {"SLURM_GPUS_ON_NODE": "8", "STATUS": "0", "INTERRUPT": "", "NODES_LEFT": "2", **SLURM, **environment}
    path = f"{commands}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=folder, env={"PATH": path, **given}, capture_output=True, text=True
    )


def words(folder: Path) -> list[str]:
    return (folder / "srun.words").read_text().splitlines()


def test_torchrun_and_anyres_understand_the_command(tmp_path: Path) -> None:
    done = submit(tmp_path, "--deepspeed", "zero2", "--set", "seed=3")
    assert done.returncode == 0, done.stderr
    every = words(tmp_path)
    launcher = get_args_parser().parse_args(every[every.index("torchrun") + 1 :])
    assert (launcher.nnodes, launcher.nproc_per_node, launcher.rdzv_endpoint) == ("1:2", "8", "n1:23456")
    assert (launcher.module, launcher.training_script) == (True, "anyres_vlm")
    command, *rest = launcher.training_script_args
    assert command == "train"
    context = typer.main.get_command(app).commands[command].make_context("train", rest)
    assert context.params["output"] == tmp_path / "runs" / "run"
    assert (context.params["deepspeed"], context.params["settings"]) == ("zero2", ["seed=3"])


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_containers_see_the_clone_the_output_and_what_is_asked_for(tmp_path: Path, container: str) -> None:
    done = submit(tmp_path, CONTAINER=container, IMAGE="image.file", MOUNTS="/data,/models")
    assert done.returncode == 0, done.stderr
    line = " ".join(words(tmp_path))
    output = tmp_path / "runs" / "run"
    mounts = f"{tmp_path}:{tmp_path},{output}:{output},/data:/data,/models:/models"
    expected = {
        "pyxis": f"--container-image=image.file --container-mounts={mounts} --container-workdir={tmp_path} torchrun ",
        "apptainer": f" apptainer exec --nv --bind {mounts} --pwd {tmp_path} image.file torchrun ",
    }
    assert expected[container] in line


@pytest.mark.parametrize(
    ("status", "interrupt", "left", "is_requeued"),
    [("0", "", "2", False), ("1", "1", "2", True), ("1", "", "2", False), ("1", "", "1", True), ("0", "", "1", False)],
)
def test_the_marker_and_lost_nodes_decide(tmp_path, status: str, interrupt: str, left: str, is_requeued) -> None:
    (tmp_path / "runs" / "anyres").mkdir(parents=True)
    (tmp_path / "runs" / "anyres" / "interrupted").touch()  # of an earlier job: it says nothing about this one
    done = submit(tmp_path, OUTPUT="runs/anyres", STATUS=status, INTERRUPT=interrupt, NODES_LEFT=left)
    assert done.returncode == int(status), done.stderr
    assert (tmp_path / "requeued").exists() == is_requeued


def test_an_unknown_container_is_refused(tmp_path: Path) -> None:
    done = submit(tmp_path, CONTAINER="docker")
    assert done.returncode == 2
    assert "CONTAINER=docker: expected none, pyxis or apptainer" in done.stderr


def test_the_readme_names_every_variable() -> None:
    variables = re.findall(r"^([A-Z_]+)=\$\{\1:-", SCRIPT.read_text(), re.MULTILINE)
    assert len(variables) == 6
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in variables if f"| `{name}` |" not in readme] == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("slurmctld") is None, reason="needs root and Debian's slurm-wlm")
def test_on_a_real_slurm(tmp_path: Path) -> None:
    """Every scenario, as tools/check/slurm runs it."""
    done = subprocess.run([FOLDER.parents[2] / "tools" / "check" / "slurm", "--folder", tmp_path / "slurm"])
    assert done.returncode == 0

"""The jobs of configs/cluster fit the image, the command line and each other; `tools/check/jobs` has the schemas."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

from anyres_vlm.cli.main import app
from anyres_vlm.config import load_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "configs" / "cluster"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SHUTDOWN_S = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", (CLUSTER / "launch").read_text())[1])


def documents(name: str) -> dict[str, Any]:
    """The manifests of a file by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((CLUSTER / "kubernetes" / name).read_text())}


def job_spec(name: str) -> dict[str, Any]:
    """The spec of the Job that a file describes, itself or through its controller."""
    if name == "job.yaml":
        return documents(name)["Job"]["spec"]
    manifests = documents(name)
    jobset = manifests["JobSet"] if name == "jobset.yaml" else manifests["TrainingRuntime"]["spec"]["template"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container(name: str) -> dict[str, Any]:
    """The container as the pod runs it: a TrainJob's trainer overrides that of its runtime."""
    (found,) = job_spec(name)["template"]["spec"]["containers"]
    return found | (documents(name)["TrainJob"]["spec"]["trainer"] if name == "trainjob.yaml" else {})


def environment(name: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(name)["env"]}


def check_command(words: list[str]) -> None:
    """`anyres train` takes the words, and the config that they name is one of ours."""
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    given = command.make_context("train", list(words)).params
    load_config(ROOT / given["config"], given["settings"])
    assert given["output"] is None, "the launcher names the output folder"


MANIFESTS = ["jobset.yaml", "job.yaml", "trainjob.yaml"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_runs_our_command_as_our_user(name: str) -> None:
    spec, train = job_spec(name)["template"]["spec"], container(name)
    assert train["command"] == ["anyres-launch"]
    check_command(train["args"])
    assert f"USER {spec['securityContext']['runAsUser']}\n" in DOCKERFILE


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_waits_for_the_checkpoint_and_starts_again(name: str) -> None:
    spec, train = job_spec(name), container(name)
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > SHUTDOWN_S
    exits, _ = spec["podFailurePolicy"]["rules"]
    assert (exits["onExitCodes"]["containerName"], exits["onExitCodes"]["values"]) == (train["name"], [os.EX_TEMPFAIL])


@pytest.mark.parametrize("name", ["jobset.yaml", "job.yaml"])
def test_nodes_meet_at_the_first(name: str) -> None:
    spec, given, manifests = job_spec(name), environment(name), documents(name)
    assert spec["parallelism"] == spec["completions"] == int(given["PET_NNODES"])
    assert spec["completionMode"] == "Indexed"
    if name == "job.yaml":
        service, job = manifests["Service"], manifests["Job"]["metadata"]["name"]
        assert service["spec"]["selector"] == {"job-name": job}
        assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
        first = f"{job}-0.{service['metadata']['name']}"
    else:
        jobset = manifests["JobSet"]
        (replicated,) = jobset["spec"]["replicatedJobs"]
        first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
    assert given["PET_MASTER_ADDR"] == first
    assert 1024 < int(given["PET_MASTER_PORT"]) < 65536


def test_compose_fits_the_image() -> None:
    (service,) = yaml.safe_load((CLUSTER / "docker" / "compose.yaml").read_text())["services"].values()
    assert service["entrypoint"] == "anyres-launch"
    check_command(service["command"])
    user = re.fullmatch(r"\$\{RUN_AS:-(\d+):\d+\}", service["user"])[1]
    assert f"USER {user}\n" in DOCKERFILE
    minutes = int(service["stop_grace_period"].removesuffix("m"))
    assert 60 * minutes > SHUTDOWN_S, "the launcher has saved before it is killed"


def test_skypilot_runs_our_command() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot" / "train.yaml").read_text())
    launch = task["run"].strip().splitlines()[-1].split()
    assert launch[:2] == ["exec", "configs/cluster/launch"]
    check_command(launch[2:])
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [os.EX_TEMPFAIL]


def test_the_lock_holds_what_the_project_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    files = {
        "requirements.lock": [*project["dependencies"], *extras["demo"], *extras["deepspeed"]],
        "requirements-test.lock": extras["test"],
    }
    locked: dict[str, list[str]] = {}
    for name, wanted in files.items():
        entries = re.split(r"\n(?=[a-z])", (ROOT / name).read_text())[1:]
        for entry in entries:
            assert "--hash=sha256:" in entry
            package, version = re.match(r"([a-z0-9-]+)==([^ ]+)", entry).groups()
            locked.setdefault(package, []).append(version)
        for requirement in map(Requirement, wanted):
            versions = locked.get(requirement.name.lower(), [])
            assert versions, f"{name} lacks {requirement.name}: run tools/lock"
            assert all(requirement.specifier.contains(version) for version in versions), (
                f"{requirement}: run tools/lock"
            )


@pytest.mark.slow
def test_the_platforms_schemas_accept_the_jobs() -> None:
    subprocess.run([ROOT / "tools" / "check" / "jobs"], check=True, timeout=900)


@pytest.mark.parametrize("name", ["launch", "slurm/train.sbatch"])
def test_launchers_let_segments_of_memory_grow(name: str) -> None:
    """All others start `launch`, as their commands say."""
    lines = (CLUSTER / name).read_text()
    found = re.search(r"^export PYTORCH_ALLOC_CONF=\$\{PYTORCH_ALLOC_CONF:-(\S+)\}", lines, re.MULTILINE)
    assert found is not None
    assert found[1] == "expandable_segments:True"

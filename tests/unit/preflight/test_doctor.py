"""Plant each fault that the doctor looks for in files, paths and environment, and find it; a sound machine has none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from anyres_vlm.checkpoints.folders import resolve
from anyres_vlm.cli.main import main
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.preflight import doctor, machine
from anyres_vlm.preflight.machine import Finding, run_checks

ROOT = Path(__file__).parents[3]
Make = Callable[..., doctor.Case]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """The embedded default on four records with images, with overrides; its run goes to `tmp_path/run`."""
    for number in range(4):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a circle"}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    config = yaml.safe_load(shipped_config("tiny").read_text())
    for stage in ("stage1", "stage2"):
        config[stage]["data"] = {"path": str(tmp_path / "data.json")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return lambda *overrides: doctor.Case(load_config(tmp_path / "config.yaml", overrides), tmp_path / "run")


def uninstall(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages impossible to find and import in this process."""
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def only(findings: Any) -> Finding:
    (finding,) = findings
    assert isinstance(finding, Finding)
    return finding


@pytest.mark.parametrize(
    "presets", [(), pytest.param(("zero2", "zero3"), marks=pytest.mark.slow)], ids=["plain", "deepspeed"]
)
def test_the_whole_command_on_a_sound_machine(make: Make, tmp_path: Path, presets: tuple[str, ...]) -> None:
    make()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "anyres_vlm", "doctor", "--config", str(tmp_path / "config.yaml")]
    settings = [f"--set=stage{number}.deepspeed={preset}" for number, preset in enumerate(presets, start=1)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run"), "--json", *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    findings = json.loads(done.stdout)
    assert [finding for finding in findings if finding["level"] == "fail"] == [], done.stderr
    assert done.returncode == 0
    by_check = {finding["check"]: finding["found"] for finding in findings}
    for check in "python packages torch accelerator attention gloo nccl config deepspeed memory disk".split():
        assert by_check[check]
    assert ("step under zero2, zero3" if presets else "not used") in by_check["deepspeed"]
    assert "4 records, 4 of 4 inspected ones are usable" in by_check["stage1 data"]
    assert not (tmp_path / "run").exists(), "it looks and leaves nothing behind"


def test_a_broken_config_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(shipped_config("tiny").read_text().replace("grid:", "gird:"))
    assert main(["doctor", "--config", str(tmp_path / "config.yaml")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("fail  config ")
    assert "did you mean grid?" in lines[-1]
    assert lines[0].startswith("ok    python ")


def test_a_check_that_breaks_ends_no_other() -> None:
    def breaks(_: None) -> list[Finding]:
        raise OSError("libcudart.so.12: cannot open\nshared object file")

    first, second = run_checks({"torch": breaks, "python": machine.check_python}, None)
    assert (first.level, first.found) == ("fail", "libcudart.so.12: cannot open shared object file")
    assert second.level == "ok"


def test_packages_of_a_wrong_version_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["pillow>=9999", "no-such-package-anywhere>=2", "numpy>=1", "wandb>=1; extra == 'test'"]
    metadata = tmp_path / "anyres_vlm-9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: anyres-vlm", "Version: 9", *(f"Requires-Dist: {one}" for one in required)]
    metadata.write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)  # found before the installed package
    finding = only(machine.check_packages(None))
    assert finding.level == "fail"
    assert finding.found.endswith(", no no-such-package-anywhere")
    assert finding.remedy == "pip install 'pillow>=9999' 'no-such-package-anywhere>=2'"


def test_a_driver_without_a_build_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for the CPU, as a wheel states it
    assert only(machine.check_torch(None)).level == "fail"
    assert only(machine.check_accelerator(None)).level == "ok"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert only(machine.check_torch(None)).level == "ok"
    finding = only(machine.check_accelerator(None))
    assert (finding.level, "CUDA_VISIBLE_DEVICES='' hides it" in finding.remedy) == ("fail", True)
    driver.unlink()
    assert only(machine.check_accelerator(None)).level == "ok"


def test_attention_that_mixes_documents_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyres_vlm.model import attention

    assert only(machine.check_attention(None)).level == "ok"
    honest = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *args, documents: honest(*args))  # one long document
    assert only(machine.check_attention(None)).level == "fail"


@pytest.mark.parametrize(
    ("capability", "settings", "found"),
    [
        ((8, 0), [], "torch's FlashAttention varlen, one call per layer"),
        ((8, 0), ["precision=fp32"], "SDPA, document by document: the computation is in float32"),
        ((7, 5), [], "SDPA, document by document: the GPU's compute capability is below 8.0"),
    ],
)
def test_the_attention_of_a_config_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], settings: list[str], found: str
) -> None:
    """Regression: it named the kernel that exists, not the one that the precision and the GPU allow."""
    import torch

    assert [finding.level for finding in doctor.check_attention(make())] == ["ok", "ok"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    findings = list(doctor.check_attention(make("precision=bf16", *settings)))
    assert [finding.check for finding in findings] == ["stage1 attention", "stage2 attention"]
    assert {finding.found for finding in findings} == {found}
    assert {finding.level for finding in findings} == {"ok" if found.startswith("torch's Flash") else "warn"}


def test_attention_dropout_counts_where_the_language_model_is_trained(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    folder = shutil.copytree(resolve("embedded:tiny-lm"), tmp_path / "dropping")
    settings = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    first, second = doctor.check_attention(make("precision=bf16", f"model.llm={folder}"))
    assert first.found.startswith("torch's FlashAttention")
    assert second.found.endswith("the model has attention dropout of 0.1")


def test_kernels_that_cannot_run_here_are_a_finding(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert only(doctor.check_kernels(make())).level == "ok"
    finding = only(run_checks({"kernels": doctor.check_kernels}, make("kernels=liger")))
    assert (finding.check, finding.level) == ("kernels", "fail")
    assert "kernels=liger needs" in finding.found


def test_deepspeed_is_needed_only_where_it_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "deepspeed")
    assert only(doctor.check_deepspeed(make())).level == "ok"
    finding = only(doctor.check_deepspeed(make("stage2.deepspeed=zero3")))
    assert (finding.level, finding.remedy) == ("fail", "pip install 'anyres-vlm[deepspeed]'")
    assert "zero3" in finding.found


def test_trackers_and_fonts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "matplotlib")
    assert [f.level for f in doctor.check_trackers(make())] == ["ok", "warn"]
    rendered = make("stage1.data={rendered: captions, samples: 3}")
    assert [f.level for f in doctor.check_trackers(rendered)] == ["ok", "fail"]


def test_settings_that_spoil_the_recipe(make: Make) -> None:
    finding = only(doctor.check_recipe(make("stage2.epochs=3")))
    assert finding.level == "warn"
    assert "3 epochs" in finding.found


def test_models_that_are_not_here(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = only(doctor.check_models(make(f"model.llm={tmp_path / 'nowhere'}")))
    assert finding.level == "fail"
    assert "nowhere" in finding.found
    broken = shutil.copytree(resolve("embedded:tiny-lm"), tmp_path / "broken")
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    *_, finding = run_checks({"model": doctor.check_models}, make(f"model.llm={broken}"))
    assert (finding.level, "model.safetensors: its weights cannot be read" in finding.found) == ("fail", True)
    (broken / "model.safetensors").unlink()
    assert {f.check: f.level for f in doctor.check_models(make(f"model.llm={broken}"))}[
        "weights"
    ] == "ok"  # the encoder's
    assert any("no weights on this machine" in f.found for f in doctor.check_models(make(f"model.llm={broken}")))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    case = make("model.llm=someone/model")
    finding = only(doctor.check_models(case))
    assert finding.level == "fail"
    assert "someone/model not in the cache" in finding.found
    assert [
        f.level for f in (*doctor.check_index(case), *doctor.check_shared_memory(case), *doctor.check_disk(case))
    ] == ["warn"] * 3


def test_memory_that_is_too_small(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a control group of the kernel's own file formats; the two models of 2.8 M numbers in fp32 take 22 MB."""
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("80000000\n")
    (tmp_path / "memory.stat").write_text("anon 70000000\ninactive_file 10000000\n")
    for limit, level in ((90_000_000, "fail"), (100_000_000, "ok")):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert {f.check: f.level for f in doctor.check_models(make())}["memory"] == level


def test_shared_memory_and_disk_that_are_too_small(make: Make) -> None:
    """The run asks for more than any machine has."""
    assert only(doctor.check_shared_memory(make("workers=2"))).level == "ok"
    assert only(doctor.check_shared_memory(make("workers=0"))).level == "ok"
    finding = only(doctor.check_shared_memory(make("workers=1000000000")))
    assert (finding.level, "fewer workers" in finding.remedy) == ("fail", True)
    assert only(doctor.check_disk(make())).level == "ok"
    finding = only(doctor.check_disk(make("keep_checkpoints=1000000000")))
    assert (finding.level, "lower keep_checkpoints" in finding.remedy) == ("fail", True)
    assert only(doctor.check_output(make())).level == "ok"
    unwritable = doctor.Case(make().config, Path("/proc/run"))
    assert "choose another --output" in only(doctor.check_output(unwritable)).remedy
    make().output.write_text("a file")
    assert only(doctor.check_output(make())).level == "fail"


def test_the_memory_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    whole = doctor.free_memory()
    assert whole > 1e6
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 350\ninactive_file 250\n")
    assert doctor.free_memory() == 650, "a cache of files gives way"
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.free_memory() == pytest.approx(whole, rel=0.5)
    monkeypatch.setattr(doctor, "MEMORY", tmp_path / "none")
    assert doctor.free_memory() >= 0.9 * whole, "elsewhere than on Linux: all that there is"


def test_data_that_is_missing_empty_or_broken(make: Make, tmp_path: Path) -> None:
    assert [f.level for f in doctor.check_data(make())] == ["ok", "ok"]
    (tmp_path / "3.png").write_bytes(b"no image")
    first, _ = doctor.check_data(make())
    assert (first.level, "3 of 4" in first.found, "3.png" in first.found) == ("fail", True, True)
    (tmp_path / "empty.json").write_text("[]")
    first, second = doctor.check_data(make(f"stage1.data.path={tmp_path / 'empty.json'}", "stage2.data.path=no.json"))
    assert (first.level, second.level) == ("fail", "fail")
    assert "no.json: no such file" in second.found


def test_an_index_of_other_settings(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run" / "stage2" / "index.parquet"
    config = str(tmp_path / "config.yaml")
    case = make()
    assert main(["index", str(tmp_path / "data.json"), "--config", config, "--out", str(out), "--workers", "1"]) == 0
    first, second = doctor.check_index(case)
    assert (first.level, "none at" in first.found) == ("ok", True)
    assert (second.level, "4 of 4" in second.found) == ("ok", True)
    _, other = doctor.check_index(make("model.grid=3x3", "stage2.max_length=900"))
    assert other.level == "warn"
    assert "another pinpoints, max_length" in other.found
    out.write_bytes(b"PAR1")
    _, broken = doctor.check_index(case)
    assert (broken.level, broken.remedy) == ("warn", "the run rebuilds it")

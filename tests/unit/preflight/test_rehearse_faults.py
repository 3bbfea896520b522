"""`anyres rehearse` names each planted fault that would stop a real run before it trains anything."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from replicas import CLIP, MISTRAL, VICUNA_7B, build_replica

from anyres_vlm.cli.main import main
from anyres_vlm.config import RunConfig, load_config, shipped_config
from anyres_vlm.preflight.doctor import checkpoint_bytes
from anyres_vlm.preflight.machine import Finding
from anyres_vlm.preflight.rehearse import Rehearsal

BEFORE_TRAINING = ("installation", "output", "deepspeed", "bases", "stage1 data", "stage2 data", "replica")
RECORDS = 20
Plant = Callable[["Run"], None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, place in ((VICUNA_7B, "llm"), (CLIP, "clip"), (MISTRAL, "mistral")):
        build_replica(name, folder / place)
    return folder


class Run:
    """A valid run in its own folder; faults change its files and settings."""

    def __init__(self, folder: Path, bases: Path) -> None:
        self.folder, self.output = folder, folder / "run"
        shutil.copytree(bases, folder / "bases")
        self.llm, self.clip = folder / "bases" / "llm", folder / "bases" / "clip"
        (folder / "images").mkdir()
        for number in range(RECORDS):
            Image.new("RGB", (40 + number, 30)).save(folder / "images" / f"{number}.png")
        self.records = [
            {
                "id": str(number),
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "a star"},
                ],
            }
            for number in range(RECORDS)
        ]
        self.settings: dict[str, Any] = {
            "model.llm": str(self.llm),
            "model.encoder.name": str(self.clip),
            "stage1.deepspeed": "zero2",
            "stage2.deepspeed": "zero3",
            "precision": "bf16",
            "model.template": "vicuna_v1",
        }
        for stage in ("stage1", "stage2"):
            data = {"path": str(folder / "data.json"), "images": str(folder / "images")}
            self.settings[f"{stage}.data"] = data

    def config(self) -> RunConfig:
        return load_config(shipped_config("tiny"), self.words())

    def words(self) -> list[str]:
        (self.folder / "data.json").write_text(json.dumps(self.records))
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]

    def findings(self) -> list[Finding]:
        """Return the findings of all steps before the training."""
        rehearsal = Rehearsal(self.config(), self.output, self.folder / "work")
        rehearsal.steps = {name: rehearsal.steps[name] for name in BEFORE_TRAINING}
        return [one.finding for one in rehearsal.run()]

    def edit(self, file: Path, **changes: Any) -> None:
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | changes))

    def preset(self, content: object) -> None:
        path = self.folder / "preset.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        self.settings["stage2.deepspeed"] = str(path)


@pytest.fixture
def run(tmp_path: Path, bases: Path) -> Run:
    return Run(tmp_path, bases)


def test_a_sound_run_has_no_fault(run: Run) -> None:
    assert [finding for finding in run.findings() if finding.level == "fail"] == []
    assert not run.output.exists(), "the folder of the real run stays as it was"


def contradicting_preset(run: Run) -> None:
    run.preset({"gradient_clipping": 2.0, "zero_optimization": {"stage": 2}})


def preset_of_other_precision(run: Run) -> None:
    run.preset({"bf16": {"enabled": False}, "zero_optimization": {"stage": 2}})


def missing_preset(run: Run) -> None:
    run.settings["stage2.deepspeed"] = "zero9"


def preset_not_json(run: Run) -> None:
    run.preset("{stage: 2}")


def template_that_cannot_be_written(run: Run) -> None:
    run.settings["model.template"] = "chatml"


def no_template_of_its_own(run: Run) -> None:
    run.settings["model.template"] = "chat_template"


def template_that_refuses_assistants(run: Run) -> None:
    run.settings["model.template"] = "chat_template"
    jinja = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}{% endfor %}"
    run.edit(run.llm / "tokenizer_config.json", chat_template=jinja)


def broken_images(run: Run) -> None:
    for number in range(3):
        (run.folder / "images" / f"{number}.png").write_bytes(b"no picture")


def missing_images(run: Run) -> None:
    run.settings["stage2.data"]["images"] = str(run.folder / "elsewhere")


def too_long(run: Run) -> None:
    run.settings["stage1.max_length"] = 8


def no_answers(run: Run) -> None:
    for record in run.records[:5]:
        del record["conversations"][1]


def no_records(run: Run) -> None:
    run.records.clear()


def missing_data(run: Run) -> None:
    run.settings["stage2.data"]["path"] = str(run.folder / "nothing.json")


def file_in_place_of_the_output(run: Run) -> None:
    run.output.write_text("")


def tokenizer_of_another_model(run: Run) -> None:
    run.edit(run.llm / "config.json", vocab_size=100)


def unknown_folder(run: Run) -> None:
    run.settings["model.llm"] = str(run.folder / "nowhere")


def corrupted_tokenizer(run: Run) -> None:
    run.settings["model.llm"] = str(run.folder / "bases" / "mistral")
    (run.folder / "bases" / "mistral" / "tokenizer.json").write_text('{"model": ')


def tile_off_the_patch(run: Run) -> None:
    run.settings["model.encoder"] = {"kind": "timm", "name": "test_vit", "tile": 100}


def capped_logits(run: Run) -> None:
    run.edit(run.llm / "config.json", model_type="gemma2", final_logit_softcapping=30.0)


def unknown_model_type(run: Run) -> None:
    run.edit(run.llm / "config.json", model_type="llama9")


def missing_tracker(run: Run) -> None:
    run.settings["trackers"] = ["wandb"]


def no_weights(run: Run) -> None:
    for file in run.llm.glob("*.bin"):
        file.unlink()


def missing_shard(run: Run) -> None:
    sorted(run.llm.glob("*.bin"))[-1].unlink()


def layer_beyond_the_depth(run: Run) -> None:
    run.settings["model.encoder.layer"] = 30


def no_encoder_config(run: Run) -> None:
    (run.clip / "config.json").unlink()


FAULTS: dict[Plant, str] = {
    contradicting_preset: r"stage2: --deepspeed .*gradient_clipping is 2\.0, the run has stage2.max_grad_norm=1",
    preset_of_other_precision: r"bf16\.enabled is False, the run has precision=bf16",
    missing_preset: "zero9: expected a JSON file or one of zero1",
    preset_not_json: "cannot be read as JSON",
    template_that_cannot_be_written: "template chatml ends answers with '<|im_end|>', which is not a token",
    no_template_of_its_own: "this llm's tokenizer has no chat template",
    template_that_refuses_assistants: "users only",
    broken_images: "3 rejects \\(unreadable_image 3\\), the limit is max_bad_fraction=0.01",
    missing_images: "20 rejects \\(missing_file 20\\)",
    too_long: "20 rejects \\(too_long 20\\)",
    no_answers: "5 rejects \\(no_answer 5\\)",
    no_records: "contains no records",
    missing_data: "nothing.json",
    file_in_place_of_the_output: "Not a directory",
    tokenizer_of_another_model: "tokens, the embedding 100 rows",
    unknown_folder: "nowhere: no such folder",
    corrupted_tokenizer: "mistral.*tokenizer",
    tile_off_the_patch: "100 pixels is not a multiple of the patch size of 16",
    capped_logits: "caps or scales the logits of its head",
    unknown_model_type: "llama9",
    missing_tracker: "wandb is not installed",
    no_weights: "is missing: download the complete model again",
    missing_shard: "is missing: download the complete model again",
    layer_beyond_the_depth: "layer 30: the encoder has 3 layers",
    no_encoder_config: "config.json",
}


@pytest.mark.parametrize(("plant", "expected"), FAULTS.items(), ids=lambda one: getattr(one, "__name__", ""))
def test_a_planted_fault_is_named(run: Run, plant: Plant, expected: str) -> None:
    plant(run)
    failures = [finding.found for finding in run.findings() if finding.level == "fail"]
    assert any(re.search(expected, line) for line in failures), failures
    assert len(failures) <= 2, "one fault is not reported over and over"


def test_too_little_disk(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(run.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=100_000))
    (failure,) = [finding for finding in run.findings() if finding.level == "fail"]
    assert re.search(r"2 checkpoints per stage and two models take about \S+ MB; 0 MB free at", failure.found)


def test_disk_is_counted_from_the_real_model_and_what_is_there_already(run: Run) -> None:
    """Checkpoints have 12 bytes per trained parameter and nothing of frozen ones."""
    rehearsal = Rehearsal(run.config(), run.output, run.folder / "work")
    found = [finding.found for finding in rehearsal.steps["bases"]() if finding.check == "disk"]
    assert len(found) == 1
    sizes = {"vision_tower": 1000, "language_model": 10_000, "multi_modal_projector": 100, "image_newline": 10}
    assert checkpoint_bytes(rehearsal.config, "stage1", sizes) == 12 * 110
    assert checkpoint_bytes(rehearsal.config, "stage2", sizes) == 12 * 10_110


def test_missing_sentencepiece(run: Run) -> None:
    """In a process that cannot import it; the tokenizer of Vicuna is a SentencePiece model alone."""
    script = "import sys; sys.modules['sentencepiece'] = None; from anyres_vlm.cli.main import main; sys.exit(main())"
    words = [word for setting in run.words() for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-c", script, "rehearse", "--output", str(run.output), *words], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "needs sentencepiece: pip install sentencepiece" in done.stdout
    assert "skipped: needs the replica" in done.stdout


def test_all_independent_faults_are_named_in_one_call(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for plant in (missing_preset, missing_data, file_in_place_of_the_output, unknown_folder, missing_tracker):
        plant(run)
    words = [word for setting in run.words() for word in ("--set", setting)]
    assert main(["rehearse", "--output", str(run.output), *words]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("would stop the run: ")]
    assert len(lines) == 5
    for plant in (missing_preset, missing_data, file_in_place_of_the_output, unknown_folder, missing_tracker):
        assert any(re.search(FAULTS[plant], line) for line in lines)


def test_a_wrong_config_is_a_line_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rehearse", "--set", "stage2.capacity=512"]) == 1
    assert "would stop the run: config: " in (out := capsys.readouterr().out)
    assert "capacity=512 is below max_length=1024" in out
    assert main(["rehearse", "--images", "here"]) == 2

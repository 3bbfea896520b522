"""A stage that was finished and is asked for more, or whose data changed: trained further, or refused in words."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from killable import Killed, train_here
from safetensors.torch import load_file, save_file

from anyres_vlm.checkpoints.load_save import load_pretrained
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.synthetic.dataset import write_dataset
from anyres_vlm.train import checkpoint
from anyres_vlm.train.checkpoint import checkpoint_path, latest, read_finished
from anyres_vlm.train.engine.plain import PlainBackend
from anyres_vlm.train.metrics import read_metrics
from anyres_vlm.train.options import RunOptions
from anyres_vlm.train.recipe import rate_factor


def run(
    bases: Path, output: Path, *more: str, stages: Sequence[str] = ("stage1",), steps: int | None = None, killed=None
) -> None:
    settings = [
        f"model.llm={bases}/llm",
        f"model.encoder.name={bases}/vit",
        "stage1.data.samples=90",
        "stage2.data.samples=70",
        "stage1.max_length=512",
        "stage1.capacity=512",
        "stage2.capacity=1024",
        "stage1.packs_per_step=2",
        "stage2.packs_per_step=2",
        "save_every=100",
        *more,
    ]
    train_here(settings, RunOptions(output, tuple(stages), max_steps=steps), killed)


def rows(output: Path, stage: str = "stage1") -> list[dict[str, float]]:
    return read_metrics(output / stage / "metrics.jsonl")


def model(output: Path, stage: str = "stage1") -> dict[str, torch.Tensor]:
    return load_file(output / stage / "model" / "model.safetensors")


def test_more_steps_train_on_under_the_schedule_of_the_new_total(tiny_bases, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    run(tiny_bases, tmp_path, steps=2)
    first, before = rows(tmp_path), model(tmp_path)
    run(tiny_bases, tmp_path, steps=2)
    assert "stage1 is finished after 2 steps" in caplog.messages[-1]
    run(tiny_bases, tmp_path, steps=5)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert found[:2] == first
    rates = [2e-3 * rate_factor(step, 5, 0.03, 0.0) for step in (2, 3, 4)]
    assert [row["train/learning_rate"] for row in found[2:]] == pytest.approx(rates)
    lines = [message for message in caplog.messages if "learning rate follows" in message]
    assert lines == [
        "stage1: 2 steps were planned before, 5 now: from step 3 on, the learning rate follows the schedule of 5"
    ]
    assert not torch.equal(model(tmp_path)["image_newline"], before["image_newline"])
    record = read_finished(tmp_path / "stage1")
    assert record is not None
    assert record.steps == 5
    run(tiny_bases, tmp_path, steps=4)
    assert "stage1 is finished after 5 steps" in caplog.messages[-1]
    assert len(rows(tmp_path)) == 5


def test_a_kill_while_training_further_changes_nothing(tiny_bases, tmp_path) -> None:
    run(tiny_bases, tmp_path / "whole", steps=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    run(tiny_bases, tmp_path / "whole", steps=5)
    for killed, save_every in ((3, 100), (5, 4)):  # before any new checkpoint, and after one
        with pytest.raises(Killed):
            run(tiny_bases, tmp_path / "killed", f"save_every={save_every}", steps=5, killed=killed)
    run(tiny_bases, tmp_path / "killed", steps=5)
    losses = [[row["train/loss"] for row in rows(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    found = model(tmp_path / "killed")
    assert all(torch.equal(found[name], tensor) for name, tensor in model(tmp_path / "whole").items())


def test_more_epochs_train_on_and_all_steps_are_the_end(tiny_bases, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    run(tiny_bases, tmp_path)
    count = len(rows(tmp_path))
    run(tiny_bases, tmp_path, steps=1000)
    assert f"stage1 is finished after {count} steps" in caplog.messages[-2]
    assert caplog.messages[-1] == "stage1: its data has no more steps: raise stage1.epochs (now 1)"
    run(tiny_bases, tmp_path, "stage1.epochs=2", steps=count + 1)
    assert len(rows(tmp_path)) == count + 1
    run(tiny_bases, tmp_path, "stage1.epochs=2")
    assert len(rows(tmp_path)) > count + 1


def test_stage_2_is_trained_further_alone_and_says_when_stage_1_moved_on(tiny_bases, tmp_path, caplog) -> None:
    both = ("stage1", "stage2")
    run(tiny_bases, tmp_path, stages=both, steps=2)
    run(tiny_bases, tmp_path, stages=("stage2",), steps=4)
    assert (len(rows(tmp_path, "stage1")), len(rows(tmp_path, "stage2"))) == (2, 4)
    assert not any("stage2 was trained on" in message for message in caplog.messages)
    words = "stage2 was trained on stage 1 as it was after 2 steps, stage 1 has 3 now"
    run(tiny_bases, tmp_path, steps=3)
    assert sum(words in message for message in caplog.messages) == 1
    run(tiny_bases, tmp_path, stages=both, steps=3)
    assert sum(words in message for message in caplog.messages) == 2


def test_an_older_version_s_folder(tiny_bases, tmp_path, caplog) -> None:
    """It kept neither a record nor the last checkpoint: left as it is, and refused where more is asked."""
    caplog.set_level("INFO")
    run(tiny_bases, tmp_path, steps=3)
    (tmp_path / "stage1" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "stage1" / "checkpoints")
    run(tiny_bases, tmp_path, steps=3)
    assert "stage1 is finished after 3 steps" in caplog.messages[-1]
    with pytest.raises(UsageError, match=r"finished after 3 steps, 5 are asked for, and its last checkpoint is not"):
        run(tiny_bases, tmp_path, steps=5)
    assert (tmp_path / "stage1" / "model" / "config.json").exists()


def test_an_older_version_s_checkpoint_resumes(tiny_bases, tmp_path) -> None:
    """Its state knows nothing of the data, and lacks settings that came later."""
    run(tiny_bases, tmp_path / "whole", "save_every=2", steps=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    folder = tmp_path / "old" / "stage1"
    shutil.rmtree(folder / "model")
    (folder / "finished.json").unlink()
    shutil.rmtree(checkpoint_path(folder / "checkpoints", 4))
    state = checkpoint_path(folder / "checkpoints", 2) / "trainer" / "state.json"
    content = json.loads(state.read_text())
    del content["data"], content["stage1_steps"], content["settings"]["lora"], content["settings"]["data"]["augment"]
    state.write_text(json.dumps(content))
    run(tiny_bases, tmp_path / "old", "save_every=2", steps=4)
    assert all(torch.equal(model(tmp_path / "old")[n], tensor) for n, tensor in model(tmp_path / "whole").items())


def test_a_checkpoint_with_the_whole_model_resumes(tiny_bases, tmp_path) -> None:
    """Older releases wrote the whole model next to `trainer/`, and no weights into it."""
    run(tiny_bases, tmp_path / "whole", "save_every=2", steps=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    folder = tmp_path / "old" / "stage1"
    (folder / "finished.json").unlink()
    shutil.rmtree(checkpoint_path(folder / "checkpoints", 4))
    old = checkpoint_path(folder / "checkpoints", 2)
    trained = load_file(old / "trainer" / "weights.safetensors")
    assert {name.partition(".")[0] for name in trained} == {"multi_modal_projector", "image_newline"}
    frozen = load_file(folder / "model" / "model.safetensors")
    save_file({**frozen, **trained}, old / "model.safetensors")
    (old / "trainer" / "weights.safetensors").unlink()
    shutil.rmtree(folder / "model")
    run(tiny_bases, tmp_path / "old", "save_every=2", steps=4)
    assert all(torch.equal(model(tmp_path / "old")[n], tensor) for n, tensor in model(tmp_path / "whole").items())


def test_a_checkpoint_is_no_model_until_its_stage_is_ended_there(tiny_bases, tmp_path) -> None:
    run(tiny_bases, tmp_path / "whole", "save_every=2", steps=5)
    with pytest.raises(Killed):
        run(tiny_bases, tmp_path / "run", "save_every=2", steps=5, killed=4)
    folder = tmp_path / "run" / "stage1"
    while (found := latest(folder / "checkpoints")) is None:
        pass
    words = f"{found[0]}: holds only what resumes its run, not a model: .* --max-steps {found[1].step} to end"
    with pytest.raises(DataError, match=words) as caught:
        load_pretrained(found[0])
    assert "\n" not in str(caught.value)
    run(tiny_bases, tmp_path / "run", "save_every=2", steps=found[1].step)
    load_pretrained(folder / "model")
    run(tiny_bases, tmp_path / "run", "save_every=2", steps=5)  # trained further, it is the undisturbed run
    assert rows(tmp_path / "run")[-1]["train/loss"] == rows(tmp_path / "whole")[-1]["train/loss"]


def test_one_copy_of_the_state_at_a_time(tiny_bases, tmp_path, monkeypatch) -> None:
    """A snapshot is taken when the checkpoint before it is complete, and the model is gathered after the last one."""
    events: list[str] = []
    write, snapshot, weights = checkpoint.write_folder, PlainBackend.snapshot, PlainBackend.weights

    def write_slowly(folder, fill) -> None:
        if folder.name.startswith("step-"):
            time.sleep(0.5)
        write(folder, fill)
        if folder.name.startswith("step-"):
            events.append("written")

    monkeypatch.setattr(checkpoint, "write_folder", write_slowly)
    monkeypatch.setattr(PlainBackend, "snapshot", lambda self: (events.append("copy"), snapshot(self))[1])
    monkeypatch.setattr(PlainBackend, "weights", lambda self: (events.append("model"), weights(self))[1])
    run(tiny_bases, tmp_path, "save_every=1", steps=3)
    assert events == ["copy", "written"] * 3 + ["model"]


def test_a_checkpoint_beyond_the_steps_is_refused(tiny_bases, tmp_path) -> None:
    with pytest.raises(Killed):
        run(tiny_bases, tmp_path, "save_every=3", steps=5, killed=4)
    while latest(tmp_path / "stage1" / "checkpoints") is None:
        pass
    with pytest.raises(UsageError, match=r"is after step 3, but 2 steps are asked for"):
        run(tiny_bases, tmp_path, steps=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", "captions", 48, seed=3)


def own(data: Path) -> str:
    return f"stage1.data={json.dumps({'path': str(data), 'images': str(data.parent)})}"


def change(data: Path, kind: str) -> None:
    records = json.loads(data.read_text())
    if kind == "grown":
        records += [{**record, "id": f"again-{record['id']}"} for record in records[:3]]
    else:
        answer = records[0]["conversations"][1]
        words = answer["value"].split(" ")
        answer["value"] = " ".join(reversed(words))  # as long as before
    data.write_text(json.dumps(records))


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("grown", "the data changed: 48 records before, 51 now"),
        ("edited", "the content of the data changed: 48 records as before"),
    ],
)
def test_changed_data_is_refused_in_words(tiny_bases, tmp_path, data, kind: str, words: str, is_finished: bool) -> None:
    if is_finished:
        run(tiny_bases, tmp_path / "run", own(data), steps=2)
    else:
        with pytest.raises(Killed):
            run(tiny_bases, tmp_path / "run", own(data), "save_every=1", steps=3, killed=3)
    text = data.read_text()
    change(data, kind)
    for steps in (2, 3) if is_finished else (3,):
        with pytest.raises(UsageError, match=words) as caught:
            run(tiny_bases, tmp_path / "run", own(data), steps=steps)
        assert "\n" not in str(caught.value)
    data.write_text(text)
    run(tiny_bases, tmp_path / "run", own(data), steps=3)
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": "5"}', '{"steps": 1.5, "available": 3, "epochs": 1}'])
def test_a_broken_record_is_named(tmp_path, content: str) -> None:
    (tmp_path / "finished.json").write_text(content)
    with pytest.raises(DataError, match=r"finished\.json: broken .*: delete it"):
        read_finished(tmp_path)


def test_a_finished_stage_without_its_data_stays_finished(tiny_bases, tmp_path, data, caplog) -> None:
    caplog.set_level("INFO")
    run(tiny_bases, tmp_path / "run", own(data), steps=2)
    data.unlink()
    run(tiny_bases, tmp_path / "run", own(data), steps=2)
    assert "stage1 is finished after 2 steps" in caplog.messages[-1]


def test_every_changed_setting_is_named(tiny_bases, tmp_path) -> None:
    run(tiny_bases, tmp_path, steps=1)
    words = r"stage1\.learning_rate: 0\.002 before, 0\.001 now; stage1\.warmup_ratio: 0\.03 before, 0\.1 now"
    with pytest.raises(UsageError, match=r"model\.grid: '2x2' before, '3x3' now; " + words):
        run(tiny_bases, tmp_path, "model.grid=3x3", "stage1.learning_rate=1e-3", "stage1.warmup_ratio=0.1", steps=1)

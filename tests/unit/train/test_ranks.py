"""Ranks from srun's variables, and which errors mean that another rank is lost."""

from __future__ import annotations

import os

import pytest
from accelerate.state import AcceleratorState
from torch.distributed import DistStoreError

from anyres_vlm.errors import RankLost
from anyres_vlm.train.engine.engine import Engine
from anyres_vlm.train.engine.ranks import adopt_slurm_ranks, first_host, telling_lost_ranks

STEP = {
    "SLURM_JOB_ID": "123457",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is taken back behind the test
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-010,12],cpu1", "gpu007"),
        ("a-[3,5-6].cluster", "a-3.cluster"),
        ("rack[1-2]n[04-05]", "rack1n04"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_srun_s_variables_make_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1234")  # the user's own stays
    adopt_slurm_ranks()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["9", "1", "16", "gpu007", "1234"]


@pytest.mark.parametrize(
    "others", [{"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, {**STEP, "RANK": "3"}]
)
def test_a_batch_script_and_a_launcher_are_left_alone(monkeypatch: pytest.MonkeyPatch, others: dict[str, str]) -> None:
    for name, value in others.items():
        monkeypatch.setenv(name, value)
    adopt_slurm_ranks()
    assert os.environ.get("RANK") == others.get("RANK")
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize("error", [RuntimeError("[/a/gloo/pair.cc:1] Connection closed\nby peer"), DistStoreError("x")])
def test_lost_ranks_are_told_in_one_line(error: RuntimeError) -> None:
    told = r"rank_timeout_minutes=5: .*resume from the newest checkpoint"
    with pytest.raises(RankLost, match=told) as caught, telling_lost_ranks(5):
        raise error
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="mat1"), telling_lost_ranks(5):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_gradients_are_views_of_the_buckets_that_ranks_exchange() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = Engine.start("fp32", rank_timeout_minutes=1)
    assert engine._accelerator.ddp_handler.gradient_as_bucket_view
    engine.close()

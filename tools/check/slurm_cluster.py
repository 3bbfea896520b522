"""A Slurm cluster on one machine: a controller and nodes, each node in its own namespaces with its own address."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from textwrap import dedent

NETWORK = "10.77.0"  # inside a private network namespace, so the machine may use it as well
CONTROLLER = "controller"
START_S, GRACE_S = 60, 120
# SlurmdTimeout: seconds until a silent node counts as dead. cred_expire: seconds that a requeued job waits.
CONFIG = """
    ClusterName=toy
    SlurmctldHost={controller}({network}.1)
    AuthType=auth/munge
    CryptoType=crypto/munge
    AuthInfo=socket={folder}/munge.socket,cred_expire=5
    SlurmUser=root
    StateSaveLocation={folder}/state
    SlurmdSpoolDir={folder}/spool-%n
    SlurmctldPidFile={folder}/slurmctld.pid
    SlurmdPidFile={folder}/slurmd-%n.pid
    ProctrackType=proctrack/linuxproc
    TaskPlugin=task/none
    MpiDefault=none
    SelectType=select/cons_tres
    SelectTypeParameters=CR_Core
    PreemptType=preempt/partition_prio
    PreemptMode=REQUEUE
    JobRequeue=1
    ReturnToService=2
    SlurmdTimeout=10
    KillWait=5
    GresTypes=gpu
    SlurmdParameters=config_overrides
    NodeName={nodes} CPUs=1 Gres=gpu:1
    PartitionName=normal Nodes={nodes} Default=YES PriorityTier=1 GraceTime={grace}
    PartitionName=urgent Nodes={nodes} PriorityTier=2 PreemptMode=OFF
"""


class SlurmCluster:
    """A cluster with its files in `folder`, whose process runs in private namespaces; everything ends with these."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self) -> None:
        """Start controller and nodes. Raises `RuntimeError` if the nodes are not idle after a minute."""
        self._configure()
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "bridge", "type", "bridge")
        run("ip", "address", "add", f"{NETWORK}.1/24", "dev", "bridge")
        run("ip", "link", "set", "bridge", "up")
        run("hostname", CONTROLLER)
        run("mount", "--bind", str(self.folder / "hosts"), "/etc/hosts")
        munge = [f"--socket={self.folder}/munge.socket", f"--key-file={self.folder}/munge.key"]
        munge += [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")]
        run("munged", "--force", *munge)
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Wait until every node is idle."""
        deadline = time.monotonic() + START_S
        while self._states() != {"idle"}:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the nodes are {self._states() or 'unknown'}, expected idle: see {self.folder}")
            time.sleep(1)

    def start_node(self, node: str) -> None:
        """Start a node unless it is running."""
        if node in self._running:
            return
        address = f"{NETWORK}.{10 + self.nodes.index(node)}"
        # The shell is the first process of the node: it adopts orphans, and all processes end with it.
        setup = f"mount -t tmpfs tmpfs /dev/shm; hostname {node}"
        linked = "until ip address show up dev eth0 | grep -q inet; do sleep 0.1; done"
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = self._daemon(node, *unshare, "bash", "-c", f"{setup}; {linked}; slurmd -D; wait")
        enter = ["nsenter", f"--target={process.pid}", "--net"]
        deadline = time.monotonic() + START_S
        while os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run("ip", "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        run("ip", "link", "set", node, "master", "bridge", "up")
        run(*enter, "ip", "link", "set", "lo", "up")
        run(*enter, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        run(*enter, "ip", "link", "set", "eth0", "up")

    def kill_node(self, node: str) -> None:
        """Kill every process of a node at once."""
        self._running[node].kill()
        self._running.pop(node).wait()

    def submit(self, *words: str) -> str:
        """Submit a job and return its number."""
        return run("sbatch", "--parsable", *words).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what the controller reports about a job, by key."""
        words = run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _states(self) -> set[str]:
        return set(run("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%t").split())

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munged refuses a folder that others can write to
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        addresses = {CONTROLLER: 1, **{node: 10 + place for place, node in enumerate(self.nodes)}}
        lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{place} {name}" for name, place in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        names = ",".join(self.nodes)
        text = CONFIG.format(controller=CONTROLLER, network=NETWORK, folder=self.folder, nodes=names, grace=GRACE_S)
        (self.folder / "slurm.conf").write_text(dedent(text))
        run("mknod", str(self.folder / "gpu0"), "c", "1", "3")  # stands for a GPU, so Slurm sets the same variables
        (self.folder / "gres.conf").write_text(f"NodeName={names} Name=gpu File={self.folder}/gpu0\n")

    def _daemon(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self._running[name]


def run(*command: str) -> str:
    """Return the output of a command. Raises `RuntimeError` with its error message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout

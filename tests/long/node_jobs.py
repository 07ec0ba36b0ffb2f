"""Runs the command lines of the jobs in docs/nodes/ here, on tiny models.

    python -m tests.long.node_jobs

`srun` and `scontrol` are stand-ins that start all tasks on this machine. The numbers of
nodes and ranks are smaller than in the files. Takes some minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.families import read_model
from tests.long.rank_jobs import Place, free_port, place
from tests.oracle import assert_same_states

JOBS = Path(__file__).parents[2] / "docs" / "nodes"
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
for (( task = 0; task < SLURM_NTASKS; task++ )); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  started+=($!)
done
for task in "${started[@]}"; do wait "$task" || exit 1; done
"""


def kubernetes() -> list[str]:
    """The command of a pod."""
    _, job = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command: list[str] = container["command"]
    return command


def skypilot() -> str:
    """The script that runs on each node."""
    script: str = yaml.safe_load((JOBS / "skypilot.yaml").read_text())["run"]
    return script


def _run(commands: list[list[str]], folder: Path, **env: str) -> None:
    """Run commands at once, one for each node."""
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
    common = {**os.environ, "PATH": path + os.environ["PATH"], **env}
    common |= {"MERGEKIT_METAGPT_CACHE": "0", "HF_HUB_OFFLINE": "1"}
    started = [subprocess.Popen(command, env=common) for command in commands]
    assert [process.wait() for process in started] == [0] * len(started)


def _changed(text: str, changes: Mapping[str, str]) -> str:
    for old, new in changes.items():
        assert old in text, f"{old} is not in {text}"
        text = text.replace(old, new)
    return text


def run_all(found: Place) -> None:
    """Merge by all three jobs; compare with one process."""
    config = found.config()
    reference = found.alone()
    tools = found.folder / "tools"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/bash\necho 127.0.0.1"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    no_tokenizer = {"--resume": "--resume --no-copy-tokenizer"}  # the models have none
    here = {"/shared/config.yml": str(config), "/shared/merged": str(found.out)}

    def slurm() -> None:
        script = _changed((JOBS / "slurm.sh").read_text(), no_tokenizer)
        (tools / "slurm.sh").write_text(script)
        tasks = {
            "SLURM_JOB_ID": "4711",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
        }
        tasks |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "n[1-2]"}
        command = ["bash", str(tools / "slurm.sh"), str(config), str(found.out)]
        _run([command], tools, **tasks)

    def pods() -> None:
        line = _changed(
            "\n".join(kubernetes()),
            {
                "nnodes=4": "nnodes=2",
                "nproc-per-node=8": "nproc-per-node=1",
                "merge-0.merge": "127.0.0.1",
                "29511": str(free_port()),
                **here,
            },
        )
        nodes = [line.replace("$(JOB_COMPLETION_INDEX)", index) for index in "01"]
        commands = [[*node.split("\n"), "--no-copy-tokenizer"] for node in nodes]
        _run(commands, tools, OMP_NUM_THREADS="1")

    def cloud() -> None:
        changes = {"nproc-per-node=8": "nproc-per-node=1", "29511": str(free_port())}
        script = _changed(skypilot(), {**changes, **here, **no_tokenizer})
        numbers = "export SKYPILOT_NUM_NODES=2 SKYPILOT_NODE_RANK="
        commands = [["bash", "-euc", f"{numbers}{rank}\n{script}"] for rank in "01"]
        _run(commands, tools, SKYPILOT_NODE_IPS="127.0.0.1\n127.0.0.2")

    for job in (slurm, pods, cloud):
        with found.work():
            job()
            assert_same_states(read_model(found.out), reference)
        print(f"{job.__name__}: the same tensors", flush=True)


if __name__ == "__main__":
    with place() as made:
        run_all(made)

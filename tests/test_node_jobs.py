"""The jobs in docs/nodes/ can be read, and what they start is a command of ours."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import yaml

from mergekit_metagpt.commands import cli
from tests.long.node_jobs import JOBS, kubernetes, skypilot


def scripts() -> dict[str, str]:
    """The shell text of each job."""
    return {
        "slurm.sh": (JOBS / "slurm.sh").read_text(),
        "kubernetes.yaml": shlex.join(kubernetes()),
        "skypilot.yaml": skypilot(),
    }


def test_all_jobs_are_tested() -> None:
    assert {path.name for path in JOBS.iterdir()} == scripts().keys()


@pytest.mark.parametrize("name", scripts())
def test_a_job_is_right_as_far_as_can_be_seen_without_running_it(name: str) -> None:
    text = scripts()[name]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    words = shlex.split(re.search(r"mergekit-metagpt (.*)", text)[1])  # type: ignore[index]
    command = cli._merge_command() if words[0] == "merge" else None
    assert command is not None and words[-1] == "--resume"
    arguments = ["config.yml", "out"] if words[1] == "$@" else words[1:-1]
    assert command.make_context("merge", [*arguments, "--resume"]).params["resume"]


def test_a_pod_for_each_node() -> None:
    service, job = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text())
    spec = job["spec"]
    assert f"--nnodes={spec['completions']}" in kubernetes()
    assert spec["parallelism"] == spec["completions"]
    name = service["metadata"]["name"]
    assert spec["template"]["spec"]["subdomain"] == name
    assert f"--master-addr={job['metadata']['name']}-0.{name}" in kubernetes()

"""Fresh Python processes: code or a console script in, what it printed out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import mergekit_metagpt

PACKAGE = Path(mergekit_metagpt.__file__).parent
LIMIT_S = 180

SWITCHES = (
    "MERGEKIT_METAGPT_AUTOLOAD",
    "MERGEKIT_METAGPT_QUIET",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "PYTHONPATH",
)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without our switches, offline, with the changes."""
    kept = {key: value for key, value in os.environ.items() if key not in SWITCHES}
    return {**kept, "HF_HUB_OFFLINE": "1", **changes}


def run_process(
    command: Sequence[str | Path], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder that holds nothing to import.

    Returns:
        its output as text, with the carriage returns of progress bars.
    """
    done = subprocess.run(
        [str(part) for part in command],
        env=environment() if env is None else dict(env),
        cwd=sys.prefix,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT_S,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def assert_succeeded(done: subprocess.CompletedProcess[str]) -> None:
    """Check that a process ended with status 0; show what it printed if not."""
    assert done.returncode == 0, (
        f"{done.args} ended with status {done.returncode}\n{done.stdout}\n{done.stderr}"
    )


def ask_python(
    code: str,
    *,
    path: Sequence[Path] = (),
    python: str | Path = sys.executable,
    **env: str,
) -> Any:
    """Run code in a fresh interpreter and return what it passed to `answer`.

    Args:
        code: calls `answer(value)` once, with a value that JSON can hold.
        path: folders to put on PYTHONPATH.
        python: the interpreter.
        env: variables to set.
    """
    head = "def answer(value):\n    import json\n    print(json.dumps(value))\n"
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = run_process([python, "-c", head + textwrap.dedent(code)], environment(**env))
    assert_succeeded(done)
    return json.loads(done.stdout.splitlines()[-1])


def script(name: str) -> Path:
    """Path of a console script of this environment."""
    return Path(sysconfig.get_path("scripts")) / name


def merge_command(
    config: Mapping[str, Any], out: Path, *options: str
) -> list[str | Path]:
    """Write the YAML beside `out`; return the command line that merges it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f"{out.name}.yml")
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return [script("mergekit-yaml"), file, out, "--no-copy-tokenizer", *options]


def mergekit_yaml(
    config: Mapping[str, Any], out: Path, *options: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """Merge with the real `mergekit-yaml`, in a process of its own."""
    return run_process(merge_command(config, out, *options), environment(**env))


def shadow_package(folder: Path, **first_lines: str) -> Path:
    """Copy our package to `folder`, with a first line put before the code of modules.

    Args:
        folder: to be put on PYTHONPATH, where it comes before the installed package.
        first_lines: path of a module without `.py` in the package: the code to put
            after its docstring and its `from __future__`.
    """
    target = folder / PACKAGE.name
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    marker = "from __future__ import annotations\n"
    for module, line in first_lines.items():
        file = target / f"{module}.py"
        source = file.read_text()
        assert marker in source, file
        file.write_text(source.replace(marker, f"{marker}{line}\n", 1))
    return folder

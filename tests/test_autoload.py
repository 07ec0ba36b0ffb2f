"""Autoload in fresh processes: every way in, both ways out, and nothing ever broken."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import registry

import mergekit_metagpt
from mergekit_metagpt import autoload
from tests.conftest import Family
from tests.families import merge_config, read_model
from tests.oracle import assert_same_states
from tests.processes import (
    PACKAGE,
    ask_python,
    assert_succeeded,
    environment,
    merge_command,
    run_process,
    script,
    shadow_package,
)

ROOT = Path(__file__).parents[1]

# The modules that a bare `import torch`, and those that mergekit's registry, may load.
AT_TORCH = {"mergekit_metagpt", "mergekit_metagpt.autoload"}
AT_REGISTRY = AT_TORCH | {
    f"mergekit_metagpt.{name}"
    for name in (
        *("arithmetic", "arithmetic.closed_form", "arithmetic.compiled"),
        *("arithmetic.in_parts", "arithmetic.scaled_sums", "arithmetic.squared_norms"),
        *("checkpoints", "checkpoints.stored", "method", "method.advice"),
        *("method.announcing", "method.composed", "method.group_norms"),
        *("method.inputs", "method.metagpt", "method.parameters"),
        *("method.plan_watch", "method.registration", "scanning", "scanning.pools"),
    )
}
# The compiled loops, where they were built.
AT_REGISTRY.add("_mergekit_metagpt")

# What the process knows at its end; `works` merges in memory with a method of mergekit.
REPORT = """
import sys
import torch
from mergekit.merge_methods import get, merge_tensors, registered_methods

autoload = sys.modules.get("mergekit_metagpt.autoload")
two = [torch.zeros(2), torch.tensor([2.0, 4.0])]
answer(
    {
        "names": [method.spec.name for method in registered_methods()],
        "failure": autoload and autoload.failure,
        "works": merge_tensors(two, "linear", parameters={"weight": 1.0}).tolist(),
    }
)
"""

# Runs before ours: torch is not imported yet, and hooks are called in turn.
FIRST_HOOK = """
import wrapt

def first(registry):
    {body}

wrapt.register_post_import_hook(first, "mergekit.merge_methods.registry")
"""

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def said_after(code: str, **options: Any) -> dict[str, Any]:
    """Run code, then `REPORT`, in a fresh process; what it answered."""
    return ask_python(textwrap.dedent(code) + REPORT, **options)


@functools.cache
def methods_of_mergekit() -> tuple[str, ...]:
    """Names of the methods that are registered without us."""
    return tuple(said_after("", TORCH_DEVICE_BACKEND_AUTOLOAD="0")["names"])


def assert_registered(said: Mapping[str, Any]) -> None:
    """Check that metagpt came beside all of mergekit's methods, without complaint."""
    ours = [name for name in said["names"] if name.partition("_")[0] == "metagpt"]
    assert "metagpt" in ours
    assert set(said["names"]) == {*methods_of_mergekit(), *ours}
    assert said["failure"] is None
    assert said["works"] == [1.0, 2.0]


def assert_mergekit_alone(said: Mapping[str, Any], because: str) -> None:
    """Check that mergekit works without us, and that we say why when asked."""
    assert tuple(said["names"]) == methods_of_mergekit()
    assert because in (said["failure"] or ""), said["failure"]
    assert said["works"] == [1.0, 2.0]


# ---- ways in

IN_A_THREAD = """
import threading
thread = threading.Thread(target=__import__, args=("mergekit.merge_methods",))
thread.start()
thread.join()
"""


@pytest.mark.parametrize(
    "statements",
    [
        "import torch",
        "import mergekit.merge_methods",
        "import mergekit.merge_methods.registry",
        "import mergekit.merge_methods.base",
        "import mergekit.graph",
        "import mergekit.config",
        "import transformers; transformers.LlamaForCausalLM",
        IN_A_THREAD,
        # Our own API first.
        "from mergekit_metagpt import coefficients, scan",
        "from mergekit_metagpt import register",
        "import mergekit_metagpt; mergekit_metagpt.register()",
    ],
)
def test_every_order_of_imports_registers(statements: str) -> None:
    assert_registered(said_after(statements))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_module_of_ours_can_come_first() -> None:
    """Whatever of ours starts mergekit's import, `register` leaves metagpt there."""
    modules = sorted(
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in PACKAGE.rglob("[a-z]*.py")
    )
    said = ask_python(
        f"""
        import importlib, os, torch
        import peft, transformers  # once, as they take longest

        failed = []
        for module in {modules}:
            child = os.fork()
            if not child:
                try:
                    importlib.import_module(module)
                    importlib.import_module("mergekit_metagpt").register()
                    from mergekit.merge_methods import get
                    os._exit(get("metagpt").spec.name != "metagpt")
                finally:
                    os._exit(1)
            if os.waitpid(child, 0)[1]:
                failed.append(module)
        answer(failed)
        """
    )
    assert len(modules) > 10
    assert said == []


def test_console_script_shows_its_help() -> None:
    done = run_process([script("mergekit-yaml"), "--help"])
    assert_succeeded(done)
    assert "--multi-gpu" in done.stdout
    assert done.stderr == ""


# ---- ways out

TWICE = """
import sys
from mergekit.scripts.run_yaml import main

def merge():
    main.main(sys.argv[1:], standalone_mode=False)

try:
    merge()
except RuntimeError as error:
    said = str(error)
import mergekit_metagpt
import mergekit_metagpt.autoload

failure = mergekit_metagpt.autoload.failure
mergekit_metagpt.register()
merge()
answer([said, failure])
"""


@pytest.mark.parametrize(
    "switch", ["MERGEKIT_METAGPT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"]
)
def test_off_switch(switch: str, family: Family, tmp_path: Path) -> None:
    config = merge_config(family.base, family.models[:1])
    out = tmp_path / "out"
    arguments = [str(part) for part in merge_command(config, out, "--quiet")[1:]]
    code = f"import sys\nsys.argv[1:] = {arguments}\n{TWICE}"
    said, failure = ask_python(code, **{switch: "0"})
    assert "Unimplemented merge method metagpt" in said
    assert f"{switch}=0" in failure
    assert_same_states(read_model(out), family.states[0])


def test_off_switch_is_off() -> None:
    assert_registered(said_after("", MERGEKIT_METAGPT_AUTOLOAD="1"))


# ---- broken surroundings


def test_without_mergekit() -> None:
    code = """
        import torch
        import mergekit_metagpt

        four = torch.tensor([1.0, 3.0], dtype=torch.float64)
        try:
            mergekit_metagpt.register()
        except ImportError as error:
            answer([str(error), mergekit_metagpt.coefficients(four).tolist()])
        """
    said = ask_python(BLOCK.format(name="mergekit") + textwrap.dedent(code))
    assert said == ["No module named 'mergekit'", [0.25, 0.75]]


LACKING_BASE = """import sys, types, mergekit.merge_methods.batching
    name = "mergekit.merge_methods.base"
    base = types.ModuleType(name)
    vars(base).update(vars(sys.modules[name]))
    del base.MergeMethodSpec
    sys.modules[name] = base"""


@pytest.mark.parametrize(
    ("code", "because"),
    [
        (BLOCK.format(name="wrapt") + "import torch", "No module named 'wrapt'"),
        (FIRST_HOOK.format(body=LACKING_BASE), "import name 'MergeMethodSpec'"),
    ],
    ids=["without wrapt", "with a mergekit whose base lacks what we need"],
)
def test_in_other_surroundings(code: str, because: str) -> None:
    assert_mergekit_alone(said_after(code), because)


def test_without_wrapt_registering_works() -> None:
    code = "import mergekit_metagpt\nmergekit_metagpt.register()"
    said = said_after(BLOCK.format(name="wrapt") + code)
    assert "metagpt" in said["names"]


def test_with_another_wrapt(tmp_path: Path) -> None:
    (tmp_path / "wrapt.py").write_text("")
    said = said_after("import torch", path=[tmp_path])
    assert_mergekit_alone(said, "register_post_import_hook")


def test_with_a_mergekit_whose_base_is_broken() -> None:
    """mergekit's own error comes out as it is; torch is none the wiser."""
    code = """
        import sys
        sys.modules["mergekit.merge_methods.base"] = None
        import torch
        import mergekit_metagpt

        said = []
        for statement in "import mergekit.merge_methods", "mergekit_metagpt.register()":
            try:
                exec(statement)
            except ImportError as error:
                said.append(str(error))
        answer([torch.ones(1).item(), *said])
        """
    one, *said = ask_python(code)
    assert (one, len(said)) == (1.0, 2)
    assert all("mergekit.merge_methods.base" in message for message in said)


@pytest.mark.parametrize(
    ("module", "line", "because"),
    [
        ("method/metagpt", "def broken(:", "SyntaxError"),
        ("arithmetic/in_parts", "raise RuntimeError('worn out')", "worn out"),
    ],
)
def test_with_a_broken_module_of_ours(
    module: str, line: str, because: str, tmp_path: Path
) -> None:
    shadow = shadow_package(tmp_path, **{module: line})
    said = said_after("import torch", path=[shadow])
    assert_mergekit_alone(said, because)


def test_a_foreign_metagpt_is_left_alone() -> None:
    body = "registry._METHODS['metagpt'] = registry.get('linear')"
    code = FIRST_HOOK.format(body=body) + textwrap.dedent("""
        from mergekit.merge_methods import get
        import mergekit_metagpt

        try:
            mergekit_metagpt.register()
        except ValueError as error:
            said = str(error)
        failure = mergekit_metagpt.autoload.failure
        answer([get("metagpt").spec.name, said, failure])
        """)
    name, said, failure = ask_python(code)
    assert name == "linear"
    assert "'metagpt' is already registered" in said
    assert said in failure


# ---- import hygiene


def modules_after(statement: str, **options: Any) -> set[str]:
    """Every module that is loaded after a statement in a fresh process."""
    return set(
        ask_python(f"import sys\n{statement}\nanswer(sorted(sys.modules))", **options)
    )


@functools.cache
def modules_without_us(statement: str) -> frozenset[str]:
    return frozenset(modules_after(statement, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))


def assert_light(statement: str, ours: set[str], **options: Any) -> None:
    """Check that autoload adds only these modules of ours, wrapt and importlib's."""
    added = modules_after(statement, **options) - modules_without_us(statement)
    foreign = {
        name
        for name in added - ours
        if name.partition(".")[0] not in ("wrapt", "importlib")
    }
    assert not foreign, f"autoload loads {sorted(foreign)}"
    assert added >= AT_TORCH, "autoload did not happen"


LIGHT = {"import torch": AT_TORCH, "import mergekit.merge_methods": AT_REGISTRY}


@pytest.mark.parametrize("statement", LIGHT)
def test_imports_stay_light(statement: str) -> None:
    assert_light(statement, LIGHT[statement])


@pytest.mark.parametrize(
    ("statement", "module", "line"),
    [
        ("import torch", "__init__", "import yaml"),
        ("import mergekit.merge_methods", "method/metagpt", "import mergekit.common"),
        ("import mergekit.merge_methods", "method/announcing", "import rich"),
    ],
)
def test_a_heavy_import_is_noticed(
    statement: str, module: str, line: str, tmp_path: Path
) -> None:
    shadow = shadow_package(tmp_path, **{module: line})
    with pytest.raises(AssertionError, match=rf"loads .*{line.split()[1]}"):
        assert_light(statement, LIGHT[statement], path=[shadow])


# ---- register()


def test_registering_again_is_harmless() -> None:
    before = registry.registered_methods()
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(mergekit_metagpt.register) for _ in range(16)]:
            future.result()
    mergekit_metagpt.register(registry)
    assert registry.registered_methods() == before


def test_entry_points() -> None:
    """Both groups name what is there; today mergekit itself looks at neither."""
    (backend,) = importlib.metadata.entry_points(
        group="torch.backends", name="mergekit_metagpt"
    )
    (plugin,) = importlib.metadata.entry_points(
        group="mergekit.merge_methods", name="metagpt"
    )
    assert backend.load() is autoload.autoload
    assert plugin.load() is mergekit_metagpt.register


# ---- ways to install


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to everything that is installed here, ourselves excepted."""
    folder = tmp_path_factory.mktemp("heavy")
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    places |= {str(Path(torch.__file__).parents[1])}
    for place in sorted(places):
        for entry in Path(place).iterdir():
            name = entry.name.lower()
            ours = "mergekit_metagpt" in name or "mergekit-metagpt" in name
            if not ours and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the distribution is built from: building leaves files behind."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("mergekit_metagpt", "recipes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def pip(*arguments: str | Path, python: str | Path = sys.executable) -> str:
    """Run pip offline, with this environment's build tools; return what it prints."""
    done = run_process(
        [sys.executable, "-m", "pip", "--python", python, *arguments],
        environment(PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1"),
    )
    assert_succeeded(done)
    return done.stdout + done.stderr


def build_wheel(project: Path, folder: Path) -> list[str | Path]:
    said = pip(
        "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, project
    )
    assert "absent from the `packages`" not in said
    return [*folder.glob("*.whl")]


def build_sdist(project: Path, folder: Path) -> list[str | Path]:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run(
        [sys.executable, "-c", code], cwd=project, check=True, capture_output=True
    )
    return [*folder.glob("*.tar.gz")]


def leave_in_place(project: Path, folder: Path) -> list[str | Path]:
    return ["--editable", project]


@pytest.mark.parametrize("build", [build_wheel, build_sdist, leave_in_place])
def test_installed(build: Any, project: Path, heavy: Path, tmp_path: Path) -> None:
    """In an environment that has everything but us, each kind of install autoloads."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=os.name != "nt")
    places = {"base": home, "platbase": home}
    bin_, site = (
        Path(sysconfig.get_path(place, "venv", vars=places))
        for place in ("scripts", "purelib")
    )
    (site / "heavy.pth").write_text(f"{heavy}\n")
    (tmp_path / "dist").mkdir()
    python = bin_ / Path(sys.executable).name
    what = build(project, tmp_path / "dist")
    pip("install", "--no-deps", "--no-build-isolation", *what, python=python)
    said = said_after("", python=python)
    assert_registered(said)
    code = """
        import mergekit_metagpt
        from mergekit_metagpt.commands import shipped_recipes
        recipes = [recipe.name for recipe in shipped_recipes.recipes()]
        answer([mergekit_metagpt.__file__, recipes])
    """
    file, recipes = ask_python(code, python=python)
    found = Path(file).parent
    assert len(recipes) == len([*(ROOT / "recipes").rglob("*.yml")])
    assert found == (project if build is leave_in_place else site) / PACKAGE.name
    assert {file.name for file in found.rglob("*.py")} == {
        file.name for file in PACKAGE.rglob("*.py")
    }
    assert (bin_ / "mergekit-metagpt").exists()


def test_not_installed(heavy: Path, tmp_path: Path) -> None:
    """The environment of `test_installed` holds no other copy of us."""
    code = "import mergekit.merge_methods" + REPORT
    said = ask_python(
        f"import sys\nsys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        f"sys.path.append({str(heavy)!r})\n{code}"
    )
    assert tuple(said["names"]) == methods_of_mergekit()
    assert said["failure"] is None

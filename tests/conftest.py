"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import mergekit_metagpt
from tests.families import State, cast, llama_state, run_command, tuned, write_model
from tests.stand_ins import Shelf, shelf_in


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes, on disk and as state dicts."""

    base: Path
    models: tuple[Path, ...]
    base_state: State
    states: tuple[State, ...]


def make_family(
    folder: Path,
    *,
    count: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    sizes: tuple[float, ...] = (2e-3, 4e-3, 6e-3),
) -> Family:
    """Write a random base and `count` fine-tunes of different distances."""
    whole = llama_state()
    base = cast(whole, dtype)
    states = tuple(
        cast(tuned(whole, seed=k + 1, size=sizes[k % len(sizes)]), dtype)
        for k in range(count)
    )
    return Family(
        base=write_model(folder / "base", base, shards=shards),
        models=tuple(
            write_model(folder / f"tuned{k}", state, shards=1 + (k + shards) % 3)
            for k, state in enumerate(states)
        ),
        base_state=base,
        states=states,
    )


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Three bfloat16 fine-tunes of one base, in different shard layouts."""
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Stand-ins for the models that recipes and pages name."""
    return shelf_in(tmp_path_factory.mktemp("stand-ins"))


@dataclass(frozen=True)
class Printed:
    """What a command printed."""

    out: str
    err: str


@dataclass(frozen=True)
class Cli:
    """Runs `mergekit-metagpt` in this process and reads what it prints."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path, status: int = 0) -> Printed:
        """Run a command and check its exit status."""
        self.capsys.readouterr()
        ended = run_command(*arguments)
        printed = Printed(*self.capsys.readouterr())
        assert ended == status, printed.err
        return printed

    def refused(self, *arguments: str | Path) -> str:
        """Check for exit status 2 and one line on stderr alone; return the line."""
        printed = self(*arguments, status=2)
        assert printed.out == "" and printed.err.startswith("Error: "), printed
        (line,) = printed.err.splitlines()
        return line


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """`mergekit-metagpt` in this process."""
    return Cli(capsys)


@pytest.fixture(autouse=True)
def _registered_and_forgetful() -> Iterator[None]:
    """Have metagpt registered, and no model open from an earlier test."""
    from mergekit.io.tasks import LoaderCache

    mergekit_metagpt.register()
    LoaderCache.loaders.clear()
    yield
    LoaderCache.loaders.clear()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="no CUDA device here"
                ),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a merge may run on."""
    return torch.device(request.param)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Run torch on one thread: on busy CPUs, more make tiny operations far slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures that tests recorded, whichever process they ran in."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")

"""Trains a tiny base and specialists on generated text, merges and evaluates them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.commands.demo_text import text
from mergekit_metagpt.commands.losses import quiet_transformers

if TYPE_CHECKING:
    import torch


SPECIALTIES = ("arithmetic", "logs", "code")
STEPS = (320, 40, 60, 80)
BATCH, WINDOW = 16, 128
TRAINING_BYTES, HELD_OUT_BYTES = 200_000, 12_288
SPECIALTY_SHARE = 0.02
BASE_RATE, SPECIALIST_RATE = 3e-3, 1e-4
END = "<|end|>"


@dataclass(frozen=True)
class Family:
    """Folders of a base and of its K specialists, these by domain."""

    base: Path
    specialists: dict[str, Path]


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What `run` found; K specialists, in the order of `family.specialists`.

    Attributes:
        family: the checkpoints that were merged.
        merges: folder of each merged model, by name of the merge.
        sq_norms: ||tau_t||^2, shape `(K,)`, float64.
        lambdas: MetaGPT's coefficients, shape `(K,)`, float64.
        cosines: of the angles between task vectors, shape `(K, K)`, float64.
        losses: held-out loss by model (base, specialists, merges) and domain.
    """

    family: Family
    merges: dict[str, Path]
    sq_norms: torch.Tensor
    lambdas: torch.Tensor
    cosines: torch.Tensor
    losses: dict[str, dict[str, float]]

    @property
    def ald(self) -> dict[str, float]:
        """Average loss difference of each merge: mean of L_t(merge) - L_t(theta_t)."""
        tasks = self.family.specialists
        return {
            name: sum(self.losses[name][t] - self.losses[t][t] for t in tasks)
            / len(tasks)
            for name in self.merges
        }


@contextmanager
def _quiet_on_one_thread() -> Iterator[None]:
    """Silence transformers and keep torch to one thread; put both back."""
    import torch

    threads = torch.get_num_threads()
    # More threads gain little on models this small, and lose minutes if other processes
    # use the cores. One thread also gives the same bits everywhere.
    torch.set_num_threads(1)
    try:
        with quiet_transformers():
            yield
    finally:
        torch.set_num_threads(threads)


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False
    )


def _train(
    model: Any, tokenizer: Any, corpus: str, steps: int, rate: float, path: Path
) -> None:
    """Minimise next-byte cross entropy with AdamW, warm-up and cosine decay; save."""
    import torch

    windows = torch.tensor(tokenizer(corpus)["input_ids"]).unfold(0, WINDOW, 1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    model.train()
    for step in range(steps):
        warm_up = min(1.0, (step + 1) * 20 / steps)
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * warm_up * decay
        batch = windows[torch.randint(0, len(windows), (BATCH,))]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_family(
    folder: Path,
    *,
    steps: tuple[int, int, int, int] = STEPS,
    width: int = 128,
    say: Callable[[str], None] = lambda line: None,
) -> Family:
    """Train a byte-level Llama base and a fine-tune of it for each specialty.

    The base learns general text and a little of each specialty; the specialists start
    from its stored weights. Each checkpoint is stored in bfloat16, with a tokenizer.

    Args:
        folder: new or empty folder; gets `base` and one folder per specialty.
        steps: training steps of the base, then of each specialist.
        width: hidden size, a multiple of 32.
        say: receives one line per model that is trained.

    Returns:
        the folders, as absolute paths.

    Raises:
        ValueError: `folder` is not empty, or mergekit cannot read its name.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; name a new one")
    if set("+@") & set(str(folder.resolve())):
        raise ValueError(
            f"{folder.resolve()} contains '+' or '@', which mergekit takes for the "
            "start of an adapter or a revision; name a folder without them"
        )
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = folder.resolve()
    family = Family(folder / "base", {name: folder / name for name in SPECIALTIES})
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=2 * WINDOW,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    share = int(SPECIALTY_SHARE * TRAINING_BYTES)
    mixture = text("general", TRAINING_BYTES - len(SPECIALTIES) * share)
    mixture += "".join(text(name, share) for name in SPECIALTIES)
    with _quiet_on_one_thread(), torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed accelerators too, and nobody would restore them.
        torch.default_generator.manual_seed(0)
        say(f"training base, {steps[0]} steps")
        model = LlamaForCausalLM(config)
        _train(model, tokenizer, mixture, steps[0], BASE_RATE, family.base)
        for name, count in zip(SPECIALTIES, steps[1:], strict=True):
            say(f"training {name}, {count} steps")
            model = AutoModelForCausalLM.from_pretrained(family.base).float()
            corpus = text(name, TRAINING_BYTES)
            path = family.specialists[name]
            _train(model, tokenizer, corpus, count, SPECIALIST_RATE, path)
    return family


def _held_out(domain: str) -> str:
    return text(domain, HELD_OUT_BYTES, held_out=True)[:HELD_OUT_BYTES]


def held_out_losses(model_path: Path) -> dict[str, float]:
    """Evaluate a checkpoint on text of each domain that no model was trained on.

    Args:
        model_path: a model of a family, or a merge of them, with its tokenizer.

    Returns:
        mean next-byte cross entropy in nats, by domain; in float32 arithmetic.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = {}
    with _quiet_on_one_thread(), torch.inference_mode():
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        model = AutoModelForCausalLM.from_pretrained(model_path).float()
        for domain in ("general", *SPECIALTIES):
            ids = tokenizer(_held_out(domain))["input_ids"]
            windows = torch.tensor(ids).view(-1, WINDOW)
            # Chunks of equal length: the mean of their means is the mean.
            means = [
                model(input_ids=part, labels=part, use_cache=False).loss.item()
                for part in windows.chunk(3)
            ]
            losses[domain] = sum(means) / len(means)
    return losses


def _write_recipes(folder: Path, family: Family) -> dict[str, Path]:
    """Write a mergekit YAML per merge, with paths that work from any folder."""
    import yaml

    base: dict[str, Any] = {"base_model": str(family.base)}
    models = [{"model": str(path)} for path in family.specialists.values()]
    # metagpt rounds only once; mergekit's own methods round at every step.
    once, often = {"dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "bfloat16"}
    weight = {"parameters": {"weight": 0.3}}
    configs = {
        "metagpt": base | once,
        "average": {"merge_method": "linear", "parameters": {"weight": 1.0}} | often,
        "task_arithmetic": base | weight | often,
    }
    recipes = {}
    for name, config in configs.items():
        config = {"merge_method": name, **config, "models": models}
        recipes[name] = folder / f"{name}.yml"
        recipes[name].write_text(yaml.safe_dump(config, sort_keys=False))
    return recipes


def _write_texts(folder: Path) -> None:
    """Write the text on which each specialist is evaluated, for `compare`."""
    for name in SPECIALTIES:
        (folder / f"{name}.txt").write_text(_held_out(name), encoding="ascii")


def run(
    folder: Path,
    *,
    say: Callable[[str], None],
    steps: tuple[int, int, int, int] = STEPS,
    width: int = 128,
) -> DemoResult:
    """Make a family, merge it with MetaGPT and two baselines, evaluate all models.

    Writes `metagpt.yml`, `average.yml` and `task_arithmetic.yml` (weight 0.3) beside
    the family, and merges each through mergekit into `merged-<name>`. Writes a
    held-out text for each specialist, too.

    Args:
        folder: new or empty folder.
        say: receives one line per stage.
        steps: training steps of the base, then of each specialist.
        width: hidden size, a multiple of 32.

    Returns:
        coefficients, cosines and losses.

    Raises:
        ValueError: `folder` is not empty, or mergekit cannot read its name.
    """
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from mergekit_metagpt import coefficients, register, scan

    register()
    family = make_family(folder, steps=steps, width=width, say=say)
    folder = folder.resolve()
    merges = {}
    with _quiet_on_one_thread():
        for name, recipe in _write_recipes(folder, family).items():
            say(f"merging {recipe.name}")
            merges[name] = folder / f"merged-{name}"
            source = recipe.read_text()
            run_merge(
                MergeConfiguration.model_validate(yaml.safe_load(source)),
                str(merges[name]),
                MergeOptions(quiet=True),
                config_source=source,
            )
    _write_texts(folder)
    pooled = scan(family.base, list(family.specialists.values()), gram=True).pool()
    say("evaluating on held-out text")
    models = {"base": family.base, **family.specialists, **merges}
    cosines = pooled.cosines
    assert cosines is not None
    return DemoResult(
        family=family,
        merges=merges,
        sq_norms=pooled.sq_norms,
        lambdas=coefficients(pooled.sq_norms),
        cosines=cosines,
        losses={name: held_out_losses(path) for name, path in models.items()},
    )

"""Writes what docs/comparing.md compares: specialists of Gemma 3 270M, and their texts.

    python docs/experiments/real_compare.py OUT WHOLE
    cd WHOLE && mergekit-metagpt compare merge.yml --text worked=worked.txt ...

OUT is the folder of real_model.py after `train`. The specialists there have the part of
the vocabulary that their texts use. WHOLE gets them with all of it, with the tokenizer,
a YAML that merges them, and a held-out text for each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import real_texts
import torch
import yaml
from real_family import Folders, as_plain, load, read_model, specialists, tokens

MODELS = ("worked", "german", "chat")


def main() -> None:
    """Write base, specialists, texts and YAML."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of real_model.py")
    parser.add_argument("whole", type=Path, help="folder to write")
    options = parser.parse_args()
    folders, whole = Folders(options.out.resolve()), options.whole
    tokenizer, model = read_model(folders)
    base = as_plain(model)
    kept = tokens(folders)["kept"]
    rows = base.get_input_embeddings().weight.detach().float()
    for name in ("base", *MODELS):
        if name != "base":
            state = load(folders.model(name)).state_dict()
            cut = state.pop("model.embed_tokens.weight")
            state.pop("lm_head.weight", None)  # the same tensor
            base = base.float()
            base.load_state_dict(state, strict=False)
            base.get_input_embeddings().weight.data = rows.index_copy(0, kept, cut)
            base.tie_weights()
        base.to(torch.bfloat16).save_pretrained(whole / name)
        tokenizer.save_pretrained(whole / name)
    for name in MODELS:
        domain = specialists()[name].domain
        text = real_texts.text(domain, folders.manual_pages, held_out=True)
        (whole / f"{name}.txt").write_text(text)
    config = {
        "merge_method": "metagpt",
        "base_model": "./base",
        "models": [{"model": f"./{name}"} for name in MODELS],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    (whole / "merge.yml").write_text(yaml.safe_dump(config, sort_keys=False))


if __name__ == "__main__":
    main()

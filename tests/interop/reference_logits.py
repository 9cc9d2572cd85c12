"""Run by another Python, one with torch and transformers: the logits of transformers for public checkpoints."""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import KimiLinearForCausalLM


def main(folder: Path) -> None:
    settings = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, loading = KimiLinearForCausalLM.from_pretrained(folder, **settings)
    problems = {kind: found for kind, found in loading.items() if found}
    assert not problems, problems
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits
    np.save(folder / "reference_logits.npy", logits.numpy())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))

"""Opens a folder of exported weights with transformers, in an interpreter that has it:

    python in_transformers.py FOLDER IN.safetensors OUT.safetensors trust|native

IN has ``tokens`` int64 [B, T]. OUT gets ``logits`` [B, T, V] of them in fp32, ``exact``, the same
in fp64, and what generate() adds to the first of them, [N]: ``greedy`` with its caches and
``uncached`` without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 24


class InDouble(TorchFunctionMode):
    """Takes fp64 wherever code asks for fp32, as norms, router and KDA do."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {name: wider(value) for name, value in (kwargs or {}).items()}
        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(wider, args), **named)


def main(folder: str, given: str, wanted: str, how: str) -> None:
    tokens = load_file(given)["tokens"]
    trusted = {"trust_remote_code": how == "trust"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trusted).eval()

    def added(use_cache: bool) -> Tensor:
        whole = model.generate(
            input_ids=tokens[:1],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=use_cache,
        )
        return whole[0, tokens.shape[1] :]

    with torch.no_grad():
        found = {"logits": model(input_ids=tokens).logits}
        found |= {"greedy": added(use_cache=True), "uncached": added(use_cache=False)}
        model.double().set_experts_implementation("eager")  # a grouped matmul takes no fp64
        with InDouble():
            found["exact"] = model(input_ids=tokens, use_cache=False).logits
    save_file({name: value.contiguous() for name, value in found.items()}, wanted)
    print(type(model).__name__)
    print(AutoTokenizer.from_pretrained(folder, **trusted).encode("the lazy dog"))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Opens a folder of exported weights with transformers, in an interpreter that has it:

    python in_transformers.py FOLDER IN.safetensors OUT.safetensors trust|native

IN has ``tokens`` int64 [B, T]; OUT gets ``logits`` [B, T, V] of them in fp32, and ``greedy``, what
generate() adds to the first of them with its caches.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, given, wanted, how = sys.argv[1:]
tokens = load_file(given)["tokens"]
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=how == "trust"
).eval()
print(type(model).__name__)
with torch.no_grad():
    logits = model(input_ids=tokens).logits
    whole = model.generate(
        input_ids=tokens[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
greedy = whole[0, tokens.shape[1] :]
save_file({"logits": logits.contiguous(), "greedy": greedy.contiguous()}, wanted)
print(
    AutoTokenizer.from_pretrained(folder, trust_remote_code=how == "trust").encode("the lazy dog")
)

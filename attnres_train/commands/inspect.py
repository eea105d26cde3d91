"""`attnres-train inspect RUN`: what each sublayer of a checkpoint reads from which block, and how
large everything is, on a text or for one of its tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attnres_train.commands.output import show
from attnres_train.errors import UserError
from attnres_train.inference.opening import Opened, open_model
from attnres_train.model.batch import MicroBatch
from attnres_train.model.moe.layer import MixtureOfExperts
from attnres_train.model.probe import Probe
from attnres_train.observe import pictures
from attnres_train.observe.drawing import style
from attnres_train.observe.observed import Arrays, arrays_of
from attnres_train.screen import complain
from attnres_train.training.observation import query_norms

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again."
"""What is looked at where no text is given."""


def run(args: argparse.Namespace) -> int:
    opened = open_model(args.run)
    tokens = _tokens(opened, _text(args))
    _check_token(args.token, tokens)
    seen = look(opened, tokens)
    folder = Path(args.out) if args.out else None
    if folder is None and not args.json:
        folder = opened.path.parent.parent / "inspected" / opened.path.name
    if folder is not None:
        _write(seen, args.token, folder)
    if args.json:
        show(json.dumps(seen.plain(args.token)))
    else:
        show("\n".join([*seen.told(args.token), f"arrays and pictures: {folder}"]))
    return 0


@dataclass
class Seen:
    """What a model has shown on ``tokens``."""

    opened: Opened
    tokens: list[int]
    loss: float | None
    """Mean over all tokens but the first, nats; None for one token."""
    arrays: Arrays
    """As in `observe.observed`."""
    weights: dict[int, np.ndarray] = field(default_factory=dict)
    """By sublayer, [T, N]: of each token."""

    def of_token(self, token: int) -> np.ndarray:
        """Weights [L + 1, blocks] with which the sublayers read at ``token``; NaN: no source."""
        mean = self.arrays["depth_weight_mean"]
        found = np.full_like(mean, np.nan)
        for sublayer, weights in self.weights.items():
            found[sublayer - 1, : weights.shape[1]] = weights[token]
        return found

    def word(self, token: int) -> str:
        assert self.opened.tokenizer is not None
        return self.opened.tokenizer.decode([self.tokens[token]])

    def plain(self, token: int | None) -> dict:
        """For JSON: what is not there is null."""
        found: dict = {
            "step": self.opened.step,
            "tokens": self.tokens,
            "loss": self.loss,
            **{name: _plain(array) for name, array in self.arrays.items()},
        }
        if token is not None and self.weights:
            found |= {"token": token, "token_weights": _plain(self.of_token(token))}
        return found

    def told(self, token: int | None) -> list[str]:
        """Lines for a person."""
        loss = "" if self.loss is None else f", loss {self.loss:.4f} nats per token"
        lines = [f"step {self.opened.step:,}: {len(self.tokens):,} tokens{loss}"]
        if not self.weights:
            kind = self.opened.config.model.residual.kind
            return [*lines, f"model.residual.kind {kind} has no attention over depth"]
        if token is None:
            table, what = self.arrays["depth_weight_mean"], "mean over tokens"
        else:
            table, what = self.of_token(token), f"token {token}, {self.word(token)!r}"
        lines.append(f"weights of the blocks that each sublayer reads most, {what}:")
        for row, weights in enumerate(table):
            name = "head" if row == len(table) - 1 else f"{row + 1} {'MLP' if row % 2 else 'attn'}"
            known = [i for i in range(len(weights)) if np.isfinite(weights[i])]
            most = sorted(known, key=lambda i: -weights[i])[:6]
            read = "   ".join(f"{i}: {weights[i]:.3f}" for i in sorted(most))
            lines.append(f"{name:>9}   {read}" if known else f"{name:>9}   (no such read)")
        return lines


class _EveryToken(Probe):
    """Keeps the weights of each token too."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, np.ndarray] = {}

    def weights(self, sublayer: int, weights: Tensor | None) -> None:
        super().weights(sublayer, weights)
        if weights is not None:
            self.kept[sublayer] = weights[0].float().cpu().numpy()


@torch.no_grad()
def look(opened: Opened, tokens: list[int]) -> Seen:
    """Run the model on ``tokens``, at least one of them, with a probe."""
    chunk, probe = opened.chunk, _EveryToken()
    ids = torch.tensor([tokens])
    mask = torch.ones(1, len(tokens))
    mask[0, -1] = 0  # nothing comes after it
    batch = MicroBatch(ids, ids.roll(-1, 1), mask, probe=probe).to(opened.device)
    batch.probe = probe
    loads: dict[str, Tensor] = {}
    hooks = []
    for layer in chunk.decoder_layers:
        experts = getattr(layer, "block_sparse_moe", None)
        if experts is not None:
            hooks.append(experts.register_forward_hook(_keep_load(loads, layer.index)))
    loss = chunk(batch, {}, None).loss
    for hook in hooks:
        hook.remove()
    totals = probe.totals | query_norms([chunk]) | loads
    found = {name: total.cpu().double().numpy() for name, total in totals.items()}
    arrays = arrays_of(opened.config.model, found)
    return Seen(opened, tokens, float(loss) if len(tokens) > 1 else None, arrays, probe.kept)


def _keep_load(loads: dict[str, Tensor], layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, _: tuple, output: tuple[Tensor, Tensor]) -> None:
        assert isinstance(module, MixtureOfExperts)
        loads[f"expert_load/{layer}"] = output[1]

    return hook


def _text(args: argparse.Namespace) -> str:
    if args.file is None:
        return TEXT if args.text is None else args.text
    try:
        return Path(args.file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--file {args.file} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"--file {args.file} cannot be read: {error.strerror or error}") from error


def _tokens(opened: Opened, text: str) -> list[int]:
    if opened.tokenizer is None:
        raise UserError(
            f"{opened.path} is of a run without a tokenizer, so no text can be looked at with it"
        )
    tokens, most = opened.tokenizer.encode(text), opened.config.train.seq_length
    if not tokens:
        raise UserError("the text has no token: give some with --text or --file")
    if len(tokens) > most:
        complain(f"the first {most:,} of {len(tokens):,} tokens (train.seq_length) are looked at")
    return tokens[:most]


def _check_token(token: int | None, tokens: list[int]) -> None:
    if token is not None and not 0 <= token < len(tokens):
        raise UserError(
            f"--token {token}: the text has the tokens 0 to {len(tokens) - 1} (`--json` lists them)"
        )


def _write(seen: Seen, token: int | None, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "observation.npz", **seen.arrays)  # type: ignore[arg-type]  # by name
        figures = pictures.drawn({seen.opened.step: seen.arrays})
        if figures and token is not None and seen.weights:
            word = repr(seen.word(token)).replace("$", r"\$")  # no formula
            title = f"Attention over depth at token {token}, {word}"
            with style():
                figures[f"token_{token}"] = pictures.weight_map(seen.of_token(token), title)
        pictures.save(figures, folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from error


def _plain(array: np.ndarray) -> list:
    plain = array.astype(object)
    plain[np.isnan(array)] = None
    return plain.tolist()

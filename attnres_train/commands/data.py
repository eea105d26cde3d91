"""`attnres-train data`: build tokenizer and token shards beforehand; `data show`: look at them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from attnres_train.commands.output import show
from attnres_train.config import check_config, load_config
from attnres_train.config.stages import stage_configs
from attnres_train.errors import UserError


def run(args: argparse.Namespace) -> int:
    for option, given in (("--batches", args.batches is not None), ("--json", args.json)):
        if given and not args.show:
            raise UserError(f"{option} is for `attnres-train data show CONFIG`")
    if args.batches is not None and args.batches < 0:
        raise UserError(f"--batches is {args.batches}: it must be 0 or more")
    config = load_config(args.config, args.overrides)
    check_config(config, None)
    # Imported here: a config that cannot run is told before torch is loaded.
    from attnres_train.runs.preparation import prepare_run, prepare_stages

    if not args.show:
        prepare_stages(config)
        return 0
    from attnres_train.data.look import look

    made = prepare_run(config)
    stage = stage_configs(config)[made.stage]
    found = look(stage, made.prepared, 1 if args.batches is None else args.batches)
    show(json.dumps(found, indent=2) if args.json else "\n".join(as_text(found)))
    return 0


def as_text(found: dict[str, Any]) -> Iterator[str]:
    """`data.look.look` for a screen."""
    if found["tokenizer"]:
        yield f"tokenizer {found['tokenizer']}, {found['vocab_size']:,} tokens"
    for corpus in found["corpora"]:
        yield from _corpus(corpus)
    if len(found["corpora"]) > 1:
        yield f"repeated documents over all corpora: {found['repeated_documents']:,}"
    for sample in found["samples"]:
        yield ""
        yield f"sample {sample['sample']}, {sample['corpus']}, {sample['documents']} documents:"
        yield from _sample(sample)


def _corpus(corpus: dict[str, Any]) -> Iterator[str]:
    yield f"{corpus['key']}: {corpus['name']}, {100 * corpus['share']:.1f} % of the samples"
    told = f"  {corpus['documents']:,} documents, {corpus['tokens']:,} tokens"
    if corpus["bytes"]:
        told += f" of {corpus['bytes']:,} bytes, {corpus['tokens_per_byte']:.3f} tokens per byte"
    yield told
    lengths = corpus["lengths"]
    shown = ", ".join(f"{name} {value:,.0f}" for name, value in lengths.items())
    yield f"  tokens of a document: {shown}"
    repeated = corpus["repeated_documents"]
    yield f"  repeated documents: {repeated:,} ({100 * repeated / corpus['documents']:.1f} %)"


def _sample(sample: dict[str, Any]) -> Iterator[str]:
    before = 0
    for piece in sample["pieces"]:
        if piece["document"] != before:
            yield f"---- document {piece['document'] + 1}, from token {piece['first']} ----"
        before = piece["document"]
        yield piece["text"] if piece["in_loss"] else f"[not in the loss: {piece['text']!r}]"

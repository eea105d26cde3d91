"""Every value of every choice in the schema, a key at a time, from the checks to the export.

The cases come from the schema: a key or a kind that is new is tried here without being named.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from attnres_train.__main__ import main
from attnres_train.config.fields import all_keys, as_written, inner_section
from attnres_train.config.kind_fields import KindName
from attnres_train.config.kinds import CHOICES
from attnres_train.config.schema import RunConfig
from attnres_train.data.tokenizers.hugging_face import train_bpe
from tests.data.tiny import sentence, write_indexed, write_jsonl
from tests.data.tokenizers.files import pieces
from tests.tiny import TinyRuns, column, saved_tensors

ONE_STEP = ["train.train_iters=2", "train.global_batch_size=2", "checkpoint.save_interval=1"]
QUIET = ["train.eval_interval=0", "log.plot=false", *ONE_STEP]
# What a value needs besides itself; names in braces are files of the fixture `inputs`.
NEEDS = {
    # From weights on, and step 1, where the others begin too.
    "checkpoint.reset=schedule": ["checkpoint.load={checkpoint}"],
    "checkpoint.reset=data": ["checkpoint.reset=[data,schedule]", "checkpoint.load={checkpoint}"],
    "checkpoint.reset=optimizer": [
        "checkpoint.reset=[optimizer,schedule]",
        "checkpoint.load={checkpoint}",
    ],
    "data.corpus.kind=jsonl": ["data.corpus.0.path={jsonl}"],
    "data.corpus.kind=parquet": ["data.corpus.0.path={parquet}"],
    "data.corpus.kind=datasets": ["data.corpus.0.path={arrow}"],
    "data.corpus.kind=indexed": ["data.corpus.0.path={indexed}", "data.tokenizer.kind=none"],
    # Its 30 MB are tokenised with what is there already.
    "data.corpus.kind=python-stdlib": [
        "data.corpus.0.path=null",
        "data.tokenizer={{kind: file, path: {tokenizer}}}",
    ],
    "data.tokenizer.kind=file": ["data.tokenizer.path={tokenizer}"],
    "data.tokenizer.kind=tiktoken": ["data.tokenizer.path={ranks}"],
    "data.tokenizer.kind=sentencepiece": ["data.tokenizer.path={pieces}"],
    "data.tokenizer.kind=none": [
        "data.corpus=[{{kind: indexed, path: {indexed}}}]",
        "data.tokenizer.eod=1",
    ],
    "log.wandb.enabled=true": ["log.wandb.mode=offline"],
    "model.residual.kind=mhc_lite": ["model.residual.num_streams=2"],
    "parallel.expert_dispatcher=deepep": ["train.precision=bf16"],
}


def choices() -> list[tuple[str, str]]:
    """(key, value) of every kind of ours, every listed word and every yes or no; but of stages,
    whose keys are those outside of them (`tests.runs.test_stages`)."""
    keys = [key for key in all_keys() if not key.startswith("stages.")]
    return [(key, value) for key in keys for value in values(field_at(key))]


def field_at(key: str) -> Any:
    section: Any = RunConfig
    *parents, name = key.split(".")
    for parent in parents:
        section = inner_section(section.model_fields[parent].annotation)
    return section.model_fields[name]


def values(field: Any) -> list[str]:
    for note in field.metadata:
        if isinstance(note, KindName):
            return list(CHOICES[note.choice].built_in)
    if field.annotation is bool:
        return ["true", "false"]
    listed = [field.annotation, *get_args(field.annotation)]
    return [str(v) for one in listed if get_origin(one) is Literal for v in get_args(one)]


@pytest.fixture(scope="module")
def inputs(tiny: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that a value may need."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("inputs")
    texts = [sentence(number, 40) for number in range(40)]
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, folder / "corpus.parquet")
    with pyarrow.ipc.new_stream(str(folder / "corpus.arrow"), table.schema) as stream:
        stream.write_table(table)
    ranks = (b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    (folder / "ranks.tiktoken").write_bytes(b"".join(ranks))
    if importlib.util.find_spec("sentencepiece"):
        (folder / "pieces.model").write_bytes(pieces(vocab_size=60, byte_fallback=False))
    train_bpe(iter(texts), 300, folder / "tokenizer.json")
    return {
        "jsonl": str(write_jsonl(folder / "corpus.jsonl", list(texts))),
        "parquet": str(folder / "corpus.parquet"),
        "arrow": str(folder / "corpus.arrow"),
        "indexed": write_indexed(folder / "tokens", [list(range(2, 200))] * 12),
        "tokenizer": str(folder / "tokenizer.json"),
        "ranks": str(folder / "ranks.tiktoken"),
        "pieces": str(folder / "pieces.model"),
        "checkpoint": str(tiny.train("earlier", *QUIET)),
    }


def test_what_a_value_needs_is_of_a_value_that_there_is() -> None:
    assert set(NEEDS) <= {f"{key}={value}" for key, value in choices()}


def case(key: str, value: str) -> Any:
    """What does not bear on the model or on how it is learnt is of the night."""
    apart = key.startswith(("data.", "log.", "checkpoint.", "lr_schedule."))
    return pytest.param(key, value, id=f"{key}={value}", marks=[pytest.mark.nightly] * apart)


@pytest.mark.parametrize(("key", "value"), [case(*choice) for choice in choices()])
def test_a_value_goes_all_the_way(
    key: str, value: str, tiny: TinyRuns, inputs: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    """Checks, summary, plan, a training step, save, resume and another step, export."""
    if (key, value) == ("train.device", "cuda") and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if value == "sentencepiece":
        pytest.importorskip(value)
    if value == "te":
        pytest.importorskip("transformer_engine")
    needs = [text.format(**inputs) for text in NEEDS.get(f"{key}={value}", [])]
    overrides = [*QUIET, f"{as_written(key)}={value}", *needs]
    name = f"{key}={value}"
    arguments = [str(tiny.path), f"run.name={name}", *overrides]

    assert main(["config", *arguments, "--derived", "--json"]) == 0
    derived = json.loads(capsys.readouterr().out)
    if key in ("model.residual.kind", "optimizer.kind"):
        assert derived[key.split(".")[-2]].startswith(f"{value}:")
    assert main(["plan", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["micro_batches"] == 1

    tiny.train(name, *overrides, "train.stop_after=1")
    run = tiny.train(name, *overrides)
    assert column(run, "step") == [1, 2]
    assert all(loss > 0 for loss in column(run, "loss"))
    before, after = saved_tensors(run, 1), saved_tensors(run, 2)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    code = main(["export", str(run), str(tmp_path / "exported")])
    told = capsys.readouterr().err
    if code:
        # Refused on account of this very key, or of the layout that the tiny run has anyway.
        assert code == 2 and (key in told or "block_size" in told), told
    else:
        assert (tmp_path / "exported" / "config.json").is_file()

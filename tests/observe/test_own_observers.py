"""Observers of the user's own, in modules outside the package, on runs from their start to their
end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.pool import RankFailedError
from tests.tiny import column, grid, records, run_cli

PIPELINE = grid(2, 2)
GRAD_NORMS = '''
from collections import Counter

import torch.distributed as dist

from attnres_train.config.section import Section
from attnres_train.observe.observer import Observer


class GradNorms(Observer):
    """The gradient norm of each module, on whichever ranks it is."""

    everywhere = True

    class Options(Section):
        depth: int = 2
        """Parts of a module's name."""

    def on_backward(self, step, chunks):
        self.squares = Counter()
        for chunk in chunks.values():
            for name, parameter in chunk.named_parameters():
                if parameter in self.run.counted:  # others have the same gradient
                    module = ".".join(name.split(".")[: self.options.depth])
                    self.squares[module] += parameter.grad.double().square().sum().item()

    def on_step_end(self, record):
        ranks = [None] * self.run.world_size
        dist.all_gather_object(ranks, self.squares, group=self.run.control)
        squares = Counter()
        for others in ranks:
            squares.update(others)
        record.update({f"grad_norm/{module}": s**0.5 for module, s in squares.items()})
'''
DIARY = '''
import json

from attnres_train.observe.observer import Observer


class Main(Observer):
    """Writes down what it is told."""

    def write(self, *told):
        name = f"{type(self).__name__.lower()}_{self.run.rank}.jsonl"
        with open(self.run.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\\n")

    def on_start(self, step):
        run = self.run
        self.write("start", step, run.is_main, run.pp_rank, run.dp_rank, run.world_size)

    def on_step_begin(self, step):
        self.write("begin", step)

    def on_backward(self, step, chunks):
        assert chunks is self.run.chunks
        graded = all(p.grad is not None for chunk in chunks.values() for p in chunk.parameters())
        self.write("backward", step, list(chunks), graded)

    def on_validation(self, step, loss):
        self.write("validation", step, loss)

    def on_step_end(self, record):
        self.write("end of step", record["step"], record["loss"])

    def on_save(self, step, path):
        self.write("save", step, path.name, (path / "meta.json").is_file())

    def on_failure(self, error):
        self.write("failure", type(error).__name__, str(error))

    def on_end(self):
        self.write("end")


class Everywhere(Main):
    everywhere = True
'''
FAULTY = """
from attnres_train.errors import UserError
from attnres_train.observe.observer import Observer


class Faulty(Observer):
    def on_backward(self, step, chunks):
        if step == 2:
            raise ValueError("the sensor is gone")


class Unready(Observer):
    def on_start(self, step):
        raise UserError("plug in the sensor")
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> str:
    """A folder with modules of the user's, importable here and in the pool's processes."""
    folder = tmp_path_factory.mktemp("lab")
    for name, text in {"grads": GRAD_NORMS, "diary": DIARY, "faulty": FAULTY}.items():
        (folder / f"lab_{name}.py").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield str(folder)


def diary(run: Path, name: str) -> list[list]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("spread", "depth", "modules"),
    [
        (PIPELINE, 1, {"embed_tokens", "layers", "norm", "lm_head"}),
        (PIPELINE, 2, {"embed_tokens.weight", "layers.0", "layers.3"}),
        (grid(1, 1), 1, {"embed_tokens", "layers", "norm", "lm_head"}),
        *(
            ([*grid(1, 1), f"parallel.{kind}_parallel_size=2"], 2, {"layers.0", "layers.3"})
            for kind in ("expert_model", "tensor_model")
        ),
    ],
    ids=["stages", "stages, deeper", "replicas", "experts", "tensors"],
)
def test_gradient_norms_of_modules_make_up_that_of_the_model(tiny, lab, spread, depth, modules):
    assert len(GRAD_NORMS.strip().splitlines()) < 40
    observer = f"log.observers=[{{kind: lab_grads:GradNorms, options: {{depth: {depth}}}}}]"
    name = "-".join(["grads", str(depth), *(text.partition(".")[2] for text in spread)])
    run = tiny.train(name, *spread, observer, "train.stop_after=2", ranks=2)
    assert len(records(run)) == 2
    for record in records(run):
        norms = {k.partition("/")[2]: v for k, v in record.items() if "/" in k}
        assert modules <= norms.keys()
        assert min(norms[module] for module in modules) > 0
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        assert total == pytest.approx(record["grad_norm"], rel=1e-6)


def test_what_is_added_goes_to_tensorboard_and_changes_no_loss(tiny, lab):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plain = tiny.train("plain-2x2", *PIPELINE, "train.train_iters=3", ranks=2)
    short = "log.observers=[lab_grads:GradNorms]"
    board = [short, "log.tensorboard=true", "train.train_iters=3"]
    run = tiny.train("board-2x2", *PIPELINE, *board, ranks=2)
    for key in ("loss", "grad_norm", "validation_loss"):
        assert column(run, key) == column(plain, key), key
    events = accumulators.EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("grad_norm/layers.1")]
    assert logged == pytest.approx(column(run, "grad_norm/layers.1"))
    assert column(plain, "grad_norm/layers.1") == []


def test_every_hook_in_its_place_on_the_ranks_that_are_asked_for(tiny, lab):
    pair = "log.observers=[lab_diary:Everywhere, lab_diary:Main]"
    told = [*PIPELINE, pair, "checkpoint.save_interval=1", "train.eval_interval=2"]
    told.append("checkpoint.async_save=false")  # else a save is told at a later step
    run = tiny.train("diary", *told, "train.train_iters=2", ranks=2)
    assert sorted(p.name for p in run.glob("*_?.jsonl")) == [
        "everywhere_0.jsonl",
        "everywhere_1.jsonl",
        "main_0.jsonl",
    ]
    loss, (validation,) = column(run, "loss"), column(run, "validation_loss")
    for rank in (0, 1):
        chunks = [rank, rank + 2]
        assert diary(run, f"everywhere_{rank}") == [
            ["start", 0, rank == 0, rank, 0, 2],
            ["begin", 1],
            ["backward", 1, chunks, True],
            ["end of step", 1, loss[0]],
            ["save", 1, "step_00000001", True],
            ["begin", 2],
            ["backward", 2, chunks, True],
            ["validation", 2, validation],
            ["end of step", 2, loss[1]],
            ["save", 2, "step_00000002", True],
            ["end"],
        ]
    assert diary(run, "main_0") == diary(run, "everywhere_0")

    tiny.train("diary", *told, "train.train_iters=3", ranks=2)
    assert diary(run, "main_0")[11:13] == [["start", 2, True, 0, 0, 2], ["begin", 3]]


def test_a_loss_that_is_not_finite_is_told_on_every_rank(tiny, lab):
    overrides = ["log.observers=[lab_diary:Everywhere]", "optimizer.lr=1e30"]
    with pytest.raises(RankFailedError, match="the gradient norm of step"):
        tiny.train("nan-told", *grid(2, 1), *overrides, ranks=2)
    for rank in (0, 1):
        *_, failure, end = diary(tiny.folder / "runs" / "nan-told", f"everywhere_{rank}")
        assert failure[:2] == ["failure", "FloatingPointError"]
        assert "is nan" in failure[2] or "is inf" in failure[2]
        assert end == ["end"]


def test_a_faulty_observer_is_dropped_and_the_others_go_on(tiny, lab):
    observers = "log.observers=[lab_faulty:Faulty, lab_diary:Main]"
    ended = run_cli("train", tiny.path, "run.name=faulty", observers, PYTHONPATH=lab)
    assert ended.returncode == 0, ended.stderr
    assert "ValueError: the sensor is gone\nraised by observer log.observers.0 " in ended.stderr
    assert "(lab_faulty:Faulty) in on_backward" in ended.stderr
    assert ended.stderr.count("Traceback") == 1
    run = tiny.folder / "runs" / "faulty"
    plain = tiny.train("whole-1x1", *grid(1, 1))
    assert column(run, "loss") == column(plain, "loss")
    assert diary(run, "main_0")[-1] == ["end"]


@pytest.mark.nightly
def test_the_command_line_tells_which_observer_speaks(tiny, lab):
    ended = run_cli("train", tiny.path, "log.observers=[lab_faulty:Unready]", PYTHONPATH=lab)
    assert ended.returncode == 2
    assert "error: plug in the sensor\nraised by observer log.observers.0" in ended.stderr
    assert "(lab_faulty:Unready) in on_start" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_base_is_light():
    code = "import sys, attnres_train.observe.observer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

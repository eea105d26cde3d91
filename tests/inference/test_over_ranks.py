"""`attnres-train generate` by processes that share the model: the text of one process, whatever
grid wrote the checkpoint; grids that cannot be are refused before any of them starts."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from attnres_train.__main__ import build_parser, main
from attnres_train.errors import UserError
from attnres_train.inference.grid import on_grid
from tests.tiny import (
    TinyRuns,
    command,
    environment,
    free_port,
    grid,
    run_cli,
    torchrun_environment,
)

ASKED = ["--max-new-tokens", "6", "--temperature", "0", "--device", "cpu", "--json"]
PROMPTS = ["--prompt", "One word and", "--prompt", "x", "--prompt", ""]
EXPERTS = "parallel.expert_model_parallel_size=2"
CONTEXT = "parallel.context_parallel_size=2"
TENSOR = "parallel.tensor_model_parallel_size=2"
GRIDS = {
    "PP2": (2, grid(2, 1)),
    "PP2 VPP2": (2, grid(2, 2)),
    "EP2": (2, [EXPERTS]),
    "PP2 EP2": (4, [*grid(2, 1), EXPERTS]),
    "CP2": (2, [CONTEXT]),
    "TP2": (2, [TENSOR]),
    "PP2 VPP2 CP2 EP2": (4, [*grid(2, 2), CONTEXT, EXPERTS]),
}


def written(arguments: list[str]) -> list[Any]:
    with redirect_stdout(io.StringIO()) as screen:
        assert main(["generate", *arguments]) == 0
    return [json.loads(line) for line in screen.getvalue().splitlines()]


def written_by_rank(arguments: list[str], port: int) -> list[Any]:
    """What this rank of a pool prints, as torchrun would have started it."""
    with torchrun_environment(port):
        return written(arguments)


@pytest.fixture(scope="module")
def run(tiny: TinyRuns) -> Path:
    return tiny.train("opened-1")


@pytest.fixture(scope="module")
def expected(run: Path) -> list[Any]:
    """Of one process."""
    return written([str(run), *ASKED, *PROMPTS])


@pytest.mark.parametrize("name", GRIDS)
def test_text_is_that_of_one_process(
    run: Path, expected: list[Any], tiny: TinyRuns, name: str
) -> None:
    """On the main rank; others print nothing."""
    ranks, overrides = GRIDS[name]
    arguments = [str(run), *ASKED, *PROMPTS, *overrides]
    main_rank, *others = tiny.pool.run(written_by_rank, ranks, arguments, free_port())
    assert main_rank == expected
    assert others == [[]] * (ranks - 1)


def test_the_grid_of_the_run_is_taken(tiny: TinyRuns) -> None:
    run = tiny.train("opened-2", *grid(2, 2), ranks=2)
    arguments = [str(run), *ASKED, *PROMPTS]
    assert tiny.pool.run(written_by_rank, 2, arguments, free_port())[0] == written(arguments)


def test_grids(tiny: TinyRuns) -> None:
    """Without keys the run's own, else one that they name, of as few processes as hold it."""
    pipeline = tiny.config(*grid(2, 2), "parallel.expert_dispatcher=bounded")
    config, count = on_grid(pipeline, [], None)
    assert count == 1
    config, count = on_grid(pipeline, [], 2)
    assert (config.parallel.num_chunks, config.parallel.expert_dispatcher, count) == (4, "exact", 2)
    config, count = on_grid(pipeline, [EXPERTS], None)
    assert (config.parallel.num_chunks, count) == (1, 2)
    config, count = on_grid(pipeline, [EXPERTS, *grid(2, 1)], None)
    assert (config.parallel.num_chunks, count) == (2, 4)
    # Samples of a length that ranks cannot share may be asked about all the same.
    config, count = on_grid(tiny.config("train.seq_length=33"), [TENSOR, CONTEXT], None)
    assert count == 4


@pytest.mark.parametrize(
    ("of_run", "overrides", "asked", "told"),
    [
        ([], ["parallel.tensor_model_parallel_size=4"], 4, "model.kda.num_heads 2 / .* leaves 2"),
        ([], [CONTEXT], 3, "a replica of the model takes 2 .parallel.context_parallel_size 2"),
        ([], [EXPERTS, "parallel.expert_dispatcher=bounded"], 2, "expert_dispatcher is bounded"),
        ([], [], 2, "each would hold the whole model"),
        (grid(2, 2), [], 3, "the number of processes .WORLD_SIZE or --nproc. is 3"),
        ([], grid(3, 2), None, "= 6 chunks, but model.num_layers is 4"),
        ([], ["parallel.expert_model_parallel_size=3"], None, "leaves 1 over"),
        ([], ["train.seq_length=8"], None, "train.seq_length: only keys of parallel"),
        ([], ["parallel.pipeline=2"], None, "parallel.pipeline .command line.: unknown key"),
    ],
)
def test_grids_that_cannot_be(
    tiny: TinyRuns, of_run: list[str], overrides: list[str], asked: int | None, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        on_grid(tiny.config(*of_run), overrides, asked)


def test_tensor_parallel_weights_open_in_one_process(tiny: TinyRuns) -> None:
    assert on_grid(tiny.config(TENSOR), [], None)[1] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nproc", "2"], "each would hold the whole model"),
        (["--nproc", "0"], "--nproc is 0: it is at least 1"),
        ([*grid(2, 1), "--device", "cuda:1"], "--device cuda:1: of several processes"),
        (["top_k=3"], "top_k"),
    ],
)
def test_the_command_refuses(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Before it starts a process."""
    assert main(["generate", str(run), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_what_begins_with_a_dash_is_a_prompt_all_the_same() -> None:
    words = ["generate", "RUN", "--prompt", "- a list", *grid(2, 1), "--prompt=-", "--json"]
    args = build_parser().parse_args(words)
    assert (args.run_folder, args.prompt, args.json) == ("RUN", ["- a list", "-"], True)
    assert args.overrides == grid(2, 1)


@pytest.mark.nightly
def test_local_processes(run: Path, expected: list[Any]) -> None:
    """They start, tell what is wrong with prompts once, take a conversation, and go when it is
    interrupted."""
    found = run_cli("generate", run, *ASKED, *PROMPTS, *grid(2, 1))
    assert (found.returncode, found.stderr) == (0, "")
    assert [json.loads(line) for line in found.stdout.splitlines()] == expected
    found = run_cli("generate", run, "--nproc", "2", *grid(2, 1), "--prompt", "long " * 99)
    assert found.returncode == 2
    assert found.stderr.count("error") == found.stderr.count("shorten it, or") == 1
    talk = command("generate", run, "--interactive", *ASKED[:-1], *grid(2, 1))
    ended = subprocess.run(
        talk, input="One word and\n", env=environment(), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0
    assert ended.stdout == f"> One word and{expected[0]['text']}\n> \n"
    with subprocess.Popen(
        talk, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as asked:
        assert asked.stdout is not None
        assert asked.stdout.read(2) == b"> "
        asked.send_signal(signal.SIGINT)
        assert asked.wait(300) == 128 + signal.SIGINT

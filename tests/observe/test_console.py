from __future__ import annotations

import pytest

from attnres_train.observe.console import Console, clock
from tests.observe.helpers import make


@pytest.fixture
def console(tmp_path) -> Console:
    return make(Console, tmp_path, interval=5, progress="off")


def run(console: Console, steps, **more) -> None:
    for step in steps:
        console.on_step_end(
            {
                "step": step,
                "tokens": 1000 * step,
                "loss": 4.5,
                "grad_norm": 0.25,
                "lr": 3e-3,
                "tokens_per_second": 500.0,
                "step_seconds": 2.0,
                "p2p_bytes": 0,
                "memory_bytes": 3 * 2**30,
                **more,
            }
        )


def test_a_line_per_interval_and_one_for_the_first_step(console, capsys):
    console.on_start(0)
    run(console, range(1, 21))
    console.on_end()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "5/20", "10/20", "15/20", "20/20"]


def test_the_line_holds_what_a_person_asks_for(console, capsys):
    console.on_start(0)
    run(console, [1], validation_loss=5.125, validation_bits_per_byte=1.5, mfu=0.417)
    console.on_end()
    line = capsys.readouterr().out
    for part in ("loss 4.5000", "grad norm 0.250", "lr 3.00e-03", "500 tokens/s", "MFU 41.7%"):
        assert part in line
    for part in ("memory 3.00 GiB", "validation loss 5.1250 | 1.5000 bits/byte", "ETA 38s"):
        assert part in line


def test_mfu_is_absent_where_the_peak_is_unknown(console, capsys):
    console.on_start(0)
    run(console, [1])
    console.on_end()
    assert "MFU" not in capsys.readouterr().out


def test_progress_bar_where_wanted(tmp_path, capsys):
    console = make(Console, tmp_path, progress="on")
    console.on_start(10)
    run(console, [11])
    console.on_end()
    assert "11/20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3720, "1h02m")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text

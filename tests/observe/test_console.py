from __future__ import annotations

import pytest

from attnres_train.observe.console import COLUMNS, Console, clock, short
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
    for part in ("loss 4.5000", "norm 0.250", "lr 3.0e-03", "500 tok/s", "MFU 41.7%"):
        assert part in line
    for part in ("3.00 GiB", "validation loss 5.1250", "1.5000 bits/byte", "ETA 38s"):
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
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3720, "1h02m"), (446_400, "5d04h")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(512.4, "512"), (9876, "9,876"), (12_345, "12.3k"), (999_700, "1.00M"), (4_560_000, "4.56M")],
)
def test_short(number, text):
    assert short(number) == text


def test_no_line_is_longer_than_a_hundred_columns(console, capsys):
    """Kimi Linear's 48B on 1.4T tokens, with everything that a line can have."""
    console.on_start(0)
    console.total = console.end = 333_333
    for more in ({}, {"skipped_steps": 12, "loss_spikes": 3, "validation_loss": 1.6543}):
        run(
            console,
            [123_450],
            loss=1.7321,
            tokens_per_second=2_345_678.9,
            step_seconds=1.79,
            mfu=0.4312,
            memory_bytes=75.31 * 2**30,
            **more,
        )
    console.on_end()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= COLUMNS == 100
    plain, first, second = lines  # what belongs to every step fits on one line
    assert plain.startswith("step 123450/333333  loss 1.7321  norm 0.250  lr 3.0e-03  2.35M tok/s")
    assert plain.endswith("MFU 43.1%  75.3 GiB  ETA 4d08h")
    assert first.endswith("75.3 GiB") and second.startswith("  skipped 12  spikes 3  ")
    assert "validation loss 1.6543" in second and second.endswith("ETA 4d08h")


def test_the_time_left_follows_the_last_steps(console, capsys):
    """With what comes between them: a validation, a save."""
    console.on_start(0)
    for step in range(1, 11):  # five steps that take 2 s, then five with 4 s between their ends
        run(console, [step], time=1000 + 2.0 * step + 2.0 * max(0, step - 5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("ETA 30s")  # step 5: 15 to come, 2 s each
    assert lines[2].endswith("ETA 30s")  # step 10: 10 to come, 3 s each on average
    console.recent.extend([4.0] * 70)
    run(console, [15], time=1000 + 34.0)
    assert capsys.readouterr().out.rstrip().endswith("ETA 20s")

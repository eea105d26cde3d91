"""How long training stands still for a save, and how fast states are saved and loaded.

One process, one state of fp32 tensors, contestants in turns, several rounds; medians, and ratios of
medians. All that is saved is flushed to the disk; before each load the file leaves the page cache.
`disk` writes and reads the same bytes with nothing in between. Everybody writes anew and deletes
what it has written the time before, as a run that keeps one checkpoint does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from attnres_train.checkpoint.folders import Keep
from attnres_train.checkpoint.saver import Saver
from attnres_train.checkpoint.store import load
from attnres_train.checkpoint.tensor_file import bytes_of, read_bytes, view_of

MIB = 2**20
State = dict[str, torch.Tensor]


class Contestants:
    """Ways to save and load ``state`` in ``folder``; each returns the seconds it took, or, where
    training goes on meanwhile, those for which it stands still."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder, self.step = state, folder, 0
        (folder / "ours").mkdir()
        self.saver = Saver(folder / "ours", state, keep=Keep(last=1))
        self.target = {name: torch.empty_like(tensor) for name, tensor in state.items()}

    def ours_asynchronous(self) -> float:
        seconds = timed(lambda: self.saver.start(2 * self.step, {}, None))
        self._saved()
        return seconds

    def ours(self) -> float:
        def save() -> None:
            self.saver.start(2 * self.step + 1, {}, None)
            self._saved()

        return timed(save)

    def _saved(self) -> None:
        outcome = self.saver.wait()
        assert outcome is not None and outcome.path is not None, outcome

    def dcp_asynchronous(self) -> float:
        waiting = []
        writer = dcp.FileSystemWriter(self._new("dcp"))
        seconds = timed(
            lambda: waiting.append(dcp.async_save(self.state, storage_writer=writer, no_dist=True))
        )
        waiting[0].result()
        self._delete("dcp")
        return seconds

    def dcp(self) -> float:
        def save() -> None:
            dcp.save(
                self.state, storage_writer=dcp.FileSystemWriter(self._new("dcp")), no_dist=True
            )
            self._delete("dcp")

        return timed(save)

    def _new(self, name: str) -> Path:
        return self.folder / f"{name}.{self.step}"

    def _delete(self, name: str) -> None:
        """What was written in earlier rounds."""
        for path in self.folder.glob(f"{name}.*"):
            if path != self._new(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def torch(self) -> float:
        def save() -> None:
            with open(self._new("torch"), "wb") as file:
                torch.save(self.state, file)
                file.flush()
                os.fsync(file.fileno())
            self._delete("torch")

        return timed(save)

    def disk(self) -> float:
        def save() -> None:
            with open(self._new("disk"), "wb", buffering=0) as file:
                for tensor in self.state.values():
                    file.write(view_of(bytes_of(tensor)))
                os.fsync(file.fileno())
            self._delete("disk")

        return timed(save)

    def load_ours(self) -> float:
        path = self.folder / "ours" / f"step_{2 * self.step + 1:08d}"
        return self._cold(path, lambda: load(path, self.target))

    def load_dcp(self) -> float:
        reader = dcp.FileSystemReader(self._new("dcp"))
        return self._cold(
            self._new("dcp"),
            lambda: dcp.load(self.target, storage_reader=reader, no_dist=True),
        )

    def load_torch(self) -> float:
        path = self._new("torch")
        return self._cold(path, lambda: torch.load(path, weights_only=True))

    def load_disk(self) -> float:
        path = self._new("disk")
        return self._cold(path, lambda: [None for _ in read_bytes(path, 0, path.stat().st_size)])

    def _cold(self, path: Path, read: Callable[[], object]) -> float:
        for file in path.iterdir() if path.is_dir() else [path]:
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return timed(read)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


STALLS = ("ours_asynchronous", "ours", "dcp_asynchronous", "dcp", "torch")
SAVES = ("ours", "dcp", "torch", "disk")
LOADS = ("load_ours", "load_dcp", "load_torch", "load_disk")


def measure(mib: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    state = {f"tensor.{number}": torch.randn(mib * MIB // 4 // 64) for number in range(64)}
    contestants = Contestants(state, folder)
    names = list(dict.fromkeys([*STALLS, *SAVES, *LOADS]))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):  # the first one warms up: memory, files
        contestants.step = turn
        for name in names:
            seconds = getattr(contestants, name)()
            if turn:
                times[name].append(seconds)
    return times


def report(times: dict[str, list[float]], mib: int) -> None:
    median = {name: statistics.median(values) for name, values in times.items()}

    def scatter(name: str) -> str:
        return f"{min(times[name]):.3f} to {max(times[name]):.3f}"

    print("| training stands still for | seconds | of a synchronous save |\n|---|---|---|")
    for name in STALLS:
        ratio = median[name] / median["ours"]
        print(f"| {name} | {median[name]:.3f} ({scatter(name)}) | {ratio:.2f} |")
    for title, names in (("save", SAVES), ("load", LOADS)):
        slower = max(median[name] for name in names[2:])
        print(
            f"\n| {title} | seconds | GB/s | of the slower of torch and disk |\n|---|---|---|---|"
        )
        for name in names:
            rate, ratio = mib * MIB / median[name] / 1e9, slower / median[name]
            print(f"| {name} | {median[name]:.3f} ({scatter(name)}) | {rate:.2f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="on the disk to measure (default: the system's for files)")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: its figures mean nothing"
    )
    args = parser.parse_args()
    mib, rounds = (4, 1) if args.quick else (args.mib, args.rounds)
    for noise in ("torch.distributed is disabled", "Detected an existing checkpoint"):
        warnings.filterwarnings("ignore", message=noise)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        report(measure(mib, rounds, folder), mib)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

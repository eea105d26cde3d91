"""Going back to the checkpoint from before a loss spike, in place and on all ranks, with the data
that led to it passed over (`train.on_spike: roll_back`)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from attnres_train.checkpoint import folders, rng, store
from attnres_train.checkpoint.manifest import BrokenCheckpoint
from attnres_train.checkpoint.peers import Peers
from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.runs.progress import Progress
from attnres_train.runs.stages import entered
from attnres_train.screen import complain, say
from attnres_train.training.run_state import Checkpoints

FILE = "history/roll_backs.jsonl"


class RollBacksUsedUp(UserError):
    """A run spikes again after as many roll-backs as it may make."""


def roll_back(config: RunConfig, checkpoints: Checkpoints, now: Progress) -> Progress | None:
    """Load the newest checkpoint from before the step just made, with which a spike began; no save
    is under way. Returns where the run stands then, None where it has no checkpoint. Collective.

    Steps, tokens and losses are the checkpoint's; the place in the data stays ``now``'s, and so do
    the counts of spikes and roll-backs. All of it follows from the state before, so that a run
    which ends before its next save makes the same roll-back once it is resumed.

    Raises RollBacksUsedUp, and BrokenCheckpoint where no checkpoint can be read.
    """
    is_main, most = checkpoints.ranks.is_main, config.train.max_roll_backs
    if checkpoints.newest is None:
        if is_main:
            complain("train.on_spike: there is no checkpoint from before; the run goes on")
        return None
    if now.spikes.roll_backs >= most:
        raise RollBacksUsedUp(
            f"the loss of step {now.step} spikes, and train.max_roll_backs={most} roll-backs have "
            f"been made. The newest checkpoint from before is {checkpoints.newest}: go on from it "
            "with a lower optimizer.lr, with a higher train.max_roll_backs, or with "
            "train.on_spike=tell, which goes through the spike"
        )
    peers = Peers(checkpoints.group)
    path = peers.on_first(partial(_chosen, checkpoints.newest, now))
    path, restored = _load(config, checkpoints, path, now.began)
    checkpoints.newest = path
    if restored.rng is not None:
        rng.set_rng_state(restored.rng)
    back = entered(config, Progress.of(restored.extras["progress"]))
    back.samples = now.samples
    back.spikes.count = now.spikes.count
    back.spikes.roll_backs = now.spikes.roll_backs + 1
    back.spikes.back_to = back.step
    # What comes after the checkpoint comes again: it is the one to keep, not what will be there.
    bounds = [min(bound, back.step + 1) for bound in now.spikes.before]
    back.spikes.before = list(dict.fromkeys(bounds))
    if is_main:
        _tell(checkpoints.run_folder, path, now, back)
    return back


def _chosen(newest: Path, now: Progress) -> Path:
    """Where the run has gone back to the ``newest`` before, and spikes again with other data before
    its next save, the weights are to blame: the one before that, if the stage has one."""
    again = now.spikes.back_to == folders.step_of(newest)
    return (_older(newest, now.began) if again else None) or newest


def _older(path: Path, began: int) -> Path | None:
    """The one before ``path``, of the stage that began after step ``began``: what is before that
    has other data."""
    older = folders.older_than(path)
    return older if older and folders.step_of(older) >= began else None


def _load(
    config: RunConfig, checkpoints: Checkpoints, path: Path, began: int
) -> tuple[Path, store.Restored]:
    peers = Peers(checkpoints.group)
    while True:
        try:
            return path, store.load(path, checkpoints.tensors, group=checkpoints.group)
        except BrokenCheckpoint as error:
            may_pass = config.checkpoint.on_damage == "use_older"
            path = peers.on_first(partial(_one_before, path, error, may_pass, began))


def _one_before(path: Path, error: BrokenCheckpoint, may_pass: bool, began: int) -> Path:
    older = _older(path, began)
    if older is None or not may_pass:
        raise error
    complain(f"damaged, kept as {folders.set_aside(path)}: {error}")
    return older


def _tell(folder: Path, path: Path, now: Progress, back: Progress) -> None:
    say(
        f"rolled back from step {now.step} to {path} "
        f"(roll-back {back.spikes.roll_backs}); the data go on at sample {back.samples:,}"
    )
    entry = {
        "roll_back": back.spikes.roll_backs,
        "from_step": now.step,
        "to_step": back.step,
        "loss": now.spikes.recent[-1],
        "samples": back.samples,
        "checkpoint": path.name,
    }
    line, place = json.dumps(entry) + "\n", folder / FILE
    try:
        place.parent.mkdir(exist_ok=True)
        with open(place, "a+", encoding="utf-8") as file:
            file.seek(0)
            if line not in file.readlines():  # made once more after a resume
                file.write(line)
    except OSError as problem:
        complain(f"{place} cannot be written: {problem}; the run goes on")

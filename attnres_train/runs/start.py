"""How the processes of a run start together: rank 0 prepares the data, the others are handed its
record, and before step 1 it is known that every rank sees run folder and data. Whatever is wrong on
any rank ends all of them with one message that names the machine."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from attnres_train.config.schema import RunConfig
from attnres_train.data.prepare import Prepared, check_alike
from attnres_train.data.record import from_record, is_here, missing
from attnres_train.errors import UserError
from attnres_train.parallel.machines import Place, first_ranks, machine_names
from attnres_train.parallel.meeting import Meeting, of_ranks
from attnres_train.runs.preparation import Lists, handed_over, prepare_stages
from attnres_train.runs.standing import nothing_left
from attnres_train.supervise.preflight import cannot_write
from attnres_train.words import some_of

HANDED_OVER = "handed over"
"""The key under which our launcher tells in which file rank 0 finds what it has prepared."""
PROBE = ".probe-"
# Seconds that a file of rank 0's has to be seen by another machine: network file systems let a
# folder's listing grow old.
SEEN_SECONDS = 10.0


@dataclass(frozen=True)
class Start:
    """What a rank has learnt from the others."""

    stage: int
    """Number of the stage that the run goes on with, 0 where there are none."""
    prepared: Sequence[Prepared]
    """Where the data of that stage, and of those after it, lie on this machine."""
    records: Sequence[Mapping[str, Any]]
    """The same with their files (`data.record`)."""
    machines: Sequence[str]
    """Of each rank, its machine's name."""
    files: Sequence[Lists] = ()
    """On rank 0, those of the corpora of each, for the run folder."""


def prepare_together(config: RunConfig, meeting: Meeting) -> Start | str:
    """The run's data: rank 0 prepares, and tells of it, unless our launcher has; the first rank of
    each machine that lacks what rank 0 has prepares there for itself. Where there is nothing to
    train, why; nothing is written then. Collective.

    Raises UserError, on all ranks, for what is wrong with checkpoint or data on any.
    """
    meeting.tell_own("place", Place(meeting.machine, meeting.local_rank))
    if meeting.rank == 0:
        return _first_to_prepare(config, meeting)
    told = meeting.hear("prepared", "rank 0 to prepare the data")
    if "done" in told:
        meeting.tell_own("leaving", True)
        return told["done"]
    places = [Place(*place) for place in told["places"]]
    machines, first = machine_names(places), first_ranks(places)[meeting.rank]
    records = told["records"]
    if first == meeting.rank:
        here = all(map(is_here, records))
        own = None if here else _prepare_here(config, records, machines, meeting.rank)
        meeting.tell(f"record/{first}", own)
    elif first != 0:
        own = meeting.hear(f"record/{first}", f"rank {first} to look at the data")
    else:
        own = None
    records = own or records
    return Start(told["stage"], list(map(from_record, records)), records, machines)


def _first_to_prepare(config: RunConfig, meeting: Meeting) -> Start | str:
    places = [Place(*place) for place in meeting.hear_all("place", "to join")]
    if done := nothing_left(config):
        meeting.tell("prepared", {"done": done})
        meeting.tell_own("leaving", True)
        meeting.hear_all("leaving", "to hear that")  # from the store, which goes with rank 0
        return done
    handed = meeting.heard(HANDED_OVER)
    made = handed_over(Path(handed)) if handed else prepare_stages(config)
    records, stage = [one.record for one in made], made[0].stage
    meeting.tell("prepared", {"records": records, "stage": stage, "places": places})
    prepared, files = [one.prepared for one in made], [one.files for one in made]
    return Start(stage, prepared, records, machine_names(places), files)


def _prepare_here(
    config: RunConfig, theirs: Sequence[Mapping[str, Any]], machines: Sequence[str], rank: int
) -> list[Mapping[str, Any]]:
    """This machine has a cache of its own: what that lacks is made."""
    own = prepare_stages(config, progress=False)
    for record, made in zip(theirs, own, strict=True):
        check_alike({machines[0]: from_record(record), machines[rank]: made.prepared})
    return [made.record for made in own]


def check_together(folder: Path, start: Start, meeting: Meeting) -> None:
    """Check that every rank sees the run folder that rank 0 holds, can write checkpoints there, and
    sees the data. Collective.

    Raises UserError, on all ranks, that names what is wrong and the machines where it is.
    """
    if meeting.world_size == 1:
        meeting.is_over = True
        return
    probe = folder / (PROBE + secrets.token_hex(8))
    try:
        if meeting.rank == 0:
            for left in folder.glob(PROBE + "*"):  # by an attempt that was killed
                left.unlink(missing_ok=True)
            probe.write_text(probe.name, encoding="utf-8")
            meeting.tell("probe", probe.name)
        token = meeting.hear("probe", "rank 0 to write into the run folder")
        unseen = chain.from_iterable(map(missing, start.records))
        meeting.tell_own("problems", [*_folder_problems(folder, token), *unseen])
        if meeting.rank == 0:
            found = meeting.hear_all(
                "problems", "to look at run folder and data", names=start.machines
            )
            meeting.tell("agreed", _told(found, start.machines))
        problems = meeting.hear("agreed", "all ranks to look at run folder and data")
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    if problems:
        raise UserError("\n".join(problems))
    meeting.is_over = True


def _folder_problems(folder: Path, token: str) -> list[str]:
    if not _sees(folder / token, token):
        return [
            f"run.dir: {folder} is not the folder that rank 0 sees under that name: set run.dir to "
            "a folder that all machines of the run share"
        ]
    if why := cannot_write(folder / "checkpoints"):
        return [f"run.dir: checkpoints cannot be written to {folder / 'checkpoints'}: {why}"]
    return []


def _sees(probe: Path, content: str) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        with suppress(OSError, UnicodeDecodeError):
            if probe.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(probe.parent)  # asks the file server anew
        time.sleep(0.2)


def _told(found: Sequence[Sequence[str]], machines: Sequence[str]) -> list[str]:
    """Each problem once, with where it is."""
    ranks_of: dict[str, list[int]] = {}
    for rank, problems in enumerate(found):
        for problem in problems:
            ranks_of.setdefault(problem, []).append(rank)
    return [
        f"{problem} (on {some_of(dict.fromkeys(machines[rank] for rank in ranks))}: "
        f"{of_ranks(ranks)})"
        for problem, ranks in ranks_of.items()
    ]

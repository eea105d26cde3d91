"""Stands in for `attnres-train train` where the queue is the subject: makes the records of a run,
one step at a time, goes on where it was, saves when told to stop. Loads nothing.

    python fake_trainer.py CONFIG SECONDS_PER_STEP [FAILS]

A run whose name holds FAILS ends with exit code 1 at its second step.
"""

import json
import os
import re
import signal
import sys
import time
import zlib

stopped = []


def main(config: str, seconds: str, fails: str = "") -> int:
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    with open(config) as file:
        text = file.read()

    def value(key: str) -> str:
        return re.search(rf"^  {key}: (.*)$", text, re.M)[1].strip("'\"")

    folder = os.path.join(value("dir"), value("name"))
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "starts"), "a") as file:
        file.write(f"{os.getpid()}\n")
    with open(os.path.join(folder, "info.json"), "w") as file:
        json.dump({"num_parameters": 10, "num_tokens": 1000, "unigram_entropy": 5.0}, file)
    metrics = os.path.join(folder, "metrics.jsonl")
    with open(metrics, "a+") as file:
        file.seek(0)
        done = len(file.readlines())
    for step in range(done + 1, int(value("train_iters")) + 1):
        if fails and fails in folder and step == 2:
            print("no such luck")
            return 1
        time.sleep(float(seconds))
        loss = 5 / step + zlib.crc32(os.path.basename(folder).encode()) / 2**40
        record = {"step": step, "tokens": 256 * step, "loss": loss, "validation_loss": loss}
        record |= {"step_seconds": time.time() % 1, "tokens_per_second": 1.0, "memory_bytes": 1}
        with open(metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        if stopped:
            print("saved")
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

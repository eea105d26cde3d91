"""What a run folder says about its run besides metrics."""

from __future__ import annotations

import json
from dataclasses import asdict

from attnres_train.config.loader import save_config
from attnres_train.observe.hardware import environment
from attnres_train.observe.observer import Observer
from attnres_train.observe.provenance import provenance


class RunFacts(Observer):
    """Writes config.yaml, info.json and environment.json into the run folder, and adds the latter
    to starts.jsonl, a line per start; not before the run has resumed, so that an attempt that
    cannot leaves those of the run it wanted to resume."""

    def on_start(self, step: int) -> None:
        folder = self.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        save_config(self.run.config, folder / "config.yaml.partial")
        (folder / "config.yaml.partial").replace(folder / "config.yaml")
        start = environment(self.run.device, self.run.world_size) | provenance()
        for name, content in {"info": asdict(self.run.info), "environment": start}.items():
            partial = folder / f"{name}.json.partial"
            partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
            partial.replace(folder / f"{name}.json")
        with open(folder / "starts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | start) + "\n")

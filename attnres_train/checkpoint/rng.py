"""State of torch's random number generators as JSON-ready text."""

from __future__ import annotations

import base64

import torch


def rng_state() -> dict[str, str]:
    """State of the CPU generator and, where CUDA is in use, of the current device's: base64."""
    # Not `is_available`: asking for a device's state sets up CUDA, also for a run on the CPU.
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        device: base64.b64encode(state.numpy().tobytes()).decode()
        for device, state in states.items()
    }


def set_rng_state(states: dict[str, str]) -> None:
    """Restore what `rng_state` gave; a device that is not in use is left out."""
    for device, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state)

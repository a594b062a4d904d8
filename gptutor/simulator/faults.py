"""Faults on demand. A request asks for a fault with the header `X-Simulator-Fault: cut=3`, or with the text `fault:cut=3` in its
last message (which reaches the simulator through any gateway). Each fault is a function: of a script, or of a generation where it
changes content or price. A request may name several; they are applied in order.
"""

import re

from gptutor.simulator.generation import Generation
from gptutor.simulator.response_faults import GENERATION_FAULTS, RESPONSE_FAULTS, FaultError
from gptutor.simulator.response_script import Script
from gptutor.simulator.transport_faults import TRANSPORT_FAULTS

__all__ = ["FAULTS", "FaultError", "apply_generation_faults", "apply_script_faults"]

FAULT = re.compile(r"fault:([a-z0-9-]+)(?:=([A-Za-z0-9.:_-]+))?")
SCRIPT_FAULTS = {**RESPONSE_FAULTS, **TRANSPORT_FAULTS}
FAULTS = {**GENERATION_FAULTS, **SCRIPT_FAULTS}


def apply_generation_faults(generation: Generation, text: str) -> Generation:
    """Applies the generation faults that `text` names. Raises FaultError."""
    for name, value in FAULT.findall(text):
        if name in GENERATION_FAULTS:
            generation = GENERATION_FAULTS[name](generation, value)
    return generation


def apply_script_faults(script: Script, generation: Generation, text: str) -> Script:
    """Applies the response and transport faults that `text` names. Raises FaultError, also for an unknown fault."""
    for name, value in FAULT.findall(text):
        if name in GENERATION_FAULTS:
            continue
        try:
            script = SCRIPT_FAULTS[name](script, generation, value)
        except (KeyError, ValueError, IndexError) as error:
            raise FaultError(f"fault:{name}={value} is not one of {', '.join(FAULTS)}") from error
    return script

"""Faults on demand. A request asks for one by the header `X-Simulator-Fault: cut=3`, or by the words `fault:cut=3` in its last
message (which reach the simulator through any gateway). Each fault is a function, from a script to a script or, where it changes
what is said or billed, from a generation to a generation; several may be asked for and are applied in order.
"""

import re

from gptutor.simulator.answer_faults import OF_GENERATIONS, OF_SCRIPTS, FaultError
from gptutor.simulator.generation import Generation
from gptutor.simulator.script import Script
from gptutor.simulator.wire_faults import OF_THE_WAY

__all__ = ["FAULTS", "FaultError", "apply_faults", "change_generation"]

ASKED = re.compile(r"fault:([a-z0-9-]+)(?:=([A-Za-z0-9.:_-]+))?")
ON_SCRIPTS = {**OF_SCRIPTS, **OF_THE_WAY}
FAULTS = {**OF_GENERATIONS, **ON_SCRIPTS}


def change_generation(generation: Generation, asked: str) -> Generation:
    """Raises FaultError."""
    for name, value in ASKED.findall(asked):
        if name in OF_GENERATIONS:
            generation = OF_GENERATIONS[name](generation, value)
    return generation


def apply_faults(script: Script, generation: Generation, asked: str) -> Script:
    """Raises FaultError."""
    for name, value in ASKED.findall(asked):
        if name in OF_GENERATIONS:
            continue
        try:
            script = ON_SCRIPTS[name](script, generation, value)
        except (KeyError, ValueError, IndexError) as error:
            raise FaultError(f"fault:{name}={value} is not one of {', '.join(FAULTS)}") from error
    return script

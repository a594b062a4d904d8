"""What a check is and what it finds, and the run of all checks at once."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gptutor.config.schema import Config

Level = Literal["ok", "warning", "error"]
CHECK_S = 15.0
"""The longest time of a check, if it says nothing else."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence; of a warning or an error it says what to do. It contains no secret."""

    level: Level
    sentence: str


@dataclass(frozen=True, slots=True)
class Installation:
    """What is looked at. `database_url` is empty if there is no database yet; `address` is the public one, or empty."""

    config: Config
    database_url: str
    address: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """`look` may raise: then the check itself has failed, which is an error."""

    name: str
    look: Callable[[Installation], Awaitable[Sequence[Finding]]]
    timeout_s: float = CHECK_S


@dataclass(frozen=True, slots=True)
class Examined:
    """The findings of one check."""

    name: str
    findings: Sequence[Finding]


def in_thread(look: Callable[[Installation], Sequence[Finding]]) -> Callable[[Installation], Awaitable[Sequence[Finding]]]:
    """A check that waits for the disk, which must not stop the others."""

    async def look_in_thread(installation: Installation) -> Sequence[Finding]:
        return await asyncio.to_thread(look, installation)

    return look_in_thread


async def examine(checks: Sequence[Check], installation: Installation) -> list[Examined]:
    """Runs all checks at the same time. None hides the findings of another, whatever happens to it."""
    return list(await asyncio.gather(*(_examine(check, installation) for check in checks)))


async def _examine(check: Check, installation: Installation) -> Examined:
    try:
        async with asyncio.timeout(check.timeout_s):
            findings = await check.look(installation)
    except TimeoutError:
        findings = [error(f"The check did not end within {check.timeout_s:.0f} seconds.")]
    except Exception as failure:  # its text may quote a secret
        findings = [error(f"The check itself failed: {type(failure).__name__}. Please report it.")]
    return Examined(check.name, findings)


def ok(sentence: str) -> Finding:
    return Finding("ok", sentence)


def warning(sentence: str) -> Finding:
    return Finding("warning", sentence)


def error(sentence: str) -> Finding:
    return Finding("error", sentence)

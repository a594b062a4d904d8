"""The examples of the READMEs."""

import re
from pathlib import Path

from tests.support.service import Service

READMES = sorted(Path(__file__).parent.parent.parent.glob("README*.md"))


def examples(path: Path, language: str) -> list[str]:
    return [block for block in re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL) if "localhost:3001" in block]


def here(example: str, service: Service) -> str:
    """The example with the address of the running service and its demo key."""
    return example.replace("http://localhost:3001", service.url).replace("sk-user-your-api-key", service.demo_key)

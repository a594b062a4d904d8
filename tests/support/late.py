"""Imports that take a second of CPU, made by the first test that uses them, and not by the collection in every test process."""

import importlib
from typing import Any


class LateImport:
    """A module that is imported when an attribute of it is first used. (For types, `import` it in `if TYPE_CHECKING`.)"""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest looks at each object of a test file for marks of its own
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)

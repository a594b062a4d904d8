"""Clients for JavaScript: installed by npm with the versions of `tests/js/package.json`, and run by Node."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import fasteners
import pytest

JAVASCRIPT = Path(__file__).parent.parent / "js"


def packages() -> dict[str, str]:
    """The version of each package, by name."""
    manifest = json.loads((JAVASCRIPT / "package.json").read_text(encoding="utf-8"))
    versions: dict[str, str] = {**manifest["dependencies"], **manifest["devDependencies"]}
    return versions


def install(lock: Path) -> str:
    """Node's path, once the packages are installed; of several test processes, the one that has `lock` installs them."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("node and npm are not installed: clients for JavaScript are not checked")
    with fasteners.InterProcessLock(lock):
        if any(_installed_version(name) != version for name, version in packages().items()):
            subprocess.run([npm, "install", "--no-save", "--no-package-lock", "--silent"], cwd=JAVASCRIPT, check=True)
    return node


def _installed_version(name: str) -> str | None:
    try:
        manifest = json.loads((JAVASCRIPT / "node_modules" / name / "package.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return str(manifest["version"])


def run_node(node: str, *arguments: str, **settings: str) -> str:
    """The standard output of a script that ends without an error."""
    environ = {**os.environ, **settings}
    ran = subprocess.run([node, *arguments], cwd=JAVASCRIPT, env=environ, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout

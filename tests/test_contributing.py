"""What CONTRIBUTING.md promises that a test will notice, where no other test does."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from gptutor import __version__
from gptutor.app import build_app
from gptutor.config.schema import Config
from gptutor.errors import ERRORS
from gptutor.simulator.faults import FAULTS
from gptutor.telemetry import metrics
from gptutor.telemetry.logs import LoggerService
from gptutor.web import page

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "README.md"])
DECISIONS = sorted(path for path in (ROOT / "docs" / "decisions").glob("*.md") if path.name != "README.md")
LOCKS = {"run": [""], "develop": ["", "test", "dev"], "bench": ["", "bench"]}
"""Each lock file with the lists of setup.cfg that it answers: the extras, and "" for install_requires."""


def code_without(*names: str) -> str:
    """All code of the package, but those files."""
    skipped = {ROOT / "gptutor" / name for name in names}
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "gptutor").rglob("*.py") if path not in skipped)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- settings, endpoints, errors, metrics, faults


def test_every_setting_is_read() -> None:
    code = code_without("config/schema.py")
    schema = (ROOT / "gptutor" / "config" / "schema.py").read_text(encoding="utf-8")
    names = {setting.name for section in msgspec.structs.fields(Config) for setting in msgspec.structs.fields(section.type)}
    assert [name for name in names if not re.search(rf"\b{name}\b", code) and f"self.{name}" not in schema] == []


@pytest.mark.parametrize("language", page.LANGUAGES)
def test_every_path_is_in_the_guide(language: str) -> None:
    guide = "\n".join((page.HERE / "pages" / f"{name}.{language}.md").read_text(encoding="utf-8") for name in page.NAMES)
    app = build_app(Config(), log=LoggerService(), secrets=[b"x" * 32])
    paths = {route.resource.canonical for route in app.router.routes() if route.resource is not None}
    assert [path for path in sorted(paths) if path.partition("{")[0].rstrip("/") not in guide] == []


def test_every_error_code_is_used() -> None:
    code = code_without("errors.py")
    assert [name for name in ERRORS if f'"{name}"' not in code] == []


def test_every_metric_is_used() -> None:
    code = code_without("telemetry/metrics.py")
    names = [
        name for name, value in vars(metrics).items() if name.isupper() and hasattr(value, "describe") and name != "REGISTRY"
    ]
    assert len(names) > 10
    assert [name for name in names if not re.search(rf"\b{name}\b\.|\({name}\b", code)] == []


def test_every_fault_is_used_by_a_test() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    assert [name for name in FAULTS if not re.search(rf"(?<![a-z-]){name}(?![a-z-])", tests)] == []


# -- documents


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        led_to = (path.parent / name).resolve() if name else path
        assert led_to.exists(), link
        assert not anchor or anchor in anchors(led_to.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_files_that_are_named_exist(name: str) -> None:
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|sql|md|yaml|cfg|service)|(?:[\w-]+/)+)`", (ROOT / name).read_text()))
    assert named
    places = (ROOT, ROOT / "gptutor", ROOT / "gptutor" / "web" / "pages", ROOT / "sql")
    made = {"var/", "logs/"}
    assert [one for one in sorted(named - made) if not any((place / one).exists() for place in places)] == []


def test_architecture_names_every_package() -> None:
    table = re.findall(r"^\| `(\w+)/`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(path.parent.name for path in (ROOT / "gptutor").glob("*/__init__.py"))


def test_the_glossary_is_short() -> None:
    glossary = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Glossary")[2]
    words = [word for cell in re.findall(r"^\| (.+?) \| ", glossary, re.MULTILINE) for word in cell.split(", ")]
    assert 10 < len(words) - 1 <= 30  # the first cell is the heading


def test_every_decision_is_listed_dated_and_says_what_lost() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    assert len(DECISIONS) > 5
    for path in DECISIONS:
        _, *sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for section in sections:
            title, _, text = section.partition("\n")
            assert f"- [{title}]({path.name}#{anchors(f'# {title}').pop()})" in index, title
            assert re.match(r"\n\*20\d\d-\d\d-\d\d\.\*", text), f"{title}: no date"
            assert "**Rejected:** " in text, f"{title}: no alternative"


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_settings_that_are_named_exist(path: Path) -> None:
    sections = {section.name: section.type for section in msgspec.structs.fields(Config)}
    named = re.findall(rf"`({'|'.join(sections)})\.(\w+)", path.read_text(encoding="utf-8"))
    files = {"py", "sql", "md", "yaml"}
    assert [one for one in named if one[1] not in files and one[1] not in sections[one[0]].__struct_fields__] == []


def test_the_changelog_has_the_newest_release_above_the_others() -> None:
    releases = re.findall(
        r"^## (\d+\.\d+\.\d+) – (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    versions = [Version(version) for version, _ in releases]
    assert versions == sorted(versions, reverse=True)
    assert Version(__version__) in versions


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z0-9.-]*[a-z0-9])", path.read_text(encoding="utf-8")))
        assert named <= targets, path.name


# -- dependencies


def locked(name: str) -> dict[str, list[tuple[Version, str]]]:
    """Package → its versions in a lock file, with their hashes."""
    found: dict[str, list[tuple[Version, str]]] = {}
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    for package, version, rest in re.findall(r"^([a-z][\w.-]*)==([\w.]+)(.*?)(?=^[a-z]|\Z)", text, re.MULTILINE | re.DOTALL):
        found.setdefault(package, []).append((Version(version), rest))
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_lock_file_fits_the_ranges(name: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = [setup["options.extras_require"][extra] if extra else setup["options"]["install_requires"] for extra in LOCKS[name]]
    wanted = [Requirement(line) for text in lists for line in text.splitlines() if line and not line.startswith("#")]
    versions = locked(name)
    for one in wanted:
        fitting = [version for version, _ in versions.get(canonicalize_name(one.name), []) if version in one.specifier]
        assert fitting, f"requirements/{name}.txt has no {one}: make lock UPGRADE="


@pytest.mark.parametrize("name", ["build", *LOCKS])
def test_every_locked_package_has_hashes(name: str) -> None:
    assert [package for package, found in locked(name).items() if not all("--hash=sha256:" in rest for _, rest in found)] == []


def test_the_lock_files_agree() -> None:
    run = {package: [version for version, _ in found] for package, found in locked("run").items()}
    for name in ("develop", "bench"):
        others = {package: [version for version, _ in found] for package, found in locked(name).items()}
        assert {package: others[package] for package in run} == run


def test_the_licence_of_every_package_that_runs_is_listed() -> None:
    table = re.findall(r"^\| ([a-z][\w-]*) \| .+ \|$", (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(locked("run"))


PIP_AUDIT = """
import sys
out = sys.argv[sys.argv.index("--output") + 1]
assert "--require-hashes" in sys.argv and "--disable-pip" in sys.argv
"""
REPORT = 'open(out, "w").write(\'{"dependencies": [{"name": "spam", "version": "1", "vulns": [%s]}, {"name": "eggs", "version": "2"}]}\')\n'


@pytest.mark.parametrize(
    ("tool", "status", "words"),
    [
        pytest.param(REPORT % "", 0, "2 locked packages, 0 known vulnerabilities", id="nothing"),
        pytest.param(
            REPORT % '{"id": "PYSEC-1", "fix_versions": ["1.1"]}' + "sys.exit(1)", 1, "spam 1: PYSEC-1, fixed in 1.1", id="found"
        ),
        pytest.param("sys.exit('requests.exceptions.ConnectionError: no route')", 0, "not done", id="unreachable"),
        pytest.param("sys.exit('a mistake')", 1, "pip-audit failed", id="broken"),
    ],
)
def test_the_audit_fails_for_what_it_knows(tmp_path: Path, tool: str, status: int, words: str) -> None:
    (tmp_path / "pip_audit.py").write_text(PIP_AUDIT + tool)
    ran = subprocess.run(
        [sys.executable, str(ROOT / "requirements" / "audit.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, words in ran.stdout + ran.stderr) == (status, True)

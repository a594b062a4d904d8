"""The dashboard and the alert rules in deploy/: they load, name only metrics and labels that exist, and use every metric."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

import gptutor.app  # noqa: F401 - registers all metrics
from gptutor.web import page

DEPLOY = Path(__file__).parent.parent / "deploy"
RULES = DEPLOY / "prometheus" / "gptutor.rules.yml"
RULES_TEST = RULES.with_name("rules_test.yml")
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "gptutor.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
(GROUP,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
ALERTS: list[dict[str, Any]] = GROUP["rules"]
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
NOT_SHOWN: set[str] = set()
"""Metrics that neither the dashboard nor a rule needs. None so far."""
ADDED_BY_PROMETHEUS = {"job", "instance"}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed: on Debian and Ubuntu it is in the package prometheus"
)


def expressions() -> dict[str, str]:
    """All queries, by where they are."""
    panels = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}
    return panels | {alert["alert"]: alert["expr"] for alert in ALERTS}


def ours() -> dict[str, tuple[str, set[str]]]:
    """The name of each sample → its family, and its labels."""
    families = [metric for metric in REGISTRY.collect() if metric.name.startswith("gptutor_")]
    return {
        f"{metric.name}{suffix}": (metric.name, labels_of(metric.name) | {"le"})
        for metric in families
        for suffix in SUFFIXES[metric.type]
    }


def labels_of(family: str) -> set[str]:
    """As the guide's table has them."""
    guide = (page.HERE / "pages" / "monitoring.en.md").read_text(encoding="utf-8")
    (shown,) = re.findall(rf"^\| `{family}(?:_total)?(\{{[\w, ]+\}})?` \|", guide, re.MULTILINE)
    return set(re.findall(r"\w+", shown))


@pytest.mark.parametrize("where", expressions())
def test_a_query_names_metrics_and_labels_that_exist(where: str) -> None:
    expression, samples = expressions()[where], ours()
    named = re.findall(r"\b(gptutor_\w+)", expression)
    assert [name for name in named if name not in samples] == []
    for name, selector in re.findall(r"\b(gptutor_\w+)\{(.*?)\}", expression, re.DOTALL):
        selected = set(re.findall(r"(\w+)\s*[=!]~?\s*\"", selector))
        assert selected <= samples[name][1] | ADDED_BY_PROMETHEUS
    allowed = set().union(*(samples[name][1] for name in named)) | ADDED_BY_PROMETHEUS
    grouped = {label for labels in re.findall(r"\b(?:by|without|on) \(([\w, ]+)\)", expression) for label in labels.split(", ")}
    assert grouped <= allowed


def test_every_metric_is_on_the_dashboard_or_in_a_rule() -> None:
    used = set(re.findall(r"\b(gptutor_\w+)", " ".join(expressions().values())))
    families = {family for name, (family, _) in ours().items() if name in used}
    assert {family for family, _ in ours().values()} - families == NOT_SHOWN


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time", "refresh"} <= DASHBOARD.keys()
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_has_a_unit_a_description_and_the_datasource(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert all(target["legendFormat"] for target in panel["targets"])
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_it_is_why_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["annotations"].keys() == {"summary", "cause", "action", "runbook_url"}
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"]["cause"].endswith(".")
    assert alert["annotations"]["action"].endswith(".")
    name, _, anchor = alert["annotations"]["runbook_url"].removeprefix("http://localhost:8080/en/").partition("#")
    source = (page.HERE / "pages" / f"{name}.en.md").read_text(encoding="utf-8")
    assert not anchor or anchor in [heading.anchor for heading in page.read_page(source).headings]


@pytest.mark.parametrize("language", page.LANGUAGES)
def test_every_alert_is_in_the_guide(language: str) -> None:
    guide = (page.HERE / "pages" / f"monitoring.{language}.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(GPTutor\w+)` \|", guide, re.MULTILINE) == [alert["alert"] for alert in ALERTS]


def test_every_alert_has_a_unit_test() -> None:
    tests = yaml.safe_load(RULES_TEST.read_text(encoding="utf-8"))["tests"]
    assert {alert["alert"] for alert in ALERTS} <= {test["name"] for test in tests}


def promtool(*arguments: str) -> str:
    assert PROMTOOL is not None
    ended = subprocess.run([PROMTOOL, *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@needs_promtool
def test_the_rules_are_valid_and_each_fault_sets_off_its_own_alert_and_no_other() -> None:
    promtool("check", "rules", str(RULES))
    promtool("test", "rules", str(RULES_TEST))


@needs_promtool
def test_prometheus_understands_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    intervals = {"$__rate_interval": "5m", "$__range": "1h", "$job": ".*"}
    rules = []
    for number, expression in enumerate(target["expr"] for panel in PANELS for target in panel["targets"]):
        for name, interval in intervals.items():
            expression = expression.replace(name, interval)
        rules.append({"record": f"panel:{number}", "expr": expression})
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))

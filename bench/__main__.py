"""`make bench`: what a request costs, here and elsewhere, measured in one run and in turn (`bench/README.md`)."""

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import trustme
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.books import commits, prepared
from bench.rig import Authority, Seen, built, seen, start_load, upstream
from bench.subjects import SUBJECTS, Place, Running, cpu_s
from gptutor.database.embedded import embedded_postgres
from gptutor.simulator.server import Simulator

WARM_UP_S = 1.0
BASE = "bare relay"
SCENARIOS = [(kind, callers) for kind in ("plain", "stream", "paced") for callers in (1, 16, 64)]
LEAN = {"gptutor", "bare relay", "nginx"}
STREAMS = 2000
OPENING_S = 8.0

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True, slots=True)
class Measure:
    """One run of callers against one subject. CPU in microseconds per request."""

    subject: str
    kind: str
    callers: int
    cpu_us: float
    database_us: float
    commits: float
    seen: Seen


def main() -> int:
    options = asked()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        with tempfile.TemporaryDirectory(prefix="gptutor-bench-", ignore_cleanup_errors=True) as directory:
            os.chmod(directory, 0o755)
            report = run(options, Path(directory))
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    show(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.chart is not None:
        from bench.chart import draw

        draw(report, options.chart)
    return 0


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="CPU per request of GPTutor, a bare relay, nginx and peers")
    parser.add_argument("--seconds", type=float, default=3, help="of each run (3)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are taken (3)")
    parser.add_argument("--only", help="subjects, with commas between: " + ", ".join(SUBJECTS))
    parser.add_argument("--scenarios", help="such as plain-64,stream-64 (all)")
    parser.add_argument("--tls", action="store_true", help="OpenRouter's stand-in behind TLS, verified")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--chart", type=Path, help="a file for the picture (PNG)")
    return parser.parse_args()


def run(options: argparse.Namespace, directory: Path) -> dict[str, object]:
    scenarios = [
        (kind, callers)
        for kind, callers in SCENARIOS
        if not options.scenarios or f"{kind}-{callers}" in options.scenarios.split(",")
    ]
    chosen = {name: subject for name, subject in SUBJECTS.items() if not options.only or name in options.only.split(",")}
    missing = {name: how for name, subject in chosen.items() if (how := subject.missing()) is not None}
    rig = built(directory)
    models = directory / "models.json"
    models.write_bytes(Simulator().model_list)
    tls = certified(directory) if options.tls else None
    with ExitStack() as stack:
        database_url = stack.enter_context(embedded_postgres(directory / "postgres"))
        keys = directory / "keys"
        keys.write_text("\n".join(asyncio.run(prepared(database_url, accounts=64))))
        port = stack.enter_context(upstream(rig, models, tls))
        running: dict[str, Running] = {}
        for name, subject in chosen.items():
            if name not in missing:
                place = directory / name.replace(" ", "-")
                place.mkdir()
                running[name] = stack.enter_context(subject.start(Place(place, port, tls, database_url, keys)))
        failed: dict[str, str] = {}
        measures, direct = measured(rig, port, running, scenarios, options, database_url, failed)
        streams = (
            {} if options.scenarios else {name: many_streams(rig, subject) for name, subject in running.items() if name in LEAN}
        )
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "tls": options.tls,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "not_measured": missing,
        "failed": failed,
        "streams": streams,
        "results": summed(measures, direct),
    }


def measured(
    rig: Path,
    port: int,
    running: dict[str, Running],
    scenarios: list[tuple[str, int]],
    options: argparse.Namespace,
    database_url: str,
    failed: dict[str, str],
) -> tuple[list[Measure], dict[tuple[str, int], list[Seen]]]:
    """All runs, in turn: whatever slows the machine down for a while slows all subjects down."""
    measures: list[Measure] = []
    direct: dict[tuple[str, int], list[Seen]] = {}
    scheme, host = ("https", "localhost") if options.tls else ("http", "127.0.0.1")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=options.rounds * len(scenarios) * (len(running) + 1))
        for _ in range(options.rounds):
            for kind, callers in scenarios:
                bar.update(task, description=f"{kind}, {callers} callers: directly", advance=1)
                if not options.tls:
                    url = f"{scheme}://{host}:{port}/api/v1/chat/completions"
                    direct.setdefault((kind, callers), []).append(
                        seen(start_load(rig, url, None, kind, callers, options.seconds / 2))
                    )
                for name, subject in running.items():
                    bar.update(task, description=f"{kind}, {callers} callers: {name}", advance=1)
                    if name in failed:
                        continue
                    try:
                        measures.append(measure(rig, name, subject, kind, callers, options.seconds, database_url))
                    except RuntimeError as error:
                        failed[name] = f"{kind}, {callers} callers: {error}"
    return measures, direct


def measure(rig: Path, name: str, subject: Running, kind: str, callers: int, seconds: float, database_url: str) -> Measure:
    seen(start_load(rig, subject.url, subject.keys, kind, callers, WARM_UP_S))
    before = subject.cpu_s(), database_cpu_s(), commits(database_url)
    figures = seen(start_load(rig, subject.url, subject.keys, kind, callers, seconds))
    time.sleep(0.3)  # what is settled and logged behind the answers belongs to them
    own, database, committed = (
        after - earlier for after, earlier in zip((subject.cpu_s(), database_cpu_s(), commits(database_url)), before, strict=True)
    )
    requests = figures.requests
    return Measure(name, kind, callers, own / requests * 1e6, database / requests * 1e6, committed / requests, figures)


def database_cpu_s() -> float:
    return cpu_s([process for process in psutil.process_iter(["name"]) if process.info["name"] == "postgres"])


def many_streams(rig: Path, subject: Running) -> dict[str, float]:
    """STREAMS at once, the second time (what a process grows by once is not a stream's): what each keeps in memory, and how long
    a lone caller of plain answers waits meanwhile."""
    alone = seen(start_load(rig, subject.url, subject.keys, "plain", 1, 1)).p50_ms
    grown, beside = 0, 0.0
    for _ in range(2):
        before = subject.memory_bytes()
        load = start_load(rig, subject.url, subject.keys, "idle", STREAMS, 1)
        time.sleep(OPENING_S)
        grown = subject.memory_bytes() - before
        beside = seen(start_load(rig, subject.url, subject.keys, "plain", 1, 2)).p50_ms
        seen(load)
    return {"kilobytes": round(grown / STREAMS / 1024, 1), "p50_ms_alone": alone, "p50_ms_beside": beside}


def summed(measures: list[Measure], direct: dict[tuple[str, int], list[Seen]]) -> list[dict[str, object]]:
    """Medians of the rounds; what is compared is compared within its round's neighbours by taking medians of the same runs."""
    rows: list[dict[str, object]] = []
    for kind, callers in dict.fromkeys((one.kind, one.callers) for one in measures):
        here = [one for one in measures if (one.kind, one.callers) == (kind, callers)]
        base = [one.cpu_us for one in here if one.subject == BASE]
        reached = direct.get((kind, callers), [])
        for name in dict.fromkeys(one.subject for one in here):
            own = [one for one in here if one.subject == name]
            ratios = [one.cpu_us / other for one, other in zip(own, base, strict=False) if other]
            rows.append(
                {
                    "kind": kind,
                    "callers": callers,
                    "subject": name,
                    "ratio": round(statistics.median(ratios), 2) if ratios else None,
                    "cpu_us": round(statistics.median(one.cpu_us for one in own)),
                    "database_us": round(statistics.median(one.database_us for one in own)) if name.startswith("gptutor") else 0,
                    "commits": round(statistics.median(one.commits for one in own), 2) if name.startswith("gptutor") else 0,
                    "requests_per_s": round(statistics.median(one.seen.requests / one.seen.seconds for one in own)),
                    **{
                        f"added_{figure}": round(
                            statistics.median(getattr(one.seen, figure) for one in own)
                            - statistics.median(getattr(one, figure) for one in reached),
                            2,
                        )
                        for figure in ("p50_ms", "p99_ms", "first_byte_p50_ms")
                        if reached
                    },
                }
            )
    return rows


def show(report: dict[str, object]) -> None:
    out.print(
        f"\n{report['machine']}; medians of {report['rounds']} rounds of {report['seconds']} s; TLS upstream: {report['tls']}"
    )
    table = Table(
        "", "callers", "", "CPU µs", "× bare relay", "PostgreSQL µs", "commits", "req/s", "+p50 ms", "+p99 ms", "+first ms"
    )
    previous = None
    for row in report["results"]:  # type: ignore[attr-defined]
        scenario = (row["kind"], row["callers"])
        if previous not in (None, scenario):
            table.add_section()
        first = scenario != previous
        previous = scenario
        table.add_row(
            row["kind"] if first else "",
            str(row["callers"]) if first else "",
            row["subject"],
            str(row["cpu_us"]),
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            str(row["database_us"] or ""),
            str(row["commits"] or ""),
            str(row["requests_per_s"]),
            *(str(row.get(f"added_{figure}", "")) for figure in ("p50_ms", "p99_ms", "first_byte_p50_ms")),
        )
    out.print(table)
    for name, figures in report["streams"].items():  # type: ignore[attr-defined]
        out.print(
            f"{name}: {STREAMS} open streams, {figures['kilobytes']} KB each; a plain answer takes {figures['p50_ms_beside']} ms "
            f"beside them, {figures['p50_ms_alone']} ms without"
        )
    for name, fault in report["failed"].items():  # type: ignore[attr-defined]
        out.print(f"{name} failed, and was left alone from then on: {fault}")
    for name, how in report["not_measured"].items():  # type: ignore[attr-defined]
        out.print(f"{name} was not measured: it is not installed. {how}")


def certified(directory: Path) -> Authority:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    files = Authority(directory / "authority.pem", directory / "certificate.pem", directory / "key.pem")
    authority.cert_pem.write_to_path(str(files.authority))
    files.certificate.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(files.key))
    return files


if __name__ == "__main__":
    sys.exit(main())

"""`make bench`: CPU per request of GPTutor and other relays, measured in turn within one run (`bench/README.md`)."""

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
from typing import Any

import psutil
import trustme
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.database import count_commits, prepare_database
from bench.rig import LoadResult, TlsFiles, build_rig, load_result, start_load, upstream
from bench.subjects import SUBJECTS, Running, Setup, cpu_s
from gptutor.database.embedded import embedded_postgres
from gptutor.simulator.server import Simulator

WARM_UP_S = 1.0
BASE = "bare relay"
SCENARIOS = [(kind, clients) for kind in ("plain", "stream", "paced") for clients in (1, 16, 64)]
STREAM_SUBJECTS = {"gptutor", "bare relay", "nginx"}
STREAMS = 2000
OPENING_S = 8.0

Report = dict[str, Any]
Row = dict[str, Any]

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One load run against one subject. CPU times are in microseconds per request, `commits` are per request."""

    subject: str
    kind: str
    clients: int
    cpu_us: float
    database_us: float
    commits: float
    load: LoadResult


def main() -> int:
    options = parse_arguments()
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
    try:
        with tempfile.TemporaryDirectory(prefix="gptutor-bench-", ignore_cleanup_errors=True) as directory:
            os.chmod(directory, 0o755)
            report = run(options, Path(directory))
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print_report(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.chart is not None:
        from bench.chart import draw

        draw(report, options.chart)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="CPU per request of GPTutor, a bare relay, nginx and peers")
    parser.add_argument("--seconds", type=float, default=3, help="duration of each run (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="number of runs; the results are their medians (default: 3)")
    parser.add_argument("--only", help="comma-separated subjects: " + ", ".join(SUBJECTS))
    parser.add_argument("--scenarios", help="comma-separated scenarios, such as plain-64,stream-64 (default: all)")
    parser.add_argument(
        "--tls", action="store_true", help="connect to the simulated OpenRouter with TLS, verifying its certificate"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--chart", type=Path, help="write a chart to this file (PNG)")
    return parser.parse_args()


def run(options: argparse.Namespace, directory: Path) -> Report:
    scenarios = [
        (kind, clients)
        for kind, clients in SCENARIOS
        if not options.scenarios or f"{kind}-{clients}" in options.scenarios.split(",")
    ]
    chosen = {name: subject for name, subject in SUBJECTS.items() if not options.only or name in options.only.split(",")}
    missing = {name: command for name, subject in chosen.items() if (command := subject.missing()) is not None}
    rig = build_rig(directory)
    models = directory / "models.json"
    models.write_bytes(Simulator().model_list)
    tls = make_tls_files(directory) if options.tls else None
    with ExitStack() as stack:
        database_url = stack.enter_context(embedded_postgres(directory / "postgres"))
        keys = directory / "keys"
        keys.write_text("\n".join(asyncio.run(prepare_database(database_url, accounts=64))))
        port = stack.enter_context(upstream(rig, models, tls))
        running: dict[str, Running] = {}
        for name, subject in chosen.items():
            if name not in missing:
                subject_directory = directory / name.replace(" ", "-")
                subject_directory.mkdir()
                running[name] = stack.enter_context(subject.start(Setup(subject_directory, port, tls, database_url, keys)))
        failed: dict[str, str] = {}
        measurements, direct = run_rounds(rig, port, running, scenarios, options, database_url, failed)
        streams = (
            {}
            if options.scenarios
            else {name: many_streams(rig, subject) for name, subject in running.items() if name in STREAM_SUBJECTS}
        )
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "tls": options.tls,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "not_measured": missing,
        "failed": failed,
        "streams": streams,
        "results": summarise(measurements, direct),
    }


def run_rounds(
    rig: Path,
    port: int,
    running: dict[str, Running],
    scenarios: list[tuple[str, int]],
    options: argparse.Namespace,
    database_url: str,
    failed: dict[str, str],
) -> tuple[list[Measurement], dict[tuple[str, int], list[LoadResult]]]:
    """All runs. The subjects take turns, so that a slow phase of the machine affects all of them."""
    measurements: list[Measurement] = []
    direct: dict[tuple[str, int], list[LoadResult]] = {}
    scheme, host = ("https", "localhost") if options.tls else ("http", "127.0.0.1")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=options.rounds * len(scenarios) * (len(running) + 1))
        for _ in range(options.rounds):
            for kind, clients in scenarios:
                bar.update(task, description=f"{kind}, {clients} clients: without relay", advance=1)
                if not options.tls:
                    url = f"{scheme}://{host}:{port}/api/v1/chat/completions"
                    direct.setdefault((kind, clients), []).append(
                        load_result(start_load(rig, url, None, kind, clients, options.seconds / 2))
                    )
                for name, subject in running.items():
                    bar.update(task, description=f"{kind}, {clients} clients: {name}", advance=1)
                    if name in failed:
                        continue
                    try:
                        measurements.append(measure(rig, name, subject, kind, clients, options.seconds, database_url))
                    except RuntimeError as error:
                        failed[name] = f"{kind}, {clients} clients: {error}"
    return measurements, direct


def measure(rig: Path, name: str, subject: Running, kind: str, clients: int, seconds: float, database_url: str) -> Measurement:
    load_result(start_load(rig, subject.url, subject.keys, kind, clients, WARM_UP_S))
    before = subject.cpu_s(), database_cpu_s(), count_commits(database_url)
    load = load_result(start_load(rig, subject.url, subject.keys, kind, clients, seconds))
    time.sleep(0.3)  # settling and logging after the responses is part of the cost
    own, database, committed = (
        after - earlier
        for after, earlier in zip((subject.cpu_s(), database_cpu_s(), count_commits(database_url)), before, strict=True)
    )
    requests = load.requests
    return Measurement(name, kind, clients, own / requests * 1e6, database / requests * 1e6, committed / requests, load)


def database_cpu_s() -> float:
    return cpu_s([process for process in psutil.process_iter(["name"]) if process.info["name"] == "postgres"])


def many_streams(rig: Path, subject: Running) -> dict[str, float]:
    """Opens STREAMS streams at once, twice; the second time measures the memory per stream, and the response time of a single other
    client meanwhile. (What a process allocates only once is not the cost of a stream.)"""
    alone = load_result(start_load(rig, subject.url, subject.keys, "plain", 1, 1)).p50_ms
    grown_bytes, beside = 0, 0.0
    for _ in range(2):
        before = subject.memory_bytes()
        load = start_load(rig, subject.url, subject.keys, "idle", STREAMS, 1)
        time.sleep(OPENING_S)
        grown_bytes = subject.memory_bytes() - before
        beside = load_result(start_load(rig, subject.url, subject.keys, "plain", 1, 2)).p50_ms
        load_result(load)
    return {"kilobytes": round(grown_bytes / STREAMS / 1024, 1), "p50_ms_alone": alone, "p50_ms_beside": beside}


def summarise(measurements: list[Measurement], direct: dict[tuple[str, int], list[LoadResult]]) -> list[Row]:
    """A row for each scenario and subject, with medians over the rounds. Ratios are computed within a round first."""
    rows: list[Row] = []
    for kind, clients in dict.fromkeys((one.kind, one.clients) for one in measurements):
        scenario = [one for one in measurements if (one.kind, one.clients) == (kind, clients)]
        base = [one.cpu_us for one in scenario if one.subject == BASE]
        without_relay = direct.get((kind, clients), [])
        for name in dict.fromkeys(one.subject for one in scenario):
            own = [one for one in scenario if one.subject == name]
            ratios = [one.cpu_us / other for one, other in zip(own, base, strict=False) if other]
            rows.append(
                {
                    "kind": kind,
                    "clients": clients,
                    "subject": name,
                    "ratio": round(statistics.median(ratios), 2) if ratios else None,
                    "cpu_us": round(statistics.median(one.cpu_us for one in own)),
                    "database_us": round(statistics.median(one.database_us for one in own)) if name.startswith("gptutor") else 0,
                    "commits": round(statistics.median(one.commits for one in own), 2) if name.startswith("gptutor") else 0,
                    "requests_per_s": round(statistics.median(one.load.requests / one.load.seconds for one in own)),
                    **{
                        f"added_{field}": round(
                            statistics.median(getattr(one.load, field) for one in own)
                            - statistics.median(getattr(one, field) for one in without_relay),
                            2,
                        )
                        for field in ("p50_ms", "p99_ms", "first_byte_p50_ms")
                        if without_relay
                    },
                }
            )
    return rows


def print_report(report: Report) -> None:
    out.print(
        f"\n{report['machine']}; medians of {report['rounds']} rounds of {report['seconds']} s; TLS upstream: {report['tls']}"
    )
    table = Table(
        "", "clients", "", "CPU µs", "× bare relay", "PostgreSQL µs", "commits", "req/s", "+p50 ms", "+p99 ms", "+first byte ms"
    )
    previous = None
    for row in report["results"]:
        scenario = (row["kind"], row["clients"])
        if previous not in (None, scenario):
            table.add_section()
        first = scenario != previous
        previous = scenario
        table.add_row(
            row["kind"] if first else "",
            str(row["clients"]) if first else "",
            row["subject"],
            str(row["cpu_us"]),
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            str(row["database_us"] or ""),
            str(row["commits"] or ""),
            str(row["requests_per_s"]),
            *(str(row.get(f"added_{field}", "")) for field in ("p50_ms", "p99_ms", "first_byte_p50_ms")),
        )
    out.print(table)
    for name, stream in report["streams"].items():
        out.print(
            f"{name}: {STREAMS} open streams, {stream['kilobytes']} KB each; a plain response takes {stream['p50_ms_beside']} ms "
            f"meanwhile, {stream['p50_ms_alone']} ms without them"
        )
    for name, error in report["failed"].items():
        out.print(f"{name} failed, and was not measured any further: {error}")
    for name, command in report["not_measured"].items():
        out.print(f"{name} was not measured, because it is not installed. Install it with: {command}")


def make_tls_files(directory: Path) -> TlsFiles:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    files = TlsFiles(directory / "authority.pem", directory / "certificate.pem", directory / "key.pem")
    authority.cert_pem.write_to_path(str(files.authority))
    files.certificate.write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(files.key))
    return files


if __name__ == "__main__":
    sys.exit(main())

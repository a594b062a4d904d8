"""`gptutor verify`, `reconcile` and `holds`: whether the books are right, against themselves and against OpenRouter."""

import asyncio

import typer

from gptutor.cli.console import Json, fail, out, print_json, with_database
from gptutor.config.load import load
from gptutor.database.pool import Database
from gptutor.money.amounts import decimal_text, roubles
from gptutor.money.balance_auditor import end_alert
from gptutor.money.invariants import Finding, check, findings_json, load_invariants, rows_json
from gptutor.money.journal import JOURNALS, UNBOOKED, read_unbooked
from gptutor.money.reconciliation import Tolerance, WaitingHolds, reconcile, waiting_holds
from gptutor.money.records import reconciliation_json, unbooked_json, waiting_holds_json
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.totals import totals
from gptutor.text import escaped

audit_app = typer.Typer()

VERIFY_S = 86_400
BROKEN = 1
"""The exit code of `verify` for a broken invariant, and of `reconcile` for a difference that is too large."""


@audit_app.command()
def verify(json: Json = False) -> None:
    """Check every accounting invariant over one snapshot. If one is broken, print the offending rows and exit with 1."""
    docs = load().docs
    guide = f"http://{docs.host}:{docs.port}/en/"

    async def run(database: Database) -> list[Finding]:
        findings = []
        async for finding in check(database):
            findings.append(finding)
            if not json:
                _print_finding(len(findings), finding, guide)
        await end_alert(database, findings)
        return findings

    findings = with_database(run, statement_s=VERIFY_S)
    broken = sum(bool(finding.rows) for finding in findings)
    if json:
        print_json(findings_json(findings))
    elif broken:
        out.print(f"{broken} of {len(findings)} invariants are broken. `gptutor docs` serves the pages that say what to do.")
    else:
        out.print(f"All {len(findings)} invariants hold.")
    if broken:
        raise typer.Exit(BROKEN)


def _print_finding(number: int, finding: Finding, guide: str) -> None:
    total = len(load_invariants())
    mark = "[red]BROKEN[/]" if finding.rows else "[green]ok[/]"
    out.print(f"{number:>3}/{total} {mark:<6} {finding.invariant.meaning}", highlight=False)
    for row in rows_json(finding):
        fields = ", ".join(f"{name}={escaped(str(value))}" for name, value in row.items())
        out.print(f"        {fields}", highlight=False, markup=False)
    if finding.rows:
        out.print(f"        What to do: {guide}{finding.invariant.remedy}", highlight=False, markup=False)


@audit_app.command("reconcile")
def reconcile_command(json: Json = False) -> None:
    """Compare our charges with OpenRouter's own totals, by day, and list what is not charged.

    Those are the holds whose cost is unknown, and the requests of accounts that the database has lost. Exits with 1 if a day's
    difference is above the settings of `reconcile`.
    """
    settings = load()
    if settings.simulated:
        fail("There are no totals to compare with: OPENROUTER_API_KEY is not set.")
    try:
        upstream = settings.openrouter
        theirs = asyncio.run(totals(upstream.base_url, upstream.api_key, upstream.management_key, proxy=upstream.proxy))
    except UpstreamError as error:
        fail(f"OpenRouter's totals cannot be read: {error}.")
    tolerance = Tolerance(settings.reconcile.difference_usd_max, settings.reconcile.difference_percent_max)
    found = with_database(lambda database: reconcile(database, theirs, tolerance))
    unbooked = read_unbooked(settings.paths.data / JOURNALS)
    if json:
        print_json(reconciliation_json(found, unbooked))
    else:
        for day in found.days:
            usd = [decimal_text(number) for number in (day.ours_usd, day.theirs_usd, day.difference_usd)]
            mark = "  TOO LARGE" if day.is_too_different else ""
            out.print(f"{day.day}  ours {usd[0]}  OpenRouter {usd[1]}  difference {usd[2]} dollars{mark}")
        _print_waiting(found.waiting)
        if unbooked:
            out.print(
                f"{len(unbooked)} requests cannot be charged, because the database has lost their accounts "
                f"({JOURNALS}/*/{UNBOOKED}):"
            )
        for hold_id, record in unbooked.items():
            named = unbooked_json(hold_id, record)
            out.print(
                "  " + "  ".join(f"{name} {escaped(str(value))}" for name, value in named.items()), highlight=False, markup=False
            )
    if found.is_too_different:
        raise typer.Exit(BROKEN)


@audit_app.command("holds")
def holds_command(json: Json = False) -> None:
    """List the holds whose cost is unknown: recovery still looks for it, or has given up."""
    waiting = with_database(waiting_holds)
    if json:
        print_json(waiting_holds_json(waiting))
    else:
        _print_waiting(waiting)


def _print_waiting(waiting: WaitingHolds) -> None:
    out.print(f"{waiting.count} holds of unknown cost, together at most {roubles(waiting.at_most)} roubles:")
    for hold in waiting.oldest:
        out.print(
            f"  user {hold.account_id}  {hold.created_at:%Y-%m-%d %H:%M}  {hold.state}  at most {roubles(hold.amount)} roubles  "
            f"{escaped(hold.model)}  {escaped(hold.generation_id or 'no generation id')}  request {escaped(hold.request_id)}",
            highlight=False,
            markup=False,
        )

"""`gptutor request ID`: what became of one request, and why."""

from typing import Annotated, Any

import typer

from gptutor.cli.console import Json, fail, out, print_json, with_database
from gptutor.config.load import load
from gptutor.money.amounts import decimal_text, roubles
from gptutor.money.records import request_answer_json
from gptutor.money.requests import FoundRequest, Proof, RequestAnswer, look_up
from gptutor.text import escaped

requests_app = typer.Typer()

PROOFS: dict[Proof, str] = {
    "response": "OpenRouter's response stated the cost",
    "generation": "the cost was looked up at /generation",
    "journal": "the response stated the cost, and the journal kept it",
    "unknown": "the charge is older than the record of what proved it",
    "none_yet": "none yet",
    "nothing_bought": "nothing was bought",
    "none": "none; recovery has given up, and nothing is charged",
}
LOG_FIELDS = ("status", "code", "outcome", "cause", "userId", "durationMs", "costRub", "generationId", "address")
"""Of a log line, those that are shown beside its time and message, where they have a value."""


@requests_app.command("request")
def request_command(
    any_id: Annotated[
        str, typer.Argument(metavar="ID", help="X-Request-ID, OpenRouter's generation id, or a hold's id, as in the ledger.")
    ],
    log_seconds: Annotated[float, typer.Option(min=0, max=3600, help="How long to search the log files, at most.")] = 60,
    json: Json = False,
) -> None:
    """Show what became of a request: its user, key, cost and charge, what proved the cost, or why it was refused."""
    logs = load().paths.logs
    answer = with_database(lambda database: look_up(database, logs, any_id, log_within_s=log_seconds))
    if not answer.requests and not answer.log.lines:
        in_part = "" if answer.log.is_complete else " The log files were searched only in part; see --log-seconds."
        fail(f"Neither the database nor the log files in {logs} have a request with this id.{in_part}")
    if json:
        print_json(request_answer_json(answer))
    else:
        _print(answer)


def _print(answer: RequestAnswer) -> None:
    for request in answer.requests:
        _print_lines(_description(request))
    if not answer.requests:
        _print_lines(["Nothing was held for this request, so it cost nothing. The log says:"])
    elif answer.log.lines:
        _print_lines(["The log says:"])
    _print_lines([_log_text(line) for line in answer.log.lines])
    if not answer.log.is_complete:
        _print_lines(["The log files were searched only in part: there may be more lines."])


def _description(request: FoundRequest) -> list[str]:
    name = f" {request.account_name}" if request.account_name else ""
    key = f"{request.key}…" if request.key is not None else "a key that is not in the database"
    key_name = f" {request.key_name}" if request.key_name else ""
    ended = "still open" if request.closed_at is None else f"{request.closed_at:%Y-%m-%d %H:%M:%S}"
    lines = [
        f"Request {request.request_id}, hold {request.hold_id}",
        f"  user        {request.account_id}{name}",
        f"  key         {request.key_id}, {key}{key_name}",
        f"  model       {request.model}",
        f"  generation  {request.generation_id or 'unknown'}",
        f"  time        {request.created_at:%Y-%m-%d %H:%M:%S} to {ended} (UTC)",
        f"  state       {request.state}",
        f"  evidence    {PROOFS[request.proof]}",
    ]
    if request.charge is not None and request.cost_usd is not None:
        tokens = ["?" if count is None else str(count) for count in (request.prompt_tokens, request.completion_tokens)]
        lines += [
            f"  tokens      {tokens[0]} of the prompt, {tokens[1]} of the output",
            f"  charged     {roubles(request.charge)} roubles = {decimal_text(request.cost_usd)} dollars × "
            f"{decimal_text(request.rub_per_usd)}",
        ]
    else:
        lines.append(f"  rate        {decimal_text(request.rub_per_usd)} roubles per dollar")
    lines.append(f"  held        {roubles(request.held)} roubles now, at most {roubles(request.amount)}")
    if request.closed_at is None:
        lines.append(f"  look-ups    {request.recovery_attempts}, the next at {request.due_at:%Y-%m-%d %H:%M:%S} (UTC)")
    return lines


def _log_text(line: dict[str, Any]) -> str:
    fields = [f"{name}={line[name]}" for name in LOG_FIELDS if line.get(name) is not None]
    return "  ".join([f"  {line.get('timestamp', '')}", str(line.get("message", "")), *fields])


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        out.print(escaped(line), highlight=False, markup=False)

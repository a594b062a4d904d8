"""`gptutor alerts`: what is wrong now, and a message that shows whether alerts arrive."""

import asyncio
from typing import Annotated

import typer

from gptutor.cli.console import Json, fail, out, print_json, shown, with_database
from gptutor.config.load import load
from gptutor.config.schema import Config
from gptutor.database.alert_book import AlertBook, Condition, Event
from gptutor.database.pool import Database
from gptutor.integrations import webhook
from gptutor.money.records import timestamp
from gptutor.telemetry.alerts import Alert, Undelivered, deliver

alerts_app = typer.Typer(help="What is wrong now, and whether alerts arrive.", invoke_without_command=True)


@alerts_app.callback()
def list_alerts(context: typer.Context, json: Json = False) -> None:
    """List the conditions that are on, and the latest events. `gptutor alerts test` sends a message."""
    if context.invoked_subcommand is not None:
        return

    async def run(database: Database) -> tuple[list[Condition], list[Event]]:
        book = AlertBook(database)
        return await book.conditions(), await book.events()

    conditions, events = with_database(run)
    if json:
        print_json(
            {
                "conditions": [{"name": each.name, "text": each.text, "since": timestamp(each.since)} for each in conditions],
                "events": [
                    {
                        "name": each.name,
                        "text": each.text,
                        "untold": each.count,
                        "told_at": None if each.told_at is None else timestamp(each.told_at),
                    }
                    for each in events
                ],
            }
        )
        return
    if not conditions:
        out.print("No condition is on.")
    for condition in conditions:
        out.print(f"since {condition.since:%Y-%m-%d %H:%M}  {condition.name}: {shown(condition.text)}", highlight=False)
    for event in events:
        when = f"{event.told_at:%Y-%m-%d %H:%M}" if event.told_at is not None else "not told yet"
        untold = f", {event.count} since then" if event.count and event.told_at is not None else ""
        out.print(f"{when}{untold}  {event.name}: {shown(event.text)}", highlight=False)


@alerts_app.command("test")
def send_test(
    text: Annotated[str, typer.Argument(help="What to send.")] = "This is a test. Alerts of GPTutor arrive here.",
) -> None:
    """Send a message, by the settings of the section `alerts`. It works while the service is down."""
    settings = load()
    try:
        asyncio.run(_send(settings, Alert("test", "test", text)))
    except Undelivered as error:
        fail(f"The message was not sent: {error}. Look at the section alerts of the settings.")
    out.print("The message was sent.")


async def _send(settings: Config, alert: Alert) -> None:
    """Raises Undelivered."""
    async with webhook.connected(settings.alerts) as receiver:
        if receiver is None:
            raise Undelivered("alerts.url is empty, and nobody is to be told")
        await deliver(receiver.send, alert)

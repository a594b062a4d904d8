"""The main use against a running gateway, by curl and by hand (contract A1, A2, C1, F1, F2, F5, F7, F9, F10; `make test-completion`)."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from gptutor.money.invariants import load_invariants
from tests.support.readme import READMES, examples, here
from tests.support.service import Service


def curl(command: str) -> str:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed: its examples are not run")
    return subprocess.run(
        ["sh", "-c", command.replace("curl ", "curl -sS ", 1)], check=True, capture_output=True, text=True
    ).stdout


def balance(service: Service, user: int) -> Decimal:
    return Decimal(service.command("user", "show", str(user))["balance"])


def complete(service: Service, key: str, **members: object) -> str:
    body = json.dumps({"messages": [{"role": "user", "content": "Привет!"}], **members})
    return curl(
        f"curl -N {service.url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-H 'Authorization: Bearer {key}' -d {shlex.quote(body)}"
    )


def cost_of(document: str) -> Decimal:
    return Decimal(re.findall(r'"cost":([^,}]+)', document)[-1])


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_curl_examples_of_the_readme_work(service: Service, readme: Path) -> None:
    plain, stream = examples(readme, "sh")
    assert json.loads(curl(here(plain, service)))["choices"][0]["message"]["content"]
    assert curl(here(stream, service)).endswith("data: [DONE]\n\n")


def test_the_curl_command_of_the_banner_works(service: Service) -> None:
    command = service.banner[service.banner.index("curl") : service.banner.index("Add ")]
    assert json.loads(curl(command))["object"] == "chat.completion"
    assert "SIMULATOR" in service.banner


def test_the_balance_falls_by_exactly_the_cost_times_ninety(service: Service) -> None:
    user = service.command("user", "create", "--balance", "100")
    assert set(user) >= {"id", "apiKey", "balance"}
    assert Decimal(str(user["balance"])) == 100
    cost = cost_of(complete(service, user["apiKey"])) + cost_of(complete(service, user["apiKey"], stream=True))
    assert cost > 0
    assert balance(service, user["id"]) == 100 - cost * 90
    entries = service.command("user", "ledger", str(user["id"]))
    assert [entry["kind"] for entry in entries] == ["charge", "charge", "topup"]
    assert sum(Decimal(entry["amount"]) for entry in entries) == 100 - cost * 90


def test_each_request_has_its_two_lines_in_the_log(service: Service) -> None:
    user = service.command("user", "create", "--balance", "5")
    cost = cost_of(complete(service, user["apiKey"], model="anthropic/claude-3-haiku", max_tokens=5))
    going_in, coming_out = service.lines_of(user["id"], 2)
    assert list(going_in) == ["timestamp", "level", "message", "type", "model", "userId", "requestId", "stream", "messagesCount"]
    assert going_in == going_in | {
        "level": "info",
        "message": "LLM Request: anthropic/claude-3-haiku",
        "type": "llm",
        "model": "anthropic/claude-3-haiku",
        "stream": False,
        "messagesCount": 1,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", going_in["timestamp"])
    assert coming_out["message"] == "LLM Response: anthropic/claude-3-haiku"
    assert coming_out["requestId"] == going_in["requestId"]
    assert (coming_out["outcome"], coming_out["completionTokens"], coming_out["cause"]) == ("settled", 5, None)
    assert Decimal(coming_out["costRub"]) == cost * 90
    assert coming_out["durationMs"] > 0


def test_no_key_and_no_message_is_ever_logged(service: Service) -> None:
    user = service.command("user", "create", "--balance", "0")
    complete(service, user["apiKey"], messages=[{"role": "user", "content": "canary-7391"}])
    complete(service, service.demo_key, messages=[{"role": "user", "content": "canary-7391 fault:cut=2"}], stream=True)
    complete(service, service.demo_key + "x", messages="canary-7391")
    service.lines_of(user["id"], 2)
    text = json.dumps(service.log())
    assert "insufficient_balance" in text
    assert "canary" not in text
    assert not re.search(r"sk-(or-|user-[0-9]+-[a-z2-7]{5})", text)  # the public part of a key has four characters there


def test_the_invariants_hold(service: Service) -> None:
    proof = subprocess.run(
        [sys.executable, "-m", "gptutor", "verify"], env=service.environ, check=False, capture_output=True, text=True
    )
    assert proof.returncode == 0
    assert f"All {len(load_invariants())} invariants hold." in proof.stdout

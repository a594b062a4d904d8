"""Settings (contract F8; row operator-1): environment over file over defaults, and a sentence for every mistake."""

import re
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from gptutor.config import DEFAULT_FILE, load
from gptutor.secret_keys import secret_key
from gptutor.settings import Config, ConfigError, OpenRouter

SHIPPED = yaml.safe_load(DEFAULT_FILE.read_text())


def written(tmp_path: Path, text: str) -> dict[str, str]:
    (tmp_path / "my.yaml").write_text(text)
    return {"GPTUTOR_CONFIG": str(tmp_path / "my.yaml")}


def test_the_shipped_file_says_the_defaults_and_all_of_them() -> None:
    assert load({"GPTUTOR_CONFIG": str(DEFAULT_FILE)}) == Config()
    assert {section: set(keys) for section, keys in SHIPPED.items()} == {
        name: set(getattr(Config(), name).__struct_fields__) for name in Config.__struct_fields__
    }


def test_every_setting_in_the_file_has_a_comment() -> None:
    lines = [line for line in DEFAULT_FILE.read_text().splitlines() if re.match(r"  \w+:", line)]
    assert len(lines) == sum(map(len, SHIPPED.values()))
    explained = [line for line in lines if "#" in line or re.match(r"  (port|base_url):", line)]
    assert [line for line in lines if line not in explained] == []


def test_the_environment_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    environ = written(tmp_path, "server: {port: 5000, host: 0.0.0.0}\nbilling: {rub_per_usd: 92.123456789012345678}\n")
    config = load({**environ, "PORT": "6000", "GPTUTOR_OPENROUTER__TITLE": "Me", "PATH": "/bin", "OPENROUTER_API_KEY": "sk-or-x"})
    assert (config.server.port, config.server.host) == (6000, "0.0.0.0")
    assert config.billing.rub_per_usd == Decimal("92.123456789012345678")  # never through a float
    assert (config.openrouter.title, config.openrouter.api_key) == ("Me", "sk-or-x")
    assert not config.simulated
    assert config.embedded


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"PORT": "70000"}, ["PORT", "70000", "65535"]),
        ({"PORT": "many"}, ["PORT", "many", "int"]),
        ({"GPTUTOR_SERVER__PROT": "1"}, ["GPTUTOR_SERVER__PROT", "not a setting"]),
        ({"GPTUTOR_SEVER__PORT": "1"}, ["sever", "not a setting"]),
        ({"GPTUTOR_DEBUG": "1"}, ["GPTUTOR_DEBUG", "not a setting"]),
        ({"GPTUTOR_BILLING__RUB_PER_USD": "0"}, ["GPTUTOR_BILLING__RUB_PER_USD", "0.0001", "100000"]),
        ({"GPTUTOR_BILLING__RUB_PER_USD": "-90"}, ["GPTUTOR_BILLING__RUB_PER_USD", "0.0001"]),
        ({"GPTUTOR_BILLING__RUB_PER_USD": "NaN"}, ["GPTUTOR_BILLING__RUB_PER_USD"]),
        ({"GPTUTOR_BILLING__MARGIN": "0.5"}, ["GPTUTOR_BILLING__MARGIN", "from 1 to 10"]),
        ({"GPTUTOR_BILLING__RESERVE": "most"}, ["GPTUTOR_BILLING__RESERVE", "most"]),
        ({"GPTUTOR_RELAY__WRITE_S": "0"}, ["GPTUTOR_RELAY__WRITE_S", "0"]),
        ({"OPENROUTER_BASE_URL": "openrouter.ai", "OPENROUTER_API_KEY": "x"}, ["OPENROUTER_BASE_URL"]),
        ({"OPENROUTER_BASE_URL": "http://localhost:1/api/v1"}, ["OPENROUTER_API_KEY"]),
        ({"GPTUTOR_CONFIG": "/nowhere.yaml"}, ["/nowhere.yaml", "No such file"]),
    ],
)
def test_a_mistake_stops_the_start_with_a_sentence_that_names_it(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("text", ["server: [", "- a", "server: 5", "serwer: {port: 1}", "server: {port: }", "server: {hots: x}"])
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml"):
        load(written(tmp_path, text))


def test_secrets_are_not_printed() -> None:
    config = load({"OPENROUTER_API_KEY": "sk-or-secret", "GPTUTOR_SECRET_KEY": "hush", "DATABASE_URL": "postgresql://u:pw@h/d"})
    assert not re.search("secret|hush|pw", repr(config) + repr(config.openrouter) + str(config.database))
    assert repr(OpenRouter(api_key="sk-or-secret")) == "<OpenRouter settings>"


def test_without_a_secret_key_an_own_database_is_refused_and_the_embedded_one_gets_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GPTUTOR_SECRET_KEY is missing"):
        secret_key(load({"DATABASE_URL": "postgresql:///x"}))
    with pytest.raises(ConfigError, match="32 bytes"):
        secret_key(load({"GPTUTOR_SECRET_KEY": "c2hvcnQ="}))
    config = load({"GPTUTOR_PATHS__DATA": str(tmp_path / "var")})
    assert secret_key(config) == secret_key(config)
    assert len(secret_key(config)) == 32
    assert (tmp_path / "var" / "secret-key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "environ",
    [
        {"OPENROUTER_BASE_URL": "https://[::1"},
        {"OPENROUTER_BASE_URL": "https://h:port/x"},
        {"OPENROUTER_BASE_URL": "https://h/x?y=1"},
        {"GPTUTOR_OPENROUTER__PROXY": "http://ivan:s3cret@h:port"},
        {"GPTUTOR_OPENROUTER__PROXY": "http://h:99999"},
        {"GPTUTOR_OPENROUTER__PROXY": "http://h/path"},
        {"HTTPS_PROXY": "http://ivan:s3cret@h:99999"},
        {"OPENROUTER_API_KEY": "sk-or-1\n"},
        {"GPTUTOR_OPENROUTER__TITLE": "a\r\nb"},
    ],
)
def test_an_address_or_a_header_that_cannot_be_is_told_without_its_secrets(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as told:
        load({"OPENROUTER_API_KEY": "sk-or-1", **environ})
    (name,) = environ
    assert name in str(told.value)
    assert "s3cret" not in str(told.value)
    assert "sk-or-1" not in str(told.value)


def test_the_proxy_of_the_environment_does_not_matter_to_the_simulator() -> None:
    assert load({"HTTPS_PROXY": "socks5://h:1"}).openrouter.proxy == ""

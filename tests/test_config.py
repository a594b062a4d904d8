"""Settings (contract F8; row operator-1): environment over file over defaults, and a sentence for every mistake."""

import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from gptutor.config.load import DEFAULT_FILE, load
from gptutor.config.schema import Config, ConfigError, OpenRouterSettings
from gptutor.config.secrets import secret_key

SHIPPED = yaml.safe_load(DEFAULT_FILE.read_text())


def written(tmp_path: Path, text: str) -> dict[str, str]:
    (tmp_path / "my.yaml").write_text(text)
    return {"GPTUTOR_CONFIG": str(tmp_path / "my.yaml")}


def test_the_shipped_file_has_every_setting_with_its_default() -> None:
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
        ({"PORT": "many"}, ["PORT must be a whole number (it is 'many')."]),
        ({"GPTUTOR_SERVER__HEADER_S": "soon"}, ["GPTUTOR_SERVER__HEADER_S must be a number (it is 'soon')."]),
        ({"GPTUTOR_BILLING__MARGIN": "1,1"}, ["GPTUTOR_BILLING__MARGIN must be a number such as 92.5 (it is '1,1')."]),
        ({"GPTUTOR_LOGS__STDOUT": "on"}, ["GPTUTOR_LOGS__STDOUT must be auto, true or false (it is 'on')."]),
        ({"GPTUTOR_METRICS__PORT": "3001"}, ["GPTUTOR_METRICS__PORT must be another port than server.port, 3001: "]),
        ({"HOST": "0.0.0.0", "GPTUTOR_ADMIN__PORT": "3001", "GPTUTOR_ADMIN__TOKEN": "x" * 32}, ["GPTUTOR_ADMIN__PORT must be "]),
        ({"GPTUTOR_LOGS__BYTES_MAX": "9000000"}, ["logs.file_bytes_max must be at most a quarter of logs.bytes_max."]),
        (
            {"GPTUTOR_LOGS__LEVEL": "loud"},
            ["GPTUTOR_LOGS__LEVEL must be one of debug, info, warning, error (it is 'loud')."],
        ),
        (
            {"OPENROUTER_API_KEY": "x", "OPENROUTER_BASE_URL": "openrouter.ai"},
            ["OPENROUTER_BASE_URL must be an address such as https://host/path (it is 'openrouter.ai')."],
        ),
        ({"GPTUTOR_OPENROUTER__TITLE": "Мой"}, ["GPTUTOR_OPENROUTER__TITLE must be printable ASCII (it is 'Мой')."]),
        ({"GPTUTOR_YOOKASSA__SHOP_ID": "1 2"}, ["must be printable ASCII without spaces (it is '1 2')."]),
        ({"GPTUTOR_YOOKASSA__RETURN_URL": "example.com"}, ["must be an address such as https://example.com/paid (it is"]),
        ({"GPTUTOR_ADMIN__TOKEN": f"Anna:{'x' * 32}"}, ["GPTUTOR_ADMIN__TOKEN", "small Latin letters, digits, - and _"]),
        ({"HOST": ""}, ["HOST is wrong (it is ''): expected `str` of length >= 1."]),
        ({"GPTUTOR_SERVER__PROT": "1"}, ["GPTUTOR_SERVER__PROT", "not a setting"]),
        ({"GPTUTOR_SEVER__PORT": "1"}, ["GPTUTOR_SEVER__PORT is not a setting"]),
        ({"GPTUTOR_SERVER__": "1", "HOST": "h"}, ["GPTUTOR_SERVER__ is not a setting"]),
        ({"GPTUTOR_DEBUG": "1"}, ["GPTUTOR_DEBUG", "not a setting"]),
        ({"GPTUTOR_BILLING__RUB_PER_USD": "0"}, ["GPTUTOR_BILLING__RUB_PER_USD", "0.0001", "100000"]),
        ({"GPTUTOR_BILLING__RUB_PER_USD": "-90"}, ["GPTUTOR_BILLING__RUB_PER_USD", "0.0001"]),
        ({"GPTUTOR_BILLING__RUB_PER_USD": "NaN"}, ["GPTUTOR_BILLING__RUB_PER_USD"]),
        (
            {"GPTUTOR_BILLING__BALANCE_MIN_RUB": "1e-999"},
            ["GPTUTOR_BILLING__BALANCE_MIN_RUB", "at most 9 decimal places, not 999"],
        ),
        ({"GPTUTOR_VK__BONUS_RUB": "0.0000000001"}, ["GPTUTOR_VK__BONUS_RUB", "at most 9 decimal places"]),
        ({"GPTUTOR_BILLING__MARGIN": "0.5"}, ["GPTUTOR_BILLING__MARGIN", "from 1 to 10"]),
        ({"GPTUTOR_BILLING__RESERVE": "worst_case"}, ["GPTUTOR_BILLING__RESERVE", "not a setting"]),
        ({"GPTUTOR_BILLING__OVERDRAFT_MAX_RUB": "-1"}, ["GPTUTOR_BILLING__OVERDRAFT_MAX_RUB", "from 0"]),
        ({"GPTUTOR_RELAY__WRITE_TIMEOUT_S": "0"}, ["GPTUTOR_RELAY__WRITE_TIMEOUT_S", "0"]),
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "server: sk-or-1",
            "must consist of sections with `name: value` lines, as the shipped config.yaml does: server is not a section.",
        ),
        ("logs: [sk-or-1]", "logs is not a section."),
        ("server:\n  port: 1\nlogs:\n  level: info\nserver:\n  host: h\n", "names server a second time in line 5."),
        ("server:\n  port: 1\n  port: 2\n", "names port a second time in line 3."),
        ("server: {port: [1]}", "server.port must be a whole number (it is ['1'])."),
        ("server: {host: {a: b}}", "server.host must be a text (it is {'a': 'b'})."),
    ],
)
def test_a_fault_in_the_file_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text))
    assert str(caught.value).endswith(words)
    assert "my.yaml" in str(caught.value)
    assert "sk-or-1" not in str(caught.value)


def test_a_section_without_lines_has_the_defaults(tmp_path: Path) -> None:
    environ = written(tmp_path, "server:\nlogs:\n  level: debug\n")
    assert load({**environ, "PORT": "5000"}).server.port == 5000
    assert load(environ).server == Config().server


@pytest.mark.parametrize("name", ["OPENROUTER_API_KEY", "VK_SECRET_KEY", "GPTUTOR_OPENROUTER__OLD_API_KEYS"])
def test_an_invalid_secret_is_named_and_not_shown(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be (printable ASCII without spaces|keys separated by one space)\.$"):
        load({"OPENROUTER_API_KEY": "x", name: " ключ"})


# -- the address of the database


@pytest.mark.parametrize(
    "url",
    [
        *(f"postgresql://ivan:s3cret{mark}w@h:5432/name" for mark in "/#?[]@"),
        *(f"postgresql://ivan:12{mark}s3cret@h:5432/name" for mark in "/#?"),
        "postgresql://ivan:12?a=s3cret@h/name",
        *(f"postgresql://ivan:s3cret@h:{port}/name" for port in ("abc", "99999", "0", "", "-1", "५")),
        *("foo", "mysql://ivan:s3cret@h/name", '"postgresql://ivan:s3cret@h/name"', "'postgresql://ivan:s3cret@h/name'"),
        *("postgresql:h/name", "postgresql://h/na me", "postgresql://h/name ", " postgresql://h/name", "postgresql://h\n/name"),
        *("postgresql://[::1/name", "postgresql://::1/name", "postgresql://h1,,h2/name", "postgresql://h1:1,h2:x/name"),
        *(
            "postgresql://h/name?sslmode",
            "postgresql:///name?host=/tmp&port=abc",
            "postgresql:///name?host=h:abc",
            "postgresql://h/name#more",
        ),
    ],
)
def test_an_invalid_database_url_is_reported_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"DATABASE_URL": url})
    assert str(caught.value) == (
        "DATABASE_URL must be such as postgresql://user:password@host:5432/name; in its password write % as %25, / as %2F, "
        "# as %23, ? as %3F, @ as %40, [ as %5B."
    )


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h/name",
        "postgres://ivan@h",
        "postgresql://ivan:s3c%2Fr%40t!$&*()-_=+;,.%5B%23%3F%25@db.example.com:5432/name?sslmode=require",
        "postgresql://ivan:p@h1:5432,h2:5433,[::1]:65535/name?target_session_attrs=read-write",
        "postgresql://[2001:db8::1]/name",
        "postgresql:///name?host=/tmp&port=5433",
        "postgresql:///name?host=h1:5432,/tmp,h2",
        "postgresql://postgres:@/postgres?host=/var/lib/gptutor/postgres",
        "postgresql://ivan:p@%2Fvar%2Frun%2Fpostgresql/name",
    ],
)
def test_a_url_that_asyncpg_reads_is_accepted(url: str) -> None:
    assert load({"DATABASE_URL": url}).database.url == url


# -- gptutor.env


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a service, and an environment without its settings."""
    for name in list(os.environ):
        if name.startswith(("GPTUTOR_", "OPENROUTER_")) or name.upper() in ("DATABASE_URL", "PORT", "HTTPS_PROXY", "NO_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_gptutor_env_is_below_the_environment_and_above_the_settings_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config.yaml").write_text("server: {port: 1, host: h, workers: 3}\nlogs: {level: debug}\n")
    (folder / "gptutor.env").write_bytes(
        b"# a comment\n; another\n\n  export PORT=2\r\nHOST='a b'\nGPTUTOR_OPENROUTER__TITLE=\"$HOME # `x`\"\n"
        b"OPENROUTER_API_KEY=sk\"or'\nPATH=/nowhere\nGPTUTOR_SERVER__WORKERS=5"
    )
    monkeypatch.setenv("GPTUTOR_WORKERS", "4")  # the short name of what the file calls by the long one
    config = load()
    assert (config.server.port, config.server.host, config.server.workers, config.logs.level) == (2, "a b", 4, "debug")
    assert (config.openrouter.title, config.openrouter.api_key) == ("$HOME # `x`", "sk\"or'")
    (folder / "gptutor.env").write_text("PORT=7\n")
    assert load().server.port == 7, "every load reads the file again"
    monkeypatch.setenv("PORT", "8")
    assert load().server.port == 8
    assert load({}).server.port == 1, "with a mapping, gptutor.env is not read"


def test_gptutor_env_is_read_beside_the_file_that_gptutor_config_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "my.yaml").write_text("logs: {level: debug}\n")
    (elsewhere / "gptutor.env").write_text("PORT=2\n")
    (folder / "gptutor.env").write_text(f"PORT=3\nGPTUTOR_CONFIG={elsewhere / 'my.yaml'}\n")
    assert (load().server.port, load().logs.level) == (3, "debug")
    monkeypatch.setenv("GPTUTOR_CONFIG", str(elsewhere / "my.yaml"))
    assert (load().server.port, load().logs.level) == (2, "debug")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\nPORT 3001 s3cret\n", "line 2, is not a setting: write NAME=value"),
        (b"PORT = s3cret", "line 1, is not a setting"),
        (b"s3cret", "line 1, is not a setting"),
        (b"4PORT=s3cret", "line 1, is not a setting"),
        (b"PORT=s3\0cret", "line 1, is not a setting"),
        (b"A=1\nGPTUTOR_SECRET_KEY=$(cat s3cret)", "line 2: commands are not run; write the value itself"),
        (b'GPTUTOR_SECRET_KEY="$(cat s3cret)"', "line 1: commands are not run"),
        (b"GPTUTOR_SECRET_KEY=`cat s3cret`", "line 1: commands are not run"),
        (b"#\n#\nHOST=s3cret\xff", "line 3, is not UTF-8"),
        (b"PORT=many", "PORT in gptutor.env must be a whole number (it is 'many')."),
        (b"DATABASE_URL=mysql://ivan:s3cret@h/x", "DATABASE_URL in gptutor.env must be such as postgresql://"),
        (b"GPTUTOR_DEBUG=s3cret", "GPTUTOR_DEBUG in gptutor.env is not a setting"),
        (b"GPTUTOR_SEVER__PORT=s3cret", "GPTUTOR_SEVER__PORT in gptutor.env is not a setting"),
        (b"OPENROUTER_API_KEY=x\nHTTPS_PROXY=http://ivan:s3cret@h:99999", "HTTPS_PROXY in gptutor.env must be an address"),
    ],
)
def test_a_fault_in_gptutor_env_is_named_by_its_line_without_its_value(folder: Path, text: bytes, words: str) -> None:
    (folder / "gptutor.env").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load()
    assert words in str(caught.value)
    assert "gptutor.env" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_an_unreadable_gptutor_env_is_named(folder: Path) -> None:
    (folder / "gptutor.env").mkdir()
    with pytest.raises(ConfigError, match=r"^gptutor\.env cannot be read: Is a directory\. Run this as the owner"):
        load()


def test_a_proxy_in_the_environment_wins_over_gptutor_env(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gptutor.env").write_text("OPENROUTER_API_KEY=x\nHTTPS_PROXY=file:1\n")
    assert load().openrouter.proxy == "http://file:1"
    monkeypatch.setenv("https_proxy", "http://own:1")
    assert load().openrouter.proxy == "http://own:1"
    monkeypatch.setenv("https_proxy", "")
    assert load().openrouter.proxy == ""
    monkeypatch.delenv("https_proxy")
    monkeypatch.setenv("NO_PROXY", "openrouter.ai")
    assert load().openrouter.proxy == ""


# -- credentials


def test_credentials_are_above_gptutor_env_and_below_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As systemd passes the files of a folder, and as the secrets of a container or of a unit of one's own are named."""
    secrets = folder / "credentials"
    secrets.mkdir()
    (secrets / "gptutor_OPENROUTER_API_KEY").write_text("sk-or-credential\n")
    (secrets / "DATABASE_URL").write_text("postgresql://h/credential")
    (secrets / "gptutor_GPTUTOR_ADMIN__TOKEN").write_text("x" * 32)
    (secrets / "HTTPS_PROXY").write_text("http://credential:1")
    (secrets / "gptutor_OPENROUTER_API_KEY~").write_text("what an editor left")
    (secrets / "..data").mkdir()
    (folder / "gptutor.env").write_text("OPENROUTER_API_KEY=sk-or-file\nHTTPS_PROXY=http://file:1\nPORT=5\n")
    assert load().openrouter.api_key == "sk-or-file"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(secrets))
    config = load()
    assert (config.openrouter.api_key, config.database.url) == ("sk-or-credential", "postgresql://h/credential")
    assert (config.admin.tokens, config.openrouter.proxy, config.server.port) == ({"admin": "x" * 32}, "http://credential:1", 5)
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-environment")
    assert load().openrouter.api_key == "sk-or-environment"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("OPENROUTR_API_KEY", b"s3cret", "The credential OPENROUTR_API_KEY is not a setting."),
        ("gptutor_GPTUTOR_CONFIG", b"s3cret", "The credential GPTUTOR_CONFIG is not a setting."),
        ("GPTUTOR_SEVER__PORT", b"s3cret", "GPTUTOR_SEVER__PORT, a credential, is not a setting."),
        ("openrouter", b"s3cret", "openrouter cannot be used: name the file like a setting"),
        ("PORT", b"s3cret", "PORT, a credential, must be a whole number."),
        ("DATABASE_URL", b"mysql://u:s3cret@h/d", "DATABASE_URL, a credential, must be such as postgresql://"),
        ("GPTUTOR_SECRET_KEY", b" \n", "GPTUTOR_SECRET_KEY is empty"),
        ("VK_SECRET_KEY", b"s3cret\nmore\n", "VK_SECRET_KEY is not one line of text"),
        ("VK_SECRET_KEY", b"s3cret\0", "VK_SECRET_KEY is not one line of text"),
        ("VK_SECRET_KEY", b"s3cret\xff", "VK_SECRET_KEY is not UTF-8"),
        ("VK_SECRET_KEY", b"s3cret" * 12_000, "VK_SECRET_KEY is too large"),
    ],
)
def test_a_fault_in_a_credential_is_named_without_its_content(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert words in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_two_credentials_of_one_name_and_an_unreadable_folder_are_named(tmp_path: Path) -> None:
    for name in ("gptutor_PORT", "PORT"):
        (tmp_path / name).write_text("1")
    with pytest.raises(ConfigError, match=r"gptutor_PORT cannot be used: .* once, or remove it"):
        load({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    with pytest.raises(ConfigError, match="The folder of credentials /nowhere cannot be read: No such file"):
        load({"CREDENTIALS_DIRECTORY": "/nowhere"})


def test_tests_do_not_run_with_the_settings_of_a_living_service(folder: Path) -> None:
    (folder / "gptutor.env").write_text("DATABASE_URL=postgresql://h/living\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).parent / "test_retry.py")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "gptutor.env has the settings of a living service: run the tests in another folder." in ended.stdout + ended.stderr


def test_secrets_are_not_printed() -> None:
    config = load({"OPENROUTER_API_KEY": "sk-or-secret", "GPTUTOR_SECRET_KEY": "hush", "DATABASE_URL": "postgresql://u:pw@h/d"})
    assert not re.search("secret|hush|pw", repr(config) + repr(config.openrouter) + str(config.database))
    assert repr(OpenRouterSettings(api_key="sk-or-secret")) == "<OpenRouterSettings>"


def test_a_secret_key_is_required_with_database_url_and_generated_for_the_embedded_database(tmp_path: Path) -> None:
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
def test_an_invalid_url_or_header_is_reported_without_its_secrets(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"OPENROUTER_API_KEY": "sk-or-1", **environ})
    (name,) = environ
    assert name in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "sk-or-1" not in str(caught.value)


def test_the_simulator_ignores_https_proxy() -> None:
    assert load({"HTTPS_PROXY": "socks5://h:1"}).openrouter.proxy == ""


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("security:\n  secret_key: sk-or-v1-hidden: x\n", "line 2, column 30"),
        ("openrouter:\n  api_key: 'sk-or-v1-hidden\n", "line 3, column 1"),
        ("openrouter:\n  api_key: *sk-or-v1-hidden\n", "line 2, column 12"),
        ("openrouter:\n  api_key: !sk-or-v1-hidden x\n  [", "line 3, column 3"),
        ("openrouter:\n\tapi_key: sk-or-v1-hidden\n", "line 2, column 1"),
        ("openrouter:\n  api_key: sk-or-v1-hidden\x07\n", ""),
    ],
)
def test_a_syntax_error_tells_its_place_and_not_the_line(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text))
    assert "is not valid YAML" in str(caught.value)
    assert place in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert caught.value.__cause__ is None

"""What `gptutor serve` prints when it has started: where everything is, and what to type next."""

from gptutor import __version__
from gptutor.config.schema import Config
from gptutor.server.listener import host_and_port


def banner(config: Config, *, url: str, demo_key: str | None, account: str | None = None) -> str:
    """`account` is what OpenRouter says of ours, or what is wrong with it."""
    upstream = (
        "the built-in SIMULATOR: no model is called and no dollar is spent. Set OPENROUTER_API_KEY to use OpenRouter."
        if config.simulated
        else config.openrouter.base_url
    )
    data = f"embedded PostgreSQL in {(config.paths.data / 'postgres').resolve()}" if config.embedded else "DATABASE_URL"
    docs = host_and_port(config.docs.host.replace("127.0.0.1", "localhost"), config.docs.port)
    lines = [
        "",
        f"  GPTutor            {url}/v1",
        f"  Version            {__version__}",
        f"  Upstream           {upstream}",
        *([f"  Account            {account}"] if account else []),
        f"  Data               {data}",
        f"  Logs               {config.paths.logs.resolve()}/combined-YYYY-MM-DD.log",
        f"  Documentation      make docs → http://{docs}",
    ]
    if config.server.workers > 1 and (config.embedded or config.simulated):
        lines.append("  Processes          1: several need DATABASE_URL and OPENROUTER_API_KEY")
    if config.admin.is_enabled:
        lines.append(
            f"  Administration     {config.admin.socket or f'http://localhost:{config.admin.port}'}, /admin and /metrics"
        )
    if demo_key:
        lines += [
            f"  Demo key           {demo_key}",
            "",
            "  Try it:",
            "",
            f"  curl {url}/v1/chat/completions \\",
            "    -H 'Content-Type: application/json' \\",
            f"    -H 'Authorization: Bearer {demo_key}' \\",
            """    -d '{"messages": [{"role": "user", "content": "Привет! Как дела?"}]}'""",
            "",
            '  Add  "stream": true  for a stream. Stop with Ctrl-C.',
        ]
    else:
        lines += ["", "  Create a user with an API key:  gptutor user create --balance 100"]
    return "\n".join([*lines, ""])

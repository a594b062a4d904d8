"""What `gptutor serve` says when it is up: what answers, where things are, and what to type next."""

from gptutor.config.schema import Config
from gptutor.server.listener import authority


def banner(config: Config, *, url: str, demo_key: str | None) -> str:
    upstream = (
        "the built-in SIMULATOR: no model is asked and no dollar is spent. Set OPENROUTER_API_KEY for the real one."
        if config.simulated
        else config.openrouter.base_url
    )
    data = f"embedded PostgreSQL in {(config.paths.data / 'postgres').resolve()}" if config.embedded else "DATABASE_URL"
    docs = authority(config.docs.host.replace("127.0.0.1", "localhost"), config.docs.port)
    lines = [
        "",
        f"  GPTutor            {url}/v1",
        f"  Answers come from  {upstream}",
        f"  Data               {data}",
        f"  Logs               {config.paths.logs.resolve()}/combined-YYYY-MM-DD.log",
        f"  Documentation      make docs → http://{docs}",
    ]
    if config.admin.is_open:
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
        lines += ["", "  A user with a key:  gptutor user create --balance 100"]
    return "\n".join([*lines, ""])

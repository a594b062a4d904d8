"""The line of the start banner about our account at OpenRouter."""

import asyncio

from gptutor.config.schema import Config
from gptutor.openrouter.account_state import TEXTS, describe, read_credit, read_key
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.service import UpstreamLimits, connected

WAIT_S = 3.0
"""The start does not wait longer: the service serves without this line."""


async def account_line(config: Config) -> str:
    """What is left of the key's limit and, with a management key, of the credit; or what is wrong."""
    settings = config.openrouter
    limits = UpstreamLimits(connect_s=WAIT_S, total_s=WAIT_S, first_byte_s=WAIT_S, idle_s=WAIT_S, end_s=WAIT_S, attempts_max=1)
    try:
        async with (
            asyncio.timeout(WAIT_S),
            connected(
                settings.base_url, settings.api_key, limits, referer="", title="", connections_max=1, proxy=settings.proxy
            ) as service,
        ):
            key = read_key(await service.get("/key"))
            credit_usd = None
            if settings.management_key:
                headers = {"Authorization": f"Bearer {settings.management_key}"}
                credit_usd = read_credit(await service.get("/credits", headers=headers))
    except UpstreamError as error:
        if error.trouble == "invalid_key":
            return f"REFUSED: {TEXTS['invalid_key']}. Set OPENROUTER_API_KEY."
        return f"cannot be read now: {error}"
    except (ValueError, TimeoutError) as error:
        return f"cannot be read now: {str(error) or 'no response in time'}"
    if key.is_used_up:
        return f"REFUSED: {TEXTS['key_limit']}; {describe(key, credit_usd)}"
    return describe(key, credit_usd)

"""The demo user of a trial installation, whose API key the banner shows."""

from gptutor.config.schema import Config
from gptutor.config.secrets import read_or_create_secret
from gptutor.database import pool
from gptutor.money.amounts import parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.keyring import KeyRing
from gptutor.money.keys import parse_key
from gptutor.money.users import UserRepository
from gptutor.money.vault import Vault

DEMO_ROUBLES = "100"


async def demo_key(config: Config, vault: Vault) -> str:
    """The API key of a user with DEMO_ROUBLES, from `paths.data`. Creates both if there is no such key, or it was revoked."""
    path = config.paths.data / "demo-key"
    async with pool.open_database(config.database.url) as database:
        users, keys = UserRepository(database), KeyRing(database, vault)
        if path.exists():
            key = path.read_text().strip()
            if (claim := parse_key(key)) and await keys.is_alive(claim):
                return key
            path.unlink()
        user = await users.create("demo")
        await Bookings(database, "demo").book(user.account_id, "bonus", parse_roubles(DEMO_ROUBLES), reason="demo")
        key, _ = await keys.issue(user.account_id, "demo")
        return read_or_create_secret(path, lambda: key)

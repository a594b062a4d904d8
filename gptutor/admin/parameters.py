"""What stands in the address of a request."""

from aiohttp import web

from gptutor.money.amounts import AccountId

ID_MAX = 10**18 - 1


def account(request: web.Request) -> AccountId:
    return AccountId(int(request.match_info["user_id"]))

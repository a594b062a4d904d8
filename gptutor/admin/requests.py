"""`/admin/requests/{id}`: one request, by its request id, generation id or hold id."""

import asyncio

from aiohttp import web

from gptutor.admin.responses import data_response
from gptutor.errors import ApiError
from gptutor.http.app_keys import CONFIG, DATABASE
from gptutor.http.query import Query
from gptutor.money.records import request_answer_json
from gptutor.money.requests import InvalidId, look_up

LOG_SEARCH_S = 10
SEARCH = web.AppKey("search", asyncio.Lock)
"""One search of the log files at a time: it takes a thread, and much of one core."""


async def show_request(request: web.Request) -> web.Response:
    """404 if neither the database nor the log knows the id."""
    Query(request, ())
    try:
        async with request.app[SEARCH]:
            answer = await look_up(
                request.app[DATABASE], request.app[CONFIG].paths.logs, request.match_info["id"], log_within_s=LOG_SEARCH_S
            )
    except InvalidId as error:
        raise ApiError("invalid_request", str(error)) from error
    if not answer.requests and not answer.log.lines:
        whole = "" if answer.log.is_complete else "; the log files were searched only in part"
        raise ApiError("not_found", f"Neither the database nor the log has a request with this id{whole}")
    return data_response(request_answer_json(answer))

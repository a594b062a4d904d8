"""`GET /v1/models` and `GET /v1/models/{id}`: OpenRouter's models in OpenAI's list shape, with prices in roubles.

The list is made once for each version of the catalogue, not once for each request.
"""

from decimal import Decimal

import msgspec
from aiohttp import web

from gptutor.errors import Refusal
from gptutor.money.amounts import EXACT
from gptutor.openrouter.catalogue import Catalogue, Model


class ModelList:
    """The catalogue as JSON bytes; fields that OpenRouter wrote keep its spelling."""

    def __init__(self, catalogue: Catalogue, rub_per_usd: Decimal) -> None:
        self._catalogue = catalogue
        self._rub_per_usd = rub_per_usd
        self._version = -1
        self._models: dict[str, bytes] = {}
        self._list = b""

    def one(self, model_id: str) -> bytes | None:
        self._refresh()
        return self._models.get(model_id)

    def all(self) -> bytes:
        self._refresh()
        return self._list

    def _refresh(self) -> None:
        if self._version != self._catalogue.version:
            self._version = self._catalogue.version
            self._models = {model.id: self._render(model) for model in self._catalogue.models.values()}
            self._list = b'{"object":"list","data":[%s]}' % b",".join(self._models.values())

    def _render(self, model: Model) -> bytes:
        pricing_rub = {
            name: f"{EXACT.multiply(usd, self._rub_per_usd):f}" for name, usd in model.pricing.items() if name != "discount"
        }
        return msgspec.json.encode(
            {
                "id": model.id,
                "object": "model",
                "created": 0,
                "owned_by": model.id.partition("/")[0].lstrip("~"),
                **{name: field for name, field in model.fields.items() if name not in ("object", "owned_by")},
                "pricing_rub": pricing_rub,
            }
        )


MODELS = web.AppKey("models", ModelList)


async def list_models(request: web.Request) -> web.Response:
    return web.Response(body=request.app[MODELS].all(), content_type="application/json")


async def show_model(request: web.Request) -> web.Response:
    model = request.app[MODELS].one(request.match_info["model_id"])
    if model is None:
        raise Refusal("model_not_found")
    return web.Response(body=model, content_type="application/json")

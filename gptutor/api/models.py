"""`GET /v1/models` and `GET /v1/models/{id}`: OpenRouter's models in OpenAI's list shape, with prices in roubles.

The JSON is rendered once for each version of the catalogue, not once for each request.
"""

import hashlib
from dataclasses import dataclass
from decimal import Decimal

import msgspec
from aiohttp import web

from gptutor.errors import ApiError
from gptutor.http.app_keys import MODEL_LIST
from gptutor.money.amounts import EXACT
from gptutor.openrouter.catalogue import Catalogue, Model


@dataclass(frozen=True, slots=True)
class Document:
    """JSON that is rendered once and served many times. `etag` is strong: a hash of the bytes."""

    body: bytes
    etag: str

    @classmethod
    def of(cls, body: bytes) -> "Document":
        return cls(body, hashlib.sha256(body).hexdigest()[:32])


class ModelList:
    """The catalogue as JSON. OpenRouter's own fields are copied byte for byte."""

    def __init__(self, catalogue: Catalogue, rub_per_usd: Decimal) -> None:
        self._catalogue = catalogue
        self._rub_per_usd = rub_per_usd
        self._version = -1
        self._models: dict[str, Document] = {}
        self._list = Document.of(b"")

    def find(self, model_id: str) -> Document | None:
        self._refresh()
        return self._models.get(model_id)

    def all(self) -> Document:
        self._refresh()
        return self._list

    def _refresh(self) -> None:
        if self._version != self._catalogue.version:
            self._version = self._catalogue.version
            self._models = {model.id: Document.of(self._render(model)) for model in self._catalogue.models.values()}
            bodies = b",".join(document.body for document in self._models.values())
            self._list = Document.of(b'{"object":"list","data":[%s]}' % bodies)

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


async def list_models(request: web.Request) -> web.Response:
    return _document_response(request, request.app[MODEL_LIST].all())


async def show_model(request: web.Request) -> web.Response:
    model = request.app[MODEL_LIST].find(request.match_info["model_id"])
    if model is None:
        raise ApiError("not_found", "Model not found")
    return _document_response(request, model)


def _document_response(request: web.Request, document: Document) -> web.Response:
    """The document, or 304 if the client has this version."""
    is_current = any(tag.value in (document.etag, "*") for tag in request.if_none_match or ())
    response = web.Response(status=304) if is_current else web.Response(body=document.body, content_type="application/json")
    response.etag = document.etag
    response.headers["Cache-Control"] = "no-cache"  # may be cached, and must be revalidated each time: prices change
    return response

"""The names of models as values of labels: those of OpenRouter's list.

A client can name any model, and must not make time series.
"""

from collections.abc import Mapping

from gptutor.telemetry.metrics import CHARGES_ROUBLES, COST_DOLLARS, TOKENS

OTHER = "other"
MODELS_MAX = 2000
FAMILIES_MAX = 200


class ModelLabels:
    """The list may grow and shrink: a name that was on it once stays, up to MODELS_MAX models of FAMILIES_MAX families."""

    def __init__(self) -> None:
        self._models: dict[str, str] = {}
        """Ids and permanent slugs, each with the id that is its label."""
        self._shown: set[str] = set()
        self._families: set[str] = set()
        _begin([OTHER])

    def learn(self, models: Mapping[str, str]) -> None:
        """`models`: by id or slug, the id that is shown."""
        new = []
        for name, shown in models.items():
            if shown not in self._shown and len(self._shown) < MODELS_MAX:
                self._shown.add(shown)
                new.append(shown)
            if shown in self._shown:
                self._models[name] = shown
        _begin(new)
        self._families.update(sorted({_author(shown) for shown in new})[: FAMILIES_MAX - len(self._families)])

    def model(self, name: str) -> str:
        """The label for a model that a client named; a variant such as `…:nitro` counts for its model, unless it is listed."""
        known = self._models
        return known.get(name) or known.get(name.partition(":")[0]) or OTHER

    def family(self, name: str) -> str:
        """The author of the model, such as `google`."""
        author = _author(self.model(name))
        return author if author in self._families else OTHER


def _author(model: str) -> str:
    return model.partition("/")[0]


def _begin(models: list[str]) -> None:
    """The counters by model are present for these models."""
    TOKENS.begin((model, direction) for model in models for direction in ("in", "out"))
    for counter in (COST_DOLLARS, CHARGES_ROUBLES):
        counter.begin((model,) for model in models)


MODEL_LABELS = ModelLabels()


def count_charge(
    model: str, *, prompt_tokens: int | None, completion_tokens: int | None, cost_usd: float, charge_rub: float
) -> None:
    """Counts a charge that was booked now. `model` is what the client named."""
    label = MODEL_LABELS.model(model)
    TOKENS.add((label, "in"), prompt_tokens or 0)
    TOKENS.add((label, "out"), completion_tokens or 0)
    COST_DOLLARS.add((label,), cost_usd)
    CHARGES_ROUBLES.add((label,), charge_rub)

"""What every group of values is, of a run or of a preparation: frozen, strict, and wrong values said in one line."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from flm_scale.errors import ConfigError, did_you_mean

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A frozen group of values that refuses unknown keys and loose types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def replace(self, **changes: Any) -> Self:  # noqa: ANN401 - any field's value
        """Return the section with other values, checked like any other (pydantic's own model_copy does not check)."""
        return type(self)(**dict(self) | changes)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:  # noqa: ANN401 - pydantic hands over anything
        """Turn pydantic's report into one line that names the value and the rule."""
        try:
            return build(data)
        except ValidationError as error:
            raise ConfigError("; ".join(cls._explain_one(dict(problem)) for problem in error.errors())) from None

    @classmethod
    def _explain_one(cls, problem: dict[str, Any]) -> str:
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            return f"{cls.__name__} has no key '{path}'{did_you_mean(path, cls.model_fields)}"
        return f"{cls.__name__}.{path} ({problem['input']!r}): {problem['msg']}"


def of_kinds(run: S, words: Sequence[str]) -> S:
    """Return the run with each section of another kind that the words name (--objective.kind mlm), at its defaults; other options then fit it."""
    given = [part for word in words for part in word.split("=", 1)]
    for option, kind in pairwise(given):
        if option.startswith("--") and option.endswith(".kind"):
            run = _of_kind(run, option[2:-len(".kind")].replace("-", "_").split("."), kind)
    return run


def _of_kind(section: Any, path: Sequence[str], kind: str) -> Any:  # noqa: ANN401 - a Run and its sections
    """Return the section with the one at a path of another kind, if it is not of that kind already, or may be by a value of its own."""
    if path[0] not in getattr(type(section), "model_fields", {}):
        return section
    inner = getattr(section, path[0])
    if path[1:]:
        return section.replace(**{path[0]: _of_kind(inner, path[1:], kind)})
    field = getattr(type(inner), "model_fields", {}).get("kind")
    return section.replace(**{path[0]: {"kind": kind}}) if field and kind not in get_args(field.annotation) else section

"""What all requests and all replies keep to, and what a request takes for a number or a truth value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.config import JsonValue


class Request(BaseModel):
    """What a caller sends."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before", check_fields=False)
    @classmethod
    def _means_what_it_says(cls, value: object, info: ValidationInfo) -> object:
        """Refuse "1" and true where a number is meant, and "no" and 0 where true or false is: they would be taken."""
        kind = _kinds(cls).get(info.field_name or "")
        if kind is None:
            return value
        wrong = _WRONG[kind]
        if type(value) in wrong:
            raise ValueError(f"Input should be a {kind}")
        many: Iterable[tuple[object, object]] = ()
        if isinstance(value, (list, tuple)) and not wrong.isdisjoint(map(type, value)):
            many = ((f"item {i}", each) for i, each in enumerate(value))
        elif isinstance(value, dict) and not wrong.isdisjoint(map(type, value.values())):
            many = value.items()
        for name, each in many:
            if type(each) in wrong:
                raise ValueError(f"{name} should be a {kind}, got {each!r:.80}")
        return value


_Kind = Literal["number", "reward", "truth value"]
_WRONG: Mapping[_Kind, frozenset[type]] = {
    "number": frozenset({bool, str}),
    "reward": frozenset({str}),
    "truth value": frozenset({str, int, float}),
}


@cache
def _kinds(model: type[BaseModel]) -> Mapping[str, _Kind]:
    """Of fields that hold numbers or truth values, alone or in lists and by name, what they hold."""
    found: dict[str, _Kind] = {}
    for name, field in model.model_fields.items():
        leaves = set(_leaves(field.annotation))
        if leaves & {int, float}:
            found[name] = "reward" if name == "rewards" else "number"
        elif bool in leaves:
            found[name] = "truth value"
    return found


def _leaves(annotation: object) -> Iterator[object]:
    """The plain types in an annotation, without the names of a mapping."""
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        inner = inner[:1]
    elif get_origin(annotation) is dict:
        inner = inner[1:]
    elif get_origin(annotation) is Literal:
        return
    if not inner:
        yield annotation
    for each in inner:
        yield from _leaves(each)


def example(**fields: JsonValue) -> ConfigDict:
    """Configuration of a request with an example for the documentation."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


class Reply(BaseModel):
    """What the service answers."""

    model_config = ConfigDict(frozen=True, extra="ignore")

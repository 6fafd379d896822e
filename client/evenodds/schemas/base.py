"""What all requests and all replies keep to, and what a request takes for a number or a truth value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
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
    for name in model.model_fields.keys() - OLDER_NAMES.keys():
        leaves = set(_leaves(model.model_fields[name].annotation))
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


OLDER_NAMES: Mapping[str, str] = {
    "group": "category",
    "groups": "categories",
    "groups_at_most": "categories_at_most",
    "other_groups": "other_categories",
}
"""Names that fields had before, and have beside their own until 1.0: a group is what the attempts at a prompt are."""


def older(name: str, *, is_sent: bool = True) -> Any:
    """A field under its older name."""
    reason = f"the older name of {OLDER_NAMES[name]}, until 1.0"
    return Field(deprecated=reason, description=reason, exclude=not is_sent)


class HasOlderNames(BaseModel):
    """A request or reply with renamed fields: they may come under either name, and stand under both."""

    @model_validator(mode="before")
    @classmethod
    def _stands_under_both_names(cls, data: object) -> object:
        if isinstance(data, Mapping):
            for old, new in _renamed(cls):
                if old in data or new in data:
                    data = {**data, **dict.fromkeys((old, new), _one_value(data, old, new))}
        return data


def _one_value(data: Mapping[str, object], old: str, new: str) -> object:
    """Of a field that may come under two names. Under both it must be the same; null says nothing."""
    earlier, value = data.get(old), data.get(new)
    if value is None or earlier is None or value == earlier:
        return earlier if value is None else value
    raise ValueError(f"{new} {value!r:.80} and {old} {earlier!r:.80} differ, and are one field: send {new} alone")


@cache
def _renamed(model: type[BaseModel]) -> tuple[tuple[str, str], ...]:
    return tuple((old, new) for old, new in OLDER_NAMES.items() if old in model.model_fields)


def example(**fields: JsonValue) -> ConfigDict:
    """Configuration of a request with an example for the documentation."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


class Reply(BaseModel):
    """What the service answers."""

    model_config = ConfigDict(frozen=True, extra="ignore")

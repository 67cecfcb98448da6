"""What a setting is: its class, default, range and one-line meaning; and a table of them.

A setting has one of three classes. *Identity* decides what a result is: a change makes the stage stale. *Extent* says how
far to go: larger continues, smaller is stale. *Execution* decides only how the work is done and never makes a stage stale.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

IDENTITY, EXTENT, EXECUTION = "identity", "extent", "execution"

Auto = Literal["auto"]
Device = Literal["auto", "cpu", "cuda", "mps"]
# Bounds belong to the number alone: on the whole union they would be applied to the word, too.
Count = Annotated[int, Field(ge=1)]


def _setting(default: Any, kind: str, meaning: str, **bounds: Any) -> Any:
    return Field(default, description=meaning, json_schema_extra={"kind": kind}, **bounds)


def identity(default: Any, meaning: str, **bounds: Any) -> Any:
    """A setting that is part of what the result is."""
    return _setting(default, IDENTITY, meaning, **bounds)


def extent(default: Any, meaning: str, **bounds: Any) -> Any:
    """A setting that says how far to go."""
    return _setting(default, EXTENT, meaning, **bounds)


def execution(default: Any, meaning: str, **bounds: Any) -> Any:
    """A setting that only says how the work is done."""
    return _setting(default, EXECUTION, meaning, **bounds)


class Table(BaseModel):
    """One table of `ocd.toml`: frozen, and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=(), strict=True, allow_inf_nan=False
    )
    title: ClassVar[str]

    def of_kind(self, kind: str) -> dict[str, Any]:
        """The settings of one class, by the names they have in `ocd.toml`."""
        return {
            info.alias or name: getattr(self, name)
            for name, info in type(self).model_fields.items()
            if info.json_schema_extra["kind"] == kind
        }

"""Settings by name, and configs that hold them in parts."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from numbers import Integral, Real
from pathlib import PurePath
from typing import Self

from imagelab.errors import UserError

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


class Config:
    """Base of a dataclass with defaults, some of whose fields are dataclasses of settings.

    No two of them have a setting of the same name.
    """

    @classmethod
    def from_settings(cls, **settings) -> Self:
        """A config from settings by name, whichever part they belong to.

        Raises UserError for a name that is no setting, and for a value of another type.
        """
        settings = fit_settings(settings, cls().settings())
        for field in fields(cls):
            if is_dataclass(field.default):
                names = [part.name for part in fields(field.default) if part.name in settings]
                settings[field.name] = type(field.default)(**{n: settings.pop(n) for n in names})
        return cls(**settings)

    def settings(self) -> dict:
        """All settings by name, of every part."""
        settings = {}
        for name, value in asdict(self).items():
            settings |= value if is_dataclass(getattr(self, name)) else {name: value}
        return settings


def fit_settings(settings: Mapping[str, object], defaults: Mapping[str, object]) -> dict:
    """Settings in the types of their defaults; paths become texts, one text a tuple of one.

    A setting whose default is None may be anything; whoever uses it checks it.

    Raises UserError for a name that is no setting, and for a value of another type.
    """
    fitted = {}
    for name, value in settings.items():
        if name not in defaults:
            known = ", ".join(sorted(defaults))
            raise UserError(f"there is no setting {name!r}; the settings are {known}")
        fitted[name] = _fit(name, value, defaults[name])
    return fitted


def _fit(name: str, value: object, default: object) -> object:
    if isinstance(value, PurePath):
        value = str(value)
    if default is None:
        return value
    if isinstance(default, tuple):
        value = (value,) if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            return tuple(value)
        raise UserError(f"{name} is {value!r}; give a list of texts")
    kind = type(default)
    if isinstance(value, bool) or kind in (bool, str):
        fits = type(value) is kind
    else:
        fits = isinstance(value, Integral if kind is int else Real)
    if not fits:
        raise UserError(f"{name} is {value!r}; give {KINDS[kind]}")
    return kind(value)

"""Settings by name, as Python code gives them."""

from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import PurePath

from imagelab.errors import UserError

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


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

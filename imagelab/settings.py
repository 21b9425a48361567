"""Settings by name, and configs that hold them in parts."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from numbers import Integral, Real
from pathlib import PurePath
from typing import Self, get_args, get_type_hints

from imagelab.errors import UserError, shorten, shown

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
        settings = fit_settings(settings, cls().settings(), cls.open_kinds())
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

    def with_settings(self, **settings) -> Self:
        """The same with other values of some settings."""
        return type(self).from_settings(**self.settings() | settings)

    @classmethod
    def open_kinds(cls) -> dict[str, type]:
        """The types of settings that may be None, as in ``int | None``, by name."""
        parts = [type(field.default) for field in fields(cls) if is_dataclass(field.default)]
        hints = {k: v for part in (cls, *parts) for k, v in get_type_hints(part).items()}
        return {name: get_args(v)[0] for name, v in hints.items() if type(None) in get_args(v)}


def fit_settings(
    settings: Mapping[str, object],
    defaults: Mapping[str, object],
    kinds: Mapping[str, type] | None = None,
) -> dict:
    """Settings in the types of their defaults; paths become texts, one text a tuple of one.

    Args:
        kinds: the types of settings that may be None, by name.

    Raises:
        UserError: a name is no setting, or a value is of another type.
    """
    fitted = {}
    for name, value in settings.items():
        if name not in defaults:
            known = ", ".join(sorted(defaults))
            raise UserError(f"there is no setting {shorten(name)!r}; the settings are {known}")
        default = defaults[name]
        if kinds and name in kinds:
            fitted[name] = None if value is None else _fit(name, value, kinds[name]())
        else:
            fitted[name] = _fit(name, value, default)
    return fitted


def _fit(name: str, value: object, default: object) -> object:
    """A value in the type of a default."""
    what = shown(value) if isinstance(value, Integral) else shorten(repr(value))
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(default, tuple):
        value = (value,) if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            return tuple(value)
        raise UserError(f"{name} is {what}; give a list of texts")
    kind = type(default)
    if isinstance(value, bool) or kind in (bool, str):
        fits = type(value) is kind
    else:
        fits = isinstance(value, Integral if kind is int else Real)
    if not fits:
        raise UserError(f"{name} is {what}; give {KINDS[kind]}")
    try:
        return kind(value)
    except OverflowError:  # of a whole number that no float can hold
        raise UserError(f"{name} is {what}; give a smaller number") from None


def check_within(settings: Mapping[str, object], bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raises UserError for a number out of its bounds; what is open, which is None, is in them.

    Args:
        bounds: the least and the most of each number, by name; whole ones for a whole number.
    """
    for name, (least, most) in bounds.items():
        value = settings.get(name)
        if value is not None and not least <= value <= most:  # true of NaN, too
            kind = "a whole number" if isinstance(least, int) else "a number"
            ends = [f"{end:.0f}" if end == int(end) else f"{end:g}" for end in (least, most)]
            raise UserError(f"--{name} is {shown(value)}; give {kind} from {ends[0]} to {ends[1]}")

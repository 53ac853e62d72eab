"""Plugin options: what a user wrote under [transport.NAME] or [store.NAME], as an instance of the plugin's class."""

from __future__ import annotations

import difflib
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs

from edm.errors import UsageError
from edm.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def build_options(options: type[Any], given: Mapping[str, Any], origins: Mapping[str, str], section: str) -> Any:
    """An instance of `options` from the given values, each converted to its field's type.

    origins: where each key came from, for the error text. A key the class does not have is left out: it belongs to the
    other half of the store, as `check_keys` has seen.
    """
    # A plugin's module may import these for its type checker only.
    hints = get_type_hints(options, localns={"Any": Any, "Literal": Literal, "Path": Path})
    arguments = {}
    for field in attrs.fields(options):
        if field.name not in given:
            continue
        try:
            arguments[field.alias] = _convert(given[field.name], hints[field.name], field.metadata.get("type"))
        except UsageError as error:
            raise UsageError(f"{origins[field.name]}: {section}.{field.name}: {error}") from None
    try:
        return options(**arguments)
    except (ValueError, TypeError) as error:
        where = ", ".join(sorted({origins[key] for key in arguments if key in origins})) or "default"
        # attrs' own validators carry the attribute and more beside the text.
        raise UsageError(f"{where}: {section}: {error.args[0] if error.args else error}") from None


def check_keys(
    classes: Iterable[type[Any]], given: Mapping[str, Any], origins: Mapping[str, str], section: str
) -> None:
    """Raise `UsageError` for a key that none of the classes has."""
    known = sorted({field.name for options in classes for field in attrs.fields(options)})
    for key in given:
        if key not in known:
            raise UsageError(f"{origins[key]}: unknown key '{section}.{key}'{suggest(key, known)}")


def suggest(key: str, known: Iterable[str]) -> str:
    """What was probably meant, or what there is, in brackets."""
    known = list(known)
    close = difflib.get_close_matches(key, known, 1)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(known)})" if known else " (there are none)"


def _convert(raw: Any, hint: Any, metadata_type: str | None) -> Any:
    origin = get_origin(hint)
    if origin in {Union, types.UnionType}:
        choices = [choice for choice in get_args(hint) if choice is not type(None)]
        if raw is None or (raw == "none" and len(choices) < len(get_args(hint))):
            return None
        hint = choices[0]
        origin = get_origin(hint)
    if metadata_type == "size":
        return parse_size(raw)
    if origin is Literal:
        return _choose(raw, get_args(hint))
    if origin in {tuple, list}:
        parts = raw.split(",") if isinstance(raw, str) else raw
        if not isinstance(parts, list | tuple):
            raise UsageError(f"must be a list, not '{raw}'")
        return origin(
            _convert(part.strip() if isinstance(part, str) else part, get_args(hint)[0], None) for part in parts
        )
    return _scalar(raw, hint)


def _choose(raw: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if raw == choice or (isinstance(raw, str) and raw == str(choice)):
            return choice
    raise UsageError(f"must be one of {', '.join(map(str, choices))}, not '{raw}'")


def _scalar(raw: Any, hint: Any) -> Any:
    if hint is bool:
        text = str(raw).strip().lower()
        if text not in {"1", "true", "yes", "on", "0", "false", "no", "off"}:
            raise UsageError(f"must be true or false, not '{raw}'")
        return text in {"1", "true", "yes", "on"}
    if hint is int or hint is float:
        try:
            if isinstance(raw, bool) or (hint is int and isinstance(raw, float)):
                raise ValueError
            return hint(raw)
        except (ValueError, TypeError):
            what = "whole number" if hint is int else "number"
            raise UsageError(f"must be a {what}, not '{raw}'") from None
    if hint is Path:
        return Path(_text(raw)).expanduser().absolute()
    if hint is str:
        return _text(raw)
    return raw


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise UsageError(f"must be text, not '{raw}'")
    return raw

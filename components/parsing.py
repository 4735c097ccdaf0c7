"""Reading JSON and YAML that anyone may have written, and showing what they hold in a message."""

from __future__ import annotations

import json
import reprlib

import yaml

TOO_DEEP = "it is nested too deeply"
# What PyYAML raises, besides its own errors, for a value that is none of its type: 2001-99-99, !!int a, !!bool a, ...
NO_VALUE = (ValueError, ArithmeticError, LookupError, AttributeError, TypeError)

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 100
SHORT.maxlevel = 3


def parse_json(text: str):
    """The value of a JSON text. Raises ValueError (JSONDecodeError where it is not JSON) with a short reason."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except ValueError as error:
        raise ValueError("a number has too many digits") from error


def parse_yaml(text: str):
    """The value of a YAML text, of plain types only. Raises ValueError with the reason."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except NO_VALUE as error:
        raise ValueError(f"a date, number or other value is none of its kind ({error!s:.60})") from error


def shown(value) -> str:
    """A value for a message: short, however large, deep or often repeated its parts are."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of too many digits"


def broken(text: str) -> bool:
    """Whether a text holds half a surrogate pair, which is no character: no UTF-8 file can hold it."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)

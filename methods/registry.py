"""From a method's name to its class: one dictionary, entry points of other distributions, or a dotted path."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from fewref.episodes.errors import InputError, near
from fewref.methods.base import Method, MethodInfo

ENTRY_POINTS = "fewref.methods"
METHODS: dict[str, str] = {
    "empty": "fewref.methods.controls:Empty",
    "random": "fewref.methods.controls:Random",
    "copy-support": "fewref.methods.controls:CopySupport",
    "oracle": "fewref.methods.controls:Oracle",
    "cma": "fewref.methods.cma.adapter:CMA",
    "cma-self": "fewref.methods.cma.adapter:CMASelf",
    "cma-base": "fewref.methods.cma.adapter:CMABase",
    "referformer": "fewref.methods.referformer.adapter:ReferFormer",
    "tf2": "fewref.methods.tf2.adapter:TF2",
    "tf2-released": "fewref.methods.tf2.adapter:TF2Released",
}


def method_names() -> tuple[str, ...]:
    """Names that `load_method` knows: the built-in ones in their order, then those of entry points, sorted."""
    return (*METHODS, *sorted(set(_installed()) - set(METHODS)))


def load_method(name: str) -> type[Method]:
    """The class of a method; imports nothing but the module it lives in.

    name: a name from `method_names()` or the dotted path "package.module:Class" of any `Method`; a module in the
    current folder is found too. Raises InputError for an unknown name, a module that cannot be imported, or something
    that is no `Method`.
    """
    where = METHODS.get(name) or _installed().get(name) or name
    if ":" not in where:
        raise InputError(f"method {name!r} is unknown: {near(name, method_names())} (or 'package.module:Class')")
    module_name, _, attribute = where.partition(":")
    with _current_folder():
        module = _import(module_name, name)
    found = getattr(module, attribute, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if _is_method(value)]
        hint = near(attribute, classes) if classes else "it defines no Method"
        raise InputError(f"method {name!r}: module {module_name} has no {attribute!r}: {hint}")
    if not _is_method(found):
        raise InputError(f"method {name!r}: {attribute} is not a subclass of fewref.methods.base.Method")
    if missing := sorted(found.__abstractmethods__):
        raise InputError(f"method {name!r}: {attribute} does not define {' and '.join(missing)}")
    if not isinstance(getattr(found, "info", None), MethodInfo):
        raise InputError(f"method {name!r}: {attribute} has no `info`, a fewref.methods.base.MethodInfo")
    return found


def _is_method(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Method) and value is not Method


def _installed() -> dict[str, str]:
    return {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}


def _import(module_name: str, name: str) -> object:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # a foreign module may raise anything while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"method {name!r}: module {module_name!r} cannot be imported ({reason})") from error


@contextmanager
def _current_folder() -> Iterator[None]:
    """The current folder at the end of the import path, except the checkout itself, whose folders are no packages."""
    here = os.getcwd()
    if here in sys.path or (Path(here) / "methods" / "registry.py").exists():
        yield
        return
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)

"""Whatever a public call takes or returns can be imported from the package's root."""

from __future__ import annotations

import ast
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import circuit_tracer_qk as ctqk

PACKAGE = "circuit_tracer_qk"
MADE_BY_USERS = {"LiveGraphs"}  # their constructors are public calls; other classes are returned


def test_every_class_in_a_public_signature_is_public() -> None:
    hidden = {
        f"{found.__module__}.{found.__name__}, named by {where}"
        for where, annotation, namespace in signatures()
        for found in classes(resolved(annotation, namespace))
        if found.__module__.split(".")[0] == PACKAGE and found.__name__ not in ctqk.__all__
    }
    assert not hidden


def test_every_public_name_is_documented_and_listed_once() -> None:
    assert len(set(ctqk.__all__)) == len(ctqk.__all__)
    for name in ctqk.__all__:
        value = getattr(ctqk, name)
        assert value.__module__.split(".")[0] == PACKAGE
        documented = value.__doc__ or ""
        assert documented and not documented.startswith(f"{name}("), name


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    """The imports for type checkers, the table of modules and ``__all__`` agree."""
    source = Path(ctqk.__file__).read_text(encoding="utf-8")
    seen = {
        alias.name: str(node.module)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{PACKAGE}.")
        for alias in node.names
        if not alias.name.startswith("_")
    }
    assert sorted(seen) == sorted(ctqk.__all__)
    for name, module in seen.items():
        assert getattr(ctqk, name) is getattr(sys.modules[str(module)], name)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(ctqk.__file__).parent / "py.typed").is_file()


def signatures() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every annotation of a public call: where it stands, itself, what its names mean."""
    for name in ctqk.__all__:
        value = getattr(ctqk, name)
        if not inspect.isclass(value):
            yield from of_function(name, value)
            continue
        for base in value.__mro__:
            if base.__module__.split(".")[0] != PACKAGE:
                continue
            for field, annotation in base.__dict__.get("__annotations__", {}).items():
                if not field.startswith("_"):
                    yield f"{name}.{field}", annotation, names_of(base.__module__)
            for attribute, member in base.__dict__.items():
                if attribute.startswith("_") and (attribute, name) not in {
                    ("__init__", made) for made in MADE_BY_USERS
                }:
                    continue
                function = function_of(member)
                if function is not None:
                    yield from of_function(f"{name}.{attribute}", function)


def function_of(member: Any) -> Callable[..., Any] | None:
    """The function behind a method, property or class method; None for other values."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, cached_property):
        return member.func
    if isinstance(member, classmethod | staticmethod):
        return member.__func__
    return member if inspect.isfunction(member) else None


def of_function(where: str, function: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        return
    for parameter, annotation in function.__annotations__.items():
        yield f"{where}({parameter})", annotation, names_of(function.__module__)


def names_of(module: str) -> dict[str, Any]:
    """A module's names, those that only type checkers import among them."""
    loaded = sys.modules[str(module)]
    names = dict(vars(loaded))
    for node in ast.parse(inspect.getsource(loaded)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), module, "exec"), names)  # its imports
    return names


def resolved(annotation: Any, names: dict[str, Any]) -> Any:
    if isinstance(annotation, typing.ForwardRef):  # of a NamedTuple
        annotation = annotation.__forward_arg__
    return eval(annotation, names) if isinstance(annotation, str) else annotation


def classes(annotation: Any) -> Iterator[type]:
    """The classes that an annotation is made of."""
    if isinstance(annotation, list | tuple):  # the arguments of a Callable
        for part in annotation:
            yield from classes(part)
    elif typing.get_args(annotation):
        yield from classes(typing.get_args(annotation))
    elif inspect.isclass(annotation):
        yield annotation

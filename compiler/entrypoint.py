"""Loads a function that the user names as ``file.py:function`` or ``pkg.mod:function``."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from edgec.errors import EdgecError, suggestion


def load_function(text: str, error_type: type[EdgecError]) -> Callable[..., Any]:
    """The function that ``file.py:function`` or ``pkg.mod:function`` names.

    The folder of a file is importable while its module is loaded and afterwards, as it is
    for ``python file.py``. Raises ``error_type`` if the file, module or function is missing.
    """
    where, _, name = text.rpartition(":")
    if not where or not name.isidentifier():
        raise error_type(f"'{text}' names no function; expected file.py:function")
    try:
        module = _load_file(pathlib.Path(where)) if where.endswith(".py") else _import(where)
    except FileNotFoundError as error:
        raise error_type(f"{where}: no such file") from error
    except ModuleNotFoundError as error:
        if error.name and where.startswith(error.name):
            raise error_type(
                f"no module named '{error.name}'; for a file, write {where}.py:{name}"
            ) from error
        raise error_type(f"{where}: {describe_failure(None, error)}") from error
    except (Exception, SystemExit) as error:
        raise error_type(f"{where}: {describe_failure(None, error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = sorted(n for n, v in vars(module).items() if callable(v) and n[0] != "_")
        raise error_type(f"{where} has no function '{name}'{suggestion(name, known)}")
    return function  # type: ignore[no-any-return]


def describe_failure(function: Callable[..., Any] | None, error: BaseException) -> str:
    """One line: what the user's code raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(pathlib.Path(__file__).parent)
    outside = [f for f in frames if not f.filename.startswith((here, "<frozen"))]
    place = f" ({pathlib.Path(outside[-1].filename).name}:{outside[-1].lineno})" if outside else ""
    if isinstance(error, SyntaxError):
        place = f" (line {error.lineno})"
    text = " ".join(str(error).split())[:400]
    name = f"{function.__name__}() " if function is not None else ""
    return f"{name}raised {type(error).__name__}: {text}{place}"


def _import(name: str) -> Any:
    if str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))
    return importlib.import_module(name)


def _load_file(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"edgec_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

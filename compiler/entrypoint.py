"""Loads and calls what the user names as ``file.py:function`` or ``pkg.mod:function``.

Random numbers that such code draws without a seed of its own come from a fixed one, so that
a build can be repeated; the caller's generators go on as if nothing had happened. No
``__pycache__`` is left beside the user's files.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pathlib
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

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
        with _no_bytecode(), repeatable():
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


@contextlib.contextmanager
def repeatable(seed: int = 0) -> Iterator[None]:
    """Inside, ``random``, ``numpy.random`` and torch start at ``seed``; outside, they go on."""
    outside = _generator_states()
    _seed_generators(seed)
    try:
        yield
    finally:
        _restore_generators(outside)


def repeatable_items(function: Callable[[], Iterable[Any]], seed: int = 0) -> Iterator[Any]:
    """The items of ``function()``; what it draws at random is the same in every pass."""
    with repeatable(seed):
        items = iter(function())
        inside = _generator_states()
    while True:
        outside = _generator_states()
        _restore_generators(inside)
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            inside = _generator_states()
            _restore_generators(outside)
        yield item


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


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """Nothing is written beside the user's files."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch = sys.modules.get("torch")  # loaded by the user's file, if it needs it
    if torch is not None:
        torch.manual_seed(seed)


def _generator_states() -> tuple[Any, Any, Any]:
    torch = sys.modules.get("torch")
    drawn = torch.get_rng_state() if torch is not None else None
    return random.getstate(), np.random.get_state(), drawn


def _restore_generators(states: tuple[Any, Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    if states[2] is not None:
        sys.modules["torch"].set_rng_state(states[2])

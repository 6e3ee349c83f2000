"""What the user gave -> ``Source``.

Four kinds are understood: a function that returns a torch module (``file.py:function`` or
``pkg.mod:function``), a torch ``.pt2`` exported program, an ``.onnx`` file and a local
Hugging Face directory. Nothing is downloaded.
"""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgec.entrypoint import describe_failure, load_function, repeatable
from edgec.errors import EdgecError, SourceError

Kind = Literal["module", "exported", "onnx", "huggingface"]
Data = str | pathlib.Path | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class ImageSpec:
    """How a photograph becomes the model's input; carried in the bundle for the app.

    size: (height, width) in pixels. crop: share of the short side that a centre crop keeps
    before resizing, 0..1. mean, std: per channel, in units of 0..255.
    """

    size: tuple[int, int]
    crop: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)
    channels: Literal["RGB", "BGR"] = "RGB"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    resize: Literal["bilinear", "bicubic"] = "bicubic"
    input: str = ""


@dataclass(frozen=True)
class Source:
    """A trained model and what is known about it.

    module: a torch.nn.Module, a torch.export.ExportedProgram, or the path of an .onnx file
        or a Hugging Face directory.
    example_inputs: a tuple in the order of forward(), or a dict by argument name, of torch
        tensors; shapes that are not declared dynamic become fixed.
    dynamic: argument name -> {axis: dimension name}.
    calibration, evaluation: a path as on the command line, or a function that yields feeds
        (dict of numpy arrays by input name; other keys, as "label", are labels).
    metric: a built-in name (top1, spearman, ...), "file.py:function" or a function
        (outputs, labels) -> float, higher is better.
    labels: class names in the order of the logits; declares a classifier.
    state: input -> the output that is its next value, of a recurrent model; None: what their names
        tell, {}: none.
    """

    module: Any
    example_inputs: tuple[Any, ...] | Mapping[str, Any] = ()
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    calibration: Data | None = None
    evaluation: Data | None = None
    metric: str | Callable[..., float] | None = None
    image: ImageSpec | None = None
    labels: tuple[str, ...] | None = None
    name: str = ""
    state: Mapping[str, str] | None = None

    @property
    def kind(self) -> Kind:
        """Which of the four kinds of model this is."""
        if isinstance(self.module, pathlib.Path):
            return "huggingface" if self.module.is_dir() else "onnx"
        if type(self.module).__name__ == "ExportedProgram":
            return "exported"
        return "module"


def load_source(given: Any) -> Source:
    """The Source that a path, a ``where:function`` or a Python object stands for.

    Raises SourceError if there is no such model or it cannot be read.
    """
    if isinstance(given, Source):
        return _checked(given)
    if isinstance(given, tuple):
        return load_source(_from_return_value(given, "the given tuple"))
    if not isinstance(given, (str, pathlib.Path)):
        raise SourceError(
            f"a {type(given).__name__} is no source; expected a path, 'file.py:function', "
            "(module, example_inputs) or edgec.Source"
        )
    text = str(given)
    path = pathlib.Path(text)
    if path.suffix == ".onnx":
        return Source(module=_existing(path), name=_file_name(path.stem))
    if path.suffix == ".pt2":
        return _from_exported_program(_existing(path))
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "modules.json")):
            raise SourceError(
                f"{path}: a directory without config.json is no Hugging Face model; "
                "give the folder that save_pretrained() wrote"
            )
        return Source(module=path, name=_file_name(path.resolve().name))
    if ":" in text and not path.exists():
        function = load_function(text, SourceError)
        try:
            with repeatable():
                value = function()
        except EdgecError:
            raise
        except (Exception, SystemExit) as error:
            raise SourceError(f"{text}: {describe_failure(function, error)}") from error
        source = _from_return_value(value, text)
        if not source.name and not isinstance(source.module, (str, pathlib.Path)):
            name = text.rpartition(":")[0].removesuffix(".py")
            source = replace(source, name=pathlib.Path(name).name.split(".")[-1])
        return _checked(source)
    if path.suffix in {".pt", ".pth", ".bin", ".safetensors", ".ckpt"}:
        _existing(path)
        raise SourceError(
            f"{path}: weights alone are no model; give 'file.py:function' that builds the "
            "module and loads them, a .pt2 exported program or an .onnx file"
        )
    if not path.exists():
        raise SourceError(
            f"no such model: {text}; expected file.py:function, pkg.mod:function, an .onnx or "
            ".pt2 file, or a Hugging Face directory"
        )
    if path.suffix == ".py":
        raise SourceError(f"{path}: which function? give {path}:FUNCTION, for example {path}:build")
    raise SourceError(f"{path}: not a model; expected .onnx, .pt2, file.py:function or a directory")


def _checked(source: Source) -> Source:
    """The source with a path as path and a name. Raises SourceError if its module is none."""
    module = source.module
    if isinstance(module, (str, pathlib.Path)):
        path = pathlib.Path(module)
        found = load_source(path) if path.suffix in {".onnx", ".pt2"} or path.is_dir() else None
        if found is None:
            raise SourceError(
                f"{path}: not a model; Source.module is a torch module, an exported program, or "
                "the path of an .onnx file or a Hugging Face directory"
            )
        examples = source.example_inputs or found.example_inputs
        source = replace(source, module=found.module, example_inputs=examples)
        return replace(source, name=_file_name(source.name or found.name))
    if not hasattr(module, "state_dict"):
        raise SourceError(
            f"Source.module is a {type(module).__name__}, expected a torch.nn.Module, an exported "
            "program or a path"
        )
    if not isinstance(source.example_inputs, (tuple, list, Mapping)):
        source = replace(source, example_inputs=(source.example_inputs,))
    return replace(source, name=_file_name(source.name or _object_name(module)))


def _from_return_value(value: Any, where: str) -> Source:
    if isinstance(value, Source):
        return value
    if isinstance(value, tuple) and len(value) == 2 and hasattr(value[0], "state_dict"):
        module, inputs = value
        if not isinstance(inputs, (tuple, list, Mapping)):
            inputs = (inputs,)
        return Source(
            module=module,
            example_inputs=dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs),
        )
    what = f"a {type(value).__name__}"
    if isinstance(value, tuple):
        what = f"a tuple of ({', '.join(type(v).__name__ for v in value)})"
    raise SourceError(
        f"{where} returned {what}; expected (torch.nn.Module, example_inputs) or edgec.Source"
    )


def _from_exported_program(path: pathlib.Path) -> Source:
    import torch

    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it prints a traceback of its own before it raises
    try:
        program = torch.export.load(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if "warnings above" in reason:  # those that are not shown
            reason = "torch.export.load() cannot read it; save it with torch.export.save()"
        raise SourceError(f"{path}: not a torch exported program: {reason}") from error
    finally:
        logger.setLevel(level)
    return Source(module=program, name=_file_name(path.stem))  # it carries its example inputs


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise SourceError(f"{path}: {what}; expected a model file")
    return path


def _object_name(module: Any) -> str:
    if isinstance(module, pathlib.Path):
        return module.resolve().stem
    return type(module).__name__.lower()


def _file_name(text: str) -> str:
    """``text`` as part of a file name: letters, digits, '-', '_' and '.'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"

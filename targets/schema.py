"""The capabilities that a target file states, as frozen dataclasses.

The field names are the TOML keys; the comment beside a field is its documentation and is
printed by ``edgec targets NAME``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Arch = Literal["x86_64", "arm64", "armhf", "riscv64", "wasm32"]
IntegerType = Literal["uint8", "int8"]
ActivationType = Literal["uint8", "int8", "uint16", "int16"]  # 16 bits: for NPUs, from opset 21


@dataclass(frozen=True)
class Session:
    """How the device's ONNX Runtime session is set up; written into the bundle's manifest."""

    threads: int = 1  # intra-op threads; 0 lets ONNX Runtime choose
    providers: tuple[str, ...] = ("CPUExecutionProvider",)  # in order of preference
    prepacking: bool = True  # repack weights at load: faster inference, more memory
    disabled_optimizers: tuple[str, ...] = ()  # ONNX Runtime graph optimizers that are slower here
    config: Mapping[str, str] = field(default_factory=dict)  # session config entries
    # CPU feature -> session config entries that a machine lacking the feature gets on top
    without: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Int8:
    """The int8 scheme that the device's kernels execute, and where it pays."""

    activation: ActivationType  # type of quantized activations
    weight: IntegerType  # type of quantized weights, symmetric around its zero point
    weight_bits: Literal[4, 8] = 8  # 4: weights on 15 levels, stored as int4
    per_channel: bool = True  # one weight scale per output channel
    reduce_range: bool = False  # 7-bit weights: no saturation in 16-bit accumulators
    min_channels: int = 1  # input channels from which an ungrouped Conv pays in integers
    depthwise_pays: bool = True  # a depthwise Conv pays in integers even where its input is float
    float_outputs: bool = True  # an integer MatMul or Gemm may give float where that is wanted
    two_scales: bool = True  # DequantizeLinear may have another scale than its QuantizeLinear
    static_ops: tuple[str, ...] = ()  # computing ops whose QDQ form runs in integers and pays
    integer_ops: tuple[str, ...] = ()  # ops kept integer between quantized ones
    dynamic_ops: tuple[str, ...] = ()  # ops that pay with ranges taken at run time
    activation_products: bool = False  # a static MatMul of two activations pays in integers
    attention_keys: int = 0  # keys from which attention without a mask pays in integers; 0: never


@dataclass(frozen=True)
class Int4:
    """Block-wise weight-only quantization (MatMulNBits)."""

    block_size: int = 32  # weights that share one scale, a power of two from 16
    accuracy_level: int = 0  # 0: compute in float32, 4: compute in int8
    pays: bool = False  # True where the kernel is at least as fast as float32


@dataclass(frozen=True)
class Float16:
    """Half precision."""

    compute: bool = False  # True where kernels calculate in float16; otherwise storage only


@dataclass(frozen=True)
class Recipes:
    """Default recipes: pass names, in order."""

    convolutional: tuple[str, ...]  # with calibration data, most weights in convolutions
    transformer: tuple[str, ...]  # most weights in matrix products
    recurrent: tuple[str, ...]  # most weights in LSTM and GRU
    uncalibrated: tuple[str, ...]  # without calibration data, most weights in convolutions
    compact: tuple[str, ...]  # instead, where the above is slower than float32: small, as fast
    lossless: tuple[str, ...]  # instead, where that is slower or loses too much, too
    # language models with a key-value cache
    decoder: tuple[str, ...] = ("cleanup", "fuse", "quantize-weights", "lower")


@dataclass(frozen=True)
class Target:
    """One class of devices."""

    name: str  # also the bundle's suffix: model.NAME.edgec
    description: str  # one line for people
    arch: Arch  # instruction set
    os: tuple[str, ...]  # linux, windows, macos, android, ios, browser
    features: tuple[str, ...]  # CPU features that the artifact is built for
    onnxruntime: str  # version range of the runtime on the device
    opset: int  # highest ONNX opset that the runtime supports
    int8: Int8
    recipe: Recipes
    kernels: tuple[str, ...] = ()  # operators that `lower` may emit and the runtime executes fast
    channel_multiple: int = 8  # widths that kernels fill their vectors with: pruning rounds to it
    static_shapes: bool = False  # True where dynamic dimensions must be fixed
    session: Session = field(default_factory=Session)
    int4: Int4 = field(default_factory=Int4)
    float16: Float16 = field(default_factory=Float16)
    devices: tuple[str, ...] = ()  # device profiles that a build verifies on where installed

"""Which outputs are the next inputs: what the names tell, what the user states, what is refused."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import graphs
import onnx_ir as ir
import pytest
from onnx import helper

from edgec.errors import EdgecError, SourceError
from edgec.export import Exported
from edgec.project import read_project
from edgec.state import check_carried, parse_state, with_state


def exported(inputs: str, outputs: str) -> Exported:
    """A graph whose outputs are, in order, its inputs; each as ``h0: float[1, 8]``."""
    ins, outs = _values(inputs), _values(outputs)
    nodes = [helper.make_node("Relu", [a.name], [b.name]) for a, b in zip(ins, outs, strict=True)]
    graph = helper.make_graph(nodes, "net", ins, outs)
    opsets = [helper.make_opsetid("", 21)]
    return Exported(ir.from_proto(helper.make_model(graph, opset_imports=opsets)), ())


def _values(text: str) -> list[Any]:
    found = re.findall(r"([\w.]+): float\[(.*?)\]", text)
    shapes = [[int(d) if d.isdigit() else d for d in dims.split(", ")] for _, dims in found]
    values = zip(found, shapes, strict=True)
    return [helper.make_tensor_value_info(name, 1, shape) for (name, _), shape in values]


def pair(before: str, after: str) -> Exported:
    x, y = "x: float[1, 4]", "y: float[1, 4]"
    return exported(f"{x}; {before}: float[2, 8]", f"{y}; {after}: float[2, 8]")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("h0", "hn"),
        ("c0", "cn"),
        ("state", "stateN"),
        ("h", "h_n"),
        ("h_in", "h_out"),
        ("hx", "hx_out"),
        ("h_0", "h_1"),
        ("hidden", "next_hidden"),
        ("prev_state", "new_state"),
        ("init_state", "last_state"),
        ("hidden_state", "hidden_state_out"),
        ("encoder_h0", "encoder_hn"),
        ("in_cache0", "out_cache0"),
        ("H0", "Hn"),
    ],
)
def test_names_of_a_state_are_known(before: str, after: str) -> None:
    found = with_state(pair(before, after), None)
    assert found.state == {before: after}
    assert found.findings == (
        f"recurrent state, by the names: {before}={after}; model.stream() of the runtime keeps it "
        "(--state none if it is none)",
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("image", "image_out"),
        ("x_in", "x_out"),
        ("last", "next"),
        ("memory", "memory_out"),
        ("statement", "statementN"),
        ("inputs", "outputs"),
    ],
)
def test_other_names_are_no_state_however_alike(before: str, after: str) -> None:
    found = with_state(pair(before, after), None)
    assert (found.state, found.findings) == ({}, ())


def test_a_state_without_its_output_is_told() -> None:
    for before, after in (("h0", "cn"), ("encoder_h0", "decoder_hn"), ("h0", "getitem_1")):
        found = with_state(pair(before, after), None)
        assert found.state == {}
        assert found.findings == (
            f"by its name the input '{before}' is recurrent state, but no output's name goes with "
            f"it; if one is its next value, give --state {before}=OUTPUT",
        )


def test_names_that_fit_with_shapes_that_do_not_are_told() -> None:
    model = exported("h0: float[2, 8]; x: float[1]", "hn: float[1, 8]; y: float[1]")
    found = with_state(model, None)
    assert found.state == {}
    [text] = found.findings
    assert text == (
        "by their names 'h0' and 'hn' are recurrent state, but the output 'hn' is float32 [1, 8], "
        "the input 'h0' float32 [2, 8]; expected the same; they are not kept from call to call"
    )


def test_the_pairs_stand_in_the_order_of_the_inputs() -> None:
    model = exported(
        "c0: float[b, 8]; x: float[4]; h0: float[b, 8]",
        "cn: float[b, 8]; y: float[4]; hn: float[b, 8]",
    )
    assert list(with_state(model, None).state.items()) == [("c0", "cn"), ("h0", "hn")]
    asked = {"h0": "cn", "c0": "hn"}
    assert list(with_state(model, asked).state.items()) == [("c0", "hn"), ("h0", "cn")]


@pytest.mark.parametrize(
    ("inputs", "outputs", "names"),
    [
        ("h0: float[8]; x: float[8]", "hn: float[8]; h_out: float[8]", "'h0' and 'hn', 'h_out'"),
        ("h0: float[8]; h_in: float[8]", "hn: float[8]; y: float[8]", "'h0', 'h_in' and 'hn'"),
    ],
)
def test_names_that_can_be_read_in_two_ways_are_an_error(
    inputs: str, outputs: str, names: str
) -> None:
    model = exported(inputs, outputs)
    with pytest.raises(SourceError, match=f"{names} tell .* in more than one way.*--state none"):
        with_state(model, None)
    assert with_state(model, {}).state == {}
    assert with_state(model, {"h0": "hn"}).state == {"h0": "hn"}


def test_what_the_user_states_is_taken_whatever_the_names() -> None:
    found = with_state(pair("memory", "y2"), {"memory": "y2"})
    assert (found.state, found.findings) == ({"memory": "y2"}, ())
    assert with_state(pair("h0", "hn"), {}).state == {}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"h": "hn"}, "state h=hn: the model has no input 'h'.*; it has x, h0"),
        ({"h0": "hm"}, "state h0=hm: the model has no output 'hm'; it has y, hn"),
        ({"hn": "h0"}, "state hn=h0: the model has no input 'hn'"),
        ({"h0": "y"}, r"state h0=y: the output 'y' is float32 \[1, 4\], the input 'h0' float"),
        ("h0=hn", "state is 'h0=hn', expected names of outputs by names of inputs"),
        ({"h0": "hn", "x": "hn"}, "state x=hn: the output 'hn' is"),
        ({"h0": None}, "state h0=None: the model has no output 'None'"),
    ],
)
def test_a_wrong_pair_is_refused(asked: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        with_state(pair("h0", "hn"), asked)


def test_an_output_is_the_next_value_of_one_input() -> None:
    model = exported("a: float[8]; b: float[8]", "c: float[8]; d: float[8]")
    with pytest.raises(SourceError, match="'d' is the next value of 'a' and 'b'; give one"):
        with_state(model, {"a": "d", "b": "d"})


def test_a_state_has_one_open_dimension() -> None:
    model = exported("h0: float[layers, b, 8]", "hn: float[layers, b, 8]")
    with pytest.raises(SourceError, match="only one dimension of a state may have an open size"):
        with_state(model, {"h0": "hn"})


def test_a_state_that_comes_back_in_another_shape_is_refused() -> None:
    text = "net (float[1, 8] h0) => (float[n, 8] hn) { hn = Concat <axis = 0> (h0, h0) }"
    model = with_state(Exported(graphs.graph(text, {}), ()), None)
    assert model.state == {"h0": "hn"}
    with pytest.raises(SourceError, match=r"h0=hn: .* given \[1, 8\] and gives \[2, 8\]"):
        check_carried(model, {"h0": graphs.feed(1, 8)})


def test_a_language_model_keeps_its_cache_itself() -> None:
    shape = "float[b, 2, p, 4]"
    past = f"past_key_values.0.key: {shape}; past_key_values.0.value: {shape}"
    present = f"present.0.key: {shape}; present.0.value: {shape}"
    model = exported(f"input_ids: float[b, n]; {past}", f"logits: float[b, n]; {present}")
    with pytest.raises(SourceError, match="keeps a cache of its own"):
        with_state(model, {"past_key_values.0.key": "present.0.key"})
    assert with_state(model, None) is model


@pytest.mark.parametrize(
    ("texts", "state"),
    [
        ((), None),
        (("none",), {}),
        (("h0=hn", "c0=cn"), {"h0": "hn", "c0": "cn"}),
        (("a:0=b=c",), {"a:0": "b=c"}),
    ],
)
def test_the_option_is_read(texts: tuple[str, ...], state: dict[str, str] | None) -> None:
    assert parse_state(texts) == state


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("h0",), "--state h0: expected INPUT=OUTPUT, for example --state h0=hn, or none"),
        (("h0=",), "--state h0=: expected INPUT=OUTPUT"),
        (("none", "h0=hn"), "--state none: expected INPUT=OUTPUT"),
        (("h0=hn", "h0=cn"), "the input 'h0' is given twice"),
    ],
)
def test_a_wrong_option_is_refused(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(EdgecError, match=message):
        parse_state(texts)


def test_the_project_file_states_it(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "edgec.toml"
    for text, state in (
        ("", None),
        ("[state]\n", {}),
        ('[state]\nh0 = "hn"\n"c.0" = "cn"\n', {"h0": "hn", "c.0": "cn"}),
    ):
        file.write_text(text)
        assert read_project(file).state == state
    file.write_text("[state]\nh0 = 1\n")
    with pytest.raises(EdgecError, match=r"edgec.toml: h0 is 1, expected text"):
        read_project(file)
    file.write_text('state = "h0"\n')
    with pytest.raises(EdgecError, match=r"\[state\] must be a table"):
        read_project(file)

"""A layout from the network: anything but the canonical bytes of a valid layout is refused by name."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_diloco.errors import ConfigurationError, RemoteProtocolError
from lightning_diloco.outer import Fragment, Layout, TensorSlice, TensorSpec, plan_layout

PLANNED = plan_layout(
    nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)), num_fragments=2, merge="rda", mean_patterns=("head",)
)
DOCUMENT = json.loads(PLANNED.to_bytes())


def encoded(document):
    return json.dumps(document, separators=(",", ":")).encode()


def refusal(data, max_bytes=100_000):
    with pytest.raises(RemoteProtocolError) as caught:
        Layout.from_bytes(data, max_bytes=max_bytes)
    return caught.value


def document_of(*slices, static=(), kind="parameters"):
    return [1, [[kind, [list(s) for s in slices]]], [list(s) for s in static]]


def slice_of(name="w", dtype="float32", shape=(2, 3), offset=0, length=6, tied=(), merge="rda"):
    return [name, dtype, list(shape), offset, length, list(tied), merge]


def test_the_planned_document_is_what_the_other_tests_damage():
    assert Layout.from_bytes(encoded(DOCUMENT), max_bytes=100_000) == PLANNED
    assert (
        Layout.from_bytes(encoded(document_of(slice_of(), static=[["s", "bool", [], "buffer"]])), max_bytes=1000).static[0].num_bytes == 1
    )


def test_buffer_fragments_and_split_tensors_are_layouts():
    split = document_of(slice_of(offset=0, length=2), slice_of(offset=2, length=4), slice_of(name="v"), kind="buffers")
    layout = Layout.from_bytes(encoded(split), max_bytes=1000)
    assert layout.fragments[0].num_params == 12
    assert layout.num_params == 0
    assert [part.name for part in layout.fragments[0].tensors] == ["w", "v"]


BAD_DOCUMENTS = {
    "no list": {"fragments": []},
    "other schema": [2, *DOCUMENT[1:]],
    "schema as bool": [True, *DOCUMENT[1:]],
    "too short": DOCUMENT[:2],
    "too long": [*DOCUMENT, 0],
    "no fragment": [1, [], []],
    "empty fragment": [1, [["parameters", []]], []],
    "kind": document_of(slice_of(), kind="weights"),
    "kind as list": [1, [[["parameters"], [slice_of()]]], []],
    "slice as text": [1, [["parameters", ["wfo00tm"]]], []],
    "name as number": document_of(slice_of(name=7)),
    "empty name": document_of(slice_of(name="")),
    "long name": document_of(slice_of(name="n" * 1025)),
    "control character": document_of(slice_of(name="a\nb")),
    "lone surrogate": document_of(slice_of(name="\ud800")),
    "unknown dtype": document_of(slice_of(dtype="int8")),
    "dtype that evaluates": document_of(slice_of(dtype="__class__")),
    "merge rule": document_of(slice_of(merge="median")),
    "negative dimension": document_of(slice_of(shape=(-2, -3))),
    "dimension as float": document_of(slice_of(shape=(2.0, 3))),
    "dimension as bool": document_of(slice_of(shape=(True, 6))),
    "huge dimension": document_of(slice_of(shape=(1 << 41,), length=1 << 41)),
    "huge product": document_of(slice_of(shape=(1 << 30, 1 << 30), length=1 << 60)),
    "many dimensions": document_of(slice_of(shape=(1,) * 65, length=1)),
    "no elements": document_of(slice_of(shape=(0,), length=0)),
    "negative offset": document_of(slice_of(offset=-1, length=7)),
    "offset as bool": document_of(slice_of(offset=False)),
    "length as float": document_of(slice_of(length=6.0)),
    "too long a slice": document_of(slice_of(length=7)),
    "incomplete tensor": document_of(slice_of(length=5)),
    "incomplete, then another": document_of(slice_of(length=5), slice_of(name="v")),
    "gap": document_of(slice_of(length=2), slice_of(offset=3, length=3)),
    "overlap": document_of(slice_of(length=4), slice_of(offset=3, length=3)),
    "starts late": document_of(slice_of(offset=1, length=5)),
    "goes on as another tensor": document_of(slice_of(length=4), slice_of(name="v", offset=4, length=2)),
    "goes on with another dtype": document_of(slice_of(length=4), slice_of(dtype="bfloat16", offset=4, length=2)),
    "same tensor twice": document_of(slice_of(), slice_of()),
    "same tensor in two fragments": [1, [["parameters", [slice_of()]], ["parameters", [slice_of()]]], []],
    "tied to itself": document_of(slice_of(tied=["w"])),
    "tied name is another tensor": document_of(slice_of(tied=["v"]), slice_of(name="v")),
    "tied names as text": [1, [["parameters", [["w", "float32", [2, 3], 0, 6, "v", "rda"]]]], []],
    "static name taken": document_of(slice_of(), static=[["w", "float32", [2], "parameter"]]),
    "static dtype": document_of(slice_of(), static=[["s", "object", [2], "parameter"]]),
    "static shape": document_of(slice_of(), static=[["s", "int8", [-1], "parameter"]]),
    "static too short": document_of(slice_of(), static=[["s", "int8", [2]]]),
    "static kind": document_of(slice_of(), static=[["s", "int8", [2], "gradient"]]),
}


@pytest.mark.parametrize("document", BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS.keys())
def test_a_document_that_breaks_a_rule_is_a_wrong_layout(document):
    assert refusal(encoded(document)).reason == "wrong_layout"


BAD_BYTES = {
    "empty": b"",
    "not json": b"{",
    "not ascii": '["ü"]'.encode(),
    "white space": json.dumps(DOCUMENT).encode(),
    "trailing line": PLANNED.to_bytes() + b"\n",
    "nested": b"[" * 50_000,
    "nan": PLANNED.to_bytes().replace(b"[5,3]", b"[NaN,3]"),
    "endless number": PLANNED.to_bytes().replace(b"[5,3]", b"[" + b"9" * 5000 + b"]"),
    "other escape": PLANNED.to_bytes().replace(b"float32", rb"\u0066loat32"),
}


@pytest.mark.parametrize("data", BAD_BYTES.values(), ids=BAD_BYTES.keys())
def test_bytes_that_are_not_the_canonical_encoding_are_a_wrong_layout(data):
    assert refusal(data).reason == "wrong_layout"


def test_too_many_bytes_are_not_even_read():
    data = PLANNED.to_bytes()
    assert Layout.from_bytes(data, max_bytes=len(data)) == PLANNED
    assert refusal(data, max_bytes=len(data) - 1).reason == "oversized"


def accepted_or_refused(data):
    """The only two outcomes; the layout if it was accepted."""
    try:
        layout = Layout.from_bytes(data, max_bytes=100_000)
    except RemoteProtocolError as error:
        assert error.reason == "wrong_layout"
        return None
    assert layout.to_bytes() == data
    return layout


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.binary(max_size=200) | JSON.map(encoded))
@settings(deadline=None)
def test_arbitrary_bytes_never_raise_anything_else(data):
    assert accepted_or_refused(data) is None


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_one_value_replaced_is_refused_or_another_layout(data):
    document = copy.deepcopy(DOCUMENT)
    node, keys = document, range(len(document))
    while True:
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], list) or not node[key] or data.draw(st.booleans()):
            break
        node, keys = node[key], range(len(node[key]))
    before = node[key]
    node[key] = data.draw(JSON | st.integers(-2, 20) | st.sampled_from(["0.weight", "mean", "float16", "buffers"]))
    layout = accepted_or_refused(encoded(document))
    unchanged = type(before) is type(node[key]) and before == node[key]
    assert (layout == PLANNED) == unchanged


@given(st.integers(0, len(PLANNED.to_bytes()) - 1), st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_any_one_flipped_bit_is_refused_or_another_layout(position, bit):
    data = bytearray(PLANNED.to_bytes())
    data[position] ^= 1 << bit
    assert accepted_or_refused(bytes(data)) != PLANNED


def test_the_vocabulary_validates_itself_without_bytes_too():
    part = TensorSlice(name="w", dtype="float32", global_shape=(2,), offset=0, length=2)
    with pytest.raises(ConfigurationError, match="tied_names"):
        TensorSlice(name="w", dtype="float32", global_shape=(2,), offset=0, length=2, tied_names=["v"])
    with pytest.raises(ConfigurationError, match="fragment_id=-1"):
        Fragment(fragment_id=-1, kind="parameters", slices=(part,))
    with pytest.raises(ConfigurationError, match="numbered from 0"):
        Layout(fragments=(Fragment(fragment_id=1, kind="parameters", slices=(part,)),))
    with pytest.raises(ConfigurationError, match="Shape"):
        TensorSpec(name="s", dtype="float32", shape=[2])

"""Planning: what is synchronized, how it is merged, which fragment it is in, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.outer import Layout, balanced_fragments, plan_layout

PATTERNS = ("lm_head", "head", "classifier", "fc_out")


def plan(module, *, num_fragments=4, merge="rda", mean_patterns=PATTERNS, include_frozen=False):
    return plan_layout(module, num_fragments=num_fragments, merge=merge, mean_patterns=mean_patterns, include_frozen=include_frozen)


def slices_of(layout):
    return {part.name: part for fragment in layout.fragments for part in fragment.slices}


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 11, bias=False)
        self.out.weight = self.embedding.weight
        self.lm_head = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("cache", torch.ones(5), persistent=False)


# --- balanced fragments -------------------------------------------------------------------------------------------------------------


def test_largest_goes_first_into_the_smallest_so_far():
    assert balanced_fragments([1, 7, 5, 4, 3], 2) == [[1, 4], [0, 2, 3]]


def test_ties_go_to_the_lower_index_and_the_lower_fragment():
    assert balanced_fragments([2, 2, 2, 2], 2) == [[0, 2], [1, 3]]


def test_there_are_never_more_fragments_than_tensors():
    assert balanced_fragments([3, 1], 24) == [[0], [1]]
    assert balanced_fragments([], 3) == []


def test_tensors_without_elements_leave_no_fragment_empty():
    assert balanced_fragments([0, 0, 0], 3) == [[0], [1], [2]]


@pytest.mark.parametrize(("sizes", "num_fragments"), [([1], 0), ([1], -1), ([3, -1], 2)])
def test_impossible_assignments_are_refused(sizes, num_fragments):
    with pytest.raises(ConfigurationError, match="at least one fragment"):
        balanced_fragments(sizes, num_fragments)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 3))
def test_the_largest_fragment_is_at_most_four_thirds_of_the_optimum(sizes, num_fragments):
    parts = balanced_fragments(sizes, num_fragments)
    assert sorted(itertools.chain(*parts)) == list(range(len(sizes)))
    assert all(indices and indices == sorted(indices) for indices in parts)
    peak = max(sum(sizes[i] for i in indices) for indices in parts)
    optimum = min(
        max(sum(size for size, to in zip(sizes, choice, strict=True) if to == p) for p in range(num_fragments))
        for choice in itertools.product(range(num_fragments), repeat=len(sizes))
    )
    # Graham: 4/3 - 1/(3P), in integers.
    assert 3 * num_fragments * peak <= (4 * num_fragments - 1) * optimum


# --- plan ---------------------------------------------------------------------------------------------------------------------------


def test_a_plan_holds_every_trainable_parameter_once():
    layout = plan(TiedModel(), num_fragments=3)
    assert {name: part.global_shape for name, part in slices_of(layout).items()} == {
        "embedding.weight": (11, 4),
        "body.weight": (4, 4),
        "body.bias": (4,),
        "lm_head.weight": (3, 4),
        "lm_head.bias": (3,),
    }
    assert layout.num_params == sum(layout.fragment_sizes) == 44 + 16 + 4 + 12 + 3
    assert [f.fragment_id for f in layout.fragments] == [0, 1, 2]
    assert all(part.offset == 0 and part.length == part.numel for part in slices_of(layout).values())


def test_a_tied_tensor_is_one_slice_under_its_first_name():
    part = slices_of(plan(TiedModel()))["embedding.weight"]
    assert part.tied_names == ("out.weight",)
    assert part.names == ("embedding.weight", "out.weight")


def test_embeddings_heads_and_vectors_are_averaged_and_the_rest_is_not():
    rules = {name: part.merge for name, part in slices_of(plan(TiedModel())).items()}
    assert rules == {
        "embedding.weight": "mean",
        "body.weight": "rda",
        "body.bias": "mean",
        "lm_head.weight": "mean",
        "lm_head.bias": "mean",
    }


def test_what_is_tied_to_an_embedding_is_averaged_also_when_the_embedding_comes_later():
    model = nn.Module()
    model.project = nn.Linear(4, 11, bias=False)
    model.bag = nn.EmbeddingBag(11, 4)
    model.bag.weight = model.project.weight
    part = slices_of(plan(model))["project.weight"]
    assert part.merge == "mean"
    assert part.tied_names == ("bag.weight",)


def test_a_pattern_is_a_dotted_part_of_any_name_and_not_a_piece_of_one():
    model = nn.ModuleDict({"overhead": nn.Linear(2, 2), "b": nn.ModuleDict({"head": nn.Linear(2, 2)}), "c": nn.Linear(2, 2)})
    model["head_alias"] = nn.ModuleDict({"classifier": model["c"]})
    rules = {name: part.merge for name, part in slices_of(plan(model)).items()}
    assert rules["overhead.weight"] == "rda"
    assert rules["b.head.weight"] == "mean"
    assert rules["c.weight"] == "mean"


def test_merge_mean_averages_everything():
    assert {part.merge for part in slices_of(plan(TiedModel(), merge="mean")).values()} == {"mean"}


def test_frozen_parameters_and_persistent_buffers_are_static():
    model = TiedModel()
    model.body.requires_grad_(False)
    layout = plan(model)
    assert [(s.name, s.dtype, s.shape) for s in layout.static] == [
        ("body.weight", "float32", (4, 4)),
        ("body.bias", "float32", (4,)),
        ("scale", "float32", (2,)),
    ]
    assert "body.weight" not in slices_of(layout)


def test_include_frozen_cuts_floating_frozen_parameters_too():
    model = TiedModel()
    model.body.requires_grad_(False)
    model.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    layout = plan(model, include_frozen=True)
    assert slices_of(layout)["body.weight"].merge == "rda"
    assert [s.name for s in layout.static] == ["table", "scale"]


def test_a_parameter_without_elements_is_static():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model.empty = nn.Parameter(torch.zeros(0, 3))
    layout = plan(model)
    assert [(s.name, s.num_bytes) for s in layout.static] == [("empty", 0)]


def test_a_plan_needs_no_memory_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100_000, 100_000), nn.Linear(100_000, 2))
    assert plan(model).num_params == 100_000 * 100_001 + 200_002


def test_stored_dtypes_are_named():
    model = nn.ModuleList([nn.Linear(2, 2).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)])
    assert [part.dtype for name, part in sorted(slices_of(plan(model)).items()) if "weight" in name] == [
        "float64",
        "float32",
        "bfloat16",
        "float16",
    ]


# --- refusals -----------------------------------------------------------------------------------------------------------------------


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ConfigurationError, match="ReLU has no trainable parameters"):
        plan(nn.ReLU())


def test_a_module_with_frozen_parameters_only_is_refused_unless_they_are_included():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigurationError, match="include_frozen"):
        plan(model)
    assert plan(model, include_frozen=True).num_params == 6


@pytest.mark.parametrize("model", [nn.LazyLinear(3), nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False))])
def test_lazy_tensors_are_refused_with_their_name(model):
    with pytest.raises(ConfigurationError, match=r"(weight|running_mean)' is lazy"):
        plan(model)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_trainable_complex_and_eight_bit_parameters_are_refused(dtype):
    model = nn.Linear(2, 2)
    model.odd = nn.Parameter(torch.zeros(2, 2).to(dtype))
    with pytest.raises(ConfigurationError, match=r"'odd' is torch\.(complex64|float8_e4m3fn)"):
        plan(model)


def test_sparse_buffers_are_refused():
    model = nn.Linear(2, 2)
    model.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(ConfigurationError, match=r"'graph' is .*sparse"):
        plan(model)


def test_two_parameters_in_the_same_memory_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight.data = model["a"].weight.data
    with pytest.raises(ConfigurationError, match=r"'a\.weight' and 'b\.weight' share memory"):
        plan(model)


# --- fingerprint --------------------------------------------------------------------------------------------------------------------


def named(*names, shape=(3, 3)):
    model = nn.Module()
    for name in names:
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return model


def test_equal_models_have_equal_fingerprints_whatever_their_values():
    torch.manual_seed(1)
    first = plan(TiedModel()).fingerprint()
    torch.manual_seed(2)
    assert plan(TiedModel()).fingerprint() == first
    assert len(first) == 64


def test_renamed_reordered_reshaped_and_cast_tensors_change_the_fingerprint():
    variants = [
        plan(named("a", "b"), num_fragments=1),
        plan(named("a", "c"), num_fragments=1),
        plan(named("b", "a"), num_fragments=1),
        plan(named("a", "b"), num_fragments=2),
        plan(named("a", "b", shape=(9, 1)), num_fragments=1),
        plan(named("a", "b").to(torch.bfloat16), num_fragments=1),
        plan(named("a", "b"), num_fragments=1, merge="mean"),
        plan(named("a", "b"), num_fragments=1, mean_patterns=("b",)),
    ]
    frozen = named("a", "b", "c")
    frozen.c.requires_grad_(False)
    variants.append(plan(frozen, num_fragments=1))
    tied = named("a", "b")
    tied.register_parameter("c", tied.b)
    variants.append(plan(tied, num_fragments=1))
    assert len({layout.fingerprint() for layout in variants}) == len(variants)


@given(st.integers(1, 6), st.sampled_from(["rda", "mean"]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_layout_survives_its_own_bytes(num_fragments, merge, frozen):
    model = TiedModel()
    model.body.requires_grad_(not frozen)
    layout = plan(model, num_fragments=num_fragments, merge=merge)
    again = Layout.from_bytes(layout.to_bytes(), max_bytes=10_000)
    assert again == layout
    assert again.fingerprint() == layout.fingerprint()

"""Subspace: what it holds, how it is made, kept, and checked against a model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shapo_kernels as sk

SIZES = {"a": 7, "b": 100, "c": 33}


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def test_indices_are_sorted_int64_and_counted():
    s = sk.Subspace({"w": [5, 2, 9], "v": torch.tensor([1], dtype=torch.int32), "empty": []})
    assert s["w"].tolist() == [2, 5, 9]
    assert s["w"].dtype == torch.int64
    assert (len(s), s.count, s.names, s.axis("w")) == (2, 4, ("w", "v"), 1)


@pytest.mark.parametrize(
    ("indices", "axis", "message"),
    [
        ({"w": [1, 1]}, 1, "twice"),
        ({"w": [-1, 1]}, 1, "counted from 0"),
        ({"w": [0.5]}, 1, "expected integers"),
        ({"w": [True, False]}, 1, "expected integers"),
        ({"w": [[1]]}, 1, "one dimension"),
        ({"w": [1]}, 2, "expected 0"),
        ({"w": [1]}, {"v": 1}, "names no 'w'"),
        ({"w": [1]}, {"w": 1, "v": 1}, "no indices"),
    ],
)
def test_malformed_input_is_refused_in_one_line(indices, axis, message):
    with pytest.raises(sk.SubspaceError, match=message) as caught:
        sk.Subspace(indices, axis)
    assert "\n" not in str(caught.value)


@given(percent=st.floats(0.01, 100), largest=st.booleans())
def test_top_takes_the_extreme_scores_of_all_names_together(percent, largest):
    given_scores = scores()
    s = sk.Subspace.top(given_scores, percent, largest=largest)
    total = sum(SIZES.values())
    assert s.count == max(1, int(total * percent / 100 + 0.5))
    chosen = torch.cat([given_scores[name][index] for name, index in s.items()])
    everything = torch.cat(list(given_scores.values())).sort(descending=largest).values
    assert torch.equal(chosen.sort(descending=largest).values, everything[: s.count])


def test_top_breaks_ties_by_name_then_index():
    s = sk.Subspace.top({"a": torch.zeros(3), "b": torch.zeros(3)}, 50)
    assert s == sk.Subspace({"a": [0, 1, 2]})


def test_top_refuses_nan_scores():
    with pytest.raises(sk.SubspaceError, match="NaN"):
        sk.Subspace.top({"a": torch.tensor([1.0, float("nan")])}, 10)


@pytest.mark.parametrize("percent", [0, -1, 100.5, float("nan"), float("inf")])
def test_percentages_out_of_range_are_refused(percent):
    with pytest.raises(sk.SubspaceError, match="percent"):
        sk.Subspace.random(SIZES, percent, seed=0)
    with pytest.raises(sk.SubspaceError, match="percent"):
        sk.Subspace.top(scores(), percent)


@given(percent=st.floats(0.01, 100), seed=st.integers(0, 2**31))
def test_random_controls_have_as_many_neurons_as_top(percent, seed):
    count = sk.Subspace.top(scores(), percent).count
    for match in ("total", "layer"):
        s = sk.Subspace.random(SIZES, percent, seed=seed, match=match)
        assert s.count == count
        assert all(index.max() < SIZES[name] for name, index in s.items())
        assert s == sk.Subspace.random(SIZES, percent, seed=seed, match=match)


def test_random_by_layer_takes_the_same_share_of_each():
    s = sk.Subspace.random({"a": 200, "b": 400}, 5, seed=1, match="layer")
    assert {name: index.numel() for name, index in s.items()} == {"a": 10, "b": 20}


def test_random_over_all_neurons_is_uniform():
    hits = torch.zeros(10)
    for seed in range(400):
        for name, index in sk.Subspace.random({"a": 4, "b": 6}, 20, seed=seed).items():
            hits[index + (0 if name == "a" else 4)] += 1
    # 400 draws of 2 of 10: 80 expected each, standard deviation 8; five of them.
    assert ((hits - 80).abs() < 40).all()


def test_random_like_matches_each_layers_count():
    critical = sk.Subspace({"a": [0, 1, 2], "c": [30]}, axis={"a": 0, "c": 1})
    control = sk.Subspace.random_like(critical, SIZES, seed=3)
    assert {n: i.numel() for n, i in control.items()} == {"a": 3, "c": 1}
    assert (control.axis("a"), control.axis("c")) == (0, 1)
    with pytest.raises(sk.SubspaceError, match="'c'"):
        sk.Subspace.random_like(critical, {"a": 7}, seed=3)
    small = {name: critical[name].numel() - 1 for name in critical}
    with pytest.raises(sk.SubspaceError, match="but the subspace selects"):
        sk.Subspace.random_like(critical, small, seed=3)


def test_full_names_every_floating_point_parameter_once(toy):
    model = toy()
    model.register_parameter("counter", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False))
    model.tied = model.head
    s = sk.Subspace.full(model)
    floating = [p for p in model.parameters() if p.is_floating_point()]
    assert len(s) == len(floating)
    assert all(s[name].numel() == p.shape[0] for name, p in s.resolve(model).items())


def test_a_saved_subspace_loads_equal(tmp_path):
    s = sk.Subspace({"z": [3, 1], "a": [0]}, axis={"z": 1, "a": 0}, metadata={"method": "probe", "percent": "1"})
    s.save(tmp_path / "s.safetensors")
    loaded = sk.Subspace.load(tmp_path / "s.safetensors")
    assert loaded == s
    assert loaded.names == ("z", "a")
    assert loaded.metadata == s.metadata
    assert list(tmp_path.iterdir()) == [tmp_path / "s.safetensors"]


def test_subspaces_differ_by_indices_names_and_axes():
    s = sk.Subspace({"a": [1, 2]})
    assert s == sk.Subspace({"a": [2, 1]})
    for other in (sk.Subspace({"a": [1]}), sk.Subspace({"b": [1, 2]}), sk.Subspace({"a": [1, 2]}, axis=0)):
        assert s != other
    assert s != {"a": [1, 2]}


def test_a_failed_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    old = sk.Subspace({"a": [1]})
    old.save(path)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        sk.Subspace({"a": [2]}).save(path)
    assert sk.Subspace.load(path) == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_loading_something_else_gives_one_clear_line(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(sk.SubspaceError, match="cannot read a subspace"):
        sk.Subspace.load(path)


def test_a_safetensors_file_of_another_kind_is_no_subspace(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(sk.SubspaceError, match="no subspace"):
        sk.Subspace.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "index", "axis", "message"),
    [
        ("layers.0.down_proj.weigth", [0], 1, "did you mean 'layers.0.down_proj.weight'"),
        ("layers.0.down_proj.weight", [24], 1, "24 neurons on axis 1"),
        ("layers.0.down_proj.weight", [10], 0, "8 neurons on axis 0"),
        ("head.bias", [0], 1, "cannot lie on axis 1"),
    ],
)
def test_a_subspace_that_does_not_fit_says_what(toy, name, index, axis, message):
    with pytest.raises(sk.SubspaceError, match=message) as caught:
        sk.Subspace({name: index}, axis).validate(toy())
    assert "\n" not in str(caught.value)


def test_wrappers_names_are_seen_through(toy, subspace):
    model = toy()
    compiled = torch.compile(model)
    wrapped = nn.DataParallel(compiled)
    assert any("module._orig_mod" in name for name, _ in wrapped.named_parameters())
    assert subspace.resolve(wrapped)["layers.0.down_proj.weight"] is model.layers[0].down_proj.weight


def test_a_module_really_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(4, 4)
    s = sk.Subspace({"module.weight": [0]})
    assert s.resolve(model)["module.weight"] is model.module.weight
    assert s.resolve(nn.DataParallel(model))["module.weight"] is model.module.weight
    assert set(sk.Subspace.full(model).resolve(model)) == set(sk.Subspace.full(model).names)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("axis", "[1, 2]"),
        ("axis", '{"a": "1"}'),
        ("axis", '{"a": 2}'),
        ("order", '{"a": 1'),
        ("order", "5"),
        ("order", '[["a"]]'),
        ("order", '["nowhere"]'),
        ("metadata", "[]"),
        ("metadata", '{"method": 3}'),
        ("metadata", "[" * 100_000),
    ],
)
def test_a_damaged_header_gives_one_error(entry, text, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "s.safetensors"
    sk.Subspace({"a": [1, 2]}).save(path)
    with safe_open(str(path), "pt") as file:
        header = dict(file.metadata())
    save_file(load_file(path), path, metadata={**header, entry: text})
    with pytest.raises(sk.SubspaceError, match="damaged"):
        sk.Subspace.load(path)

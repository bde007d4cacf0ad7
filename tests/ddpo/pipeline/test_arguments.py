"""Which arguments of a denoiser's call belong to the samples: told apart by runs with one, two and three prompts."""

import pytest
import torch

from ddpo.pipeline.argument_learning import learn_arguments
from ddpo.pipeline.arguments import groups
from ddpo.pipeline.tracing import Call, Step, UntraceableError
from ddpo.ragged import collate, join, trim

LENGTHS = (2, 3, 7)  # of the longest prompt of each run


def step(rows, **arguments):
    latents = torch.zeros(rows, 4, 8, 8)
    call = Call(latents=latents, timestep=torch.tensor(1), arguments=arguments, listed=False, output=latents)
    return Step(calls=(call,), sample=latents, model_output=latents)


def learnt(make, **options):
    return learn_arguments("Net", *(step(n, **make(n, LENGTHS[n - 1])) for n in (1, 2, 3)), **options)


def numbers(*shape):
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "axis", "entries"),
    [
        (lambda n, length: (n, 5), 0, 1),
        (lambda n, length: (4 * n, 5), 0, 4),  # AnimateDiff: an embedding for each frame
        (lambda n, length: (6, n, length, 5), 1, 1),  # HiDream: layers first
        (lambda n, length: (n, length, 5), 0, 1),
        (lambda n, length: (n, 5, length), 0, 1),
    ],
)
def test_rows_are_found_on_their_axis_and_given_back_as_they_were(shape, axis, entries):
    found = learnt(lambda n, length: {"x": numbers(*shape(n, length))})
    spec = found.rows["x"]
    assert (spec.axis, spec.entries) == (axis, entries)
    call = step(3, x=numbers(*shape(3, 7))).calls[0]
    taken = found.take(call)
    assert taken["x"].shape[0] == 3
    assert torch.equal(found.give(taken, 3)["x"], call.arguments["x"])
    single = {name: value[1:2] for name, value in taken.items()}
    again = join([{name: value[b : b + 1] for name, value in taken.items()} for b in range(3)])
    assert torch.equal(found.give(again, 3)["x"], call.arguments["x"])
    assert found.give(single, 1)["x"].shape == torch.Size(shape(1, 7))


def test_rows_of_a_list_of_layers_are_found_in_every_layer():
    """Bria FIBO's hidden states of all layers; a list with a tensor for each row is another thing (Z-Image)."""
    found = learnt(lambda n, length: {"x": list(numbers(4, n, length, 5)), "y": list(numbers(n, length, 5))})
    assert found.rows["x"].layered and found.rows["y"].listed
    given = {"x": list(numbers(4, 3, 7, 5)), "y": list(numbers(3, 7, 5))}
    taken = found.take(step(3, **given).calls[0])
    assert taken["x"].shape == (3, 7, 4, 5)
    again = found.give(taken, 3)
    assert all(torch.equal(a, b) for name in given for a, b in zip(again[name], given[name], strict=True))


def test_without_a_mask_rows_of_equal_length_share_a_call():
    found = learnt(lambda n, length: {"x": numbers(n, length, 5)})
    assert found.mask is None and found.grouped == ["x@length"]
    rows = [trim({k: v[0] for k, v in found.take(step(1, x=numbers(1, n, 5)).calls[0]).items()}) for n in (2, 6, 2)]
    batch = collate(rows)
    assert [group.tolist() for group in groups([batch], found.grouped)] == [[0, 2], [1]]
    assert found.give({name: value[[0, 2]] for name, value in batch.items()}, 2)["x"].shape == (2, 2, 5)


def test_what_has_no_row_but_depends_on_the_prompt_is_shared_by_those_that_have_it_in_common():
    found = learnt(lambda n, length: {"x": numbers(n, 5), "places": torch.arange(length), "size": 10 * length})
    assert set(found.common) == {"places", "size"} and "x" in found.rows
    rows = [found.take(step(1, x=numbers(1, 5), places=torch.arange(n), size=10 * n).calls[0]) for n in (4, 9, 4)]
    batch = collate([{name: value[0] for name, value in row.items()} for row in rows])
    assert [group.tolist() for group in groups([batch], found.grouped)] == [[0, 2], [1]]
    given = found.give({name: value[1:2] for name, value in batch.items()}, 1)
    assert torch.equal(given["places"], torch.arange(9)) and given["size"] == 90


def test_a_mask_covers_what_is_as_long_and_padding_of_a_prompt_alone_is_kept():
    def padded(n, length):
        mask = torch.zeros(n, length + 4, dtype=torch.long)
        mask[:, :length] = 1
        return {"x": numbers(n, length + 4, 5), "mask": mask}

    found = learnt(padded)
    assert found.mask.name == "mask" and found.mask.covers == {"x"} and found.mask.padded and found.grouped == []
    call = step(1, **padded(1, 3)).calls[0]
    given = found.give(found.take(call), 1)
    assert torch.equal(given["x"], call.arguments["x"]) and torch.equal(given["mask"], call.arguments["mask"])


def test_equal_values_are_shared_and_another_value_later_is_refused():
    found = learnt(lambda n, length: {"x": numbers(n, 5), "flag": True, "sizes": [(4, 4)] * n})
    assert found.shared == {"flag": True} and found.repeated == {"sizes": (4, 4)}
    with pytest.raises(UntraceableError, match="flag of Net was the same for all probes, and is another"):
        found.take(step(1, x=numbers(1, 5), flag=False, sizes=[(4, 4)]).calls[0])


def test_a_list_of_feature_maps_is_no_list_of_rows_by_coincidence():
    """Three maps in a run of three prompts, and three in the others."""
    maps = lambda n, length: {"maps": [torch.zeros(n, size) for size in (4, 4, 2)]}  # noqa: E731
    with pytest.raises(UntraceableError, match="maps of Net depends on the prompts"):
        learnt(maps)


def test_one_prompt_at_a_time_a_leading_axis_of_one_is_the_rows():
    runs = [step(1, x=numbers(1, length, 5), ids=numbers(9, 3)) for length in LENGTHS]
    found = learn_arguments("Net", *runs, alone=True)
    assert found.rows["x"].ragged == 0 and list(found.shared) == ["ids"]

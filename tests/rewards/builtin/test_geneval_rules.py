"""GenEval's rules on constructed boxes, and against a second statement of them in numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.builtin.geneval.rules import Found, intersection_over_union, judge, relations, suppress
from rewards.builtin.geneval.spec import COLORS, RELATIONS, Clause, Spec, parse_spec


def box(x, y, width=20, height=20):
    """Around a centre."""
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def found(*boxes, color=None):
    return [Found(box=one, score=1 - place / 100, color=color) for place, one in enumerate(boxes)]


def spec(*include, exclude=(), tag=""):
    return parse_spec({"tag": tag, "include": list(include), "exclude": list(exclude)})


def ask(kind, count=1, **more):
    return {"class": kind, "count": count} | more


DOG, CAT = box(50, 50), box(150, 50)
THREE = [box(20, 20), box(60, 20), box(100, 20)]


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("number", "strict", "partial"),
    [(0, False, 0.0), (1, False, 1 / 3), (2, False, 2 / 3), (3, True, 1.0), (4, False, 2 / 3), (5, False, 1 / 3),
     (6, False, 0.0), (9, False, 0.0)],
)  # fmt: skip
def test_an_official_counting_prompt_wants_exactly_its_number(number, strict, partial):
    wanted = spec(ask("dog", 3), exclude=[ask("dog", 4)], tag="counting")
    boxes = [box(10 + 30 * n, 20) for n in range(number)]
    verdict = judge(wanted, {"dog": found(*boxes)})
    assert verdict.strict == strict
    assert verdict.partial == pytest.approx(partial)


def test_without_an_exclude_clause_more_is_fine():
    assert judge(spec(ask("dog", 1)), {"dog": found(*THREE)}).strict
    assert judge(spec(ask("dog", 2)), {"dog": found(*THREE)}).partial == 1


def test_two_objects_earn_half_each():
    wanted = spec(ask("dog"), ask("cat"))
    assert judge(wanted, {"dog": found(DOG), "cat": found(CAT)}).strict
    verdict = judge(wanted, {"dog": found(DOG), "bear": found(CAT)})
    assert (verdict.strict, verdict.partial) == (False, 0.5)
    assert verdict.reasons == ("number of 1 cat",)
    assert judge(wanted, {}).partial == 0


def test_an_excluded_class_must_be_absent_or_below_its_number():
    wanted = spec(ask("dog"), exclude=[ask("cat", 2)])
    assert judge(wanted, {"dog": found(DOG), "cat": found(CAT)}).strict
    verdict = judge(wanted, {"dog": found(DOG), "cat": found(CAT, box(150, 90))})
    assert (verdict.strict, verdict.partial) == (False, 0.5)
    assert verdict.reasons == ("cat must number fewer than 2",)


# ------------------------------------------------------------------------------------------------------------ colours


def test_all_objects_taken_must_have_the_colour():
    wanted = spec(ask("car", 2, color="red"))
    reds, blues = found(*THREE[:2], color="red"), found(*THREE[:2], color="blue")
    assert judge(wanted, {"car": reds}).strict
    verdict = judge(wanted, {"car": [reds[0], blues[1]]})
    assert (verdict.strict, verdict.partial) == (False, 0.75)  # both there, one of two red
    assert verdict.reasons == ("color of 2 red car",)
    assert judge(wanted, {"car": reds[:1]}).partial == 0.25  # half the number, no colour while too few


def test_only_the_surest_objects_count_for_colour():
    red, blue = found(DOG, color="red"), found(CAT, color="blue")
    assert judge(spec(ask("car", color="red")), {"car": [*red, *blue]}).strict
    assert not judge(spec(ask("car", color="red")), {"car": [*blue, *red]}).strict


def test_attributes_must_not_be_swapped():
    wanted = spec(ask("car", color="red"), ask("bus", color="blue"))
    right = {"car": found(DOG, color="red"), "bus": found(CAT, color="blue")}
    swapped = {"car": found(DOG, color="blue"), "bus": found(CAT, color="red")}
    assert judge(wanted, right).strict
    verdict = judge(wanted, swapped)
    assert (verdict.strict, verdict.partial) == (False, 0.5)


# ---------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (box(20, 100), {"left of"}),
        (box(180, 100), {"right of"}),
        (box(100, 20), {"above"}),  # y grows downwards
        (box(100, 180), {"below"}),
        (box(100, 100), set()),
        (box(20, 20), {"left of", "above"}),  # both parts exceed half of the distance
        (box(20, 75), {"left of"}),
        (box(104, 100), set()),  # an offset of 4 = 0.1 (20 + 20)
        (box(104.5, 100), set()),  # beyond it, but a ninth of the distance
        (box(107.9, 100), set()),
        (box(108.1, 100), {"right of"}),  # 8.1 - 4 > 8.1 / 2
    ],
)
def test_relative_positions_follow_the_rule_with_its_threshold_of_a_tenth(first, expected):
    assert relations(first, box(100, 100)) == expected


def test_larger_objects_must_be_further_apart():
    near = box(120, 100, 20, 20)
    assert relations(near, box(100, 100, 20, 20)) == {"right of"}
    assert relations(box(120, 100, 80, 20), box(100, 100, 80, 20)) == set()
    assert relations(box(120, 100, 80, 20), box(100, 100, 80, 20), threshold=0.01) == {"right of"}


centres = st.tuples(*[st.floats(-100, 100)] * 2)
sizes = st.tuples(*[st.floats(1, 60)] * 2)
boxes = st.builds(lambda c, s: box(*c, *s), centres, sizes)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(first=boxes, second=boxes)
def test_relations_are_antisymmetric_and_never_contradict(first, second):
    held = relations(first, second)
    assert relations(second, first) == {OPPOSITE[relation] for relation in held}
    assert not held & {OPPOSITE[relation] for relation in held}


@given(first=boxes, second=boxes, shift=centres, zoom=st.floats(0.5, 4))
def test_relations_do_not_depend_on_where_and_how_large_the_picture_is(first, second, shift, zoom):
    moved = [tuple(zoom * (side + shift[n % 2]) for n, side in enumerate(one)) for one in (first, second)]
    offset = math.dist((first[0] + first[2], first[1] + first[3]), (second[0] + second[2], second[1] + second[3]))
    if offset > 1 and relations(first, second, threshold=0.0999) == relations(first, second, threshold=0.1001):
        assert relations(*moved) == relations(first, second)


def test_a_position_prompt_needs_both_objects_and_their_relation():
    wanted = spec(ask("dog"), ask("cat", position=["right of", 0]), tag="position")
    assert judge(wanted, {"dog": found(DOG), "cat": found(CAT)}).strict
    wrong = judge(wanted, {"dog": found(CAT), "cat": found(DOG)})
    assert (wrong.strict, wrong.partial) == (False, pytest.approx(2 / 3))
    assert wrong.reasons == ("position of 1 cat right of dog",)
    alone = judge(wanted, {"cat": found(CAT)})
    assert (alone.strict, alone.partial) == (False, pytest.approx(1 / 3))


def test_every_pair_must_stand_in_the_relation():
    wanted = spec(ask("dog", 2), ask("cat", position=["right of", 0]))
    dogs = found(DOG, box(50, 80))
    assert judge(wanted, {"dog": dogs, "cat": found(CAT)}).strict
    verdict = judge(wanted, {"dog": found(DOG, box(250, 50)), "cat": found(CAT)})
    assert (verdict.strict, verdict.partial) == (False, pytest.approx(2.5 / 3))


def test_the_target_of_a_position_must_hold_itself():
    wanted = spec(ask("dog", color="red"), ask("cat", position=["right of", 0]))
    verdict = judge(wanted, {"dog": found(DOG, color="blue"), "cat": found(CAT)})
    assert (verdict.strict, verdict.partial) == (False, 0.5)  # dog there, cat there; colour and position not


# --------------------------------------------------------------------------------------------------- a second statement


def strict_by_numpy(wanted, objects):
    """The published decision procedure, stated on arrays: earlier clauses either hand over their boxes or nothing."""
    handed, right = [], True
    for clause in wanted.include:
        mine = objects.get(clause.kind, [])[: clause.count]
        fine = len(mine) == clause.count
        if fine and clause.color:
            fine = sum(one.color == clause.color for one in mine) >= clause.count
        if fine and clause.relation:
            others = handed[clause.target]
            fine = others is not None and all(
                clause.relation in named(np.array(one.box), np.array(other.box)) for one in mine for other in others
            )
        right = right and fine
        handed.append(mine if fine else None)
    return right and all(len(objects.get(one.kind, [])) < one.count for one in wanted.exclude)


def named(a, b):
    corners_a, corners_b = a.reshape(2, 2), b.reshape(2, 2)
    offset = corners_a.mean(0) - corners_b.mean(0)
    dead = 0.1 * (np.ptp(corners_a, axis=0) + np.ptp(corners_b, axis=0))
    rest = np.where(np.abs(offset) > dead, offset - np.sign(offset) * dead, 0)
    if (np.abs(rest) < 1e-3).all():
        return []
    x, y = rest / np.sqrt((offset**2).sum())
    return [n for n, v in zip(["left of", "right of", "above", "below"], [-x, x, -y, y], strict=True) if v > 0.5]


@st.composite
def scenes(draw):
    kinds = ["dog", "cat", "bus"]
    include = []
    for place in range(draw(st.integers(1, 3))):
        relation = draw(st.sampled_from([None, *RELATIONS])) if place else None
        include.append(
            Clause(
                kind=draw(st.sampled_from(kinds)),
                count=draw(st.integers(1, 2)),
                color=draw(st.sampled_from([None, None, "red", "blue"])),
                relation=relation,
                target=draw(st.integers(0, place - 1)) if relation else 0,
            )
        )
    exclude = tuple(
        Clause(kind=draw(st.sampled_from(kinds)), count=draw(st.integers(1, 3))) for _ in range(draw(st.integers(0, 1)))
    )
    grid = st.builds(lambda x, y: box(40 * x, 40 * y), st.integers(0, 2), st.integers(0, 2))
    things = st.builds(lambda b, c: Found(box=b, score=0.5, color=c), grid, st.sampled_from(["red", "blue"]))
    objects = {kind: draw(st.lists(things, max_size=3)) for kind in kinds}
    return Spec(tag="", include=tuple(include), exclude=exclude), objects


@given(scene=scenes())
def test_strict_is_the_published_procedure_and_partial_is_one_exactly_then(scene):
    wanted, objects = scene
    verdict = judge(wanted, objects)
    assert verdict.strict == strict_by_numpy(wanted, objects)
    assert 0 <= verdict.partial <= 1
    assert (verdict.partial == 1) == verdict.strict
    assert bool(verdict.reasons) != verdict.strict


# ------------------------------------------------------------------------------------------------------------ overlaps


def test_overlap_of_boxes_is_shared_over_joint_area():
    assert intersection_over_union((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert intersection_over_union((0, 0, 1, 1), (1, 1, 2, 2)) == 0
    assert intersection_over_union(DOG, DOG) == 1


def test_suppression_agrees_with_torchvision_and_keeps_the_surest():
    ops = pytest.importorskip("torchvision.ops")
    import torch

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, generator=generator) * 100
    rectangles = torch.cat([corners, corners + 10 + 30 * torch.rand(40, 2, generator=generator)], dim=1)
    scores = torch.rand(40, generator=generator)
    things = [Found(box=tuple(b), score=s) for b, s in zip(rectangles.tolist(), scores.tolist(), strict=True)]
    kept = suppress(things, overlap=0.3, limit=40)
    assert kept == [things[n] for n in ops.nms(rectangles, scores, 0.3).tolist()]
    assert 5 < len(kept) < 35
    everything = suppress(things, overlap=1, limit=16)
    assert [one.score for one in everything] == sorted(scores.tolist(), reverse=True)[:16]


# ------------------------------------------------------------------------------------------------------------ metadata


def test_official_metadata_is_read():
    wanted = parse_spec(
        {
            "tag": "position",
            "include": [ask("potted plant"), ask("dog", color="pink", position=["left of", 0])],
            "prompt": "ignored",
        }
    )
    assert wanted.tag == "position"
    assert wanted.include[1] == Clause(kind="dog", count=1, color="pink", relation="left of", target=0)
    assert wanted.kinds == ("dog", "potted plant")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "needs GenEval metadata with the key include, got the keys none"),
        ({"text": "a"}, "got the keys text"),
        ({"include": []}, "both empty"),
        ({"include": "dog"}, "include must be a list of objects, got 'dog'"),
        ({"include": ["dog"]}, r"include\[0\] must be an object"),
        ({"include": [{"class": "dog"}]}, r"include\[0\]: count must be a whole number, at least 1, got None"),
        ({"include": [ask("dog", 0)]}, "count must be a whole number, at least 1, got 0"),
        ({"include": [ask("", 1)]}, "class must be a name"),
        ({"include": [ask("dog", colour="red")]}, "unknown key 'colour'"),
        ({"include": [ask("dog", color="crimson")]}, "color must be one of red, orange.*got 'crimson'"),
        ({"include": [ask("dog"), ask("cat", position=["near", 0])]}, r"include\[1\]: position must be"),
        ({"include": [ask("dog", position=["left of", 0])]}, "number of an earlier include clause"),
        ({"include": [ask("dog")], "exclude": [ask("cat", position=["above", 0])]}, r"exclude\[0\]: position"),
    ],
)
def test_other_metadata_is_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(metadata)


def test_the_ten_colours_are_those_of_the_paper():
    assert set(COLORS) == {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"}

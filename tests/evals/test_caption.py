"""Caption scores: a perfect caption scores best, words are compared without case and punctuation, every reference counts."""

import pytest

from flm_scale.evals.caption import other_pictures, score_captions, words

REFERENCES = [["a red circle on a wall", "the circle"], ["a blue square in the sun"], ["some green triangle over there"]]


def test_captions_equal_to_a_reference_score_full_marks_and_others_do_not() -> None:
    perfect = score_captions([texts[0] for texts in REFERENCES], REFERENCES)
    assert perfect["exact"] == 1.0
    assert perfect["BLEU-1"] == pytest.approx(1.0)
    assert perfect["BLEU-4"] == pytest.approx(1.0)
    wrong = score_captions(["an old house by the sea"] * 3, REFERENCES)
    assert wrong["exact"] == 0.0
    assert all(wrong[name] < perfect[name] for name in perfect)


def test_every_caption_of_a_picture_is_a_reference() -> None:
    said = ["the circle", "a blue square in the sun", "nothing"]
    assert score_captions(said, REFERENCES)["exact"] == pytest.approx(2 / 3)


def test_case_and_punctuation_do_not_count() -> None:
    assert words("  A Red circle, on a wall. ") == "a red circle on a wall"
    assert score_captions(["A red circle, on a wall.", "A blue square in the sun!", "x"], REFERENCES)["exact"] == pytest.approx(2 / 3)


def test_cider_gives_less_for_words_that_all_pictures_share() -> None:
    references = [["a red dog"], ["a blue cat"], ["a green cow"], ["a black pig"]]
    common = score_captions(["a red thing", "a cow thing", "a pig thing", "a dog thing"], references)["CIDEr"]
    rare = score_captions(["one red dog", "one cow thing", "one pig thing", "one dog thing"], references)["CIDEr"]
    assert rare > common


def test_every_picture_goes_once_to_a_picture_with_another_caption() -> None:
    labels = ["a"] * 7 + ["b"] * 4 + ["c"] * 3
    others = other_pictures(labels, seed=0)
    assert sorted(others) == list(range(14))
    assert all(labels[other] != label for label, other in zip(labels, others, strict=True))
    assert others == other_pictures(labels, seed=0) != other_pictures(labels, seed=1)


def test_where_most_pictures_share_a_caption_the_others_still_change() -> None:
    labels = ["a"] * 5 + ["b", "c"]
    others = other_pictures(labels, seed=0)
    assert sorted(others) == list(range(7))
    assert all(other != number for number, other in enumerate(others))
    assert sum(labels[other] != label for label, other in zip(labels, others, strict=True)) == 4

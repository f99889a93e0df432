"""Caption scores: a perfect caption scores best, words are compared without case and punctuation, every reference counts."""

import pytest

from flm_scale.evals.caption import score_captions, words

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

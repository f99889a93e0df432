"""What stays: each rule by itself."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flm_scale.data.images import ImageError, decode_image
from flm_scale.data.prepare.filters import column_fate, keep_captions, language, normalise, perceptual_hash, read_forbidden, size_fate
from flm_scale.data.prepare.spec import FilterConfig, ImageConfig, Spec, TextConfig
from flm_scale.errors import ConfigError
from tests.data.prepare.pictures import drawn, picture


@given(st.text())
def test_a_normal_text_has_single_blanks_no_control_characters_and_is_normal_already(text: str) -> None:
    normal = normalise(text)
    assert normal == normal.strip()
    assert "  " not in normal
    assert not any(character in normal for character in "\0\t\r\n\x85\u2028\u00a0\x7f")
    assert normalise(normal) == normal


def test_letters_and_their_accents_become_one() -> None:
    assert normalise("cafe\u0301\0au\tlait") == "caf\u00e9 au lait"


@pytest.mark.parametrize(("captions", "config", "kept", "fate"), [
    (["a dog", "a  dog", "a cat"], TextConfig(), ["a dog", "a cat"], ""),
    (["a  dog"], TextConfig(normalise=False), ["a  dog"], ""),
    ([], TextConfig(), [], "no_caption"),
    ([" \t"], TextConfig(), [], "no_caption"),
    (["dog", "a dog"], TextConfig(min_words=2), ["a dog"], ""),
    (["dog", "a big dog"], TextConfig(min_words=2, max_words=2), [], "few_words"),
    (["a big dog"], TextConfig(max_words=2), [], "many_words"),
    (["dog"], TextConfig(min_characters=4), [], "short_text"),
    (["dogs"], TextConfig(max_characters=3), [], "long_text"),
    (["ein roter Kreis auf der Wiese", "a red circle on the grass"], TextConfig(languages=("en",)), ["a red circle on the grass"], ""),
    (["IMG_2231.jpg"], TextConfig(languages=("en",)), [], "language"),
])
def test_captions_are_judged_one_by_one_and_none_left_is_the_reason_of_the_first(captions: list[str], config: TextConfig, kept: list[str],
                                                                               fate: str) -> None:
    assert keep_captions(captions, config) == (kept, fate)


def test_languages_are_told_apart_and_no_evidence_is_no_language() -> None:
    texts = "a dog runs over the meadow", "ein Hund läuft über die Wiese", "un chien court dans le pré", "IMG_2231.jpg"
    assert [language(text) for text in texts] == ["en", "de", "fr", ""]


@pytest.mark.parametrize(("where", "value", "holds"), [
    ("s>=0.3", 0.3, True), ("s>=0.3", 0.29, False), ("s<0.8", 0.8, False), ("s<=2", 2, True), ("s>2", 2, False), ("s>=0.3", None, False),
    ("s=en,de", "de", True), ("s=en,de", "fr", False), ("s=en", None, False), ("s!=NSFW", "UNLIKELY", True), ("s!=NSFW", "NSFW", False),
    ("s!=NSFW", None, True), ("s=1", 1.0, True), ("s!=1", 1, False)])
def test_a_condition_holds_or_gives_the_columns_name(where: str, value: float | str | None, holds: bool) -> None:
    spec = Spec(filter=FilterConfig(where=(where,)))
    assert column_fate({"s": value}, spec.conditions) == ("" if holds else "column_s")


@pytest.mark.parametrize(("size", "fate"), [((200, 600), ""), ((199, 300), "small"), ((200, 601), "aspect"), ((601, 200), "aspect")])
def test_a_picture_is_judged_by_its_sides(size: tuple[int, int], fate: str) -> None:
    assert size_fate(*size, ImageConfig(min_side=200, max_aspect=3.0)) == fate
    assert size_fate(*size, ImageConfig()) == ""


def test_copies_of_a_picture_have_its_perceptual_hash_and_other_pictures_have_others() -> None:
    """Scaled and compressed ones mostly: 195 and 194 of 200 when this was written."""
    copies = 0
    for number in range(20):
        smaller, buffer = drawn(number, 341, 256).resize((300, 225), Image.Resampling.LANCZOS), io.BytesIO()
        smaller.save(buffer, "WEBP", quality=90)
        copies += perceptual_hash(buffer.getvalue()) == perceptual_hash(picture(number, width=341, height=256))
    assert copies >= 17
    assert len({perceptual_hash(picture(number)) for number in range(50)}) == 50


def test_the_perceptual_hash_is_what_imagehash_says() -> None:
    """imagehash.phash of the same files, by imagehash 4.3.2 and scipy 1.17.1."""
    assert [f"{perceptual_hash(picture(number, kind='PNG')):016x}" for number in range(4)] == [
        "fed818c8f313d4c4", "8ce7f058b83a27ca", "bd4c9b8d075b9524", "cd5861c0fe94d7a8"]


def test_hashes_of_both_kinds_are_read_and_anything_else_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "hashes").write_text("AB" * 32 + "\n\n" + "0f" * 8 + "\n")
    assert read_forbidden(tmp_path / "hashes") == (frozenset({"ab" * 32}), frozenset({0x0F0F0F0F0F0F0F0F}))
    assert read_forbidden(None) == (frozenset(), frozenset())
    (tmp_path / "wrong").write_text("ab" * 32 + "\n" + "ab" * 16)
    with pytest.raises(ConfigError, match="'abababababababababababababababab' is neither a sha256"):
        read_forbidden(tmp_path / "wrong")


def test_a_picture_that_only_the_quicker_decoder_takes_is_one_damaged_picture() -> None:
    """Pillow stumbles over a cut Adobe segment; a hash must not cost the shard for it."""
    jpeg = picture(0)
    odd = jpeg[:2] + b"\xff\xee\x00\x07Adobe" + jpeg[2:]
    assert decode_image(odd, size=32).shape == (3, 32, 32)
    with pytest.raises(ImageError, match="cannot be decoded") as found:
        perceptual_hash(odd)
    assert found.value.reason == "damaged"

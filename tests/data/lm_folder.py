"""Folders of small language models' tokenizers, each as its family has it: trained on a few sentences, with the settings files that decide."""

import json
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FAMILIES = ("gpt2", "opt", "qwen2", "llama", "llama 2")
TEXTS = ["a teal triangle", "a red circle", "the circle that you see here is red", "there's a yellow shape in the image, isn't it?", "un café noir",
         "日本 1999 http://example.org"] * 3
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def write_lm_folder(folder: Path, family: str = "gpt2") -> Path:
    """Write tokenizer.json and what a folder of that family has beside it; return the folder."""
    folder.mkdir(parents=True)
    if family.startswith("llama"):
        from transformers import AutoTokenizer

        write_sentencepiece(folder)
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        if family == "llama 2":
            _spell_spaces_by_normalizer(folder)
        return folder
    specials = ["<s>", "<pad>", "</s>", "<unk>"] if family == "opt" else ["<|endoftext|>"]
    tokenizer = byte_level(specials, words=QWEN_WORDS if family == "qwen2" else "")
    if family == "opt":
        tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if family == "gpt2":  # as published: what a text ends with stands in the model's own settings alone
        settings("tokenizer_config", folder, model_max_length=1024)
        settings("config", folder, model_type="gpt2", bos_token_id=0, eos_token_id=0)
    elif family == "opt":
        end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        settings("tokenizer_config", folder, tokenizer_class="GPT2Tokenizer", bos_token=end, eos_token=end, unk_token=end, pad_token="<pad>")
    else:
        settings("tokenizer_config", folder, tokenizer_class="Qwen2Tokenizer", bos_token=None, eos_token="<|endoftext|>", unk_token=None)
        settings("config", folder, model_type="qwen2", bos_token_id=0, eos_token_id=0)
    return folder


def settings(name: str, folder: Path, **values: object) -> None:
    """Write NAME.json."""
    (folder / f"{name}.json").write_text(json.dumps(values))


def byte_level(specials: list[str], *, words: str = "") -> Tokenizer:
    """Train byte-level BPE as GPT-2's, or with another way to cut words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(words), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=specials, show_progress=False))
    return tokenizer


def write_sentencepiece(folder: Path) -> None:
    """Write tokenizer.model as LLaMA's is: BPE with bytes for what it does not know, a space in front of each text, blanks as they are."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=420, hard_vocab_limit=False,
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, character_coverage=1.0, num_threads=1, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    settings("tokenizer_config", folder, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)
    settings("config", folder, model_type="llama", bos_token_id=1, eos_token_id=2)


def _spell_spaces_by_normalizer(folder: Path) -> None:
    """Make tokenizer.json what published folders hold, from before transformers 5: a text with a space in front gets another one."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    spaces = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    file.write_text(json.dumps(content | {"normalizer": {"type": "Sequence", "normalizers": spaces}, "pre_tokenizer": None}))

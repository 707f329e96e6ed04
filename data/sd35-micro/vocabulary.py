"""The three tokenizers, made from the captions: nothing is downloaded, and every caption is covered.

Both CLIP tokenizers are byte-pair encodings trained on the captions (their files are the usual ones). T5's is a unigram
model whose pieces are the captions' words; single characters stand for words it does not know.
"""

import math
import string
from collections import Counter
from itertools import pairwise

CLIP_VOCABULARY = 1280
LENGTH = 16  # tokens of a caption, for all three; the longest caption takes 13
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
END = "</w>"


def clip_tokenizer(captions: list[str]):
    """A CLIPTokenizer of at most CLIP_VOCABULARY tokens and LENGTH tokens a caption."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _byte_pairs(captions)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def t5_tokenizer(captions: list[str]):
    """A T5TokenizerFast whose words are those of the captions, by frequency, then characters."""
    from transformers import T5TokenizerFast

    count = Counter(word for caption in captions for word in caption.replace(",", " ").split())
    total = sum(count.values())
    words = [(f"▁{word}", math.log(number / total)) for word, number in sorted(count.items(), key=_by_frequency)]
    taken = {piece for piece, _ in words} | {"▁"}
    characters = [c for c in string.ascii_letters + string.digits + string.punctuation if c not in taken]
    rare = math.log(1 / total) - 10
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", rare), *words, *((c, rare) for c in characters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def _by_frequency(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _byte_pairs(captions: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: repeatedly the most frequent pair of neighbours within a word (Sennrich et al. 2016)."""
    from transformers import CLIPTokenizer

    characters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))
    vocabulary = [*SPECIAL, *characters, *(c + END for c in characters)]
    split = CLIPTokenizer().backend_tokenizer
    words: Counter[tuple[str, ...]] = Counter()
    for text, number in Counter(text for caption in captions for text in caption.split()).items():
        for word, _ in split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(text)):
            words[(*word[:-1], word[-1] + END)] += number
    merges: list[tuple[str, str]] = []
    while len(vocabulary) < CLIP_VOCABULARY:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, number in words.items():
            for pair in pairwise(word):
                pairs[pair] += number
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        vocabulary.append("".join(best))
        words = Counter({_merged(word, best): number for word, number in words.items()})
    return {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}, merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in word:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)

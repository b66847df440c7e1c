"""Files beside a model that are neither weights nor its tokenizer: processors of images and sounds, poolings."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.recipe.special_ids import translate_ids

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
CHAT_TEMPLATE = "chat_template.json"  # of a processor, in older folders
# sentence-transformers: what comes behind the model, and the files of a part.
MODULES = "modules.json"
MODULE_FILES = ("config.json", "model.safetensors")
SENTENCES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")


def copy_processor(model: str | Path, folder: Path | None, vocabulary: VocabularyPair) -> list[str]:
    """Copy what `AutoProcessor` needs, with ids of the new vocabulary, and what sentence-transformers needs.

    A processor names tokens, such as the one that stands for an image. The new tokenizer is told their names, in its
    saved configuration; where it lacks one, the processor is left out: the result then takes text only.

    Args:
        model: folder or hub name of the teacher.
        folder: the result's, into which the tokenizer was saved; None only tells what would be left out.
        vocabulary: the two vocabularies.

    Returns:
        a line for each thing that was left out.

    Raises:
        ValueError: a file that is not JSON of the usual form, or one that names a place outside the model's folder.
    """
    files = {name: content for name in PROCESSOR_FILES if (content := _read(model, name)) is not None}
    modules = _module_folders(model)
    named = _named_tokens(vocabulary.teacher)
    wanted = {*named.values(), *(token for content in files.values() for token in _token_strings(content))}
    known = vocabulary.student.get_vocab()
    if files and (missing := sorted(wanted - known.keys())):
        return [
            f"{', '.join(files)}: left out, as the new tokenizer does not have {', '.join(map(repr, missing))}: the "
            "result takes text only"
        ]
    messages = []
    for name, content in files.items():
        messages += translate_ids(content, vocabulary, where=name)
        if folder is not None:
            _write(folder / name, content)
    if folder is None:
        return messages
    names = {role: token for role, token in named.items() if token in known}
    kind = vocabulary.teacher.init_kwargs.get("processor_class")
    if files and (names or kind):
        saved = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        _write(folder / "tokenizer_config.json", saved | names | ({"processor_class": kind} if kind else {}))
    template = _read(model, CHAT_TEMPLATE)
    if files and template is not None and not vocabulary.student.chat_template:
        _write(folder / CHAT_TEMPLATE, template)
    _copy_modules(model, folder, modules)
    return messages


def _named_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Tokens that a tokenizer names beyond the usual roles: "boi_token" -> "<start_of_image>"."""
    usual = set(type(tokenizer).SPECIAL_TOKENS_ATTRIBUTES)
    named = (name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name not in usual)
    return {name: token for name in named if isinstance(token := getattr(tokenizer, name), str)}


def _token_strings(content: Any) -> set[str]:
    """The values of all fields such as "image_token" that are strings."""
    if isinstance(content, list):
        return {token for part in content for token in _token_strings(part)}
    if not isinstance(content, dict):
        return set()
    own = {value for name, value in content.items() if name.endswith("_token") and isinstance(value, str)}
    return own.union(*(_token_strings(part) for part in content.values()))


def _module_folders(model: str | Path) -> list[str]:
    """The folders of the parts behind the model; the model itself is the part that lies in the folder of them all."""
    folders = []
    for module in _read(model, MODULES, list) or ():
        path = module.get("path", "") if isinstance(module, dict) else None
        parts = PurePosixPath(path).parts if isinstance(path, str) else ("..",)
        if ".." in parts or PurePosixPath(*parts).is_absolute():
            raise ValueError(f"model: wanted folders in {str(model)!r} as the paths of {MODULES}, got {module!r}")
        folders += ["/".join(parts)] if parts else []
    return folders


def _copy_modules(model: str | Path, folder: Path, modules: list[str]) -> None:
    for name in SENTENCES:
        content = _read(model, name, list if name == MODULES else dict)
        if content is not None:
            _write(folder / name, content)
    for path in modules:
        for name in MODULE_FILES:
            found = _find(model, f"{path}/{name}")
            if found is not None:
                (folder / path).mkdir(parents=True, exist_ok=True)
                (folder / path / name).write_bytes(found.read_bytes())


def _find(model: str | Path, name: str) -> Path | None:
    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    found = cached_file(
        str(model),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _read(model: str | Path, name: str, kind: type = dict) -> Any:
    path = _find(model, name)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model: wanted JSON in {str(path)!r}: {error}") from error
    if not isinstance(content, kind):
        wanted = "a list" if kind is list else "an object"
        raise ValueError(f"model: wanted {wanted} in {str(path)!r}, got {type(content).__name__}")
    return content


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Embedding models: a text becomes a unit vector.

The built-in one averages the 256-dimensional word vectors that the wordllama wheel brings: nothing is
downloaded and torch is not imported. Any other name is a sentence-transformers model. Stores and caches
nothing: vectors are kept under `Embedder.name` by whoever asked for them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain.settings import BUILTIN
from evenodds_service.errors import EmbedderUnavailable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUILTIN_NAME = "builtin/1"
"""The name under which vectors of the built-in embedder are stored. A change of its values is a new name."""

MAX_CHARACTERS = 20_000
"""Only so many characters of a text are embedded. A model with a shorter limit truncates further."""

_WEIGHTS = "weights/l2_supercat_256.safetensors"
_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
_TOKENIZED_AT_ONCE = 256

_Encode = Callable[[list[str]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Embedder:
    """An opened embedding model. May be shared between threads.

    Attributes:
        name: Key under which its vectors are stored; differs whenever the vectors of a text may differ.
        width: D, the length of a vector.
    """

    name: str
    width: int
    _encode: _Encode = field(repr=False)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed each text by its first `MAX_CHARACTERS` characters.

        A text gets the same vector every time, alone or among others (to float32 rounding).

        Returns:
            float32 [n, D]. Rows have unit length, or are zero where the model has nothing to say (for an
            empty text without a prompt) or gives a value that is not finite.
        """
        if not texts:
            return np.zeros((0, self.width), dtype=np.float32)
        vectors_N_D = self._encode([_encodable(text[:MAX_CHARACTERS]) for text in texts])
        # In float64, so that the square of a large value does not overflow.
        norms_N = np.linalg.norm(vectors_N_D.astype(np.float64), axis=1, keepdims=True)
        usable_N = np.isfinite(norms_N) & (norms_N > 0)
        unit_N_D: NDArray[np.float64] = np.divide(vectors_N_D, norms_N, out=np.zeros(vectors_N_D.shape), where=usable_N)
        return unit_N_D.astype(np.float32)


def open_embedder(setting: str, prompt: str | None = None) -> Embedder:
    """Open the model that a run names. Takes a fraction of a second for the built-in one, many for another.

    Args:
        setting: `builtin`, or the name on the hub or the local path of a sentence-transformers model. A model
            that is not on this machine yet is downloaded; code that comes with a model is not run.
        prompt: Instruction put before each text.

    Raises:
        EmbedderUnavailable: the model is not installed, cannot be loaded or downloaded, or gives no vectors.
    """
    prompt = prompt or ""
    if setting == BUILTIN:
        return _open_builtin(prompt)
    return _open_sentence_transformer(setting, prompt)


def _open_builtin(prompt: str) -> Embedder:
    """The mean of a text's word vectors, as a StaticEmbedding of sentence-transformers computes it."""
    spec = importlib.util.find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise EmbedderUnavailable(
            f"embedder {BUILTIN!r}: the package wordllama, which brings its weights, is not installed; "
            "install evenodds[api]"
        )
    folder = Path(spec.origin).parent
    for file in (_WEIGHTS, _TOKENIZER):
        if not (folder / file).is_file():
            raise EmbedderUnavailable(
                f"embedder {BUILTIN!r}: the installed package wordllama has no file {file}; "
                "reinstall wordllama from its wheel (0.4 or newer)"
            )

    weights_V_D, tokenizer = _builtin_model(folder)
    width = weights_V_D.shape[1]

    def encode(texts: list[str]) -> NDArray[np.float32]:
        vectors_N_D = np.zeros((len(texts), width), dtype=np.float32)
        for first in range(0, len(texts), _TOKENIZED_AT_ONCE):
            chunk = [prompt + text for text in texts[first : first + _TOKENIZED_AT_ONCE]]
            encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            for row, encoding in enumerate(encodings, start=first):
                if encoding.ids:
                    vectors_N_D[row] = weights_V_D.take(np.array(encoding.ids), axis=0).mean(axis=0)
        return vectors_N_D

    return Embedder(storage_name(BUILTIN, prompt), width, encode)


@functools.cache
def _builtin_model(folder: Path) -> tuple[NDArray[np.float32], Tokenizer]:
    """Weights [V, D] and tokenizer; 32 MB, and read once in a process whatever instructions its runs have."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    weights_V_D = load_file(folder / _WEIGHTS)["embedding.weight"].astype(np.float32)
    return weights_V_D, Tokenizer.from_file(str(folder / _TOKENIZER))


def _open_sentence_transformer(model_name: str, prompt: str) -> Embedder:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise EmbedderUnavailable(
            f"embedder {model_name!r}: the package sentence-transformers, which opens it, is not installed where the "
            f"service runs; install evenodds[service] there, or use {BUILTIN!r}"
        )
    lock = threading.Lock()  # the tokenizers of transformers change their settings while they encode
    try:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(model_name)

        def encode(texts: list[str]) -> NDArray[np.float32]:
            with lock:
                vectors = model.encode(texts, prompt=prompt or None, show_progress_bar=False, convert_to_numpy=True)
            return np.asarray(vectors, dtype=np.float32)

        shape = encode(["How many?"]).shape
    except Exception as error:  # loading files of third parties may raise anything
        raise EmbedderUnavailable(_unavailable(model_name, f"{type(error).__name__}: {error}")) from error
    if len(shape) != 2:
        raise EmbedderUnavailable(_unavailable(model_name, "it does not give one vector for a text"))
    return Embedder(storage_name(model_name, prompt), shape[1], encode)


def _unavailable(model_name: str, reason: str) -> str:
    one_line = " ".join(reason.split())
    if len(one_line) > 300:
        one_line = one_line[:297] + "..."
    return (
        f"embedder {model_name!r} cannot be opened ({one_line}); name a sentence-transformers model on the "
        f"hub that this machine can reach, the path of a folder that holds one, or {BUILTIN!r}"
    )


def storage_name(setting: str, prompt: str | None = None) -> str:
    """The name under which the vectors of this setting are stored; `Embedder.name` without opening the model."""
    name = BUILTIN_NAME if setting == BUILTIN else setting
    if not prompt:
        return name
    return f"{name}#{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"


def _encodable(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")

"""One contract for every embedder, and what the built-in one adds: no download, no torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenodds_service.errors import EmbedderUnavailable, ModelError
from evenodds_service.model.embedder import MAX_CHARACTERS, Embedder, open_embedder

PROMPTS = (
    "What is the remainder when $7^{2024}$ is divided by 5?",
    "Find all functions $f$ with $f(x+y) = f(x) + f(y)$.",
    "A train travels 60 miles in 1.5 hours. What is its average speed?",
    "def task_func(path):\n    '''Return the number of lines of a file.'''",
)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=100)

NO_NETWORK = """
import sys

def refuse(event, arguments):
    if event.startswith("socket."):
        raise RuntimeError(event)

sys.addaudithook(refuse)
from evenodds_service.model.embedder import open_embedder

print(open_embedder("builtin").embed(["2 + 2"]).shape, "torch" in sys.modules)
"""


def test_vectors_have_unit_length_and_follow_the_order_of_the_texts(embedder: Embedder) -> None:
    vectors = embedder.embed(PROMPTS)

    assert vectors.shape == (len(PROMPTS), embedder.width)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embedder.embed(PROMPTS[::-1])[::-1], vectors, atol=1e-6)


def test_a_text_has_one_vector_alone_among_others_and_again(embedder: Embedder) -> None:
    together = embedder.embed(PROMPTS)

    alone = np.vstack([embedder.embed([prompt]) for prompt in PROMPTS])

    np.testing.assert_allclose(alone, together, atol=1e-6)
    np.testing.assert_array_equal(embedder.embed(PROMPTS), together)


def test_threads_share_an_embedder(embedder: Embedder) -> None:
    expected = embedder.embed(PROMPTS)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: embedder.embed(PROMPTS), range(12)))

    for answer in answers:
        np.testing.assert_allclose(answer, expected, atol=1e-6)


def test_no_texts_give_no_rows(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, embedder.width)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_any_text_gives_a_unit_vector_or_zeros(embedder: Embedder, texts: list[str]) -> None:
    norms = np.linalg.norm(embedder.embed(texts), axis=1)

    assert np.all((norms == 0) | np.isclose(norms, 1, atol=1e-5))


def test_a_long_text_is_embedded_by_its_head(embedder: Embedder) -> None:
    head = "word " * (MAX_CHARACTERS // 5)

    vectors = embedder.embed([head, head + "tail " * 30_000])

    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert np.linalg.norm(vectors[0]) > 0.9


def test_related_prompts_are_nearer_than_unrelated_ones(embedder: Embedder) -> None:
    near, also_near, far = embedder.embed(
        [
            "Find the area of the triangle.",
            "What is the area of this triangle?",
            "Write a Python parser for CSV files.",
        ]
    )

    assert near @ also_near > near @ far


def test_the_builtin_embedder_opens_no_socket_and_imports_no_torch() -> None:
    result = subprocess.run([sys.executable, "-c", NO_NETWORK], capture_output=True, text=True, check=False)

    assert result.stdout == "(1, 256) False\n", result.stderr


def test_the_builtin_embedder_says_nothing_about_an_empty_text(builtin: Embedder) -> None:
    assert not builtin.embed([""]).any()


def test_the_builtin_embedder_agrees_with_the_same_files_in_sentence_transformers(
    builtin: Embedder, offline: None
) -> None:
    from safetensors.numpy import load_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec("wordllama")
    assert spec is not None
    assert spec.origin is not None
    wheel = Path(spec.origin).parent
    weights = load_file(wheel / "weights/l2_supercat_256.safetensors")["embedding.weight"].astype(np.float32)
    tokenizer = Tokenizer.from_file(str(wheel / "tokenizers/l2_supercat_tokenizer_config.json"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")

    expected = model.encode(list(PROMPTS), normalize_embeddings=True, show_progress_bar=False)

    np.testing.assert_allclose(builtin.embed(PROMPTS), expected, atol=1e-6)


@pytest.mark.parametrize("which", ["builtin", "minilm"])
def test_an_instruction_changes_the_vectors_and_the_name(which: str, request: pytest.FixtureRequest) -> None:
    plain: Embedder = request.getfixturevalue(which)
    setting = "builtin" if which == "builtin" else request.getfixturevalue("minilm_folder")

    instructed = open_embedder(setting, "Judge how hard this problem is: ")
    otherwise = open_embedder(setting, "Judge the topic: ")

    assert len({plain.name, instructed.name, otherwise.name}) == 3
    assert instructed.name.startswith(f"{plain.name}#")
    assert np.abs(instructed.embed(PROMPTS) - plain.embed(PROMPTS)).max() > 0.01
    assert np.abs(instructed.embed(PROMPTS) - otherwise.embed(PROMPTS)).max() > 0.01


def test_names_are_those_under_which_vectors_are_stored(
    builtin: Embedder, minilm: Embedder, minilm_folder: str
) -> None:
    assert (builtin.name, builtin.width) == ("builtin/1", 256)
    assert (minilm.name, minilm.width) == (minilm_folder, 384)
    assert open_embedder("builtin", "").name == "builtin/1"


def test_a_model_that_does_not_exist_is_named_with_the_reason_and_the_next_step(tmp_path: Path, offline: None) -> None:
    with pytest.raises(EmbedderUnavailable) as caught:
        open_embedder(str(tmp_path / "none-such"))

    assert caught.value.code == "embedder_unavailable"
    assert isinstance(caught.value, ModelError)
    message = str(caught.value)
    assert message.startswith(f"embedder '{tmp_path / 'none-such'}' cannot be opened (")
    assert "not found" in message
    assert message.endswith(
        "name a sentence-transformers model on the hub that this machine can reach, "
        "the path of a folder that holds one, or 'builtin'"
    )


def test_a_folder_without_a_model_is_refused(tmp_path: Path, offline: None) -> None:
    (tmp_path / "config.json").write_text("{")

    with pytest.raises(EmbedderUnavailable, match=r"cannot be opened \(.+\); name a sentence-transformers model"):
        open_embedder(str(tmp_path))


def test_where_the_library_is_not_installed_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)

    with pytest.raises(
        EmbedderUnavailable, match=r"embedder 'some/model': .* install evenodds\[service\] there, or use"
    ):
        open_embedder("some/model")

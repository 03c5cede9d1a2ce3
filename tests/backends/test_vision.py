"""Vision-language models: a tiny Llava sees images that are in the messages themselves."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.backends.pictures import TEMPLATE, ask, chat, expected, png, text, uri
from tests.backends.tiny import Answers, byte_tokenizer
from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import BackendError, ContextOverflowError, RequestError, TooLargeError, UnsupportedOperationError
from zfabric.wire.payloads import CountRequest

Served = tuple[ModelWorker, Answers]
#: A 16 × 16 image in patches of 4 × 4.
PLACES = 16


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llava."""
    directory = tmp_path_factory.mktemp("tiny-llava")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = None
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.5,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        initializer_range=0.5, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=len(tokenizer) - 1, initializer_range=0.5,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(directory)
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False), tokenizer=tokenizer,
        patch_size=4, vision_feature_select_strategy="default", chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(directory)  # fmt: skip
    return directory


@pytest_asyncio.fixture
async def served(tiny_llava: Path) -> AsyncIterator[Served]:
    worker = ModelWorker(
        TransformersOptions(model=str(tiny_llava), dtype="float32", device="cpu", prefill_chunk_tokens=16)
    )
    worker.steps = answers = Answers()
    (info,) = await worker.load()
    assert {"chat", "multimodal"} <= set(info.capabilities)
    yield worker, answers
    await worker.close()


async def test_images_and_texts_share_a_batch(served: Served, tiny_llava: Path) -> None:
    worker, answers = served
    red, blue = png("red"), png("blue", (64, 64))
    worker.begin(ask("text", chat(text("What?")), 30))
    await answers.until("text", tokens=2)
    worker.begin(ask("red", chat({"type": "image", "image": red}, text("What?")), 24))
    worker.begin(ask("blue", chat(text("What?"), {"type": "image_url", "image_url": {"url": uri(blue)}})))
    both = chat({"type": "image", "image": uri(red)}, text(" or "), {"type": "image", "image": blue})
    worker.begin(ask("both", both, n=2))
    await answers.until("text", "red", "blue", "both")
    assert answers.largest_step > 1
    head, tail = "<system>Look.\n<user>", "\n<assistant>"
    assert answers.tokens("text") == expected(tiny_llava, f"{head}What?{tail}", [], 30)
    assert answers.tokens("red") == expected(tiny_llava, f"{head}<image>What?{tail}", [red], 24)
    assert answers.tokens("blue") == expected(tiny_llava, f"{head}What?<image>{tail}", [blue], 16)
    wanted = expected(tiny_llava, f"{head}<image> or <image>{tail}", [red, blue], 16)
    assert answers.tokens("both", 0) == answers.tokens("both", 1) == wanted
    assert answers.tokens("red")[:16] != answers.tokens("text")[:16]


async def test_a_content_that_is_a_text_is_not_lost(served: Served, tiny_llava: Path) -> None:
    worker, answers = served
    messages = [{"role": "system", "content": "Look."}, {"role": "user", "content": "What?"}]
    worker.begin(ask("text", messages, 12))
    seen = [messages[0], *chat({"type": "image", "image": png("red")}, text("What?"))[1:]]
    worker.begin(ask("seen", seen, 12))
    await answers.until("text", "seen")
    assert answers.tokens("text") == expected(tiny_llava, "<system>Look.\n<user>What?\n<assistant>", [], 12)
    head = "<system>Look.\n<user><image>What?\n<assistant>"
    assert answers.tokens("seen") == expected(tiny_llava, head, [png("red")], 12)


async def test_what_is_seen_counts(served: Served) -> None:
    worker, answers = served
    messages = chat({"type": "image", "image": png("red")}, text("What?"))
    count = await worker.count_tokens(CountRequest(messages=messages))
    assert count == len("<system>Look.\n<user>What?\n<assistant>") + PLACES
    worker.begin(ask("a", messages, 3))
    await answers.until("a")
    usage = answers.last("a").usage
    assert usage is not None
    assert usage.prompt_tokens == count


async def test_a_full_cache_changes_no_text(tiny_llava: Path, served: Served) -> None:
    options = TransformersOptions(model=str(tiny_llava), dtype="float32", device="cpu", kv_tokens_max=160)
    small = ModelWorker(options)
    small.steps = crowded = Answers()
    await small.load()
    worker, answers = served
    names = ["red", "green", "blue"]
    for name in names:
        messages = chat({"type": "image", "image": png(name)}, text("What?"))
        small.begin(ask(name, messages, 40))
        worker.begin(ask(name, messages, 40))
    await answers.until(*names)
    await crowded.until(*names)
    await small.close()
    for name in names:
        assert crowded.tokens(name) == answers.tokens(name)


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}, RequestError, "not fetched"),
        ({"type": "image", "image": "/etc/passwd"}, RequestError, "not fetched"),
        ({"type": "image", "image": "data:image/png;base64,%%%"}, RequestError, "base64"),
        ({"type": "image", "image": b"no image"}, RequestError, "cannot be read"),
        ({"type": "image", "image": png("red")[:60]}, RequestError, "cannot be read"),
        ({"type": "image"}, RequestError, "NoneType"),
        ({"type": "image", "image": png("red", (9_000, 9_000))}, TooLargeError, "81000000 pixels"),
    ],
)
async def test_images_that_cannot_be_seen_are_refused(
    served: Served, part: dict[str, Any], error: type[Exception], words: str
) -> None:
    worker, answers = served
    worker.begin(ask("a", chat(part)))
    await answers.until("a")
    assert isinstance(answers.errors["a"], error)
    assert words in str(answers.errors["a"])


async def test_images_that_break_the_model_cost_their_requests_alone(served: Served) -> None:
    worker, answers = served
    names = [f"broken {number}" for number in range(8)]
    assert worker._assembled is not None
    made = worker._assembled.loaded.processor
    real = type(made).__call__

    def too_few(self: Any, **given: Any) -> Any:
        inputs = real(self, **given)
        inputs["pixel_values"] = inputs["pixel_values"][:, :, :8]
        return inputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(made), "__call__", too_few)
        for name in names:
            worker.begin(ask(name, chat({"type": "image", "image": png("red")})))
        await answers.until(*names)
    worker.begin(ask("literal", chat({"type": "image", "image": png("red")}, text("an <image> in words"))))
    worker.begin(ask("good", chat({"type": "image", "image": png("red")})))
    await answers.until("literal", "good")
    assert {type(answers.errors[name]) for name in names} == {BackendError}
    assert isinstance(answers.errors["literal"], RequestError)
    assert answers.died is None


async def test_images_go_through_the_fabric(tiny_llava: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with fabric(f"ipc://{directory}/c.sock") as made, AsyncClient(made.endpoint) as client:
            options = TransformersOptions(model=str(tiny_llava), model_names=("eyes",), dtype="float32", device="cpu")
            await made.add_worker("w0", ModelWorker(options))
            found = []
            for color in ("red", "blue"):
                messages = chat({"type": "image", "image": png(color)}, text("What?"))
                completion = await client.generate(
                    "eyes", messages=messages, temperature=0, max_new_tokens=12, ignore_eos=True
                )
                found.append(completion.choices[0].token_ids)
            assert [model.name for model in await client.models("multimodal")] == ["eyes"]
            assert found[0] != found[1]


async def test_a_prompt_with_images_is_not_cut(served: Served) -> None:
    worker, answers = served
    worker.begin(ask("a", chat({"type": "image", "image": png("red")}, text("x" * 300)), truncate_prompt=True))
    await answers.until("a")
    assert isinstance(answers.errors["a"], ContextOverflowError)


async def test_a_model_without_eyes_says_so(tiny_worker: Served) -> None:
    worker, answers = tiny_worker
    worker.begin(ask("a", chat({"type": "image", "image": png("red")})))
    await answers.until("a")
    assert isinstance(answers.errors["a"], UnsupportedOperationError)

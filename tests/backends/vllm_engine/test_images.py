"""Images: a tiny Idefics3 sees those that are in the messages themselves."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tests.backends.pictures import TEMPLATE, ask, chat, expected, png, text, uri
from tests.backends.tiny import Answers, byte_tokenizer
from tests.backends.vllm_engine.conftest import ENGINE, Borrowed
from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.errors import RequestError
from zfabric.wire.payloads import CountRequest
from zfabric.wire.sampling import SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="module")

Seeing = tuple[VLLMWorker, Answers]
#: A 32 × 32 image in patches of 8 × 8, four of which are one place of the prompt.
PLACES = 4
SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]


@pytest.fixture(scope="module")
def tiny_idefics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Idefics3, whose family vLLM runs without torchvision."""
    directory = tmp_path_factory.mktemp("tiny-idefics")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = None
    language = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.5,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    vision = Idefics3VisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        initializer_range=0.5,
    )  # fmt: skip
    config = Idefics3Config(
        vision_config=vision, text_config=language, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2, tie_word_embeddings=False, pad_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    Idefics3ForConditionalGeneration(config).save_pretrained(directory)
    edge = {"longest_edge": 32}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    Idefics3Processor(images, tokenizer, image_seq_len=PLACES, chat_template=TEMPLATE).save_pretrained(directory)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seeing(tiny_idefics: Path) -> AsyncIterator[VLLMWorker]:
    """A worker on it in float32."""
    argv = ["--model", str(tiny_idefics), "--model-names", "eyes", "--dtype", "float32", "--max-model-len", "256"]
    worker = VLLMWorker([*argv, *ENGINE, "--limit-mm-per-prompt", '{"image": 2}'])
    worker.steps = Answers()
    (info,) = await worker.load()
    assert {"chat", "multimodal"} <= set(info.capabilities)
    yield worker
    await worker.close()


@pytest_asyncio.fixture(loop_scope="module")
async def seen(seeing: VLLMWorker) -> Seeing:
    """The worker, with a sink of its own."""
    seeing.steps = answers = Answers()
    return seeing, answers


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(data)}}


async def test_images_and_texts_share_a_batch(seen: Seeing, tiny_idefics: Path) -> None:
    worker, answers = seen
    red, blue = png("red"), png("blue", (64, 64))
    worker.begin(ask("text", chat(text("What?")), 30))
    await answers.until("text", tokens=2)
    worker.begin(ask("red", chat(image(red), text("What?")), 24))
    worker.begin(ask("blue", chat(text("What?"), {"type": "image", "image": blue})))
    worker.begin(ask("both", chat(image(red), text(" or "), {"type": "image", "image": uri(blue)})))
    await answers.until("text", "red", "blue", "both")
    assert not answers.errors
    head, tail = "<system>Look.\n<user>", "\n<assistant>"
    assert answers.tokens("text") == expected(tiny_idefics, f"{head}What?{tail}", [], 30)
    assert answers.tokens("red") == expected(tiny_idefics, f"{head}<image>What?{tail}", [red], 24)
    assert answers.tokens("blue") == expected(tiny_idefics, f"{head}What?<image>{tail}", [blue], 16)
    wanted = expected(tiny_idefics, f"{head}<image> or <image>{tail}", [red, blue], 16)
    assert answers.tokens("both") == wanted
    assert answers.tokens("red")[:16] != answers.tokens("text")[:16]


@pytest.mark.parametrize("choices", [1, 3])
async def test_an_image_that_got_lost_on_its_way_is_sent_again(seen: Seeing, choices: int) -> None:
    """vLLM took it for sent when it prepared a request that the engine then never got."""
    worker, answers = seen
    lost = image(png("yellow", (50 + choices, 50)))
    worker.begin(ask("refused", chat(lost), logprobs=10**6))
    await answers.until("refused")
    assert isinstance(answers.errors["refused"], RequestError)
    request = ask("again", chat(lost), 8)
    request.sampling = SamplingParams(seed=1, max_new_tokens=8, ignore_eos=True, n=choices)
    worker.begin(request)
    worker.begin(ask("beside", chat(lost), 8))
    await answers.until("again", "beside")
    assert not answers.errors.keys() & {"again", "beside"}
    assert all(len(answers.tokens("again", index)) == 8 for index in range(choices))
    usage = answers.last("again").usage
    assert usage is not None
    assert usage.completion_tokens == 8 * choices


async def test_an_answer_to_an_image_goes_on(seen: Seeing) -> None:
    """Drawn again, since an image's places in a prompt are no tokens of a text."""
    worker, answers = seen
    messages = chat(image(png("green")), text("What?"))
    worker.begin(ask("whole", messages, 12))
    await answers.until("whole")
    request = ask("rest", messages, 12)
    request.resume_token_ids = answers.tokens("whole")[:5]
    request.resume_characters = sum(len(delta.text) for delta in answers.deltas["whole"][:5])
    worker.begin(request)
    await answers.until("rest")
    assert answers.tokens("rest") == answers.tokens("whole")[5:]
    assert answers.text("rest") == answers.text("whole")[request.resume_characters :]


async def test_what_is_seen_counts(seen: Seeing) -> None:
    worker, answers = seen
    messages = chat(image(png("red")), text("What?"))
    count = await worker.count_tokens(CountRequest(messages=messages))
    # Beside its places an image has three marks.
    assert count == len("<system>Look.\n<user>What?\n<assistant>") + PLACES + 3
    worker.begin(ask("a", messages, 3))
    await answers.until("a")
    usage = answers.last("a").usage
    assert usage is not None
    assert usage.prompt_tokens == count


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "image", "image": "data:image/png;base64,%%%"}],
        [image(b"no image")],
        [{"type": "image", "image": b"no image"}],
        [image(png("red")[:60])],
        [image(png("red"))] * 3,
        [{"type": "image"}],
        [{"type": "image", "image": "/etc/passwd"}],
        [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
    ],
    ids=["base64", "noise", "bytes", "cut", "too many", "nothing", "path", "file"],
)
async def test_images_that_cannot_be_seen_are_refused(seen: Seeing, parts: list[dict[str, Any]]) -> None:
    worker, answers = seen
    worker.begin(ask("bad", chat(*parts)))
    await answers.until("bad")
    assert isinstance(answers.errors["bad"], RequestError), answers.errors["bad"]
    worker.begin(ask("good", chat(image(png("red")))))
    await answers.until("good")
    assert len(answers.tokens("good")) == 16


async def test_images_go_through_the_fabric(seen: Seeing) -> None:
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with fabric(f"ipc://{directory}/c.sock") as made, AsyncClient(made.endpoint) as client:
            await made.add_worker("w0", Borrowed(seen[0]))
            found = []
            for color in ("red", "blue"):
                messages = chat({"type": "image", "image": png(color)}, text("What?"))
                completion = await client.generate(
                    "eyes", messages=messages, temperature=0, max_new_tokens=12, ignore_eos=True
                )
                found.append(completion.choices[0].token_ids)
            assert [model.name for model in await client.models("multimodal")] == ["eyes"]
            assert found[0] != found[1]

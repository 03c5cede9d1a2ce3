"""Whether prompts with pictures can be computed over pages, in parts: the model itself is asked, once it is loaded.

A prompt with two pictures that differ in size is seen picture by picture and computed in parts beside a text. What comes after
it, and after one token more, has to be what the model says of all of it as a whole. Where it is not, both pictures are seen at
once; and where that is not either, rows are padded, and a prompt with pictures is computed alone and as a whole.
"""

from __future__ import annotations

import io
from typing import Any, Final

import torch

from zfabric.backends.front.images import see
from zfabric.backends.hf_transformers.cache.block_table import table_of
from zfabric.backends.hf_transformers.checks.self_check import alone, difference, tolerance, two_texts
from zfabric.backends.hf_transformers.failures import out_of_memory
from zfabric.backends.hf_transformers.loading.model_loader import Loaded
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner, Part
from zfabric.backends.hf_transformers.runner.vision import Sight, Vision
from zfabric.wire.payloads import GenerateRequest

#: Width and height of the pictures.
_SIZES: Final = ((48, 32), (32, 64))
_BLOCK_TOKENS: Final = 4
#: Tokens of the text that are computed before any of the pictures' prompt; the others are steps beside its parts.
_BEFORE: Final = 3


def why_whole(loaded: Loaded, model: ModelRunner) -> str | None:
    """Why prompts with pictures are computed as a whole; None if they are computed in parts, and `model.vision` is set."""
    try:
        model.vision, answer = Vision(model), _asked(loaded)
        with torch.inference_mode():
            text = two_texts(loaded.tokenizer)[0]
            expected = [*_whole(loaded.model, model, answer, text[0]), alone(loaded.model, text)]
            distance = _distance(model, expected, answer, text)
            if not distance <= tolerance(loaded.model):
                model.vision.apart = False
                distance = _distance(model, expected, answer, text)
    except Exception as error:
        if out_of_memory(error):
            raise
        model.vision = None
        name = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
        return f"{name}{str(error).partition(chr(10))[0]}"
    if distance <= tolerance(loaded.model):
        return None
    model.vision = None
    return (
        f"it answers otherwise to pictures in parts than as a whole, by {distance:.2g} times the spread of its answers"
    )


def _asked(loaded: Loaded) -> Answer:
    """A prompt with two pictures."""
    words = loaded.tokenizer.decode(two_texts(loaded.tokenizer)[1])
    content: list[dict[str, Any]] = []
    for number, size in enumerate(_SIZES):
        content += [{"type": "image", "image": _picture(number, size)}, {"type": "text", "text": words}]
    answer = Answer(GenerateRequest())
    answer.prompt, answer.media = see(
        loaded.processor, loaded.tokenizer, [{"role": "user", "content": content}], None, None
    )
    answer.pictures = len(_SIZES)
    return answer


def _picture(seed: int, size: tuple[int, int]) -> bytes:
    """One whose places all differ."""
    from PIL import Image

    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, format="PNG")
    return out.getvalue()


def _whole(raw: Any, model: ModelRunner, answer: Answer, further: int) -> list[torch.Tensor]:
    """The model's own logits after the prompt, and after one token more."""
    tokens = [*answer.prompt, further]
    logits = raw(input_ids=model.send([tokens]), **model.sent(answer.media or {}, len(tokens))).logits[0]
    return [logits[-2], logits[-1]]


def _distance(model: ModelRunner, expected: list[torch.Tensor], answer: Answer, text: list[int]) -> float:
    """How far it is from that in parts, beside a text."""
    found = _in_parts(model, answer, text)
    return max(difference(right, got) for right, got in zip(expected, found, strict=True))


def _in_parts(model: ModelRunner, answer: Answer, text: list[int]) -> list[torch.Tensor]:
    """Logits after the prompt, after one token more, and after the text."""
    vision = model.vision
    assert vision is not None
    sight = Sight(vision, answer)
    while sight.embedded is None:
        sight.advance()
    size = len(answer.prompt)
    blocks = -(-(size + 1) // _BLOCK_TOKENS)
    beside = -(-len(text) // _BLOCK_TOKENS)
    runner = PagedRunner(model, blocks + beside, _BLOCK_TOKENS)
    # Blocks of the two are no neighbours at their beginning.
    mine, its = table_of([*range(beside, beside + blocks)]), table_of([*range(beside)])
    nobody = Answer(GenerateRequest())
    runner.forward([Part(nobody, text[:_BEFORE], _BEFORE, its, "last")])
    begin, length, after_prompt, after_text = 0, _BEFORE, None, None
    while begin < size:
        end = sight.embedded.end(begin, min(size, begin + max(2, size // 3)))
        part = Part(answer, answer.prompt[begin:end], end, mine, "last", sight.embedded)
        steps = [] if length == len(text) else [Part(nobody, [text[length]], length + 1, its, "last")]
        logits = runner.forward([*steps, part])
        length, begin, after_prompt = length + len(steps), end, logits[-1]
        after_text = logits[0] if steps else after_text
    while length < len(text):
        after_text = runner.forward([Part(nobody, [text[length]], length + 1, its, "last")])[0]
        length += 1
    further = runner.forward([Part(answer, [text[0]], size + 1, mine, "last")])[0]
    assert after_prompt is not None
    assert after_text is not None
    return [after_prompt, further, after_text]

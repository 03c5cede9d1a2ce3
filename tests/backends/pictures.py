"""Pictures, messages that hold them, and what transformers makes of both."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}<assistant>"
)


def png(color: str, size: tuple[int, int] = (40, 30)) -> bytes:
    image = Image.new("RGB", size, color)
    image.paste("white", (0, 0, size[0] // 2, size[1] // 3))
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def chat(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Look."}, {"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def ask(name: str, messages: list[dict[str, Any]], count: int = 16, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True, **sampling)
    return GenerateRequest(messages=messages, request_id=name, sampling=params)


def expected(directory: Path, words: str, images: list[bytes], count: int) -> list[int]:
    """What transformers' own generate makes of it alone."""
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
    inputs = processor(text=[words], images=opened or None, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens

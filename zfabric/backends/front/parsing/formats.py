"""The formats that are known, by the names that vLLM has for them, and how a model's chat template tells its own.

A template has the marks of its model's calls, since it writes those of earlier turns. One that shows several is taken for the
first of them in the tables' order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from zfabric.backends.front.parsing.gemma_calls import GemmaCalls
from zfabric.backends.front.parsing.json_calls import HermesCalls, LlamaCalls, MistralCalls
from zfabric.backends.front.parsing.pythonic_calls import PythonicCalls
from zfabric.backends.front.parsing.scanning import Parser, PlainText
from zfabric.backends.front.parsing.tagged_calls import DeepseekCalls, QwenCoderCalls
from zfabric.errors import ConfigurationError

#: Of a request's tools: parameters' schemas by name.
Schemas = Mapping[str, Mapping[str, Any]]
#: The format of gpt-oss has one parser for all of it.
HARMONY_TOOLS: Final = "openai"
HARMONY_REASONING: Final = "openai_gptoss"
AUTO: Final = "auto"
NONE: Final = "none"


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family writes calls.

    Attributes:
        make: A parser for a request's tools.
        marks: What the parser has to see, be it a special token or not.
        signs: Groups of strings: a template that holds all of one group is of this family.
        id_length: Characters of a call's id, where the family's template insists; None for our own form.
    """

    make: Callable[[Schemas], Parser]
    marks: tuple[str, ...] = ()
    signs: tuple[tuple[str, ...], ...] = ()
    id_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReasoningFormat:
    """How a family writes reasoning.

    Attributes:
        marks: Around it.
        signs: As of `ToolFormat`.
        opened: An answer begins with reasoning unless the prompt has closed it; else only where the prompt has opened it.
    """

    marks: tuple[str, str]
    signs: tuple[tuple[str, ...], ...] = ()
    opened: bool = False


_HARMONY_MARKS: Final = (
    "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip

TOOL_FORMATS: Final[dict[str, ToolFormat]] = {
    HARMONY_TOOLS: ToolFormat(
        make=lambda _: PlainText(), marks=_HARMONY_MARKS, signs=(("<|channel|>", "<|message|>", "<|start|>"),)
    ),
    "deepseek_v3": ToolFormat(
        make=lambda _: DeepseekCalls(),
        marks=(
            DeepseekCalls.OPEN, DeepseekCalls.CLOSE, DeepseekCalls.CALL, DeepseekCalls.CALL_END, DeepseekCalls.SEPARATOR
        ),
        signs=((DeepseekCalls.CALL,),),
    ),
    "gemma4": ToolFormat(
        make=lambda _: GemmaCalls("<|tool_call>", "<tool_call|>", '<|"|>'),
        marks=("<|tool_call>", "<tool_call|>", '<|"|>'),
        signs=(("<|tool_call>",),),
    ),
    "functiongemma": ToolFormat(
        make=lambda _: GemmaCalls("<start_function_call>", "<end_function_call>", "<escape>"),
        marks=("<start_function_call>", "<end_function_call>", "<escape>"),
        signs=(("<start_function_call>",),),
    ),
    "mistral": ToolFormat(
        make=lambda _: MistralCalls(),
        marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        signs=(("[TOOL_CALLS]",),),
        id_length=9,
    ),
    "qwen3_coder": ToolFormat(
        make=QwenCoderCalls, marks=("<tool_call>", "</tool_call>"), signs=(("<function=", "<parameter="),)
    ),
    "hermes": ToolFormat(
        make=lambda _: HermesCalls(), marks=("<tool_call>", "</tool_call>"), signs=(("<tool_call>", "arguments"),)
    ),
    "pythonic": ToolFormat(
        make=lambda schemas: PythonicCalls(frozenset(schemas)),
        marks=PythonicCalls.MARKS,
        signs=(("<|python_start|>",), ("[func_name1(params_name1=",)),
    ),
    "llama3_json": ToolFormat(
        make=lambda schemas: LlamaCalls(frozenset(schemas)),
        marks=(LlamaCalls.MARK,),
        signs=(("<|python_tag|>",), ("<|start_header_id|>", "ipython", "parameters")),
    ),
}  # fmt: skip

REASONING_FORMATS: Final[dict[str, ReasoningFormat]] = {
    HARMONY_REASONING: ReasoningFormat(
        marks=("<|channel|>analysis<|message|>", "<|end|>"), signs=TOOL_FORMATS[HARMONY_TOOLS].signs
    ),
    "gemma4": ReasoningFormat(marks=("<|channel>thought", "<channel|>"), signs=(("<|channel>",),)),
    "mistral": ReasoningFormat(marks=("[THINK]", "[/THINK]"), signs=(("[/THINK]",),)),
    "deepseek_r1": ReasoningFormat(
        marks=("<think>", "</think>"), signs=(("</think>", "<｜Assistant｜>"),), opened=True
    ),
    "qwen3": ReasoningFormat(marks=("<think>", "</think>"), signs=(("</think>",),)),
}  # fmt: skip


def chosen(option: str, setting: str, template: str, known: Mapping[str, ToolFormat | ReasoningFormat]) -> str | None:
    """The name of the format that a worker was started with, or that the chat template shows; None for none.

    Args:
        option: Name of the setting.
        setting: "auto", "none", or the name of a format.
        template: The text of all chat templates of the model.

    Raises:
        ConfigurationError: No format has that name.
    """
    if setting == AUTO:
        return next((name for name, one in known.items() if _shown(one.signs, template)), None)
    if setting == NONE:
        return None
    if setting not in known:
        there = ", ".join([AUTO, NONE, *sorted(known)])
        raise ConfigurationError(f"{option} is {setting!r}, it must be one of {there}", setting=option)
    return setting


def _shown(signs: tuple[tuple[str, ...], ...], template: str) -> bool:
    return any(all(sign in template for sign in group) for group in signs)

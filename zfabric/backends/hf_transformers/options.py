"""What can be set on a ModelWorker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from zfabric import limits

#: Its requests are long with others by then; a CPU that computes 512 tokens of a large model may take minutes.
_STALL_MS: Final = 5 * limits.STALL_MS

#: Keys and values of 8 bits.
Narrow = Literal["fp8", "int8"]
#: SmolLM2's logits are 2.8 times as far from the right ones with fp8.
_8_BIT: Final[Narrow] = "int8"


@dataclass(frozen=True, kw_only=True)
class TransformersOptions:
    """Options of the transformers backend.

    Attributes:
        model: Directory of the model, a GGUF file, or a name that transformers can find.
        model_names: Names it is served under; the first is the model, the others aliases. Default: the last path part.
        gguf_file: Name of a GGUF file in that directory; its weights are unpacked when it is loaded.
        revision: Branch, tag or commit of a model from a hub.
        device: cpu, cuda, cuda:1, mps …; auto takes CUDA if there is one.
        dtype: auto takes what the checkpoint holds.
        device_map: Spread over devices by accelerate (auto, balanced, sequential).
        tensor_parallel: Processes that a causal model is divided over, each with a part of every layer, and on CUDA with a GPU
            of its own.
        max_gpu_memory: With device_map, per GPU, such as 20GiB.
        quantization: Make weights of 8 or 4 bits as they are loaded: 8bit and 4bit by bitsandbytes; int8, fp8 and, on CUDA,
            int4 by torchao. A checkpoint whose weights are quantized already is served as it is, without this.
        cpu_offload: With 8bit and device_map, what no GPU has room for stays on the CPU, in float32.
        attention: Attention implementation, such as sdpa, eager or flash_attention_2; the best that the model has by default.
        trust_remote_code: Run code that the model's repository brings along.
        chat_template: File with a Jinja chat template, instead of the tokenizer's own.
        tool_parser: How tool calls are written: auto goes by the chat template, none leaves them in the text, or a format's name.
        reasoning_parser: The same for reasoning.
        generation_config: Where to take the model's own way of drawing from: auto is the model, none is nothing, or a directory.
        lora: LoRA adapters as name=path, each served as a model of that name beside the model itself.
        adapters_dir: Directory of LoRA adapters that are loaded when somebody asks for one, each a directory of its own there.
        weights_dir: Directory below which weights lie that operators may have loaded in place of the model's while it serves.
        weight_version: What the weights are called that it starts with; answers tell it, as they tell it of later ones.
        context_length: Tokens of prompt and answer; the model's own by default.
        max_batch_size: Sequences in the running batch; also the worker's slots. By the device's cache, if not given.
        prefill_chunk_tokens: Prompt tokens computed between two steps of the running batch at most. Where nothing runs, prompts
            share a pass of four times as many, so many of each.
        prefill_wait_ms: How long running streams may wait for part of a new prompt; parts are cut to fit that. Where
            more requests wait than run, it is as many times as long.
        kv_cache: auto has a cache of pages where the model allows it, else one whose rows are padded; paged refuses models
            whose attention does not allow it; padded pads the rows of any.
        speculation: Guess several tokens ahead, which changes no text: ngram by what the text had before, assistant by a smaller
            model. Goes with pages.
        assistant: Directory or name of that model; it has the same vocabulary, and its memory counts as the model's own.
        num_speculative_tokens: Tokens guessed for a request in a step at most; fewer where fewer are right.
        prompt_lookup_min: Newest tokens that the text must have had before, for ngram.
        prompt_lookup_max: Of several such places the one that is like the end for the most tokens counts, up to so many.
        kv_cache_dtype: Type of the keys and values in a cache of pages: auto is the model's; 8bit is int8, half the size of
            bfloat16 and nearer to it than fp8, which vLLM's workers have.
        tell_cache: Tell the controller which blocks of prompts the cache has, for its policy prefix_aware; goes with pages.
        kv_tokens_max: Tokens of the cache over all requests, padding included; derived from the device by default.
        embed_batch_tokens: Tokens of one pass of embeddings, padding included.
        max_logprobs: Alternatives per token that a request may ask the log-probabilities of.
        pooling: How embeddings are made; by default as the model's own files say, else the mean.
        stall_ms: A turn of the engine that takes longer has hung: its requests go elsewhere, and the worker ends.
        pack_weights: On a CPU, keep large weights in the order of its matrix kernels: several streams are faster by far.
        enforce_eager: Launch each kernel of a step from Python. By default steps over pages are recorded as graphs when the
            worker starts, one for each of some tens of sizes, and played, if the device is CUDA.
        compile: Have torch compile the steps of a causal language model, over pages as well. Takes minutes at the start, and a
            C++ compiler on a CPU.
        threads: CPU threads of torch.
        seed: Seed for requests that bring none; random by default.
    """

    model: str
    model_names: tuple[str, ...] = ()
    gguf_file: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device_map: str | None = None
    tensor_parallel: int = 1
    max_gpu_memory: str | None = None
    quantization: Literal["8bit", "4bit", "fp8", "int8", "int4"] | None = None
    cpu_offload: bool = False
    attention: str | None = None
    trust_remote_code: bool = False
    chat_template: Path | None = None
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    generation_config: str = "auto"
    lora: tuple[str, ...] = ()
    adapters_dir: Path | None = None
    weights_dir: Path | None = None
    weight_version: str = ""
    context_length: int | None = None
    max_batch_size: int | None = None
    prefill_chunk_tokens: int = 512
    prefill_wait_ms: int = 100
    kv_cache: Literal["padded", "paged", "auto"] = "auto"
    speculation: Literal["ngram", "assistant"] | None = None
    assistant: str | None = None
    num_speculative_tokens: int = 8
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 8
    kv_cache_dtype: Literal["auto", "8bit", "fp8", "int8"] = "auto"
    tell_cache: bool = False
    kv_tokens_max: int | None = None
    embed_batch_tokens: int = 8_192
    max_logprobs: int = limits.LOGPROBS_MAX
    pooling: Literal["mean", "cls", "last"] | None = None
    stall_ms: int = _STALL_MS
    pack_weights: bool = True
    enforce_eager: bool = False
    compile: bool = False
    threads: int | None = None
    seed: int | None = None

    @property
    def narrow(self) -> Narrow | None:
        """What keys and values are stored in; None for the model's own type."""
        if self.kv_cache_dtype == "auto":
            return None
        return _8_BIT if self.kv_cache_dtype == "8bit" else self.kv_cache_dtype

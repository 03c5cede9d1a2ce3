"""From a message with a sound to what Whisper is given: features for its encoder, and the tokens that its answer goes on from.

Source of those tokens: `WhisperGenerationMixin._retrieve_init_tokens` of transformers, which OpenAI's own code agrees with.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import torch
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from zfabric.backends.front.chat import parts_of
from zfabric.backends.front.sounds import seconds_heard, sounds_of
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.speech import FEATURES, HEARD, SpeechRunner
from zfabric.errors import ParameterRangeError, RequestError, UnsupportedParameterError
from zfabric.sounds import samples_of

#: Keys of a request's `extra`.
LANGUAGE: Final = "language"
TASK: Final = "task"
TASKS: Final = ("transcribe", "translate")
#: Before what was said before, and before the text of a prompt.
_BEFORE: Final = "<|startofprev|>"


class Hearing:
    """Prepares sounds for one model.

    Args:
        extractor: Makes features of samples, of transformers.
        tokenizer: Of transformers.
        model: The forward pass, for languages that requests leave open.
        settings: The model's generation_config.
        start: The token that an answer begins with.
        context_length: Tokens of prompt and answer.

    Attributes:
        run: Runs a job on the thread of the model.
    """

    def __init__(
        self, extractor: Any, tokenizer: Any, model: SpeechRunner, settings: Any, *, start: int, context_length: int
    ) -> None:
        self._extractor = extractor
        self._tokenizer = tokenizer
        self._model = model
        #: That the encoder makes of any sound.
        self.columns = model.columns
        self._start = start
        self._prompt_max = context_length // 2 - 1
        self._languages: dict[str, int] = getattr(settings, "lang_to_id", None) or {}
        self._tasks: dict[str, int] = getattr(settings, "task_to_id", None) or {}
        if getattr(settings, "is_multilingual", True) is False:
            self._languages, self._tasks = {}, {}
        self._untimed: int | None = getattr(settings, "no_timestamps_token_id", None)
        self._language: str | None = getattr(settings, "language", None)
        self._task: str | None = getattr(settings, "task", None)
        self._older = getattr(settings, "forced_decoder_ids", None)
        self.run: Callable[[Callable[[], Any]], Future[Any]] | None = None

    def prepare(self, answer: Answer) -> list[int]:
        """Set `answer.media`; the tokens before the answer.

        Raises:
            RequestError: There is not one sound, it cannot be read or is too long, or a text is none that can stand before it.
            UnsupportedOperationError: It is no WAV, and the extra "audio" is not installed.
            UnsupportedParameterError: Another language than English is named, or a task, and the model knows no other.
            ParameterRangeError: It knows others.
        """
        request = answer.request
        sounds = sounds_of(request.messages or ())
        if len(sounds) != 1:
            raise RequestError(
                f"this model writes down what is said: it takes one sound in one message, there are {len(sounds)}"
            )
        rate = int(self._extractor.sampling_rate)
        samples = samples_of(sounds[0], rate, seconds_heard(self._extractor))
        features = self._extractor(samples, sampling_rate=rate, return_tensors="pt")[FEATURES]
        answer.media = {FEATURES: features}
        language, task = request.extra.get(LANGUAGE, self._language), request.extra.get(TASK, self._task)
        return [*self._prompt(answer), *self._begin(answer, language, task)]

    def _begin(self, answer: Answer, language: str | None, task: str | None) -> list[int]:
        if self._languages:
            tokens = self._chosen(answer, language, task)
        else:
            # What such a model does anyway may be asked for.
            if task not in (None, TASKS[0]) or (language or "en").lower() not in ("en", "english"):
                name, value = (TASK, task) if task not in (None, TASKS[0]) else (LANGUAGE, language)
                raise UnsupportedParameterError(
                    f"{name!r} is {value!r}, and this model writes down English alone", parameter=name
                )
            tokens = [token for _, token in self._older or () if token is not None]
        tokens = [token for token in tokens if token != self._untimed]
        return [self._start, *tokens, *([] if self._untimed is None else [self._untimed])]

    def _chosen(self, answer: Answer, language: str | None, task: str | None) -> list[int]:
        """Tokens of the language and of the task, of a model that knows several."""
        if task is None and language is None and self._older:
            # Older files have places and tokens, where nothing stands for a language that is to be found out.
            first, *others = [token for _, token in self._older]
            found = [self._detected(answer) if first is None else first, *others]
            return [token for token in found if token is not None]
        tokens = [self._detected(answer) if language is None else self._token_of(language)]
        # Whoever names a language has it written down; whoever names nothing leaves it to the model.
        return tokens if task is None and language is None else [*tokens, self._task_token(task or TASKS[0])]

    def _task_token(self, task: str) -> int:
        if task not in self._tasks:
            known = ", ".join(sorted(self._tasks))
            raise ParameterRangeError(f"{TASK} is {task!r}, it must be one of {known}", parameter=TASK, value=task)
        return self._tasks[task]

    def _token_of(self, language: str) -> int:
        """Of a language by name, by code, or as the token is written."""
        name = language.lower()
        for form in (name, f"<|{TO_LANGUAGE_CODE.get(name, name)}|>"):
            if form in self._languages:
                return self._languages[form]
        known = ", ".join(sorted(code.strip("<|>") for code in self._languages))
        raise ParameterRangeError(
            f"{LANGUAGE} is {language!r}, it must be one of {known}", parameter=LANGUAGE, value=language
        )

    def _detected(self, answer: Answer) -> int:
        """The likeliest language; what the encoder has made is kept for the answer."""
        media = answer.media
        assert media is not None
        assert self.run is not None

        def detect() -> int:
            with torch.inference_mode():
                media[HEARD] = self._model.hear(media[FEATURES])
                answer.encoded = True
                return self._model.likeliest(media[HEARD], self._start, list(self._languages.values()))

        found: int = self.run(detect).result()
        return found

    def _prompt(self, answer: Answer) -> list[int]:
        """The text beside the sound, as what was said before it: its end, if it is long, as OpenAI's own does it."""
        texts = []
        for message in answer.request.messages or ():
            content = message.get("content")
            texts += [content] if isinstance(content, str) else []
            texts += [str(part["text"]) for part in parts_of(message) if isinstance(part, dict) and part.get("text")]
        text = " ".join(text.strip() for text in texts if text.strip())
        if not text:
            return []
        tokens = list(self._tokenizer(" " + text, add_special_tokens=False)["input_ids"])
        special = set(self._tokenizer.all_special_ids)
        if special & set(tokens):
            raise RequestError("the text beside a sound holds special tokens of the model")
        before = self._tokenizer.convert_tokens_to_ids(_BEFORE)
        return [before, *tokens[-self._prompt_max :]]

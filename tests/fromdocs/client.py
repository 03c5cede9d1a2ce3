"""A client: sessions, streams with credit, cancel, failover, claims, and questions."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from tests.fromdocs.connection import Connection
from tests.fromdocs.document import body_of, kind_of, message, named, packed, sampling_of, struct, unpacked, version

LOST = (50301, 50302, 50303, 50304)
DEATHS = (50301, 50303)
DEATHS_MAX = 2
CANCELLED = 49901
NAME_TAKEN = 50305
ATTEMPTS_WITHOUT_PROGRESS = 3
WAIT_S = 20.0


class Failed(Exception):  # noqa: N818 — it is the fabric's word
    """A request or a question ended with an error."""

    def __init__(self, code: int, text: str, details: dict[str, Any]) -> None:
        super().__init__(code, text)
        self.code, self.text, self.details = code, text, details


@dataclass
class Answer:
    """A request, and what has come of its answer."""

    number: int
    operation: str
    model: str
    body: dict[str, Any]
    window: int
    deadline: float | None = None
    attempt: int = 0
    submitted: bool = False
    next: int = 0
    granted: int = 0
    token_ids: list[int] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    exact: bool = False
    barren: int = 0
    deaths: int = 0
    worker: str = ""
    finish_reason: str = ""
    loss: Failed | None = None
    done: bool = False
    error: Failed | None = None
    result: Any = None
    usage: dict[str, Any] | None = None
    chunks: int = 0

    @property
    def text(self) -> str:
        """Of its first choice."""
        return self.texts.get(0, "")

    @property
    def left_ms(self) -> int | None:
        """Until the deadline, if it has one."""
        return None if self.deadline is None else max(0, round(1_000 * (self.deadline - time.monotonic())))

    @property
    def claim(self) -> list[Any]:
        """That the client still waits for it."""
        return struct(
            "Claim", request=self.number, attempt=self.attempt, next=self.next, window=self.granted, model=self.model
        )


class Client:
    """One client, driven by the thread that calls it."""

    def __init__(self, endpoint: str, *, key: Path | None = None, controller_key: Path | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._where = (endpoint, key, controller_key)
        self.instance = random.getrandbits(63)
        self._secret = random.randbytes(16)
        self._token = b""
        self.welcome: dict[str, Any] | None = None
        self.refused: Failed | None = None
        self.faults: list[dict[str, Any]] = []
        self.beats = 0
        self.sessions: list[int] = []
        self.answers: dict[int, Answer] = {}
        self._questions: dict[int, list[Any]] = {}
        self._answered: dict[int, Failed | None] = {}
        self._number = 0
        self._hello_at = self._beat_at = 0.0
        self._connection = Connection(self._context, *self._where)

    def __enter__(self) -> Client:
        self.wait(lambda: self.welcome is not None or self.refused is not None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.welcome is not None:
            self._send(message("GOODBYE", struct("Goodbye")))
        self._connection.close()
        self._context.term()

    # ── what a caller does ────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self, operation: str, model: str, body: dict[str, Any], window: int = 1_024, deadline_s: float | None = None
    ) -> Answer:
        """Ask for something. `body` are fields of the request's struct by name."""
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        answer = Answer(random.getrandbits(63), operation, model, body, window, deadline, granted=window)
        self.answers[answer.number] = answer
        if self.welcome is not None:
            self._submit(answer)
        return answer

    def result(self, answer: Answer) -> Answer:
        """Wait for the end. Raises: Failed."""
        self.wait(lambda: answer.done)
        if answer.error is not None:
            raise answer.error
        return answer

    def cancel(self, answer: Answer) -> None:
        """The request has ended with this, whatever still comes."""
        self._send(message("CANCEL", struct("Cancel", requests=[answer.number])))
        self._end(answer, Failed(CANCELLED, "cancelled", {}))

    def ask(self, what: str, **arguments: Any) -> Any:
        """Ask the controller. Raises: Failed."""
        self._number += 1
        number = self._number
        self._questions[number] = []
        self._send(message("QUERY", struct("Query", number=number, what=what, arguments=arguments)))
        self.wait(lambda: number in self._answered)
        error, parts = self._answered.pop(number), self._questions.pop(number)
        if error is not None:
            raise error
        if isinstance(parts[0], list):
            return [row for part in parts for row in part]
        return parts[0]

    def drop(self) -> None:
        """Lose the connection without a word."""
        self._connection.socket.linger = 0
        self._connection.close()
        self._connect()

    def wait(self, until: Any) -> None:
        """Do what there is to do until something is true."""
        deadline = time.monotonic() + WAIT_S
        while not until():
            assert time.monotonic() < deadline, "it took too long"
            self.work()

    def work(self) -> None:
        """Take a message, if one comes soon, and do what is due."""
        frames = self._connection.receive(0.01)
        now = time.monotonic()
        if self._connection.lost:
            self._connection.close()
            self._connect()
            return
        if frames is not None:
            self._receive(frames)
        if self._connection.up and self.welcome is None and now >= self._hello_at:
            self._hello(now)
        if self.welcome is not None and now >= self._beat_at:
            self._beat_at = now + self.welcome["beat_ms"] / 1_000
            self._send(message("BEAT", struct("Beat", number=7)))

    # ── the session ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _connect(self) -> None:
        self.welcome = None
        self._hello_at = 0.0
        self._connection = Connection(self._context, *self._where)

    def _hello(self, now: float) -> None:
        self._hello_at = now + random.uniform(0.75, 1.25)
        hello = struct(
            "ClientHello",
            version=version(),
            build="fromdocs",
            instance=self.instance,
            token=self._token,
            claims=[answer.claim for answer in self.answers.values() if answer.submitted],
            secret=self._secret,
        )
        self._send(message("CLIENT_HELLO", hello))

    def _welcomed(self, welcome: dict[str, Any]) -> None:
        if self.welcome is not None:
            return
        self.welcome, self._token = welcome, welcome["token"]
        self.sessions.append(welcome["session"])
        for answer in list(self.answers.values()):
            if not answer.submitted:
                self._submit(answer)

    def _over(self, pause_s: float) -> None:
        if self.welcome is not None:
            self.welcome = None
            self._hello_at = time.monotonic() + pause_s

    def _send(self, *frames: bytes) -> None:
        self._connection.send(*frames)

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _submit(self, answer: Answer) -> None:
        envelope = struct(
            "Submit",
            request=answer.number,
            attempt=answer.attempt,
            operation=answer.operation,
            model=answer.model,
            deadline_ms=answer.left_ms,
            window=answer.granted,
            resume_from=answer.next,
        )
        body = dict(answer.body)
        if answer.next:
            body |= {"resume_token_ids": answer.token_ids, "resume_characters": len(answer.text)}
        answer.submitted = True
        self._send(message("SUBMIT", envelope), packed(request(answer.operation, **body)))

    def _end(self, answer: Answer, error: Failed | None) -> None:
        answer.done, answer.error = True, error
        self.answers.pop(answer.number, None)

    def _fail(self, answer: Answer, error: Failed) -> None:
        """An attempt has ended with an error: another one, the same one later, or the end."""
        if error.code not in LOST:
            self._end(answer, error)
            return
        if error.details.get("resumable") is False:
            if answer.loss is not None and answer.loss.details.get("claim_ms"):
                answer.attempt -= 1
                answer.loss = None
                self._send(message("CLAIMS", struct("Claims", claims=[answer.claim])))
            else:
                self._end(answer, error)
            return
        deaths = (answer.deaths if answer.barren else 0) + (error.code in DEATHS)
        if error.code in DEATHS and deaths >= DEATHS_MAX and not error.details.get("claim_ms"):
            self._end(answer, Failed(40307, "it kills its workers", {"deaths": deaths}))
        elif self._may_go_on(answer) and (error.code not in DEATHS or deaths < DEATHS_MAX):
            answer.loss = error
            answer.deaths = deaths
            answer.attempt += 1
            answer.barren += 1
            self._submit(answer)
        elif error.details.get("claim_ms"):
            self._send(message("CLAIMS", struct("Claims", claims=[answer.claim])))
        else:
            self._end(answer, error)

    def _may_go_on(self, answer: Answer) -> bool:
        """Whether another worker would draw the same from here on."""
        if answer.barren >= ATTEMPTS_WITHOUT_PROGRESS:
            return False
        if not answer.next:
            return True
        sampling = answer.body["sampling"]
        greedy = sampling.get("temperature") == 0.0 and sampling.get("n", 1) == 1
        return len(answer.token_ids) == answer.next and greedy

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _receive(self, frames: list[bytes]) -> None:
        kind = kind_of(frames[0])
        if kind == "CHUNKS":
            self._chunks(unpacked(frames[0][5:]))
            return
        content = unpacked(frames[0][1:]) if len(frames[0]) > 1 else []
        if kind == "WELCOME":
            self._welcomed(named("Welcome", content))
        elif kind == "ENDS":
            self._ends(named("Ends", content), named("EndsBody", unpacked(frames[1])))
        elif kind == "BEAT":
            self.beats += 1
        elif kind == "ANSWER":
            self._answer(named("Answer", content))
        elif kind == "FAULT":
            self._fault(named("Fault", content))
        elif kind == "UNKNOWN_SESSION":
            self._over(random.uniform(0, 0.1))
        elif kind == "GOODBYE":
            self._over(1.0)
        elif kind == "REFUSED":
            fault = named("Fault", content)
            self.refused = Failed(fault["code"], fault["message"], fault["details"])
            if fault["code"] == NAME_TAKEN:
                self.instance, self._token, self.welcome = random.getrandbits(63), b"", None
                self._hello_at = 0.0
            else:
                self._over(1.0)

    def _chunks(self, array: list[Any]) -> None:
        chunks = named("Chunks", array)
        extras = dict(chunks["extras"])
        for number, request in enumerate(chunks["requests"]):
            attempt, index = (chunks[column][number] if chunks[column] else 0 for column in ("attempts", "indexes"))
            offset, text, tokens = (chunks[column][number] for column in ("offsets", "texts", "tokens"))
            token_ids = tokens if isinstance(tokens, list) else [tokens]
            answer = self.answers.get(request)
            if answer is None or attempt != answer.attempt or offset < answer.next:
                continue
            if offset > answer.next:
                self._send(message("CANCEL", struct("Cancel", requests=[answer.number])))
                self._fail(answer, Failed(50304, "units were lost", {}))
                continue
            extra = named("ChunkExtra", extras.get(number, []))
            answer.next += extra["units"] or len(token_ids) or 1
            answer.texts[index] = answer.texts.get(index, "") + text
            answer.token_ids += token_ids
            answer.chunks += 1
            answer.barren = 0
            if extra["worker"]:
                answer.worker, answer.exact = extra["worker"], extra["exact"]
            answer.finish_reason = extra["finish_reason"] or answer.finish_reason
            self._give_credit(answer)

    def _give_credit(self, answer: Answer) -> None:
        if answer.granted - answer.next < answer.window // 2:
            answer.granted = answer.next + answer.window
            line = struct(
                "CreditLine", request=answer.number, attempt=answer.attempt, next=answer.next, window=answer.granted
            )
            self._send(message("CREDIT", struct("Credit", lines=[line])))

    def _ends(self, envelope: dict[str, Any], body: dict[str, Any]) -> None:
        self._chunks(body["chunks"])
        for line, array in zip(envelope["ends"], body["outcomes"], strict=True):
            end, outcome = named("End", line), named("Outcome", array)
            answer = self.answers.get(end["request"])
            if answer is None or end["attempt"] != answer.attempt:
                continue
            if end["code"] == CANCELLED:
                self._fail(answer, Failed(50304, "a former connection left it behind", {}))
            elif end["code"]:
                self._fail(answer, Failed(end["code"], outcome["message"], outcome["details"]))
            elif answer.operation == "generate" and outcome["units"] != answer.next:
                self._fail(answer, Failed(50304, "units were lost", {}))
            else:
                answer.result = outcome["result"]
                answer.usage = named("Usage", outcome["usage"]) if outcome["usage"] is not None else None
                self._end(answer, None)

    def _answer(self, answer: dict[str, Any]) -> None:
        number = answer["number"]
        if number not in self._questions:
            return
        if answer["code"]:
            self._answered[number] = Failed(answer["code"], answer["message"], answer["details"])
            return
        self._questions[number].append(answer["result"])
        if not answer["more"]:
            self._answered[number] = None

    def _fault(self, fault: dict[str, Any]) -> None:
        self.faults.append(fault)
        error = Failed(fault["code"], fault["message"], fault["details"])
        answer = self.answers.get(fault["request"] or -1)
        if answer is not None and answer.attempt == fault["attempt"]:
            self._fail(answer, error)
        if fault["query"] in self._questions:
            self._answered[fault["query"]] = error


def request(operation: str, **fields: Any) -> list[Any]:
    """The body of a request; `sampling` by name as well."""
    if "sampling" in fields:
        fields["sampling"] = struct(sampling_of(operation), **fields["sampling"])
    return struct(body_of(operation), **fields)

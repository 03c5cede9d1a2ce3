"""Every bound and every timing, with its reason. Nothing else in the project holds a magic number of this kind.

Reaching a bound is a typed error to the one who reached it; nobody else notices.
"""

from __future__ import annotations

import sys
from typing import Final

# One namespace, in several files for the sake of their length.
from zfabric.limits.cells import *  # noqa: F403
from zfabric.limits.dispatch import *  # noqa: F403
from zfabric.limits.sounds import *  # noqa: F403

# ── Time ────────────────────────────────────────────────────────────────────────────────────────────────────────────
#: One beat a second is noise on any link, and three lost ones still mean a detection within seconds.
BEAT_MS: Final = 1_000
#: Three lost beats: one is jitter, two is a garbage collection, three is a death.
LEASE_MS: Final = 3_000
#: A controller that wants more beats than this is not obeyed: whoever asks for one in no time asks for no end of them.
BEAT_MS_MIN: Final = 10
#: A worker that reports work but no engine progress for so long has hung. Long, since one prefill of a
#: very long prompt on a CPU takes tens of seconds and shows no step in between.
STALL_MS: Final = 60_000
#: After a controller's start: how long running streams may take to be claimed from both ends.
RECOVERY_MS: Final = LEASE_MS
#: How long a request outlives a lost connection: what both ends still have goes on, if they are back within this time, as
#: after a controller's start. A reconnect takes RECONNECT_MAX_MS and HELLO_JITTER_MS at most; an engine works no longer
#: than this for a client that has died.
CLAIM_MS: Final = 1_500
#: Whoever judges by silence looks twice, so long apart, and what had arrived by the first look is read by the second: a
#: process that was stopped finds all of its timers due before it has read a single message. Enough for some thousand
#: messages, and little beside any time that is judged.
SECOND_LOOK_MS: Final = 50
#: How often a worker tells each of its controllers that the others have more or fewer of its slots; one that waits for a slot
#: hears of it at once. A hundred small messages a second at most, and a count that is older than this is handed back.
SHARE_TELL_MS: Final = 10
#: For how long a worker believes that clients wait at a controller: two beats, each of which is answered with their number.
WANTING_MS: Final = 2 * BEAT_MS
#: How often a client of several controllers looks whether its own says anything while requests run, and after how many vain looks
#: it goes to the next: it asks at the first, so a controller has two of these to answer. With a move of some 50 ms a stream is
#: silent for less than 300 ms. Whoever was left for its silence gets twice the time from then on, up to the greatest, until all
#: was well for the last of these: a host that is short of processors must not have its clients run in circles.
PROBE_MS: Final = 50
PROBES_MAX: Final = 3
PROBE_MS_MAX: Final = 1_000
PROBE_FORGET_MS: Final = 60_000
#: A controller that has nothing to say, and answers, is asked no more often than this: requests that wait in a queue for minutes
#: must not make work.
PROBE_QUIET_MS: Final = 800
#: Clients that go to another controller say HELLO within this time: it is there already, and they are in a hurry.
MOVE_JITTER_MS: Final = 30
#: How long one of several controllers may take to accept a connection, before the next one is tried; the second time around each
#: has the usual time.
MOVE_CONNECT_MS: Final = 250
#: How often a name is looked up by workers, which register at all of its addresses: Kubernetes' own resolvers keep an answer for
#: as long.
RESOLVE_MS: Final = 5_000
#: How long a query waits for its answer unless its caller says otherwise: it is answered from memory.
QUERY_TIMEOUT_MS: Final = 10_000
#: How long a probe waits for a controller by default, in seconds: probes of service managers and orchestrators come every few.
PING_TIMEOUT_S: Final = 2.0
#: Clocks of two hosts may differ so much, in seconds, before their logs cannot be read side by side.
CLOCK_DIFFERENCE_S_MAX: Final = 1.0
#: Whoever watches a list sees nothing new more often than this, in seconds, and a controller has better to do.
WATCH_S_MIN: Final = 0.1
#: How long `count_tokens` and `operate` wait by default. Loading an adapter takes seconds, a stuck worker for ever.
CALL_TIMEOUT_MS: Final = 120_000
#: A drain that lasts longer than the longest usual answer helps nobody; what still runs is handed back.
DRAIN_MS: Final = 30_000
#: How long a backend may take to stop one request, which keeps its slot meanwhile: a step has to end, an upstream's
#: connection to be closed. After it the slot counts as free, and the log says which backend did not stop.
STOP_MS: Final = 10_000
#: Deltas of one generator before the event loop gets a turn whatever happens: one that awaits nothing would otherwise keep beats
#: and cancels from coming through until its answer is whole. A turn costs some microseconds, so 64 deltas hide it.
DELTAS_PER_TURN: Final = 64
#: Farewells are a courtesy: a peer that does not answer in this time is left to its lease.
GOODBYE_MS: Final = 500
#: Reconnect backoff. The first try is nearly free on one host; the cap keeps a restarted controller found within 1 s.
RECONNECT_MIN_MS: Final = 20
RECONNECT_MAX_MS: Final = 1_000
#: Peers say HELLO within this window (full jitter) after a *re*connect, so that 1,000 workers do not arrive at once.
HELLO_JITTER_MS: Final = 100
#: A HELLO that stays unanswered is said again.
HELLO_RETRY_MS: Final = 1_000
#: A silent connect must not hold a file descriptor for libzmq's default of 30 s.
HANDSHAKE_MS: Final = 5_000
#: An address that does not answer must not keep the others of a name waiting. Lost SYNs are sent again after 1 s and 3 s.
CONNECT_MS: Final = 3_500
#: How long to wait for the other end's greeting, to find out why a handshake failed.
GREETING_MS: Final = 1_000
#: Handshakes that fail in a row for no reason told, before the key is to blame: one may have met a controller that ended.
HANDSHAKES_MAX: Final = 3
#: Lines that a daemon logs of one event, and the time they are counted in: enough to see what a storm is about, and few enough
#: to read. A hundred workers that are lost at once are ten lines and a number.
LOG_LINES_MAX: Final = 10
LOG_WINDOW_MS: Final = 10_000
#: A failed handshake is logged at once, and the next ones of its reason together, after this time.
HANDSHAKE_LOG_MS: Final = 10_000
#: The longest time that libzmq's options take, but for rounding: 24 days.
NEVER_MS: Final = 2**31 - 1
#: ZMTP's own ping: it finds dead paths. libzmq's thread answers it even when its program is busy, and an event loop's kernel
#: acknowledges it.
ZMTP_PING_MS: Final = 1_000
ZMTP_TIMEOUT_MS: Final = 3_000
#: A peer of the event loop that says nothing for so long is given up even if its kernel, or a proxy's, takes all that is sent:
#: an engine or a program that holds its interpreter for some seconds is alive, whoever does it for this long is not waited for.
SILENCE_MS: Final = 30_000
#: How long libzmq gets to send what a peer is told before its connection is shut down: it does not say when it has.
LAST_WORDS_MS: Final = 100
#: How long a connection that is given up may take to send its reason.
PARTING_MS: Final = 500
#: A default deadline would surprise more people than it would help; a request without one may run for ever.
DEADLINE_MAX_MS: Final = 7 * 24 * 3_600_000
#: A disconnect is announced just before the connection becomes unroutable; the probe that confirms it tries again
#: after these times.
PROBE_RETRY_MS: Final = (0.5, 2.0, 10.0, 50.0)
#: How long a model that lost its last worker is remembered: its requests wait so long for a worker to come back, which
#: is what a rolling restart of a small model takes. Then they fail, and new ones are refused at once.
MODEL_MEMORY_MS: Final = 30_000
#: Requests of one session of a client that all workers are asked for, since it came from another controller and has had nothing
#: of them yet: more begin anew, which costs little. What it names a worker for is asked of that one alone.
SEARCHES_MAX: Final = 1_024
#: So many models without a host are remembered for which nothing waits, and so many names of each that nobody announces any
#: more; the longest unheard of go first. Four workers with as many models as one may have can be restarted at once.
MODELS_REMEMBERED_MAX: Final = 4_096
ALIASES_REMEMBERED_MAX: Final = 1_024
#: How long requests wait for workers that are there and take nothing, since they drain or hang: a whole drain, then the time
#: that a model without workers is remembered.
UNTAKEN_MS: Final = DRAIN_MS + MODEL_MEMORY_MS
#: How often it is decided how many replicas models should have. A worker needs seconds to start, so nobody would notice less.
SCALE_LOOK_MS: Final = 500
#: A number of replicas that is wrong by no more than this share stays: the tolerance of Kubernetes.
SCALE_TOLERANCE: Final = 0.1
#: A client that an operator has thrown out gets no session for this, unless told otherwise: long enough to find out whose it
#: is, and to take its key away.
KICK_MS: Final = 60_000
#: A policy that fails does so at each request: one line of log for each kind of failure in this time.
POLICY_REPORT_MS: Final = 60_000
#: A client waits so long beyond a request's deadline for the controller's word before it ends the request itself.
DEADLINE_GUARD_MS: Final = 1_000
#: A full pipe to one peer is tried again after this time (ROUTER tells of no peer when it has room again), and after a vain
#: try after twice the time: a peer that has not read for a second gets the rest half a second late, at the most.
CONGESTED_RETRY_MS: Final = 5
CONGESTED_RETRY_MAX_MS: Final = 500

# ── The gateway ─────────────────────────────────────────────────────────────────────────────────────────────────────
#: A stream of events that has nothing to say says so after this time: proxies close what is silent for 30 s or more.
KEEP_ALIVE_MS: Final = 15_000
#: Connections that are kept between requests: longer than the 60 s for which common load balancers keep theirs, who would
#: else send a request down a connection that is just being closed.
HTTP_IDLE_MS: Final = 75_000
#: Of a request's line and headers together: what nginx takes by default, 4 buffers of 8 KiB, and as much again.
HEAD_BYTES_MAX: Final = 65_536
#: Of a body that is being sent something has to come in this time; a head has to be whole.
BODY_PAUSE_MS: Final = 30_000
#: When to come back after an overload or an outage, in seconds: a controller is found again within one.
RETRY_AFTER_S: Final = 1
#: Who asks whether the gateway is ready waits a second or so, by the defaults of Kubernetes.
READY_TIMEOUT_MS: Final = 800
#: A gateway asks so rarely which models there are: their contexts change with a deployment.
MODELS_KNOWN_MS: Final = 5_000
#: How often a controller and a gateway look whether their file of keys has changed, and a controller whether a key has expired: a
#: key that was taken out is of no use, and has no connection, less than a second later.
KEYS_LOOK_MS: Final = 500
#: A body: REQUEST_TEXT_BYTES_MAX as JSON, of which images are most and take no escapes.
GATEWAY_BODY_BYTES_MAX: Final = 32 * 1024 * 1024
#: Texts of one request to embed, to rank or to complete: OpenAI's own bound.
GATEWAY_INPUTS_MAX: Final = 2_048
#: A limit on bodies below this refuses usual chats.
GATEWAY_BODY_BYTES_MIN: Final = 1_024
#: Bytes that wait for a caller who does not read them; then its answer ends. Some 40,000 tokens, each an event.
UNSENT_BYTES_MAX: Final = 8 * 1024 * 1024

# ── Sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
#: libzmq disconnects a peer whose frame is larger, so senders check before. 64 MiB holds images and embedding batches.
FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
#: Headers are a kind, a few numbers and names, and what a prompt is known by: PREFIX_BLOCKS_MAX hashes are 4 KiB. Up to
#: version 2.1 it was half of this, so clients tell older controllers no hashes.
HEADER_BYTES_MAX: Final = 8_192
#: Control bodies the controller itself decodes: the largest is the inventory of a worker with 10,000 requests.
CONTROL_BODY_BYTES_MAX: Final = 4 * 1024 * 1024
#: Frames are filled up to this size where their content can be split: the terminals of a step, lists, claims.
FRAME_BYTES_GOAL: Final = 4 * 1024 * 1024
#: A request's body that is smaller is decoded as it is: whatever it holds takes some MiB and milliseconds at most.
REQUEST_BYTES_UNSEEN: Final = 64 * 1024
#: Values of one request: the longest contexts that are served have a million tokens. A worker decodes them on its event
#: loop, where so many numbers take some hundredths of a second.
REQUEST_VALUES_MAX: Final = 1_048_576
#: Texts, lists and maps of one request, which cost more: inputs to embed, or a chat of more than ten thousand messages.
REQUEST_PARTS_MAX: Final = 65_536
#: Text of one request, in bytes: a million tokens are some 5 MiB, and images may come as base64. Binary values, which
#: cost a copy, are bounded by the frame alone.
REQUEST_TEXT_BYTES_MAX: Final = 16 * 1024 * 1024
#: Stop strings, bad words, choices … of one request: engines look at each of them for every token.
SAMPLING_ITEMS_MAX: Final = 1_024
#: Keys of a request's `extra`: an engine has a dozen options of its own, an API some more.
EXTRA_KEYS_MAX: Final = 64
#: Tokens with a bias, which engines add as one tensor.
LOGIT_BIAS_MAX: Final = 65_536
#: Values of one embedding that may be asked for; no model makes more.
DIMENSIONS_MAX: Final = 65_536
#: Words of a prompt that the echo backend takes: it splits prompts on its event loop, in some milliseconds.
ECHO_WORDS_MAX: Final = 65_536
#: Characters of one of its tokens: it says them again and again, so a longer word is several tokens.
ECHO_TOKEN_LENGTH_MAX: Final = 1_024
#: Alternatives per token that a request may ask the log-probabilities of, unless a worker is told otherwise: vLLM's
#: default, and OpenAI's bound.
LOGPROBS_MAX: Final = 20
#: Log-probabilities of a whole prompt, alternatives included. They go out in one piece, at some 50 bytes each.
PROMPT_LOGPROBS_MAX: Final = 500_000
#: Images of one request, and pixels of all of them. A decoded pixel takes up to 7 bytes while it is prepared.
IMAGES_MAX: Final = 64
IMAGE_PIXELS_MAX: Final = 64 * 1024 * 1024
#: Text of an error on the wire, in characters, and its details: an error tells, it does not carry.
MESSAGE_LENGTH_MAX: Final = 4_096
DETAILS_MAX: Final = 32
#: Named figures of one load report.
GAUGES_MAX: Final = 64
#: What a client's secret hashes to: half of SHA-256 cannot be inverted either.
LOCK_BYTES: Final = 16
#: Accounts of groups of keys from which on those that are idle are forgotten when another is made.
GROUPS_IDLE_MAX: Final = 1_024
#: Limits of a keyring: beyond these nobody means a limit.
QUOTA_MAX: Final = 1_000_000_000
#: Priorities lie between minus this and this: more levels than anybody tells apart.
PRIORITY_MAX: Final = 1_000
#: Names end up in tables, logs and labels.
NAME_LENGTH_MAX: Final = 256
#: What is said of a request's trace: version 00 of `traceparent` has 55 characters, later ones may have more, and of `tracestate`
#: the specification wants 512 to be passed on.
TRACEPARENT_LENGTH_MAX: Final = 128
TRACESTATE_LENGTH_MAX: Final = 512
#: Unix socket paths: sun_path holds 108 bytes with its terminator on Linux, 104 on macOS and other BSDs.
IPC_PATH_LENGTH_MAX: Final = 107 if sys.platform == "linux" else 103
#: Token ids are 32 bits wide, in every tokenizer and on every engine.
TOKEN_ID_MAX: Final = 2**32 - 1
#: Lists and maps inside one another, in messages and arguments: more is a structure that contains itself.
NESTING_MAX: Final = 64
#: Items of one control list (cancels, credits, models of one worker).
LIST_LENGTH_MAX: Final = 65_536
#: Models of one worker process.
WORKER_MODELS_MAX: Final = 1_024
#: Concurrent requests one worker may announce room for.
SLOTS_MAX: Final = 65_536
#: Relative speed of a worker. The sum of all workers' is still a number.
SPEED_MAX: Final = 1_000_000.0

# ── Queues and tables ───────────────────────────────────────────────────────────────────────────────────────────────
#: Waiting requests of one model that demand the same of a worker. Beyond some thousands a wait is longer than any caller's
#: patience.
QUEUE_DEPTH_MAX: Final = 16_384
#: Of so many requests that a worker gets from queues, one is the one that has waited longest, whatever its priority: a
#: priority says who goes first, not who waits for ever.
TURNS_BY_AGE: Final = 16
#: Of so many kinds of waiting requests a worker's next one is chosen. One that serves hundreds of adapters need not compare
#: them all for each request: models take turns in being compared.
COMPARED_MAX: Final = 64
#: Attempts of one client that ended through no fault of its own, and whose next attempts keep their place: a worker takes
#: no more with it than its slots.
FORMER_ATTEMPTS_MAX: Final = 16_384
#: Bodies of waiting requests of all models (once dispatched, a body is gone from the controller).
QUEUE_BYTES_MAX: Final = 1024 * 1024 * 1024
#: Requests in flight of one client; a pool of backends should use several clients before it uses more.
CLIENT_REQUESTS_MAX: Final = 65_536
#: Sessions. Each costs a few KiB and a file descriptor.
CLIENTS_MAX: Final = 65_536
WORKERS_MAX: Final = 16_384
#: Bytes parked for one peer whose pipe is full, chunks included: some thousand answers. Beyond it the session ends, and the
#: peer claims its streams again when it reads.
PARKED_BYTES_MAX: Final = 8 * 1024 * 1024
#: The same for a peer without a session, who is owed no more than a few refusals.
PARKED_STRANGER_BYTES_MAX: Final = 16 * 1024
#: Readers that are shown in the status, those first for which most waits.
SLOW_READERS_MAX: Final = 16
#: Rows of an operator's list: so many unless more are asked for, and so many at the most, whose longest names still fit one
#: message.
LISTED_DEFAULT: Final = 100
LISTED_MAX: Final = 1_000
#: Dispatches that the controller can explain, the last ones: some 400 bytes each, more in fabrics of several workers.
EXPLAINED_DISPATCHES: Final = 1_024
#: Orders of operators of one sort that hold at a time: more models, workers or clients than anybody names by hand.
DIRECTIVES_MAX: Final = 1_024
#: What a parked message costs beside its bytes.
PARKED_MESSAGE_BYTES: Final = 256
#: Frames of a message that has too many that are dropped before the loop gets its turn: about 1 ms of work.
DROPPED_FRAMES_MAX: Final = 4_096
#: libzmq's own pipes, per peer and direction, in messages: the last fuse below credits.
SOCKET_QUEUE_MESSAGES: Final = 4_096
#: Frames of one message. Messages have one or two; a few more are a mistake, more than that an attack on memory.
MESSAGE_FRAMES_MAX: Final = 8
#: Room that is made for a large body of which less has come, for a peer with a session and for one without: a prompt of a million
#: characters is read without its place ever moving, and a stranger who announces much holds no more than one read. Beyond
#: that, room grows with what has come.
BODY_AHEAD_BYTES: Final = 1024 * 1024 + 4_096
STRANGER_BODY_AHEAD_BYTES: Final = 64 * 1024
#: What is missing of a body is read to where it stays if it is so much or more: for less the change costs more than a copy.
BODY_READ_BYTES: Final = 64 * 1024
#: A command of ZMTP: READY with its metadata is the largest that means anything.
COMMAND_BYTES_MAX: Final = 4_096
#: Connections whose handshake is not over, of one address (or, on ipc, one user), and of all, at each listening socket; the
#: oldest goes for one more. A thousand workers of one host that come back at once must fit, each for HANDSHAKE_MS at most.
SOURCE_HANDSHAKES_MAX: Final = 1_024
OPEN_HANDSHAKES_MAX: Final = 4_096
#: The same of those that have no session, and with keys of one key: a HELLO follows at once, or after HELLO_RETRY_MS again.
SOURCE_SESSIONLESS_MAX: Final = 1_024
SESSIONLESS_MAX: Final = 2_048
SESSIONLESS_MS: Final = 10_000
#: Connections taken from a listener before the loop gets its turn: 1 ms of work, which streams wait for.
ACCEPT_BURST: Final = 16
#: Connections that may wait in the kernel: its default of 100 is too short for a thousand peers that return at once.
BACKLOG: Final = 4_096
#: Without a free file descriptor a listener waits so long before it tries again.
ACCEPT_PAUSE_MS: Final = 500
#: How often a daemon with metrics looks how late its loop is.
LAG_INTERVAL_MS: Final = 100
#: How long a scrape of metrics may wait for the loop, and a connection for its request: less than what scrapers wait.
SCRAPE_MS: Final = 5_000
#: How often `zfabric top` and the page of live figures look: often enough to steer by, and a controller answers from memory.
TOP_INTERVAL_S: Final = 1.0
#: How long such a look may take; then it is said that what is shown is older.
TOP_TIMEOUT_S: Final = 5.0
#: Requests that it shows, the oldest: more than a person reads in a second.
TOP_REQUESTS_MAX: Final = 200
#: Samples that a controller with metrics keeps for plots, one each TOP_INTERVAL_S: fifteen minutes, some 100 KB.
HISTORY_SAMPLES: Final = 900
#: Rows of a table that the page of live figures is given: more than a person reads, and a second of a browser's work.
LIVE_ROWS_MAX: Final = 2_000
#: Rows that are gathered before the loop gets a turn: a row takes some microseconds.
LIVE_SLICE_ROWS: Final = 50
#: Python gives a loop that wakes up the interpreter after 5 ms, if another thread has it. So the thread that writes a scrape
#: pauses by itself, after so many samples, about 0.1 ms of work, for as long as it takes to wake up.
SCRAPE_SAMPLES: Final = 32
SCRAPE_PAUSE_US: Final = 100
#: Models whose requests are counted apart; a label of a metric must not grow without end.
MEASURED_MODELS_MAX: Final = 512
#: Events of a controller that wait for its log: a thousand workers that are lost in one turn are told, and no more is kept.
JOURNAL_EVENTS_MAX: Final = 2_048
#: Workers that have labels of their own; the others are one line together, called `other`.
MEASURED_WORKERS_MAX: Final = 1_024
#: Events of one span: a request that is lost and found again and again does not grow without end.
SPAN_EVENTS_MAX: Final = 32
#: The same of those for a recording, which has a few for each request.
RECORDED_PENDING_MAX: Final = 65_536
#: What a recording takes on disk, and how far it goes back: some hundred thousand requests, and an hour.
RECORD_BYTES_MAX: Final = 64 * 1024 * 1024
RECORD_MS_MAX: Final = 3_600_000
#: The least that can be set for them: a part of a recording must hold the state that it begins with.
RECORD_BYTES_MIN: Final = 256 * 1024
RECORD_MS_MIN: Final = 1_000
#: Parts of a recording. When one is full, or old, the oldest goes: three quarters of what may be kept is there at any time.
RECORD_PARTS: Final = 4
#: Bad frames from one peer before it is ignored for the rest of its connection.
BAD_FRAMES_MAX: Final = 64
#: Reads of chunks that come within so many microseconds of one another are taken for one look at many connections, of which so
#: many at most are written together: a thousand workers' tokens for one client are a few writes then, and none of them waits
#: longer than a few hundred microseconds. Tokens that come alone come at larger distances.
READS_TOGETHER_US: Final = 30
READS_TOGETHER_MAX: Final = 32
#: A loop that looks for work instead of sleeping does so for this long at most: a host that has nothing to do for longer gains
#: nothing by looking on, since one wake-up in ten milliseconds is cheap.
SPIN_US_MAX: Final = 10_000
#: Messages handled before the loop gets its turn: about 1 ms of work.
BURST_MESSAGES_MAX: Final = 256
#: Answers a worker keeps after their terminal, so that a client whose controller just died can still get them. The time
#: runs only while a controller is there: longer than its recovery, shorter than memory would mind.
FINISHED_BYTES_MAX: Final = 16 * 1024 * 1024
FINISHED_MS: Final = 10_000
#: Objects made before Python looks for cycles among them. Its default of 700 is some ten streams' tokens; a look at so
#: many takes about half a millisecond.
COLLECTED_OBJECTS: Final = 20_000

# ── Streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────
#: Units (tokens) a worker may send ahead of the reader: a usual answer needs no credit message at all.
WINDOW_UNITS: Final = 1_024
#: Attempts in a row that yield no unit before the failure is the caller's, whatever ended them.
ATTEMPTS_WITHOUT_PROGRESS_MAX: Final = 3
#: Workers that may die or hang under a request in a row, without a unit of its answer in between, until it is taken for what
#: kills them: one death is chance, and a third would cost one more worker's streams. Clients may set it.
DEATHS_DEFAULT: Final = 2
#: Attempts of one request at all.
ATTEMPTS_MAX: Final = 1_000
#: Default concurrency of a worker: FastChat's value for engines that do not batch.
SLOTS_DEFAULT: Final = 5
#: Below this limit on open files a controller warns at its start: every peer costs one, and running out is fatal.
FILE_DESCRIPTORS_MIN: Final = 4_096

assert FINISHED_MS > RECOVERY_MS + RECONNECT_MAX_MS
assert LEASE_MS >= 3 * BEAT_MS
assert ZMTP_TIMEOUT_MS >= 2 * ZMTP_PING_MS
assert SILENCE_MS >= 2 * ZMTP_TIMEOUT_MS
assert RECONNECT_MIN_MS < RECONNECT_MAX_MS < LEASE_MS
assert HELLO_JITTER_MS < LEASE_MS
assert CLAIM_MS > RECONNECT_MAX_MS + HELLO_JITTER_MS
assert CLAIM_MS <= RECOVERY_MS
assert 4 * SECOND_LOOK_MS < CLAIM_MS
assert FRAME_BYTES_GOAL <= CONTROL_BODY_BYTES_MAX
assert CONTROL_BODY_BYTES_MAX <= FRAME_BYTES_MAX

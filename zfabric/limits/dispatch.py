"""Limits of dispatch: affinity, circuits, adapters on demand, and what is known of cached prompts."""

from __future__ import annotations

from typing import Final

#: Characters of a key of affinity: as many as the keys that OpenAI's API takes to find a prompt's cache.
AFFINITY_LENGTH_MAX: Final = 64
#: Keys whose workers the controller remembers, some 300 bytes each; the longest unused is forgotten first.
AFFINITIES_MAX: Final = 100_000
#: Models for which one key is remembered: a session uses one, or one and its tools' models.
AFFINITY_MODELS_MAX: Final = 8
#: A key that was not used for so long is forgotten: an engine that works has given its cache to others by then.
AFFINITY_TTL_MS: Final = 600_000
#: A worker is too busy for the keys that it has when it has so many live requests more than the least loaded one, and ...
IMBALANCE_REQUESTS: Final = 8
#: ... its load over its speed is more than so many times that one's.
IMBALANCE_RATIO: Final = 1.5
#: Requests of one model that may go in one turn: what others wait for it at most.
WEIGHT_MAX: Final = 100
#: Failures in a row after which a host gets no more requests of a model: chance alone, at one failure in ten, makes five of
#: them once in 100,000 requests.
CIRCUIT_FAILURES: Final = 5
#: For how long at first, twice as long each time that a try in between fails as well, ...
CIRCUIT_OPEN_MS: Final = 1_000
#: ... and no longer than this: what a host that was mended has to wait for its first request.
CIRCUIT_OPEN_MS_MAX: Final = 30_000
#: Each of these times is drawn within this share of it.
CIRCUIT_JITTER: Final = 0.2
#: Of the hosts that could take a request no more than this share may be out at once: with half of them the others' load at most
#: doubles, and of one host none is out.
CIRCUIT_SHARE_MAX: Final = 0.5
#: Adapters that a controller may have loaded at a worker at once, unless told otherwise: each takes memory of its device.
ADAPTERS_PER_HOST: Final = 4
#: An adapter that no request has used for so long is unloaded: longer than people pause within a conversation.
ADAPTER_IDLE_MS: Final = 600_000
#: Requests, running and waiting, for which one host of an adapter is enough: a batch in which each still decodes quickly.
ADAPTER_SPREAD: Final = 32
#: What a load has to be done in, and what it is taken to cost before one was measured: files from a disk take a second or two.
ADAPTER_LOAD_MS: Final = 120_000
ADAPTER_COLD_MS: Final = 2_000
#: Where more adapters are wanted than fit, one that is in use gives its place up after so long; who waits looks so often.
ADAPTER_TURN_MS: Final = 10_000
ADAPTER_LOOK_MS: Final = 1_000
#: After a load failed, the next one there waits so long, and twice as long each time after, up to this.
ADAPTER_RETRY_MS: Final = 5_000
ADAPTER_RETRY_MS_MAX: Final = 300_000
#: A worker's share of all live requests may be so many times the mean before the policy `consistent_hash` passes it over.
HASH_LOAD_RATIO: Final = 1.25
#: Blocks of a prompt whose hashes a request may bring: 8,192 tokens in blocks of 16, in 4 KiB of its envelope. What two prompts
#: share beyond that counts as not shared.
PREFIX_BLOCKS_MAX: Final = 512
#: Bytes of one block's hash: among 10⁶ blocks two have the same one with a probability of 3·10⁻⁸.
PREFIX_HASH_BYTES: Final = 8
#: Tokens of a block that a client hashes: vLLM's own block size, so that what is shared is counted as its cache shares it.
PREFIX_BLOCK_TOKENS: Final = 16
#: Characters of a block where the client has no tokens, which counts as many tokens as the one above: four characters each.
PREFIX_BLOCK_CHARACTERS: Final = 64
#: Blocks whose holders a controller knows: 16 million tokens of prompts, in about 150 MB when it is full.
PREFIX_INDEX_BLOCKS_MAX: Final = 1_048_576
#: What `prefix_aware` takes one live request of a worker to cost a further one, in tokens of a prompt. In simulated placement
#: (docs/dispatch.md) more of it loses hits, and less of it gains few and lets a common prompt gather more requests at one worker.
PREFIX_LOAD_TOKENS: Final = 256
#: Blocks that one LOAD may tell a controller of as cached, and as many that are so no more: 32 KiB of hashes each.
PREFIX_TOLD_BLOCKS: Final = 4_096
#: Blocks that a worker knows of its engines' caches, to tell a controller that has just started: a million tokens. An engine may
#: cache more, of which the controller knows no more than its own dispatches.
PREFIX_KEPT_BLOCKS_MAX: Final = 65_536
#: A change of a cache is told within this time, together with all others of it.
PREFIX_TELL_MS: Final = 20

"""Every event that the daemons log: how much it matters, whose it is, and what it means. docs/operating.md has it as a table.

Levels are a contract. `error`: something of this process is broken, or a request or engine was lost by a fault here; somebody
should look. `warning`: the fabric goes on, and a peer, the host or the load is not as it should be. `info`: what an operator
wants to find in the log the next morning: who came, who went, what was asked for. `debug` has nothing of the fabric's own.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Level = Literal["info", "warning", "error"]


class LogEvent(NamedTuple):
    """What is known of an event before it happens.

    Attributes:
        level: How much it matters.
        of: Which daemons log it.
        meaning: What happened, and where it is not evident, what to do.
    """

    level: Level
    of: str
    meaning: str


_CONTROLLER: Final[dict[str, LogEvent]] = {
    "keys_kept": LogEvent("error", "controller, gateway", "The keyring or the file of API keys has changed and cannot be "
                          "used; the former keys stay in force."),
    "listening": LogEvent("info", "controller, gateway", "It takes connections."),
    "keys": LogEvent("info", "controller, gateway", "A keyring or a file of API keys was read, with so many keys."),
    "recovered": LogEvent("info", "controller", "The time after the start is over in which running streams are claimed: so many "
                          "go on, so many found nobody."),
    "client_registered": LogEvent("info", "controller", "A client has a session; `returned` says that it was here before and "
                                  "had lost its connection."),
    "client_lost": LogEvent("info", "controller", "A client's connection is gone. What it has in flight is kept for 1.5 s."),
    "client_left": LogEvent("info", "controller", "A client said goodbye."),
    "worker_registered": LogEvent("info", "controller", "A worker has a session, with these models."),
    "cell_registered": LogEvent("info", "controller", "This controller is a worker of another one, its parent, with these "
                                "models."),
    "cell_draining": LogEvent("info", "controller", "An operator of the parent wants this cell to take nothing from there; its "
                              "own clients are served on."),
    "cell_parent_lost": LogEvent("warning", "controller", "The connection to the parent is gone. It is looked for again; what "
                                 "runs for its clients goes on for 30 s."),
    "cell_refused": LogEvent("error", "controller", "The parent does not take this cell: a name that is taken, a key that does "
                             "not allow it, or a controller that would be a cell of itself. It is asked again."),
    "cell_models_left_out": LogEvent("warning", "controller", "The cell has more models than a worker may announce."),
    "models_announced": LogEvent("info", "controller", "A worker serves other models than before."),
    "worker_draining": LogEvent("info", "controller", "A worker takes nothing new, since an operator or it itself wants so."),
    "worker_undrained": LogEvent("info", "controller", "An operator has a worker take requests again; `by` says who, as of all "
                                 "that operators do."),
    "model_paused": LogEvent("info", "controller", "An operator has a model's requests wait, for `wait_ms` at the most."),
    "model_resumed": LogEvent("info", "controller", "An operator has a model's requests dispatched again."),
    "request_cancelled": LogEvent("info", "controller", "An operator has ended a request."),
    "session_revoked": LogEvent("warning", "controller", "The key of a peer was taken out of the keyring, has expired, or has "
                                "another role now: its session and what it had in flight have ended."),
    "client_kicked": LogEvent("warning", "controller", "An operator has ended a client's session and its requests."),
    "config_changed": LogEvent("warning", "controller", "An operator has changed a setting, from `former` to `now`; the next "
                               "start has the former again."),
    "worker_left": LogEvent("info", "controller", "A worker said goodbye."),
    "worker_lost": LogEvent("warning", "controller", "A worker's connection is gone, or it was silent for too long; `why` "
                            "says which. Its requests go on elsewhere."),
    "engine_stalled": LogEvent("warning", "controller", "An engine has work and made no step for `--stall-ms`. Its requests go "
                               "on elsewhere."),
    "circuit_opened": LogEvent("warning", "controller", "Requests for a model failed at a worker one after the other, so that it "
        "gets none for a while: see [dispatch.md](dispatch.md)."),
    "circuit_closed": LogEvent("info", "controller", "A worker gets requests for the model again."),
    "adapter_asked": LogEvent("info", "controller", "A worker is asked to load or to unload an adapter that it offers."),
    "adapter_loaded": LogEvent("info", "controller", "It has loaded it, and serves it as a model."),
    "adapter_unloaded": LogEvent("info", "controller", "It has unloaded it."),
    "adapter_failed": LogEvent("warning", "controller", "It has not; it is not asked for this again for some time."),
    "adapter_gives_way": LogEvent("info", "controller", "An adapter gets no new requests there, and goes for one that waits."),
    "engine_moves": LogEvent("info", "controller", "An engine that had stalled makes steps again."),
    "peer_refused": LogEvent("warning", "controller", "Somebody without a session got none, or sent what needs one: another "
                             "version, a name that is taken, a key that does not allow it."),
    "bad_message": LogEvent("warning", "controller, worker", "A message made no sense. From one peer 64 are answered; then its "
                            "session ends."),
    "queue_full": LogEvent("warning", "controller", "A request was turned away: more wait than may. Add workers, or raise "
                           "`--queue-depth-max`."),
    "policy_failed": LogEvent("error", "controller", "An operator's own policy raised, or chose what is no candidate; "
                              "`shortest_queue` chose instead."),
    "internal_error": LogEvent("error", "controller, worker, gateway", "A fault of this program, with its traceback. Whoever "
                               "sent the message that led to it was told, and all else goes on. Please report it."),
    "events_dropped": LogEvent("warning", "controller", "So many events came in one turn that some were not kept."),
    "drained": LogEvent("info", "controller, gateway", "The drain is over; the process ends."),
}  # fmt: skip

_TRANSPORT: Final[dict[str, LogEvent]] = {
    "file_limit_low": LogEvent(
        "warning", "controller", "Fewer files may be open than a busy fabric needs: each peer costs one."
    ),
    "handshake_failed": LogEvent(
        "warning", "controller", "Connections got no further than the handshake, for this reason."
    ),
    "accepting_paused": LogEvent(
        "warning", "controller", "No file descriptor is free; nobody new is let in for a moment."
    ),
}

_WORKER: Final[dict[str, LogEvent]] = {
    "loading": LogEvent("info", "worker", "A backend loads its model."),
    "connected": LogEvent("info", "worker", "There is a connection to a controller."),
    "registered": LogEvent("info", "worker", "The controller knows it, with these models."),
    "refused": LogEvent("warning", "worker", "The controller gives it no session, for this reason."),
    "disconnected": LogEvent("warning", "worker", "The connection is gone. What runs goes on, and is told to the controller that "
                             "comes next."),
    "controller_gone": LogEvent("info", "worker", "A name has no longer the address of a controller that is gone."),
    "name_unknown": LogEvent("warning", "worker", "A name of controllers cannot be looked up now; those that are known stay."),
    "fault": LogEvent("warning", "worker, controller", "The controller could not use a message of this worker, or a parent one "
                      "of its cell's."),
    "backend_error": LogEvent("error", "worker", "A backend raised for a request, or handed over what is none."),
    "bad_load_report": LogEvent("warning", "worker", "A backend tells figures of itself that are none."),
    "announcement_refused": LogEvent("error", "worker", "A backend offers what cannot be announced; the former models stay."),
    "step_tap_off": LogEvent("warning", "worker", "The installed vLLM has other internals than the worker knows, by `reason`; it "
                             "serves by vLLM's public API: slower, and with the same answers."),
    "cache_events_lost": LogEvent("warning", "worker", "What the engine publishes of its cache cannot be read, by `error`; the "
                                  "controller is told of it no more, and goes by its own dispatches."),
    "step_graphs_refused": LogEvent(
        "warning", "worker", "Steps of the model could not be recorded as graphs, for an `error`; they are launched from Python."
    ),
    "kv_windows_kept": LogEvent(
        "info", "worker", "Some layers of the model have a window, and the blocks behind it are kept all the same, `because`."
    ),
    "engine_restarted": LogEvent("warning", "worker", "A turn of the engine broke; what it had goes on elsewhere, or here."),
    "weights_updated": LogEvent("info", "worker", "Other weights have taken the place of the model's, by `weight_version`."),
    "engine_died": LogEvent("error", "worker", "The engine is gone, and the process ends for a supervisor to start it anew."),
    "stop_limit_reached": LogEvent("warning", "worker", "A backend did not stop a request in time; its slot counts as free."),
    "abort_failed": LogEvent("error", "worker", "A backend raised while a request was to stop."),
    "close_failed": LogEvent("error", "worker", "A backend raised while it was closed."),
    "close_limit_reached": LogEvent("error", "worker", "A backend does not close; the process ends without it."),
    "reloaded": LogEvent("info", "worker", "A backend read its files anew."),
    "reload_failed": LogEvent("error", "worker", "A backend could not use its new files; the old ones hold."),
    "drain_withdrawn": LogEvent("info", "worker, controller", "An operator has taken a drain back; it takes requests again."),
    "drain_limit_reached": LogEvent("warning", "worker", "What still ran was handed back, and goes on at other workers."),
}  # fmt: skip

_GATEWAY: Final[dict[str, LogEvent]] = {
    "request_failed": LogEvent("warning", "gateway", "An HTTP request ended in a status of 500 or more; `request` is the "
                               "X-Request-Id that its caller knows."),
    "child_ready": LogEvent("info", "gateway, serve, up, ray", "A process that this one started is ready."),
    "child_ended": LogEvent("warning", "gateway, serve, up, ray", "A process that this one started ended, and is started anew."),
    "child_stopped": LogEvent("info", "up, ray", "A process that the fleet has no use for any more has ended."),
    "scaled": LogEvent("info", "up, ray", "A group of workers gets more of them or fewer, since the controller wants so many."),
    "scaling_unknown": LogEvent("warning", "up, ray", "The controller does not say how many workers it wants, for this reason; "
                                "their number stays."),
    "fleet_changed": LogEvent("info", "up, ray", "The fleet's file was read anew, and these processes changed with it."),
    "actor_missing": LogEvent("warning", "ray", "Somebody has ended an actor of the fleet, which is made anew."),
    "fleet_failed": LogEvent(
        "error", "ray", "Ray has failed the actor of the fleet's file, which tries again; all others go on."
    ),
    "node_lacks": LogEvent("error", "ray", "A node lacks a directory that the fleet's file names; the process waits for it."),
    "fleet_kept": LogEvent(
        "error", "controller, up", "The fleet's file was read anew and cannot be used; what runs goes on as it was."
    ),
}  # fmt: skip

_ALL: Final[dict[str, LogEvent]] = {
    "draining": LogEvent("info", "controller, worker, gateway", "It takes nothing new, and lets what runs end."),
    "drain_failed": LogEvent("error", "controller, worker, gateway", "The drain itself broke; the process ends."),
    "traces_failed": LogEvent(
        "warning",
        "controller, worker, gateway",
        "Spans could not be exported; the collector does not answer, or refuses them. Requests are not touched by it.",
    ),
    "failed": LogEvent("error", "controller, worker, gateway", "The process ends with this error."),
    "recording_failed": LogEvent("error", "controller, worker", "Nothing is recorded any more, and all else goes on."),
}

#: By name.
EVENTS: Final = _CONTROLLER | _TRANSPORT | _WORKER | _GATEWAY | _ALL

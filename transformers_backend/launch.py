"""`python -m transformers_backend.launch [options of torchrun] -m transformers_backend.train [arguments]`.

torchrun with the same options and the same agent, except that

- the job config is checked before any process starts: one line and exit status 2 instead of one failure a rank;
- SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks, which finish the step and save, and the exit status is 0.
  torchrun sends them on as well, but then ends with status 1 after at most 30 seconds; of SIGUSR1 it dies;
- a failure ends in one message that says which rank and why, and a job that cannot work is not started again.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import uuid
from types import FrameType

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, parse_args, parse_min_max_nnodes

from transformers_backend.job_config import load_job_config, validate
from transformers_backend.signals import SECONDS_BETWEEN_INTERRUPTS, STOP_SIGNALS

FAILED = 1
CANNOT_WORK = 2
INTERRUPTED = 128 + signal.SIGINT
TRAINING = "transformers_backend.train"
_SECONDS_TO_END = 30  # that the agent gives to the other ranks when one has failed
_SECONDS_TO_SAVE = 600  # before a new node joins


class StoppedEarly(Exception):
    """A stop signal came while no ranks were running, or were ending because one had failed; or a second Ctrl-C."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Agent(LocalElasticAgent):
    """torch's agent, which starts, watches and restarts the ranks of this node; it keeps the node's last failure.

    Beside public methods it uses some of torch's private names, which test_launch.py looks for. Tried with torch 2.13.
    """

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.stop_signal: signal.Signals | None = None
        self.failures: dict[int, ProcessFailure] = {}  # by global rank; of the ranks that end, or ended, last

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: pass the first stop signal on to the ranks; a second Ctrl-C kills them."""
        first, now = self.stop_signal is None, time.monotonic()
        if first:
            self.stop_signal, self._stop_time = signal.Signals(number), now
        if self._worker_group.state != WorkerState.HEALTHY:
            if self.failures:  # what failed was not saved: the signal makes no success of it
                raise StoppedEarly(
                    f"{self.stop_signal.name}: not started again\n{describe(self.failures)}", exit_status(self.failures)
                )
            raise StoppedEarly(f"{self.stop_signal.name}: stopped while no ranks were running", 0)
        if first:
            for handler in self._pcontext.subprocess_handlers.values():
                handler.proc.send_signal(number)
        elif number == signal.SIGINT and now - self._stop_time > SECONDS_BETWEEN_INTERRUPTS:
            for handler in self._pcontext.subprocess_handlers.values():
                handler.proc.kill()
            raise StoppedEarly("second Ctrl-C: stopped at once; what was saved before is whole", INTERRUPTED)

    def _monitor_workers(self, worker_group) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.SUCCEEDED and self.stop_signal is None and self._node_is_waiting():
            # Another agent has stopped its ranks so that the new node can join, and they agreed with those of this
            # node: all have saved. HEALTHY, because then the caller lets the new node in and starts them again.
            return RunResult(state=WorkerState.HEALTHY)
        if result.state == WorkerState.FAILED:
            self.failures = result.failures
            if self.stop_signal is not None or exit_status(self.failures) == CANNOT_WORK:
                self._remaining_restarts = 0
            elif self._remaining_restarts > 0:
                restarts = self._worker_group.spec.max_restarts
                number = restarts - self._remaining_restarts + 1
                _say(f"{describe(self.failures)}\nrestart {number} of {restarts}, from the last checkpoint")
        return result

    def _initialize_workers(self, worker_group) -> None:
        super()._initialize_workers(worker_group)
        self.failures = {}

    def _restart_workers(self, worker_group) -> None:
        if worker_group.state == WorkerState.HEALTHY:
            _say("another node joins: the ranks save and start again, on all nodes")
            self._pcontext.close(signal.SIGTERM, _SECONDS_TO_SAVE)  # torch's own would kill them after 30
            if self.stop_signal is not None:
                raise StoppedEarly(f"{self.stop_signal.name}: stopped before the ranks started again", 0)
        super()._restart_workers(worker_group)

    def _node_is_waiting(self) -> bool:
        try:
            return self._rdzv_handler.num_nodes_waiting() > 0
        except RendezvousError:  # the node that holds the rendezvous has finished and left
            return False


def main(arguments: list[str] | None = None) -> int:
    """Run a job on this node; returns the exit status: 0 done or stopped, 1 failed, 2 cannot work as configured."""
    options = parse_args(arguments)
    nodes = parse_min_max_nnodes(options.nnodes)
    if options.standalone or (nodes == (1, 1) and not options.rdzv_endpoint):
        options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    options.master_port = options.master_port or 29500  # of the static rendezvous, as in torchrun
    config, command, command_arguments = config_from_args(options)
    if options.module and options.training_script == TRAINING:
        world_size = config.nproc_per_node * config.max_nodes if config.min_nodes == config.max_nodes else None
        try:
            _check(options.training_script_args, world_size)
        except ValueError as error:
            _say(f"error: {error}")
            return CANNOT_WORK
    # What it says about closing signals and failed processes is said below, with the reason.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    return _run(config, command, command_arguments)


def _check(arguments: list[str], world_size: int | None) -> None:
    application = logging.getLogger("transformers_backend")
    level = application.level
    application.setLevel(logging.ERROR)  # what is only warned about, the ranks say
    try:
        validate(load_job_config(arguments), world_size=world_size)
    finally:
        application.setLevel(level)


def _run(config: LaunchConfig, command: str, arguments: list[str]) -> int:
    try:
        agent = _make_agent(config, command, arguments)
    except (RendezvousError, ValueError) as error:
        _say(f"error: no rendezvous at {config.rdzv_endpoint}: {error}")
        return FAILED
    previous = {number: signal.signal(number, agent.stop) for number in STOP_SIGNALS}
    leaves_rendezvous = True
    try:
        result = agent.run()
    except StoppedEarly as stopped:
        _say(str(stopped))
        return stopped.status
    except SignalException as stopped:
        leaves_rendezvous = False  # as in torch: the other nodes may go on
        _say(f"{stopped.sigval.name}: stopped at once; what was saved before is whole")
        return 128 + stopped.sigval
    except RendezvousError as error:
        _say(f"error: the rendezvous at {config.rdzv_endpoint} failed: {type(error).__name__} {error}")
        return FAILED
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if leaves_rendezvous:
            agent._rdzv_handler.shutdown()
    if result is None or not result.is_failed():  # None: another node ended the run
        return 0
    return _end_of_failure(agent)


def _make_agent(config: LaunchConfig, command: str, arguments: list[str]) -> Agent:
    """As torch.distributed.launcher.api.launch_agent does it."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # torch's way; the others are ours
    # Else (torch 2.13) an agent keeps one store for all its rounds. Restarted ranks then read the addresses that the
    # dead ones left there, and where another node has come to hold the store, some look for it at the old place.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    settings = dict(config.rdzv_configs)
    if config.local_addr and config.local_addr == config.rdzv_endpoint.rpartition(":")[0]:
        settings.setdefault("is_host", "true")  # torch compares the endpoint with what the host name resolves to
    rendezvous = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **settings,
    )
    static_address = config.rdzv_endpoint.rpartition(":") if config.rdzv_backend == "static" else (None, None, None)
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(arguments),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=static_address[0],
        master_port=static_address[2] and int(static_address[2]),
        local_addr=config.local_addr,
        event_log_handler=config.event_log_handler,
        numa_options=config.numa_options,
        virtual_local_rank=config.virtual_local_rank,
    )
    return Agent(
        spec=spec,
        logs_specs=config.logs_specs,
        start_method=config.start_method,
        log_line_prefix_template=config.log_line_prefix_template,
    )


def _end_of_failure(agent: Agent) -> int:
    ended_by_signal = {INTERRUPTED, *(-number for number in STOP_SIGNALS)}
    if agent.stop_signal is not None and ended_by_signal.issuperset(f.exitcode for f in agent.failures.values()):
        _say(f"{agent.stop_signal.name}: stopped before the first step; there is nothing to save")
        return 0
    _say(describe(agent.failures))
    return exit_status(agent.failures)


def exit_status(failures: dict[int, ProcessFailure]) -> int:
    """The failed rank's own status where it says that the job cannot work as configured, else 1."""
    return CANNOT_WORK if root_cause(failures)[1].exitcode == CANNOT_WORK else FAILED


def root_cause(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and by itself: not for want of another, and not stopped by the agent."""
    unanswering = _unanswering(failures)

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, int, int]:
        rank, failure = item
        stopped = failure.exitcode == -signal.SIGTERM or rank in unanswering
        return stopped, _extra(failure).get("kind") == "peer", failure.timestamp, rank

    return min(failures.items(), key=order)


def describe(failures: dict[int, ProcessFailure]) -> str:
    """What happened, as the last thing that a user reads: a traceback where one is needed, then which rank and why."""
    rank, failure = root_cause(failures)
    extra, who = _extra(failure), f"rank {rank} ({socket.gethostname()}, pid {failure.pid})"
    if failure.exitcode < 0 and not extra:  # with one it said why; gloo may abort while the process ends
        return f"error: {who} died by signal {-failure.exitcode} ({failure.signal_name()}{_hint(-failure.exitcode)})"
    if not extra:
        return f"error: {who} ended with status {failure.exitcode} and left no message"
    message = failure.error_file_data["message"]["message"]
    if extra.get("kind") == "user":
        return f"error: {message}" if failure.exitcode == CANNOT_WORK else f"error: {who}: {message}"
    if extra.get("kind") == "peer":
        hung = ", ".join(f"{rank} (pid {failures[rank].pid})" for rank in sorted(_unanswering(failures)))
        reason = (
            f"rank {hung} hung and was killed; see comm.train_timeout_seconds"
            if hung
            else "no rank of this node failed by itself: see the message of the other nodes"
        )
        return f"error: {who}: {message}; {reason}"
    return f"{extra['py_callstack']}error: {who}: {message}; see {failure.error_file}"


def _unanswering(failures: dict[int, ProcessFailure]) -> set[int]:
    """Ranks that the agent killed because they did not end on its SIGTERM, long after the first one had failed."""
    first = min(failure.timestamp for failure in failures.values())
    return {
        rank
        for rank, failure in failures.items()
        if failure.exitcode == -signal.SIGKILL and failure.timestamp - first >= _SECONDS_TO_END - 1
    }


def _hint(number: int) -> str:
    hints = {signal.SIGKILL: "; was the memory full? see dmesg", signal.SIGABRT: "; see the lines above"}
    return hints.get(number, "")


def _extra(failure: ProcessFailure) -> dict[str, str]:
    message = failure.error_file_data["message"]
    return message["extraInfo"] if isinstance(message, dict) else {}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

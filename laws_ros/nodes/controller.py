"""The controller: a lifecycle node that answers observations with commands, from a certified library or the policy.

Topics, relative to the node's namespace; the binding (core/observation.py) names those of sensors and commands:
    joint_states and the like in
    <controller_name>/commands or the binding's topic out, as ros2_control's forward controllers take it
    ~/decision (std_msgs/Float64MultiArray) out: every command with its source, bound and observation, see `columns`
    ~/heartbeat (std_msgs/UInt64) out: commands so far, from the control thread, heartbeat_hz times a second
    /diagnostics (diagnostic_msgs/DiagnosticArray) out, once a second
    laws/intervention in, of the commands' type: an operator's commands. While they come, they count and not the answers
    (within the limits), and where that happens the library does not answer any more; an empty one hands back.
Services: ~/estop (std_srvs/Trigger) latches the emergency stop, in any state; ~/estop_reset releases it.

This thread serves parameters, services and diagnostics; the loop runs on its own (control.py), and what is read from
and written to files while it runs on a third (upkeep.py).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.parameter import Parameter
from std_msgs.msg import Float64MultiArray, UInt64
from std_srvs.srv import Trigger

from laws_ros.core.card import Card
from laws_ros.core.errors import ConfigError
from laws_ros.core.observation import TRAJECTORY, Binding
from laws_ros.core.safety import ON_SILENCE, POLICY, REACTIONS, RESUME, SOURCES, Budget, Rules
from laws_ros.runtime import takeovers
from laws_ros.runtime.cached_policy import CachedPolicy, check_tolerance
from laws_ros.runtime.quarantine import Quarantine

from . import notify
from .control import ControlThread, Input, lock_memory
from .loop import ControlLoop, Step
from .ros import (
    AUTOSTART,
    COMMAND_QOS,
    OPERATOR_QOS,
    RECORD_QOS,
    Declared,
    Managed,
    binding_of,
    labelled,
    message_class,
    run,
    set_data,
)
from .upkeep import Upkeep, open_cached, state_folder

_REACTION = f"{', '.join(REACTIONS[:-1])} or {REACTIONS[-1]}"
PARAMETERS = (
    Declared("policy", "", "the policy's ONNX file, its card beside it; relative to the working folder or the package"),
    Declared("library", "", "the certified library that was built for this policy; a snapshot in `state` is preferred"),
    Declared("state", "", "folder shared with a learner and `laws library`, one per namespace; empty: nothing is kept"),
    Declared("binding", "", "YAML file: which message fields the policy's observations and actions are"),
    Declared("controller_name", "", "without a binding: commands go to <controller_name>/commands, fields by the card"),
    Declared("tolerance", Parameter.Type.DOUBLE_ARRAY, "largest error of each action, its unit; empty: the library's"),
    Declared("certificates.kinds", Parameter.Type.STRING_ARRAY, "kinds of certificates to trust; empty: the formal"),
    Declared("providers", Parameter.Type.STRING_ARRAY, "of cpu, cuda, tensorrt: the first that loads runs the policy"),
    Declared("budget.capacity", Parameter.Type.DOUBLE_ARRAY, "certified error that may accumulate, action units"),
    Declared("budget.drain_per_s", Parameter.Type.DOUBLE_ARRAY, "how fast it is forgiven, action units per second"),
    Declared("rate_hz", 100.0, "rate of control [Hz]; rate limits and repeated commands count in its period", 1.0, 1e3),
    Declared("miss.deadline_s", 0.0, "a command this long after its message is late [s]; 0: one period", 0.0, 10.0),
    Declared("miss.on_deadline", "hold", f"when the policy is late: {_REACTION}"),
    Declared("observation_timeout_s", 0.1, "time without a usable observation until on_timeout [s]", 0.001, 60.0),
    Declared("on_timeout", "hold", f"without observations: {_REACTION}"),
    Declared("freeze_timeout_s", 0.0, "unchanged values for this long: a frozen sensor [s]; 0: allowed", 0.0, 60.0),
    Declared("max_delay_s", 0.0, "observations this much older than the fastest are refused [s]; 0: off", 0.0, 60.0),
    Declared("on_limit", "hold", f"when an observation is beyond the binding's limits: {_REACTION}"),
    Declared("on_estop", "zero", f"while the emergency stop is latched: {_REACTION}"),
    Declared("on_silence", "hold", f"an operator falls silent without handing back: {_REACTION}; or policy: go on"),
    Declared("silence_timeout_s", 0.5, "what is silence [s]", 0.01, 60.0),
    Declared("ramp_down_s", 0.5, "how long ramp_down takes to the safe pose [s]", 0.0, 60.0),
    Declared("heartbeat_hz", 10.0, "rate of ~/heartbeat [Hz]", 0.1, 1e3),
    Declared("realtime.priority", 0, "SCHED_FIFO priority of the control thread; 0: normal scheduling", 0, 99),
    Declared("realtime.cpus", Parameter.Type.INTEGER_ARRAY, "CPUs that the control thread may use; empty: all"),
    Declared("realtime.lock_memory", False, "keep the process in memory (mlockall)"),
    Declared("fault.policy_stall_s", 0.0, "live, for tests and training: the policy takes longer [s]", 0.0, 60.0),
    AUTOSTART,
)
LIVE = ("tolerance", "fault.policy_stall_s")
COUNTERS = ("hits", "misses", "deadline_misses", "rejected", "budget_refusals", "handovers", "quarantined", "updates")
INTERVENTION = "laws/intervention"
SETTLE_S = 0.5  # a publisher that has just gone may be listed this long


def columns(card: Card, binding: Binding) -> list[str]:
    """What a message on ~/decision holds, in order.

    step: counts answers from 1, so that a gap shows a lost message; time_s: steady clock, when the command was
    published; stamp_s: of the observation; region: -1 for the policy, below that a reaction (core.safety.SOURCES),
    whose row has no answer: NaN; lookup_us, policy_us (0 on a hit), latency_us: message in to command out;
    deadline_misses: so far; budget: the fullest level over its capacity; then of each action its value, certified
    bound and tolerance, in its unit (a decision: the index and a bound of 0); the command as published; the
    observation that was answered; library: the first 12 digits of its digest, as a number.
    """
    continuous = card.decision == "none"
    actions = [c.name for c in card.actions] if continuous else [card.decision]
    kinds = ("action", "bound", "tolerance") if continuous else ("action", "bound")
    return [
        *("step", "time_s", "stamp_s", "region", "lookup_us", "policy_us", "latency_us", "deadline_misses", "budget"),
        *(f"{kind}:{name}" for kind in kinds for name in actions),
        *(f"command:{e.name}" for e in binding.action),
        *(f"observation:{c.name}" for c in card.observations),
        "library",
    ]


class Controller(Managed):
    """See the module's docstring and PARAMETERS."""

    def __init__(self) -> None:
        super().__init__("controller", PARAMETERS)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._cached: CachedPolicy | None = None
        self._loop: ControlLoop | None = None
        self._control: ControlThread | None = None
        self._upkeep: Upkeep | None = None
        self._quarantine: tuple[str, Quarantine] | None = None  # with the card's digest; it outlives deactivation, too
        self._stopped = ""  # the emergency stop outlives deactivation
        self._rivals = 0  # diagnoses in a row that saw another publisher of commands
        self._turns = -1  # of the control thread at the last diagnosis
        self._seen: dict[str, int] = {}  # the loop's counters at the last diagnosis
        self._heartbeat = self.create_publisher(UInt64, "~/heartbeat", 10)
        self.create_service(Trigger, "~/estop", self._on_estop)
        self.create_service(Trigger, "~/estop_reset", self._on_estop_reset)
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._diagnose, clock=self._steady)

    def stop(self) -> None:
        if self._control is not None:
            self._control.stop()
            if self._upkeep is not None:
                self._upkeep.stop()
            if self._loop is not None:
                self._cached = self._loop.cached
                self._quarantine = self._cached.card.digest, self._loop.quarantine
            self._control = self._loop = self._upkeep = None
            self.destroy_publisher(self._commands)

    # ------------------------------------------------------------------------------------------- lifecycle

    def configure(self, p: dict[str, Any]) -> None:
        for name in ("policy", "library") if not p["state"] else ("policy",):
            if not p[name]:
                raise ConfigError(f"node {self.get_fully_qualified_name()}: parameter {name!r} is not set")
        period_ns = round(1e9 / p["rate_hz"])
        rules = Rules(
            period_ns,
            round(p["observation_timeout_s"] * 1e9),
            p["miss.on_deadline"],
            p["on_timeout"],
            p["on_limit"],
            p["on_estop"],
            round(p["ramp_down_s"] * 1e9),
            p["on_silence"],
            round(p["silence_timeout_s"] * 1e9),
        )
        self._folder = state_folder(self, p["state"])
        cached = open_cached(p, self._folder, self.get_logger())
        card = cached.card
        if self._folder is not None:
            takeovers.read(self._folder, card)  # refused now, not when activating
        reactions = [rules.reaction(cause) for cause in SOURCES if ON_SILENCE <= cause < POLICY]
        if card.decision != "none" and not set(reactions) <= {"hold", RESUME}:
            raise ConfigError(f"the reactions {', '.join(reactions)}: a {card.decision} policy can only 'hold'")
        binding = binding_of(self, p, card, cached.policy.sha256)
        self._command = message_class(binding.commands_type)()
        if binding.commands_type == TRAJECTORY:
            point = message_class("trajectory_msgs/msg/JointTrajectoryPoint")()
            point.time_from_start.sec, point.time_from_start.nanosec = divmod(period_ns, 1_000_000_000)
            self._command.points = [point]
        self._deadline_ns = round(p["miss.deadline_s"] * 1e9) or period_ns
        self._new_budget(p, cached)  # refused now, not when activating
        self._decisions = self.create_publisher(Float64MultiArray, "~/decision", RECORD_QOS)
        self._decision = labelled(columns(card, binding))
        self._cached, self._binding, self._rules, self._values = cached, binding, rules, p
        if not cached.policy.has_card:
            names = ", ".join(c.name for c in card.observations)
            self.get_logger().warning(f"{p['policy']}: no card beside it; its observations are taken for {names}")
        self.get_logger().info(
            f"configured: library {cached.library.digest}, {len(cached.library)} regions for {card.name}, "
            f"{', '.join(self.resolve_topic_name(t.name) for t in binding.topics)} -> "
            f"{self.resolve_topic_name(binding.commands)}"
        )

    def _new_budget(self, p: dict[str, Any], cached: CachedPolicy) -> Budget | None:
        capacity, drain = list(p["budget.capacity"]), list(p["budget.drain_per_s"])
        if not capacity and not drain:
            return None
        return Budget(capacity, drain, len(cached.tolerance), time.monotonic_ns())

    def activate(self) -> None:
        p, cached, binding = self._values, self._cached, self._binding
        assert cached is not None
        until = time.monotonic() + SETTLE_S
        topic = self.resolve_topic_name(binding.commands)
        while rivals := self.count_publishers(topic):
            if time.monotonic() > until:
                raise ConfigError(
                    f"{topic}: {rivals} other publisher(s) command it already; two controllers on one topic would fight"
                )
            time.sleep(0.05)
        quarantine = self._quarantine_for(cached)
        self._commands = self.create_publisher(type(self._command), binding.commands, COMMAND_QOS)
        self._rivals = 0
        self._loop = ControlLoop(
            cached,
            binding,
            self._rules,
            self._publish,
            self._record,
            self._deadline_ns,
            round(p["freeze_timeout_s"] * 1e9),
            round(p["max_delay_s"] * 1e9),
            self._new_budget(p, cached),
            quarantine,
            lambda correction: upkeep.corrected(correction),
        )
        self._loop.stall_s = p["fault.policy_stall_s"]
        self._upkeep = upkeep = Upkeep(self, self._loop, self._folder)
        if self._stopped:
            self._loop.estop(self._stopped)
        if p["realtime.lock_memory"] and (warning := lock_memory()):
            self.get_logger().warning(warning)
        topics = sorted(binding.topics, key=lambda t: t.name in binding.trigger)  # the last one completes
        self._control = ControlThread(
            self,
            self._loop,
            [
                Input(INTERVENTION, binding.commands_type, self._loop.operate, OPERATOR_QOS),
                *(Input(t.name, t.type, self._loop.step) for t in topics),
            ],
            self._beat,
            1.0 / p["heartbeat_hz"],
            p["realtime.priority"],
            tuple(p["realtime.cpus"]),
        )
        self._seen = {}
        upkeep.start()
        self._control.start()

    def _quarantine_for(self, cached: CachedPolicy) -> Quarantine:
        """What was corrected and not released, for a library that begins to answer."""
        inputs = len(cached.card.observations)
        if self._folder is not None:
            return takeovers.quarantine_of(takeovers.read(self._folder, cached.card), inputs, cached.library)
        digest, kept = self._quarantine or (cached.card.digest, Quarantine(inputs))
        if digest == cached.card.digest:
            return Quarantine(inputs, kept.points, kept.volumes, cached.library)
        if len(kept.points):
            self.get_logger().error("what was corrected under another card is forgotten: set 'state' to keep it")
        return Quarantine(inputs, library=cached.library)

    def release(self) -> None:
        self.stop()
        if self._cached is not None:
            self._cached = None
            self.destroy_publisher(self._decisions)

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        own = [c for c in changes if c.name in {p.name for p in PARAMETERS}]
        if self._cached is None or not own:
            return SetParametersResult(successful=True)
        for change in own:
            if change.name not in LIVE:
                reason = f"{change.name} is set before configuring: clean up first"
                return SetParametersResult(successful=False, reason=reason)
        new = {change.name: change.value for change in own}
        if "tolerance" in new:
            wanted = list(new["tolerance"] or self._cached.library.tolerance)
            try:
                new["tolerance"] = check_tolerance(wanted, self._cached.policy).tolist()
            except ConfigError as error:
                return SetParametersResult(successful=False, reason=str(error))
        self._values |= new
        if self._loop is not None:
            self._loop.stall_s = self._values["fault.policy_stall_s"]
        if "tolerance" in new:
            (self._cached.set_tolerance if self._loop is None else self._loop.retune)(new["tolerance"])
        return SetParametersResult(successful=True)

    # ------------------------------------------------------------------------------------------- emergency stop

    def _on_estop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._stopped = self._stopped or "service ~/estop"
        if self._loop is not None and self._control is not None:
            self._loop.estop(self._stopped)
            self._control.wake()
            self.get_logger().error("emergency stop: latched until ~/estop_reset")
        response.success, response.message = (
            True,
            f"latched; {self._values['on_estop'] if self._cached else 'inactive'}",
        )
        return response

    def _on_estop_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = bool(self._stopped)
        response.message = "released" if self._stopped else "it was not latched"
        self._stopped = ""
        if self._loop is not None:
            self._loop.reset()
            self.get_logger().warning("emergency stop: released")
        return response

    # ------------------------------------------------------------------------------------------- control thread

    def _publish(self, command: list[float]) -> None:
        self._binding.write_command(self._command, command)
        self._commands.publish(self._command)

    def _record(self, step: Step) -> None:
        loop, answer = self._loop, step.answer
        if loop is None:
            return
        cached, budget = loop.cached, loop.budget
        level = float((budget.level / np.maximum(budget.capacity, 1e-300)).max()) if budget is not None else 0.0
        row = [loop.hits + loop.misses, step.time_ns / 1e9, step.stamp_s, step.source]
        row += [step.lookup_us, step.policy_us, step.latency_us, loop.deadline_misses, level]
        if answer is None:
            row += [np.nan] * (2 * len(self._binding.action))
        else:
            row += [*answer.action.tolist(), *answer.bound.tolist()]
        row += [*cached.tolerance.tolist(), *step.command]
        row += step.observation.tolist() if step.observation is not None else [np.nan] * len(cached.card.observations)
        row.append(loop.number)
        self._decisions.publish(set_data(self._decision, row))

    def _beat(self) -> None:
        loop = self._loop
        if loop is not None:
            self._heartbeat.publish(UInt64(data=loop.hits + loop.misses + sum(loop.governor.counts.values())))

    # ------------------------------------------------------------------------------------------- diagnostics

    def _diagnose(self) -> None:
        """Once a second, diagnostics, and a warning line for what went wrong since."""
        loop, lines, turns = self._loop, list[str](), -1 if self._control is None else self._control.turns
        if turns != self._turns or self._control is None:
            notify.tell(notify.ALIVE)
        self._turns = turns
        facts: dict[str, Any] = {"state": "unconfigured"}
        if loop is not None:
            self._cached = loop.cached
        if self._cached is not None:
            facts = {
                "state": "inactive",
                "library": self._cached.library.digest,
                "regions": len(self._cached.library),
                "kinds": ", ".join(self._cached.kinds),
                "tolerance": self._cached.tolerance.tolist(),
            }
        facts["estop"] = self._stopped or "no"
        if loop is not None:
            counts = {name: getattr(loop, name) for name in COUNTERS}
            counts |= {f"on_{SOURCES[cause]}": count for cause, count in loop.governor.counts.items()}
            answered = counts["hits"] + counts["misses"]
            facts |= {"state": "active", "hit_rate": counts["hits"] / answered if answered else "none yet", **counts}
            named = (("hit_us", loop.hit_us), ("policy_us", loop.policy_us), ("latency_us", loop.latency_us))
            for name, recent in (*named, ("bound_over_tolerance", loop.margin)):
                facts[f"{name}_p50"], facts[f"{name}_p99"] = recent.percentiles(50, 99)
            facts["operator"] = loop.operator
            facts["quarantine_regions"] = loop.quarantine.count
            facts["handover_bound_max"] = loop.handover_bound.tolist()
            if loop.budget is not None:
                facts["budget_level"] = loop.budget.level.tolist()
            new = {name: counts[name] - self._seen.get(name, 0) for name in counts}
            self._seen = counts
            lines = self._complaints(loop, new)
        else:
            self._rivals = 0  # it no longer commands
        if self._stopped:
            lines.insert(0, f"emergency stop ({self._stopped}) until ~/estop_reset")
        level = DiagnosticStatus.WARN if lines else DiagnosticStatus.OK
        if self._stopped or self._rivals:
            level = DiagnosticStatus.ERROR
        hardware = self._cached.card.name if self._cached else ""
        self.report("control loop", facts, hardware, level, "; ".join(lines))
        if self._rivals > 1:
            self.get_logger().error(f"{lines[-1]}; this one stops commanding")
            self.trigger_deactivate()

    def _complaints(self, loop: ControlLoop, new: dict[str, int]) -> list[str]:
        """What went wrong since the last diagnosis, each also a line in the log."""
        lines = []
        topics = ", ".join(sorted(self.resolve_topic_name(topic.name) for topic in self._binding.topics))
        silent_s = (time.monotonic_ns() - loop.governor.observed_ns) / 1e9
        if new["rejected"]:
            lines.append(f"{topics}: {new['rejected']} messages rejected, the latest: {loop.rejection}")
        if silent_s > self._values["observation_timeout_s"]:
            lines.append(f"{topics}: no usable message for {silent_s:.3g} s")
        if new["deadline_misses"]:
            lines.append(f"{new['deadline_misses']} answers later than {self._deadline_ns / 1e6:g} ms")
        if new["on_limit"]:
            lines.append(f"{loop.beyond}: {self._rules.on_limit}")
        if new["budget_refusals"]:
            lines.append(f"error budget full: {new['budget_refusals']} answers left to the policy")
        if loop.stall_s:
            lines.append(f"fault.policy_stall_s: the policy is held up by {loop.stall_s:g} s")
        if loop.operator != "no":
            lines.append(f"the operator is {loop.operator}")
        if new["quarantined"]:
            lines.append(f"{new['quarantined']} answers left to the policy: an operator corrected there")
        topic = self.resolve_topic_name(self._binding.commands)
        rivals = self.count_publishers(topic) - 1
        self._rivals = self._rivals + 1 if rivals > 0 else 0
        if self._rivals > 1:
            lines.append(f"{topic}: {rivals} other publisher(s) command it, too")
        for line in lines:
            self.get_logger().warning(line)
        return lines


def main() -> int:
    return run(Controller)

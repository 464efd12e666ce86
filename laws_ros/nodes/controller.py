"""The controller: a lifecycle node that answers observations with commands, from a certified library or the policy.

Topics, relative to the node's namespace; the binding (core/observation.py) names those of sensors and commands:
    joint_states and the like in
    <controller_name>/commands or the binding's topic out, as ros2_control's forward controllers take it
    ~/decision (std_msgs/Float64MultiArray) out: every command with its source, bound and observation, see `columns`
    ~/heartbeat (std_msgs/UInt64) out: commands so far, from the control thread, heartbeat_hz times a second
    /diagnostics (diagnostic_msgs/DiagnosticArray) out, once a second
Services: ~/estop (std_srvs/Trigger) latches the emergency stop, in any state; ~/estop_reset releases it.

This thread serves parameters, services and diagnostics; the loop runs on its own (control.py).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import rclpy.lifecycle
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import NameValidationException
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from std_msgs.msg import Float64MultiArray, UInt64
from std_srvs.srv import Trigger

from laws_ros.core.card import Card
from laws_ros.core.errors import ConfigError, LawsError
from laws_ros.core.observation import TRAJECTORY, Binding
from laws_ros.core.safety import REACTIONS, SOURCES, Budget, Rules
from laws_ros.runtime.cached_policy import CachedPolicy, check_tolerance
from laws_ros.runtime.files import resolve

from .control import ControlThread, lock_memory
from .loop import ControlLoop, Step
from .ros import COMMAND_QOS, RECORD_QOS, Declared, binding_of, declare, labelled, message_class, run, set_data, values

_REACTION = f"{', '.join(REACTIONS[:-1])} or {REACTIONS[-1]}"
PARAMETERS = (
    Declared("policy", "", "the policy's ONNX file, its card beside it; relative to the working folder or the package"),
    Declared("library", "", "the certified library that was built for this policy"),
    Declared("binding", "", "YAML file: which message fields the policy's observations and actions are"),
    Declared("controller_name", "", "without a binding: commands go to <controller_name>/commands, fields by the card"),
    Declared("tolerance", Parameter.Type.DOUBLE_ARRAY, "largest error of each action, its unit; empty: the library's"),
    Declared("certificates.kinds", Parameter.Type.STRING_ARRAY, "kinds of certificates to trust; empty: the formal"),
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
    Declared("ramp_down_s", 0.5, "how long ramp_down takes to the safe pose [s]", 0.0, 60.0),
    Declared("heartbeat_hz", 10.0, "rate of ~/heartbeat [Hz]", 0.1, 1e3),
    Declared("realtime.priority", 0, "SCHED_FIFO priority of the control thread; 0: normal scheduling", 0, 99),
    Declared("realtime.cpus", Parameter.Type.INTEGER_ARRAY, "CPUs that the control thread may use; empty: all"),
    Declared("realtime.lock_memory", False, "keep the process in memory (mlockall)"),
    Declared("autostart", False, "configure and activate at once, and exit with code 2 if that is refused"),
)
LIVE = ("tolerance",)
COUNTERS = ("hits", "misses", "deadline_misses", "rejected", "budget_refusals", "handovers")
SETTLE_S = 0.5  # a publisher that has just gone may be listed this long


def columns(card: Card, binding: Binding) -> list[str]:
    """What a message on ~/decision holds, in order.

    step: counts answers from 1, so that a gap shows a lost message; time_s: steady clock, when the command was
    published; stamp_s: of the observation; region: -1 for the policy, below that a reaction (core.safety.SOURCES),
    whose row has no answer: NaN; lookup_us, policy_us (0 on a hit), latency_us: message in to command out;
    deadline_misses: so far; budget: the fullest level over its capacity; then of each action its value, certified
    bound and tolerance, in its unit (a decision: the index and a bound of 0); the command as published; the
    observation that was answered.
    """
    continuous = card.decision == "none"
    actions = [c.name for c in card.actions] if continuous else [card.decision]
    kinds = ("action", "bound", "tolerance") if continuous else ("action", "bound")
    return [
        *("step", "time_s", "stamp_s", "region", "lookup_us", "policy_us", "latency_us", "deadline_misses", "budget"),
        *(f"{kind}:{name}" for kind in kinds for name in actions),
        *(f"command:{e.name}" for e in binding.action),
        *(f"observation:{c.name}" for c in card.observations),
    ]


class Controller(rclpy.lifecycle.LifecycleNode):
    """See the module's docstring and PARAMETERS."""

    def __init__(self) -> None:
        super().__init__("controller")
        declare(self, PARAMETERS)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self.exit_code = 0
        self._cached: CachedPolicy | None = None
        self._loop: ControlLoop | None = None
        self._control: ControlThread | None = None
        self._stopped = ""  # the emergency stop outlives deactivation
        self._rivals = 0  # diagnoses in a row that saw another publisher of commands
        self._seen: dict[str, int] = {}  # the loop's counters at the last diagnosis
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._heartbeat = self.create_publisher(UInt64, "~/heartbeat", 10)
        self.create_service(Trigger, "~/estop", self._on_estop)
        self.create_service(Trigger, "~/estop_reset", self._on_estop_reset)
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._diagnose, clock=self._steady)

    def start(self) -> bool:
        success = TransitionCallbackReturn.SUCCESS
        if self.get_parameter("autostart").value and (
            self.trigger_configure() != success or self.trigger_activate() != success
        ):
            self.exit_code = 2 if rclpy.ok() else 0  # a signal may have come meanwhile
            return False
        return True

    def stop(self) -> None:
        if self._control is not None:
            self._control.stop()
            self._control = self._loop = None
            self.destroy_publisher(self._commands)

    # ------------------------------------------------------------------------------------------- lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("configured", lambda: self._configure(values(self, PARAMETERS)), state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("activated", self._activate, state)

    def _transition(self, done: str, do: Callable[[], None], state: LifecycleState) -> TransitionCallbackReturn:
        try:
            do()
        except (LawsError, NameValidationException) as error:
            if done == "configured":
                self._release()
            self.get_logger().error(f"not {done}: {' '.join(str(error).split())}")
            return TransitionCallbackReturn.FAILURE
        except Exception:
            if rclpy.ok():
                self.get_logger().fatal(traceback.format_exc())  # rclpy would swallow it
            raise
        return super().on_configure(state) if done == "configured" else super().on_activate(state)

    def _configure(self, p: dict[str, Any]) -> None:
        for name in ("policy", "library"):
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
        )
        cached = CachedPolicy.open(
            resolve(p["library"]),
            resolve(p["policy"]),
            tolerance=list(p["tolerance"]) or None,
            kinds=list(p["certificates.kinds"]) or None,
        )
        card = cached.card
        reactions = [rules.reaction(cause) for cause in list(SOURCES)[1:]]
        if card.decision != "none" and set(reactions) != {"hold"}:
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

    def _activate(self) -> None:
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
        )
        if self._stopped:
            self._loop.estop(self._stopped)
        if p["realtime.lock_memory"] and (warning := lock_memory()):
            self.get_logger().warning(warning)
        topics = sorted(binding.topics, key=lambda t: t.name in binding.trigger)  # the last one completes
        self._control = ControlThread(
            self,
            self._loop,
            {t.name: t.type for t in topics},
            self._beat,
            1.0 / p["heartbeat_hz"],
            p["realtime.priority"],
            tuple(p["realtime.cpus"]),
        )
        self._seen = {}
        self._control.start()

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        return super().on_error(state)

    def _release(self) -> None:
        """Back to unconfigured, from wherever."""
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
        try:
            wanted = list(own[0].value or self._cached.library.tolerance)
            tolerance = check_tolerance(wanted, self._cached.policy).tolist()
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if self._loop is None:
            self._cached.set_tolerance(tolerance)
        else:
            self._loop.retune(tolerance)
        self._values["tolerance"] = tolerance
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
        loop, cached, answer = self._loop, self._cached, step.answer
        if loop is None or cached is None:
            return
        budget = loop.budget
        level = float((budget.level / np.maximum(budget.capacity, 1e-300)).max()) if budget is not None else 0.0
        row = [loop.hits + loop.misses, step.time_ns / 1e9, step.stamp_s, step.source]
        row += [step.lookup_us, step.policy_us, step.latency_us, loop.deadline_misses, level]
        if answer is None:
            row += [np.nan] * (2 * len(self._binding.action))
        else:
            row += [*answer.action.tolist(), *answer.bound.tolist()]
        row += [*cached.tolerance.tolist(), *step.command]
        row += step.observation.tolist() if step.observation is not None else [np.nan] * len(cached.card.observations)
        self._decisions.publish(set_data(self._decision, row))

    def _beat(self) -> None:
        loop = self._loop
        if loop is not None:
            self._heartbeat.publish(UInt64(data=loop.hits + loop.misses + sum(loop.governor.counts.values())))

    # ------------------------------------------------------------------------------------------- diagnostics

    def _diagnose(self) -> None:
        """Once a second, diagnostics, and a warning line for what went wrong since."""
        loop, control, lines = self._loop, self._control, []
        facts: dict[str, Any] = {"state": "unconfigured"}
        if self._cached is not None:
            facts = {
                "state": "inactive",
                "library": self._cached.library.digest,
                "regions": len(self._cached.library),
                "kinds": ", ".join(self._cached.kinds),
                "tolerance": self._cached.tolerance.tolist(),
            }
        facts["estop"] = self._stopped or "no"
        if loop is not None and control is not None:
            counts = {name: getattr(loop, name) for name in COUNTERS}
            counts |= {f"on_{SOURCES[cause]}": count for cause, count in loop.governor.counts.items()}
            answered = counts["hits"] + counts["misses"]
            facts |= {"state": "active", "hit_rate": counts["hits"] / answered if answered else "none yet", **counts}
            named = (("hit_us", loop.hit_us), ("policy_us", loop.policy_us), ("latency_us", loop.latency_us))
            for name, recent in (*named, ("bound_over_tolerance", loop.margin)):
                facts[f"{name}_p50"], facts[f"{name}_p99"] = recent.percentiles(50, 99)
            facts["handover_bound_max"] = loop.handover_bound.tolist()
            if loop.budget is not None:
                facts["budget_level"] = loop.budget.level.tolist()
            new = {name: counts[name] - self._seen.get(name, 0) for name in counts}
            self._seen = counts
            lines = self._complaints(loop, control, new)
        else:
            self._rivals = 0  # it no longer commands
        if self._stopped:
            lines.insert(0, f"emergency stop ({self._stopped}) until ~/estop_reset")
        message = DiagnosticArray()
        message.header.stamp = self.get_clock().now().to_msg()
        message.status = [
            DiagnosticStatus(
                level=DiagnosticStatus.ERROR
                if self._stopped or self._rivals
                else DiagnosticStatus.WARN
                if lines
                else DiagnosticStatus.OK,
                name=f"{self.get_fully_qualified_name()}: control loop",
                message="; ".join(lines) or facts["state"],
                hardware_id=self._cached.card.name if self._cached else "",
                values=[KeyValue(key=key, value=str(value)) for key, value in facts.items()],
            )
        ]
        self._diagnostics.publish(message)
        if self._rivals > 1:
            self.get_logger().error(f"{lines[-1]}; this one stops commanding")
            self.trigger_deactivate()

    def _complaints(self, loop: ControlLoop, control: ControlThread, new: dict[str, int]) -> list[str]:
        """What went wrong since the last diagnosis, each also a line in the log."""
        lines = []
        silent_s = (time.monotonic_ns() - loop.governor.observed_ns) / 1e9
        if new["rejected"]:
            lines.append(f"{control.topics}: {new['rejected']} messages rejected, the latest: {loop.rejection}")
        if silent_s > self._values["observation_timeout_s"]:
            lines.append(f"{control.topics}: no usable message for {silent_s:.3g} s")
        if new["deadline_misses"]:
            lines.append(f"{new['deadline_misses']} answers later than {self._deadline_ns / 1e6:g} ms")
        if new["on_limit"]:
            lines.append(f"{loop.beyond}: {self._rules.on_limit}")
        if new["budget_refusals"]:
            lines.append(f"error budget full: {new['budget_refusals']} answers left to the policy")
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

"""The controller: a lifecycle node that answers joint states with commands, from a certified library or the policy.

Topics, relative to the node's namespace:
    joint_states (sensor_msgs/JointState) in
    <controller_name>/commands (std_msgs/Float64MultiArray) out, as ros2_control's forward controllers take it
    ~/decision (std_msgs/Float64MultiArray) out: every answer with its source, bound and observation, see `columns`
    /diagnostics (diagnostic_msgs/DiagnosticArray) out, once a second
"""

from __future__ import annotations

import traceback
from typing import Any

import rclpy.lifecycle
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import NameValidationException
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray

from laws_ros.core.card import Card
from laws_ros.core.errors import CardError, ConfigError, LawsError
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.files import resolve

from .joints import JointBinding
from .loop import REACTIONS, ControlLoop, Step
from .ros import COMMAND_QOS, RECORD_QOS, SENSOR_QOS, Declared, declare, labelled, run, set_data, values

PARAMETERS = (
    Declared("policy", "", "the policy's ONNX file, its card beside it; relative to the working folder or the package"),
    Declared("library", "", "the certified library that was built for this policy"),
    Declared("observation", Parameter.Type.STRING_ARRAY, "the card's observations in order, <joint>.<field> each"),
    Declared("tolerance", Parameter.Type.DOUBLE_ARRAY, "largest error of each action, its unit; empty: the library's"),
    Declared("controller_name", "", "commands are published on <controller_name>/commands"),
    Declared("rate_hz", 100.0, "rate of control [Hz]; one period is the deadline of an answer", 1.0, 1000.0),
    Declared("observation_timeout_s", 0.1, "time without a usable observation until on_timeout [s]", 0.001, 60.0),
    Declared("on_timeout", "hold", f"what is published without observations: {' or '.join(REACTIONS)}"),
    Declared("autostart", False, "configure and activate at once, and exit with code 2 if that is refused"),
)
COUNTERS = ("hits", "misses", "deadline_misses", "rejected", "timeouts")


def columns(card: Card) -> list[str]:
    """What a message on ~/decision holds, in order.

    step: counts answers from 1, so that a gap shows a lost message; stamp_s: of the observation; region: -1 for the
    policy; lookup_us, policy_us (0 on a hit), latency_us: message in to command out; deadline_misses: so far; then of
    each action its value, certified bound and tolerance, in its unit (a decision: the index and a bound of 0); then the
    observation that was answered.
    """
    continuous = card.decision == "none"
    actions = [c.name for c in card.actions] if continuous else [card.decision]
    kinds = ("action", "bound", "tolerance") if continuous else ("action", "bound")
    return [
        *("step", "stamp_s", "region", "lookup_us", "policy_us", "latency_us", "deadline_misses"),
        *(f"{kind}:{name}" for kind in kinds for name in actions),
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
        self._seen: dict[str, int] = {}  # the loop's counters at the last diagnosis
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
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
        if self._loop is not None:
            self._loop.stop()
            self._loop = None
            self.destroy_timer(self._watchdog)

    # ------------------------------------------------------------------------------------------- lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            self._configure(values(self, PARAMETERS))
        except (LawsError, NameValidationException) as error:
            self._release()
            self.get_logger().error(f"not configured: {' '.join(str(error).split())}")
            return TransitionCallbackReturn.FAILURE
        except Exception:
            if rclpy.ok():
                self.get_logger().fatal(traceback.format_exc())  # rclpy would swallow it
            raise
        return super().on_configure(state)

    def _configure(self, p: dict[str, Any]) -> None:
        for name in ("policy", "library", "controller_name", "observation"):
            if not p[name]:
                raise ConfigError(f"node {self.get_fully_qualified_name()}: parameter {name!r} is not set")
        if p["on_timeout"] not in REACTIONS:
            raise ConfigError(f"parameter on_timeout: {p['on_timeout']!r} is none of {', '.join(REACTIONS)}")
        cached = CachedPolicy.open(resolve(p["library"]), resolve(p["policy"]), tolerance=list(p["tolerance"]) or None)
        card = cached.card
        expected = [c.name for c in card.observations]
        for i, (mine, theirs) in enumerate(zip(p["observation"], expected, strict=False)):
            if mine != theirs:
                raise CardError(f"parameter observation[{i}] is {mine!r}, on the card of {p['policy']} {theirs!r}")
        if len(p["observation"]) != len(expected):
            raise CardError(
                f"parameter observation has {len(p['observation'])} names, the card of {p['policy']} {len(expected)}"
            )
        if card.decision != "none" and p["on_timeout"] == "zero":
            raise ConfigError(f"parameter on_timeout: 'zero' means nothing for {card.decision} policies, take 'hold'")
        self._joints = JointBinding(card.observations)
        self._commands = self.create_publisher(Float64MultiArray, f"{p['controller_name']}/commands", COMMAND_QOS)
        self._decisions = self.create_publisher(Float64MultiArray, "~/decision", RECORD_QOS)
        self._observations = self.create_subscription(JointState, "joint_states", self._on_joint_state, SENSOR_QOS)
        self._command, self._decision = Float64MultiArray(), labelled(columns(card))
        self._tolerance = cached.tolerance.tolist()
        self._cached, self._values = cached, p
        self.get_logger().info(
            f"configured: library {cached.library.digest}, {len(cached.library)} regions for {card.name}, "
            f"{self._observations.topic_name} -> {self._commands.topic_name}"
        )

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        p = self._values
        assert self._cached is not None
        self._loop = ControlLoop(
            self._cached,
            self._joints.read,
            lambda command: self._commands.publish(set_data(self._command, command)),
            self._record,
            p["rate_hz"],
            p["on_timeout"],
        )
        self._watchdog = self.create_timer(p["observation_timeout_s"], self._loop.time_out, clock=self._steady)
        self._seen = {}
        self._loop.start()
        return super().on_activate(state)

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
            self.destroy_subscription(self._observations)
            self.destroy_publisher(self._commands)
            self.destroy_publisher(self._decisions)

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        own = [c.name for c in changes if c.name in {p.name for p in PARAMETERS}]
        if self._cached is None or not own:
            return SetParametersResult(successful=True)
        return SetParametersResult(successful=False, reason=f"{own[0]} is set before configuring: clean up first")

    # ------------------------------------------------------------------------------------------- running

    def _on_joint_state(self, message: JointState) -> None:
        if self._loop is not None and self._loop.step(message):
            self._watchdog.reset()

    def _record(self, step: Step) -> None:
        loop, answer = self._loop, step.answer
        assert loop is not None
        row = [loop.hits + loop.misses, step.stamp_s, answer.region]
        row += [step.lookup_us, step.policy_us, step.latency_us, loop.deadline_misses]
        row += [*answer.action.tolist(), *answer.bound.tolist(), *self._tolerance, *step.observation.tolist()]
        self._decisions.publish(set_data(self._decision, row))

    def _diagnose(self) -> None:
        """Once a second, diagnostics, and a warning line for what went wrong since."""
        loop, lines = self._loop, []
        facts: dict[str, Any] = {"state": "unconfigured"}
        if self._cached is not None:
            facts = {"state": "inactive", "library": self._cached.library.digest, "regions": len(self._cached.library)}
        if loop is not None:
            counts = {name: getattr(loop, name) for name in COUNTERS}
            answered = counts["hits"] + counts["misses"]
            facts |= {"state": "active", "hit_rate": counts["hits"] / answered if answered else "none yet", **counts}
            for name, recent in (("hit", loop.hit_us), ("policy", loop.policy_us), ("latency", loop.latency_us)):
                facts[f"{name}_us_p50"], facts[f"{name}_us_p99"] = recent.percentiles(50, 99)
            new = {name: counts[name] - self._seen.get(name, 0) for name in counts}
            self._seen = counts
            topic = self._observations.topic_name
            if new["rejected"]:
                lines.append(f"{topic}: {new['rejected']} messages rejected, the latest: {loop.rejection}")
            if loop.stale:
                lines.append(f"{topic}: no usable message for {self._values['observation_timeout_s']:g} s or longer")
            if new["deadline_misses"]:
                lines.append(f"{new['deadline_misses']} answers later than {1e3 / self._values['rate_hz']:g} ms")
            for line in lines:
                self.get_logger().warning(line)
        message = DiagnosticArray()
        message.header.stamp = self.get_clock().now().to_msg()
        message.status = [
            DiagnosticStatus(
                level=DiagnosticStatus.WARN if lines else DiagnosticStatus.OK,
                name=f"{self.get_fully_qualified_name()}: control loop",
                message="; ".join(lines) or facts["state"],
                hardware_id=self._cached.card.name if self._cached else "",
                values=[KeyValue(key=key, value=str(value)) for key, value in facts.items()],
            )
        ]
        self._diagnostics.publish(message)


def main() -> int:
    return run(Controller)


if __name__ == "__main__":
    raise SystemExit(main())

"""The simulator: a workload as a ROS robot.

Topics, relative to the node's namespace; the binding (core/observation.py) names those of sensors and commands:
    joint_states and the like out, once a control period
    <controller_name>/commands or the binding's topic in
    /clock (rosgraph_msgs/Clock) out
    ~/episode (std_msgs/Float64MultiArray) out: one row of COLUMNS after every step
Services: ~/pause (std_srvs/SetBool), ~/reset (std_srvs/Trigger, begins the next episode).
The parameter `fault` breaks something while it runs, see FAULTS.

Observation k is published at tick k; at tick k + 1 the plant steps with the newest command. The period of delay that
this costs is part of the workload itself, so simulation over ROS and offline are the same plant. Until the first
command the robot waits at observation 0, published again every period, and simulated time stands still.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from numpy.typing import NDArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import SetBool, Trigger

from laws_ros.build import workloads
from laws_ros.core.card import Card
from laws_ros.core.errors import ConfigError, ObservationError

from .ros import (
    COMMAND_QOS,
    RECORD_QOS,
    SENSOR_QOS,
    Declared,
    binding_of,
    declare,
    fail,
    labelled,
    message_class,
    run,
    set_data,
    values,
)

# kind -> (meaning, what its argument is: "": none, a number's upper limit, or the name of an observation or joint)
FAULTS: dict[str, tuple[str, str | float]] = {
    "freeze": ("sensors repeat their last values under new stamps", ""),
    "nan": ("one observation is NaN", "observation"),
    "extreme": ("one observation stands at the upper end of its range", "observation"),
    "delay": ("observations arrive this much later [s]", 10.0),
    "drop": ("observations are lost with this probability", 1.0),
    "clock": ("stamps are set back by this much [s]", 1e6),
    "lock": ("one joint is stuck", "joint"),
}
LOCKED = 1e6  # damping of a stuck joint, N m s/rad or N s/m
PARAMETERS = (
    Declared("workload", "cartpole", "what to simulate; `laws workloads` lists them"),
    Declared("binding", "", "YAML file: which message fields the workload's observations and actions are"),
    Declared("controller_name", "", "without a binding: commands come from <controller_name>/commands"),
    Declared("seed", 0, "of the first episode; the following ones derive theirs from it", 0, 2**31 - 1),
    Declared("real_time_factor", 1.0, "simulated seconds per second", 0.01, 100.0),
    Declared("duration_s", 0.0, "simulated time after which the node ends with code 0 [s]; 0: never", 0.0, 1e9),
    Declared("start_timeout_s", 60.0, "wait for the first command; the node then ends with code 1 [s]", 0.1, 1e6),
    Declared("command_timeout_s", 0.0, "without a new command the actuators let go after this [s]; 0: never", 0.0, 1e6),
    Declared("clock", True, "publish /clock; one simulator of a graph may"),
    Declared("fault", "", f"live: {'; '.join(f'{name}: {about}' for name, (about, _) in FAULTS.items())}"),
)
# time_s and step of this row; the return so far of its episode; ticks without a new command (the last one was held),
# of these ticks under command_timeout_s, ticks more than a period late, and commands that were no numbers or too few
# or many, all since the start.
COLUMNS = ("time_s", "episode", "step", "return", "ended", "held", "let_go", "late", "refused")


class Fault(NamedTuple):
    """What is broken: a kind of FAULTS or "", and its number or name."""

    kind: str = ""
    number: float = 0.0
    name: str = ""

    @classmethod
    def parse(cls, text: str, observations: list[str], joints: list[str]) -> Fault:
        """Read "", "freeze", "nan hinge.position", "delay 0.2", "drop 0.5", "clock 5", "lock hinge", ...

        Raises:
            ConfigError: anything else.
        """
        kind, _, argument = text.strip().partition(" ")
        if not kind:
            return cls()
        if kind not in FAULTS:
            raise ConfigError(f"fault {text!r}: {kind!r} is none of {', '.join(FAULTS)}")
        wanted = FAULTS[kind][1]
        if isinstance(wanted, float):
            try:
                number = float(argument)
            except ValueError:
                number = math.nan
            if not 0.0 <= number <= wanted:
                raise ConfigError(f"fault {text!r}: a number from 0 to {wanted:g} is needed after {kind}")
            return cls(kind, number)
        known = {"observation": observations, "joint": joints, "": [""]}[wanted]
        if argument not in known:
            what = f"one of {', '.join(known)} is needed" if known != [""] else "nothing may stand"
            raise ConfigError(f"fault {text!r}: {what} after {kind}")
        return cls(kind, name=argument)


class Simulator(Node):
    """See the module's docstring and PARAMETERS."""

    def __init__(self) -> None:
        super().__init__("simulator")
        declare(self, PARAMETERS)
        p = values(self, PARAMETERS)
        self._values = p
        self.exit_code = 0
        workload = workloads.get(p["workload"])
        self._spec = spec = workload.spec
        card = Card(spec.name, spec.observations, spec.actions, "argmax" if spec.discrete else "none")
        self._binding = binding = binding_of(self, p, card, None)
        self._plant: Any = workload.simulation()
        # What completes an observation goes out last.
        topics = sorted(binding.topics, key=lambda t: t.name in binding.trigger)
        kinds = [(topic, message_class(topic.type)) for topic in topics]
        self._out = [(topic, kind, self.create_publisher(kind, topic.name, SENSOR_QOS)) for topic, kind in kinds]
        self._clock_out = self.create_publisher(Clock, "/clock", SENSOR_QOS) if p["clock"] else None
        self._episodes = self.create_publisher(Float64MultiArray, "~/episode", RECORD_QOS)
        self._row = labelled(COLUMNS)
        kind = message_class(binding.commands_type)
        self._commands = self.create_subscription(kind, binding.commands, self._on_command, COMMAND_QOS)
        self.create_service(SetBool, "~/pause", self._on_pause)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self._fault = self._parse(p["fault"])
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._random = np.random.default_rng(p["seed"])  # of faults; the workload has its own
        self._delayed: deque[tuple[float, float, NDArray[np.float32]]] = deque()
        self._shown: NDArray[np.float32] | None = None
        self._locked: tuple[Any, Any] | None = None
        self._action: NDArray[np.float32] | None = None
        self._refused = 0
        self._reset = self._paused = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="plant", daemon=True)

    def start(self) -> bool:
        self._thread.start()
        return True

    def stop(self) -> None:
        self._stopping = True
        if self._thread.ident is not None:
            self._thread.join()
            self._plant.close()

    def _on_command(self, message: Any) -> None:
        try:
            self._action = self._binding.read_action(message).astype(np.float32)
        except ObservationError as error:
            self._refused += 1
            if self._refused == 1:
                self.get_logger().warning(f"{self._commands.topic_name}: {error}; counting on")

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._paused = request.data
        response.success, response.message = True, "paused" if self._paused else "running"
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._reset = True
        response.success, response.message = True, "the next tick begins a new episode"
        return response

    def _parse(self, text: str) -> Fault:
        model = self._model()
        joints = [model.joint(k).name for k in range(model.njnt)] if model is not None else []
        return Fault.parse(text, [c.name for c in self._spec.observations], joints)

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        own = [c for c in changes if c.name in {p.name for p in PARAMETERS}]
        for change in own:
            if change.name != "fault":
                return SetParametersResult(successful=False, reason=f"{change.name} is set at the start only")
        try:
            faults = [self._parse(change.value) for change in own]
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if faults:
            self._fault = faults[-1]
            self.get_logger().warning(f"fault: {own[-1].value or 'none'}")
        return SetParametersResult(successful=True)

    def _run(self) -> None:
        try:
            self._simulate()
        except Exception as error:
            fail(self, error)
        else:
            if not self._stopping:
                rclpy.shutdown()

    def _simulate(self) -> None:
        p, spec, plant = self._values, self._spec, self._plant
        tick_s = spec.period_s / p["real_time_factor"]
        latest = time.monotonic() + p["start_timeout_s"]
        observation = plant.reset(workloads.episode_seed(p["seed"], 0))
        while self._action is None:
            if self._stopping:
                return
            if time.monotonic() > latest:
                self.get_logger().error(f"{self._commands.topic_name}: no command within {p['start_timeout_s']:g} s")
                self.exit_code = 1
                return
            self._publish(0.0, observation)
            self._tell(0.0)
            time.sleep(tick_s)
        action = None
        idle = 0 if spec.discrete else np.clip(0.0, [c.low for c in spec.actions], [c.high for c in spec.actions])
        tick = episode = step = held = waited = let_go = late = 0
        total, given_up = 0.0, False
        due = time.monotonic()
        while not self._stopping and (p["duration_s"] == 0.0 or tick * spec.period_s < p["duration_s"] - 1e-9):
            due += tick_s
            if due < time.monotonic() - tick_s or self._paused:
                late += not self._paused
                due = time.monotonic() + tick_s
            time.sleep(max(0.0, due - time.monotonic()))
            if self._paused:
                continue
            newest = self._action
            waited = waited + 1 if newest is action else 0
            held += waited > 0
            action = newest
            dead = 0.0 < p["command_timeout_s"] < waited * spec.period_s
            if dead and not given_up:
                told = f"no new one for {p['command_timeout_s']:g} s, the actuators let go"
                self.get_logger().warning(f"{self._commands.topic_name}: {told}")
            given_up = dead
            let_go += dead
            self._lock(self._fault.name if self._fault.kind == "lock" else "")
            given = idle if dead else int(action[0]) if spec.discrete else action
            observation, reward, ended = plant.step(given)
            tick, step, total = tick + 1, step + 1, total + reward
            ended = ended or step == spec.episode_steps or self._reset
            row = (tick * spec.period_s, episode, step, total, ended, held, let_go, late, self._refused)
            if ended:
                self._reset, episode, step, total = False, episode + 1, 0, 0.0
                observation = plant.reset(workloads.episode_seed(p["seed"], episode))
            self._sense(tick * spec.period_s, observation)
            self._episodes.publish(set_data(self._row, row))

    def _model(self) -> Any:
        """The plant's MuJoCo model, or None: some are simulated otherwise."""
        lanes = getattr(self._plant, "lanes", None)
        return lanes.models[0] if lanes is not None else None

    def _lock(self, joint: str) -> None:
        """Give one joint of the MuJoCo model a damping that holds it, and what was held before its own again."""
        if self._locked is not None and self._locked[0] != joint:
            name, damping = self._locked
            self._model().joint(name).damping[:] = damping
            self._locked = None
        if joint and self._locked is None:
            own = self._model().joint(joint).damping
            self._locked = joint, own.copy()
            own[:] = LOCKED

    def _sense(self, time_s: float, observation: NDArray[np.float32]) -> None:
        """Publish an observation as the fault lets it through."""
        fault = self._fault
        if fault.kind == "freeze" and self._shown is not None:
            observation = self._shown
        self._shown = observation
        self._tell(time_s)
        if fault.kind in ("nan", "extreme"):
            k = [c.name for c in self._spec.observations].index(fault.name)
            observation = observation.copy()
            observation[k] = np.nan if fault.kind == "nan" else self._spec.observations[k].high
        if fault.kind == "drop" and self._random.random() < fault.number:
            return
        stamp_s = max(0.0, time_s - fault.number) if fault.kind == "clock" else time_s
        wait_s = fault.number if fault.kind == "delay" else 0.0
        self._delayed.append((time_s + wait_s, stamp_s, observation))
        while self._delayed and self._delayed[0][0] <= time_s + 1e-9:
            _, stamp_s, observation = self._delayed.popleft()
            self._publish(stamp_s, observation)

    def _tell(self, time_s: float) -> None:
        if self._clock_out is not None:
            self._clock_out.publish(Clock(clock=stamp_of(time_s)))

    def _publish(self, stamp_s: float, observation: NDArray[np.float32]) -> None:
        stamp = stamp_of(stamp_s)
        for topic, kind, publisher in self._out:
            message = kind()
            if hasattr(message, "header"):
                message.header.stamp = stamp
            self._binding.write(topic, message, observation)
            publisher.publish(message)


def stamp_of(time_s: float) -> Time:
    sec, nanosec = divmod(round(time_s * 1e9), 10**9)
    return Time(sec=sec, nanosec=nanosec)


def main() -> int:
    return run(Simulator)

"""The simulator: a workload as a ROS robot.

Topics, relative to the node's namespace:
    joint_states (sensor_msgs/JointState) out, once a control period
    <controller_name>/commands (std_msgs/Float64MultiArray) in
    /clock (rosgraph_msgs/Clock) out
    ~/episode (std_msgs/Float64MultiArray) out: one row of COLUMNS after every step
Services: ~/pause (std_srvs/SetBool), ~/reset (std_srvs/Trigger, begins the next episode).

Observation k is published at tick k; at tick k + 1 the plant steps with the newest command. The period of delay that
this costs is part of the workload itself, so simulation over ROS and offline are the same plant. Until the first
command the robot waits at observation 0, published again every period, and simulated time stands still.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import SetBool, Trigger

from laws_ros.build import workloads
from laws_ros.core.errors import ConfigError

from .joints import JointBinding
from .ros import COMMAND_QOS, RECORD_QOS, SENSOR_QOS, Declared, declare, fail, labelled, run, set_data, values

PARAMETERS = (
    Declared("workload", "cartpole", "a workload with joint observations; `laws workloads` lists them"),
    Declared("controller_name", "", "commands are taken from <controller_name>/commands"),
    Declared("seed", 0, "of the first episode; the following ones derive theirs from it", 0, 2**31 - 1),
    Declared("real_time_factor", 1.0, "simulated seconds per second", 0.01, 100.0),
    Declared("duration_s", 0.0, "simulated time after which the node ends with code 0 [s]; 0: never", 0.0, 1e9),
    Declared("start_timeout_s", 60.0, "wait for the first command; the node then ends with code 1 [s]", 0.1, 1e6),
)
# time_s and step of this row; the return so far of its episode; ticks without a new command (the last one was held),
# ticks more than a period late and commands that were no numbers or too few or many, all since the start.
COLUMNS = ("time_s", "episode", "step", "return", "ended", "held", "late", "refused")


class Simulator(Node):
    """See the module's docstring and PARAMETERS."""

    def __init__(self) -> None:
        super().__init__("simulator")
        declare(self, PARAMETERS)
        p = values(self, PARAMETERS)
        if not p["controller_name"]:
            raise ConfigError(f"node {self.get_fully_qualified_name()}: parameter 'controller_name' is not set")
        self._values = p
        self.exit_code = 0
        workload = workloads.get(p["workload"])
        self._spec = workload.spec
        self._joints = JointBinding(self._spec.observations)
        self._plant = workload.simulation()
        self._joint_states = self.create_publisher(JointState, "joint_states", SENSOR_QOS)
        self._clock_out = self.create_publisher(Clock, "/clock", SENSOR_QOS)
        self._episodes = self.create_publisher(Float64MultiArray, "~/episode", RECORD_QOS)
        self._row = labelled(COLUMNS)
        topic = f"{p['controller_name']}/commands"
        self._commands = self.create_subscription(Float64MultiArray, topic, self._on_command, COMMAND_QOS)
        self.create_service(SetBool, "~/pause", self._on_pause)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self._command: np.ndarray | None = None
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

    def _on_command(self, message: Float64MultiArray) -> None:
        command = np.array(message.data, dtype=np.float32)
        if command.shape != (1 if self._spec.discrete else len(self._spec.actions),) or not np.isfinite(command).all():
            self._refused += 1
            if self._refused == 1:
                self.get_logger().warning(f"{self._commands.topic_name}: refused {command.tolist()}, counting on")
            return
        self._command = command

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._paused = request.data
        response.success, response.message = True, "paused" if self._paused else "running"
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._reset = True
        response.success, response.message = True, "the next tick begins a new episode"
        return response

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
        given_up = time.monotonic() + p["start_timeout_s"]
        observation = plant.reset(workloads.episode_seed(p["seed"], 0))
        while self._command is None:
            if self._stopping:
                return
            if time.monotonic() > given_up:
                self.get_logger().error(f"{self._commands.topic_name}: no command within {p['start_timeout_s']:g} s")
                self.exit_code = 1
                return
            self._publish(0.0, observation)
            time.sleep(tick_s)
        command = None
        tick = episode = step = held = late = 0
        total = 0.0
        due = time.monotonic()
        while not self._stopping and (p["duration_s"] == 0.0 or tick * spec.period_s < p["duration_s"] - 1e-9):
            due += tick_s
            if due < time.monotonic() - tick_s or self._paused:
                late += not self._paused
                due = time.monotonic() + tick_s
            time.sleep(max(0.0, due - time.monotonic()))
            if self._paused:
                continue
            newest = self._command
            held += newest is command
            command = newest
            observation, reward, ended = plant.step(int(command[0]) if spec.discrete else command)
            tick, step, total = tick + 1, step + 1, total + reward
            ended = ended or step == spec.episode_steps or self._reset
            row = (tick * spec.period_s, episode, step, total, ended, held, late, self._refused)
            if ended:
                self._reset, episode, step, total = False, episode + 1, 0, 0.0
                observation = plant.reset(workloads.episode_seed(p["seed"], episode))
            self._publish(tick * spec.period_s, observation)
            self._episodes.publish(set_data(self._row, row))

    def _publish(self, time_s: float, observation: np.ndarray) -> None:
        sec, nanosec = divmod(round(time_s * 1e9), 10**9)
        stamp = Time(sec=sec, nanosec=nanosec)
        message = JointState()
        message.header.stamp = stamp
        self._joints.write(message, observation)
        self._joint_states.publish(message)
        self._clock_out.publish(Clock(clock=stamp))


def main() -> int:
    return run(Simulator)


if __name__ == "__main__":
    raise SystemExit(main())

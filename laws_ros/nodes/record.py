"""A bag recorder for machines without rosbag2: what it sees goes to one MCAP file, byte for byte."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from laws_ros.core.errors import ConfigError

from .ros import message_class

QOS = QoSProfile(depth=1000, reliability=ReliabilityPolicy.BEST_EFFORT)  # takes from publishers of either kind


class BagRecorder:
    """Writes topics of a node's graph to a new bag until `close`; messages are recorded when the node is spun.

    Args:
        node: whose executor serves the subscriptions.
        folder: of the bag; it must not exist.
        topics: name -> type, such as "std_msgs/msg/Float64MultiArray".

    Raises:
        ConfigError: the folder exists, or rosbags is not installed.
    """

    def __init__(self, node: Node, folder: Path, topics: dict[str, str]) -> None:
        try:
            from rosbags.rosbag2 import StoragePlugin, Writer
            from rosbags.typesys import Stores, get_typestore
        except ModuleNotFoundError:
            raise ConfigError("recording needs the package rosbags: pip install rosbags") from None
        if folder.exists():
            raise ConfigError(f"{folder}: exists already; a bag is a new folder")
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._node, self._log = node, node.get_logger()
        self._subscriptions = []
        store = get_typestore(Stores.ROS2_HUMBLE)
        self.counts = dict.fromkeys(topics, 0)
        for topic, kind in topics.items():
            name = node.resolve_topic_name(topic)
            connection = self._writer.add_connection(name, kind, typestore=store)
            keep = partial(self._keep, topic, connection)
            self._subscriptions.append(node.create_subscription(message_class(kind), topic, keep, QOS, raw=True))

    def _keep(self, topic: str, connection: Any, data: bytes) -> None:
        self._writer.write(connection, time.time_ns(), data)
        if not self.counts[topic]:
            self._log.info(f"recording {connection.topic}")
        self.counts[topic] += 1

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._writer.close()

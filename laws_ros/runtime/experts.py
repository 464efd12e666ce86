"""All experts of a library as one ONNX model: gather by index and multiply; one session for all of them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from laws_ros.core.certificate import Certificates


def experts_model(certificates: Certificates) -> onnx.ModelProto:
    """ONNX model (index int64 [k], observation float32 [k, n + 1, 1]) -> action float32 [k, r, 1] of all experts.

    The observation's last entry is 1: it multiplies the bias.
    """
    _, rows, inputs = certificates.expert_weight.shape

    weight = np.concatenate([certificates.expert_weight, certificates.expert_bias[..., None]], axis=2)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["weight", "index"], ["expert"]),
            helper.make_node("MatMul", ["expert", "observation"], ["action"]),
        ],
        "experts",
        [
            helper.make_tensor_value_info("index", TensorProto.INT64, ["k"]),
            helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["k", inputs + 1, 1]),
        ],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["k", rows, 1])],
        [numpy_helper.from_array(np.ascontiguousarray(weight), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8  # what the ONNX Runtime of JetPack 6 reads
    return model

"""ONNX Runtime sessions as certificates assume them."""

from __future__ import annotations

import onnxruntime as ort

from laws_ros.core.errors import ModelError


def session(model: str | bytes, where: str, threads: int = 1) -> ort.InferenceSession:
    """An ONNX Runtime CPU session without graph rewriting.

    Certificates cover the graph as it stands, in any order of summation; a rewrite (a scale folded into a weight, say)
    would be another float32 program, so optimisation is off.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """
    try:
        return ort.InferenceSession(model, settings(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{where}: ONNX Runtime cannot load it: {reason}") from None


def settings(threads: int) -> ort.SessionOptions:
    """What every session here is opened with, whatever runs it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # one small call at a time: planning its memory costs more than it saves
    options.add_session_config_entry("session.set_denormal_as_zero", "0")
    options.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "0")
    return options

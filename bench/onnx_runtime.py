"""ONNX Runtime's call: one BatchNormalization node, input and output bound to the problem's memory."""

from __future__ import annotations

from typing import Any

from bench.problem import EPS, Call, Maker, Problem, Refused

_threads = 1


def set_threads(number: int) -> None:
    """Give the sessions to come as many threads as fastbn has."""
    global _threads
    _threads = number


def _inference(p: Problem, what: str) -> Call:
    if what != "inference":
        raise Refused("ONNX Runtime runs inference only")
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    # Its node has the channels in axis 1: channels-last memory is given as rows of channels.
    x, y = p.rows(p.x), p.rows(p.out)
    if p.case.last:
        x, y = x.reshape(-1, p.gamma.size), y.reshape(-1, p.gamma.size)
    element = helper.np_dtype_to_tensor_dtype(x.dtype)
    constants = {"gamma": p.gamma, "beta": p.beta, "mean": p.mean, "var": p.var}
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *constants], ["y"], epsilon=EPS)],
        "batch_norm",
        [helper.make_tensor_value_info("x", element, x.shape)],
        [helper.make_tensor_value_info("y", element, y.shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bound = session.io_binding()
    bound.bind_input("x", "cpu", 0, x.dtype, x.shape, x.ctypes.data)
    bound.bind_output("y", "cpu", 0, y.dtype, y.shape, y.ctypes.data)
    return Call(lambda: session.run_with_iobinding(bound), lambda _: (p.out,))


def calls(p: Problem, what: str) -> dict[str, Maker]:
    """ONNX Runtime."""
    return {"ONNX Runtime": lambda: _inference(p, what)}
